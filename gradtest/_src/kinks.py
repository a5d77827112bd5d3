"""At a kink: whether a claimed gradient is one of those that the function has nearby.

A piecewise smooth function has, at a point where pieces meet, the gradient of each
piece as a limit, and autodiff may return any of them or a value between. One-sided
slopes along one direction can't tell: where several pieces meet, a valid gradient's
slope may lie outside of them. So the exact gradient is sampled at points very near,
where the function is smooth, and every claimed entry must lie between the samples.

Source: J. V. Burke, A. S. Lewis and M. L. Overton, "A robust gradient sampling
algorithm for nonsmooth, nonconvex optimization", SIAM J. Optim. 15 (2005).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src.case import Case, norm, pair_all
from gradtest._src.inputs import Point
from gradtest._src.lifting import widen
from gradtest._src.program import Values

# Distance of the samples, relative to each leaf: far above rounding, nearer than
# other kinks are likely to be.
_DISTANCE = 1e-7
_PAIRS = 8
# Curvature over that distance, and rounding, relative to the gradient's size.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class NearbyGradients:
    """The exact gradients at points around a kink.

    Attributes:
      low: Entry-wise minimum of the samples, for each leaf (real and imaginary parts
        apart, along a last axis of length two where the leaf is complex).
      high: The same for the maximum.
    """

    low: Values
    high: Values

    def accepts(self, leaf: int, claimed: np.ndarray, *, strictly: bool) -> bool:
        """Whether every entry of a claimed gradient lies between the samples.

        Args:
          leaf: Position of the leaf.
          claimed: Its claimed gradient.
          strictly: Otherwise an entry that varies may lie as far outside of the samples
            as these are apart: where many pieces meet, samples miss the extremes.
        """
        value, low, high = _real(claimed), self.low[leaf], self.high[leaf]
        slack = self._slack(leaf)
        margin = slack if strictly else slack + (high - low) * (high - low > slack)
        return bool(((value >= low - margin) & (value <= high + margin)).all())

    def nearest(self, leaf: int, claimed: np.ndarray) -> np.ndarray:
        """Returns the gradient between the samples that is nearest to the claimed."""
        bounded = np.clip(_real(claimed), self.low[leaf], self.high[leaf])
        if not np.iscomplexobj(claimed):
            return bounded
        return bounded[..., 0] + 1j * bounded[..., 1]

    def varying(self, leaf: int) -> int:
        """Returns in how many entries of a leaf the samples differ."""
        return int((self.high[leaf] - self.low[leaf] > self._slack(leaf)).sum())

    def _slack(self, leaf: int) -> np.ndarray:
        largest = np.maximum(np.abs(self.low[leaf]), np.abs(self.high[leaf]))
        usual = norm(largest) / max(largest.size, 1) ** 0.5
        return _TOLERANCE * np.maximum(largest, usual)


def sample_nearby(case: Case) -> NearbyGradients | None:
    """Samples the exact gradient around the point, in pairs of opposite sides.

    Returns:
      None where there is no exact gradient, or where differences at the first sample
      do not confirm it.
    """
    samples: list[Values] = []
    for k in range(_PAIRS):
        step = [case.direction(i, f"kink {k}") for i in range(len(case.leaves))]
        for sign in (1, -1):
            moving = [
                widen(x) + sign * _DISTANCE * v
                for x, v in zip(case.point.moving, step, strict=True)
            ]
            near = case.at(Point(tuple(moving), case.point.held))
            exact = near.readings.exact
            if exact is None or not all(np.isfinite(e).all() for e in exact):
                return None
            if not samples and not _confirmed(near, exact):
                return None
            samples.append([_real(e) for e in exact])
    by_leaf = [np.stack(leaf) for leaf in zip(*samples, strict=True)]
    return NearbyGradients(
        [leaf.min(axis=0) for leaf in by_leaf], [leaf.max(axis=0) for leaf in by_leaf]
    )


def _confirmed(near: Case, exact: Values) -> bool:
    """Whether differences, with steps that stay on this side, agree with exact."""
    directions = {i: near.direction(i, "nearby") for i in range(len(near.leaves))}
    scale = float(np.linalg.norm(near.contributions(exact)))
    slope = near.measure(directions, scale)
    return slope.distance(pair_all(exact, directions)) <= (
        _TOLERANCE * scale + 3 * slope.error
    )


def _real(array: np.ndarray) -> np.ndarray:
    if not np.iscomplexobj(array):
        return array
    return np.stack([array.real, array.imag], axis=-1)
