"""Whether slopes of the values agree with a gradient, many leaves at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradtest._src.case import NOISE_FLOOR, Case, pair, pair_all
from gradtest._src.differences import SWAMPED, Slope, magnitude

# The smallest slope worth seeing, as a part of the value.
LEAST_PART = 1e-6


class Confirmation(NamedTuple):
    """How well slopes agree with a gradient.

    Attributes:
      numbers: For each leaf, distance and allowance relative to its own part of the
        slope: so large a factor error of the leaf would have been seen.
      is_kink: Whether there is a kink along a direction.
    """

    numbers: dict[int, tuple[float, float]]
    is_kink: bool


def confirm(
    case: Case,
    members: Sequence[int],
    contributions: np.ndarray,
    gradient: Sequence[np.ndarray],
    count: int,
) -> Confirmation | None:
    """Compares slopes along some leaves' directions; None where they don't agree.

    Args:
      case: The program and the point.
      members: Which leaves move.
      contributions: What each leaf adds to a slope.
      gradient: The gradient of all leaves that is to be confirmed.
      count: Along how many directions.
    """
    numbers = dict.fromkeys(members, (0.0, np.inf))
    is_kink = False
    for k in range(count):
        directions, scale = case.bucket_directions(
            members, contributions, f"direction {k}"
        )
        slope = case.measure(directions, max(scale, least_scale(case)))
        scale = scale_of(case, scale, slope)
        allowed = case.rtol * scale + 3 * slope.error
        distance = slope.distance(pair_all(list(gradient), directions))
        if distance > allowed or allowed > SWAMPED * scale > 0:
            return None
        is_kink |= slope.is_kink
        for i, direction in directions.items():
            seen = relative(distance, allowed, pair(gradient[i], direction), scale)
            numbers[i] = min(numbers[i], seen, key=lambda pair: pair[1])
    return Confirmation(numbers, is_kink)


def relative(
    distance: float, allowed: float, part: float, scale: float
) -> tuple[float, float]:
    """Returns distance and allowance relative to a leaf's part of the slope."""
    unit = abs(part) if abs(part) > NOISE_FLOOR * scale else scale
    return (distance / unit, allowed / unit) if unit else (0.0, 0.0)


def least_scale(case: Case) -> float:
    """Returns the smallest slope worth seeing, where the gradient is zero."""
    return LEAST_PART * magnitude(case.readings.values, case.weights)


def scale_of(case: Case, expected: float, slope: Slope) -> float:
    """Returns a slope's size; where it is zero, what the value does around it."""
    scale = max(expected, least_scale(case))
    return scale if scale > NOISE_FLOOR * slope.reach else slope.reach
