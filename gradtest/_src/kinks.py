"""At a kink: whether a claimed gradient is one of those that the function has nearby.

A piecewise smooth function has, at a point where pieces meet, the gradient of each
piece as a limit, and autodiff may return any of them or a value between. One-sided
slopes along one direction can't tell: where several pieces meet, a valid gradient's
slope may lie outside of them. So the exact gradient is sampled at points very near,
where the function is smooth. Every claimed entry must lie between the samples, and so
must the entries in dispute taken together: at a tie of two maxima each may have the
gradient, not both.

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
DISTANCE = 1e-7
_PAIRS = 8
# Curvature over that distance, and rounding, relative to the gradient's size.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class NearbyGradients:
    """The exact gradients at points around a kink.

    Attributes:
      low: Entry-wise minimum of the samples, for each leaf (real and imaginary parts
        apart, along a last axis of length two where the leaf is complex).
      high: The same for the maximum.
      disputes: For each leaf, the claim minus the exact gradient at the kink itself.
      projections: The samples' inner products with the disputes, [samples, leaves].
    """

    low: Values
    high: Values
    disputes: Values
    projections: np.ndarray

    def accepts_each(self, leaf: int, claimed: np.ndarray, *, strictly: bool) -> bool:
        """Whether every entry of a claimed gradient lies between the samples.

        Args:
          leaf: Position of the leaf.
          claimed: Its claimed gradient.
          strictly: Whether the claim departs from the exact derivative. Otherwise an
            entry may lie as far outside of the samples as any are apart: where many
            pieces meet, samples miss some of them.
        """
        value, low, high = _real(claimed), self.low[leaf], self.high[leaf]
        slack = self._slack(leaf)
        margin = slack if strictly else slack + np.max(high - low, initial=0.0)
        return bool(((value >= low - margin) & (value <= high + margin)).all())

    def accepts_together(self, leaf: int, claimed: np.ndarray) -> bool:
        """Whether the disputed entries, weighted by the dispute, fit the samples."""
        seen, dispute = self.projections[:, leaf], self.disputes[leaf]
        value = _inner(dispute, claimed)
        spread = float(seen.max() - seen.min())
        slack = TOLERANCE * (float(np.abs(seen).max()) + abs(value))
        # Samples miss the extremes of many kinks at once: hence their spread.
        margin = slack + (spread if spread > slack else 0.0)
        return bool(seen.min() - margin <= value <= seen.max() + margin)

    def nearest(self, leaf: int, claimed: np.ndarray) -> np.ndarray:
        """Returns the gradient between the samples that is nearest to the claimed."""
        bounded = np.clip(_real(claimed), self.low[leaf], self.high[leaf])
        if not np.iscomplexobj(claimed):
            return bounded
        return bounded[..., 0] + 1j * bounded[..., 1]

    def varying(self, leaf: int) -> int:
        """Returns in how many entries of a leaf the samples differ."""
        return int(self._varies(leaf).sum())

    def vary(self, leaf: int, entries: np.ndarray) -> bool:
        """Whether the samples differ in all of these entries of a leaf, and in any.

        Args:
          leaf: Position of the leaf.
          entries: A mask of its shape.
        """
        varies: np.ndarray = self._varies(leaf)
        if varies.ndim > entries.ndim:  # a complex entry varies where either part does
            varies = np.any(varies, axis=-1)
        return bool(varies.any() and varies[entries].all())

    def _varies(self, leaf: int) -> np.ndarray:
        return self.high[leaf] - self.low[leaf] > self._slack(leaf)

    def _slack(self, leaf: int) -> np.ndarray:
        largest = np.maximum(np.abs(self.low[leaf]), np.abs(self.high[leaf]))
        usual = norm(largest) / max(largest.size, 1) ** 0.5
        return TOLERANCE * np.maximum(largest, usual)


def sample_nearby(case: Case, disputes: Values) -> NearbyGradients | None:
    """Samples the exact gradient around the point, in pairs of opposite sides.

    Args:
      case: The case at the kink.
      disputes: For each leaf, the claim minus the exact gradient there.

    Returns:
      None where there is no exact gradient, or where differences at the first sample
      do not confirm it.
    """
    low: Values = []
    high: Values = []
    projections: list[list[float]] = []
    for k in range(2 * _PAIRS):
        near = case.at(_near(case, k // 2, 1 - 2 * (k % 2)))
        exact = near.readings.exact
        if exact is None or not all(np.isfinite(e).all() for e in exact):
            return None
        if not k and not _confirmed(near, exact):
            return None
        sample = [_real(e) for e in exact]
        low = [np.minimum(a, s) for a, s in zip(low or sample, sample, strict=True)]
        high = [np.maximum(a, s) for a, s in zip(high or sample, sample, strict=True)]
        projections.append([_inner(d, e) for d, e in zip(disputes, exact, strict=True)])
    return NearbyGradients(low, high, disputes, np.array(projections))


def _near(case: Case, k: int, sign: int) -> Point:
    """Returns a sample's point; of the first pair all entries move alike."""
    moving = []
    for i, value in enumerate(case.point.moving):
        step = case.direction(i, f"kink {k}")
        if k == 0:
            step = np.abs(step)
        moving.append(widen(value) + sign * DISTANCE * step)
    return Point(tuple(moving), case.point.held)


def _confirmed(near: Case, exact: Values) -> bool:
    """Whether differences, with steps that stay on this side, agree with exact."""
    directions = {i: near.direction(i, "nearby") for i in range(len(near.leaves))}
    scale = float(np.linalg.norm(near.contributions(exact)))
    slope = near.measure(directions, scale)
    return slope.distance(pair_all(exact, directions)) <= (
        TOLERANCE * scale + 3 * slope.error
    )


def _inner(dispute: np.ndarray, gradient: np.ndarray) -> float:
    return float(np.sum((np.conj(dispute) * gradient).real))


def _real(array: np.ndarray) -> np.ndarray:
    if not np.iscomplexobj(array):
        return array
    return np.stack([array.real, array.imag], axis=-1)
