"""Slopes of a function at a special point, on either side of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradtest._src.case import Case, norm
from gradtest._src.domain import Domain
from gradtest._src.lifting import widen
from gradtest._src.program import Values

# The steps of one-sided slopes, the smaller for functions of large curvature, their
# allowed error relative to |gradient||direction|, and the noise of a value.
_STEPS, _SLOPE, _NOISE = (1e-6, 1e-8), 1e-3, 1e-15
# So near a point, relative to its size, a function is finite or at an edge.
_NEAR = 1e-3


class Slopes:
    """One-sided slopes along random directions, beside what is claimed."""

    def __init__(self, case: Case):
        self._case = case

    def agree(self, scales: Sequence[float]) -> bool:
        """Whether the claim is near the slope along one direction, on both sides.

        Where the program has no rules of its own, claim and autodiff are one and the
        same: only differences see what autodiff makes of a tie. Where the function is
        not finite so near, there is no slope to differ from.
        """
        case = self._case
        claimed, directions = _expected_slope(case)
        along = directions.values() if case.claim.mode == "rev" else case.weights
        pairs = zip(scales, along, strict=True)
        scale = sum(each * norm(direction) for each, direction in pairs)
        return any(
            all(
                not abs(slope - claimed) > _SLOPE * scale + self._value_noise(step)
                for slope in self._of(directions, step)
            )
            for step in _STEPS
        )

    def is_edge(self) -> bool:
        """Whether the slope is infinite where the function ends, as sqrt does at 0.

        Where the user declared a domain with its ends, they count.
        """
        case = self._case
        if all(isinstance(leaf.source, Domain) for leaf in case.leaves):
            return False
        if all(np.isfinite(array).all() for array in case.readings.claimed):
            return False
        for purpose in ("edge", "another edge"):
            along = {i: case.direction(i, purpose) for i in range(len(case.leaves))}
            if not all(map(math.isfinite, self._of(along, _NEAR))):
                return True
        return False

    def add_up(self) -> bool:
        """Whether the slope along a sum is the sum of slopes, but for a kink.

        At a median of equal numbers it is not: along each line the slope is the same on
        both sides, and yet no sum of partial derivatives.
        """
        case = self._case
        arrays = [*case.readings.claimed, *(case.readings.claimed_values or ())]
        if not all(np.isfinite(array).all() for array in arrays):
            return True
        leaves = range(len(case.leaves))
        one, other = (
            {i: case.direction(i, f"special point {k}") for i in leaves} for k in "12"
        )
        both = {i: one[i] + other[i] for i in leaves}
        sides = [self._of(along) for along in (one, other, both)]
        allowed = _SLOPE * sum(abs(right) for _, right in sides) + self._value_noise()
        if any(abs(right - left) > allowed for left, right in sides):
            return True  # a kink along a line, of which the full verdict knows
        first, second, together = (right for _, right in sides)
        return abs(first + second - together) <= allowed

    def _of(
        self, directions: Mapping[int, np.ndarray], step: float = _STEPS[0]
    ) -> list[float]:
        """Returns the slopes of the weighed value on the one and the other side."""
        pairs = self._case.sides(directions, step)
        return [
            _weighed(self._case.weights, [pair[side] for pair in pairs])
            for side in range(2)
        ]

    def _value_noise(self, step: float = _STEPS[0]) -> float:
        """What the rounding of values does to a slope."""
        size = _weighed(self._case.weights, self._case.readings.values, np.abs)
        return _NOISE * size / step


def _expected_slope(case: Case) -> tuple[float, dict[int, np.ndarray]]:
    """Returns the slope that is claimed along one direction, and the direction."""
    claimed = case.readings.claimed
    if case.claim.mode == "fwd":
        directions = {i: widen(tangent) for i, tangent in enumerate(case.seed)}
        return _weighed(case.weights, claimed), directions
    directions = {i: case.direction(i, "special point") for i in range(len(claimed))}
    return _weighed(list(directions.values()), claimed), directions


def _weighed(
    weights: Values,
    values: Sequence[np.ndarray],
    each: Callable[[np.ndarray], np.ndarray] = np.real,
) -> float:
    products = zip(weights, values, strict=True)
    return sum(float(np.sum(each(weight * value))) for weight, value in products)
