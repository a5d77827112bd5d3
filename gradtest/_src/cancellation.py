"""Where terms cancel: whether float64's own rounding accounts for what is seen.

What rounding does is measured by evaluating claim and exact derivative again, with
every operation off by a unit in the last place; see `Case.evaluation_noise`.
"""

from __future__ import annotations

import math

import numpy as np

from gradtest._src.case import FAINT, Case, norm, pair
from gradtest._src.confirmation import least_scale
from gradtest._src.differences import SWAMPED, Slope


def sets_apart(case: Case, leaf: int) -> bool:
    """Whether rounding alone may have set claim and exact derivative apart."""
    claimed, exact = case.readings.claimed[leaf], case.readings.exact
    if exact is None:
        return False
    return norm(claimed - exact[leaf]) <= case.evaluation_noise(leaf)


def is_all(case: Case, leaf: int) -> bool:
    """Whether rounding is all that there is of a leaf's claim and exact derivative.

    Differences have to find no slope either. Where terms cancel in every entry, no
    gradient is large enough to set a scale for them.
    """
    claimed, exact = case.readings.claimed[leaf], case.readings.exact
    if exact is None:
        return False
    direction = case.direction(leaf, "leaf 0")
    slope = case.measure({leaf: direction}, least_scale(case))
    seen = SWAMPED * norm(claimed) * norm(direction) + 3 * slope.error
    if slope.distance(0.0) > seen or not math.isfinite(slope.error):
        return False
    noise = case.evaluation_noise(leaf)
    return noise > 0 and norm(claimed) <= noise and norm(exact[leaf]) <= noise


def is_all_of_truth(case: Case, leaf: int, truth: np.ndarray) -> bool:
    """Whether rounding is all that there is of a truth that is nothing to the claim."""
    if not norm(truth) < FAINT * norm(case.readings.claimed[leaf]):
        return False
    return norm(truth) <= case.evaluation_noise(leaf)


def explains(case: Case, leaf: int, direction: np.ndarray, slope: Slope) -> bool:
    """Whether rounding of the derivative explains the little that a slope is off.

    Terms of a derivative may cancel where those of the values do not: differences are
    then the more accurate of the two.
    """
    distance = slope.distance(pair(case.readings.claimed[leaf], direction))
    if distance > SWAMPED * abs(slope.value):
        return False
    return distance <= case.evaluation_noise(leaf) * norm(direction)
