"""What a function's own values say of its slope at an entry, from either side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Steps, as parts of the entry's size, or of 1.
_STEPS = (1e-4, 1e-6, 1e-8)
# A slope that settles changes by less than this part of it over the last two steps; one
# that has no bound grows by more than this factor with each step.
_SETTLED, _GROWS = 1e-3, 1.3
# It keeps to so much of its growth from step to step.
_KEEPS = 0.6
# Growth by the same amount, as that of a logarithm, is by no larger factor than this.
_SLOWLY = 4
# Of the value, for each unit of the smallest step: what float64 loses of it.
_NOISE = 1e-6

Values = Callable[[Sequence[Any]], float]


@dataclasses.dataclass(frozen=True)
class Sides:
    """The slopes of the two sides; None where that side says nothing.

    Attributes:
      slopes: Finite where they settle, infinite where they grow without bound.
      noise: How far they may be off.
    """

    slopes: tuple[float | None, float | None]
    noise: float

    @property
    def is_infinite(self) -> bool:
        """Whether the function has no finite slope, as far as its sides are known."""
        known = [slope for slope in self.slopes if slope is not None]
        return bool(known) and all(np.isinf(known))

    def allow(self, derivative: float) -> bool:
        """Whether a derivative lies between the slopes, as far as they are known."""
        known = [slope for slope in self.slopes if slope is not None]
        if not known or self.is_infinite:
            return True
        finite = [abs(slope) for slope in known if np.isfinite(slope)]
        slack = self.noise + 2 * _SETTLED * max(finite, default=0.0)
        return min(known) - slack <= derivative <= max(known) + slack


def sides(
    value: Values, moving: Sequence[Any], leaf: int, index: tuple[int, ...]
) -> Sides:
    """Measures the slopes of a function on both sides of one entry of one leaf.

    Args:
      value: The function, in float64, of all leaves that move.
      moving: The leaves.
      leaf: Which of them.
      index: Which entry of it.
    """
    here = value(moving)
    size = abs(float(moving[leaf][index])) or 1.0

    def slope(step: float) -> float:
        moved = [np.array(each) for each in moving]
        moved[leaf][index] += step
        taken = float(moved[leaf][index] - moving[leaf][index])
        return (value(moved) - here) / taken if taken else np.nan

    found = [[slope(sign * size * h) for h in _STEPS] for sign in (1, -1)]
    noise = _NOISE * max(abs(here), 1e-6) / size
    left, right = (_limit(each, noise) for each in found)
    return Sides((left, right), noise)


def _limit(slopes: Sequence[float], noise: float) -> float | None:
    """Returns where slopes along falling steps go; None where they do not settle."""
    if not np.isfinite(slopes).all():
        return None
    first, second, last = slopes
    if abs(last - second) <= _SETTLED * max(abs(last), abs(second)) + noise:
        return last
    if abs(last) > _GROWS * abs(second) > _GROWS**2 * abs(first):
        return float(np.copysign(np.inf, last)) if _goes_on(slopes) else None
    return None


def _goes_on(slopes: Sequence[float]) -> bool:
    """Whether slopes that grow do so as before: by a factor, or by an amount.

    A slope that is bounded at last, far up, grows by ever less.
    """
    first, second, last = map(abs, slopes)
    if not first:
        return True
    by_factor = np.log(last / second) > _KEEPS * np.log(second / first)
    by_amount = abs((last - second) / (second - first) - 1) < 1 - _KEEPS
    return bool(by_factor or (by_amount and second < _SLOWLY * first))
