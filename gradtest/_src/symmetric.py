"""Gradients by symmetric matrices, of which a function may read a part alone."""

from __future__ import annotations

import numpy as np

from gradtest._src.case import Case, pair
from gradtest._src.differences import SWAMPED
from gradtest._src.gaps import leaf_gap
from gradtest._src.program import Values

_DIRECTIONS = 3


def is_right_for_symmetric(
    case: Case, leaf: int, claimed: Values, exact: np.ndarray, floor: float
) -> bool:
    """Whether a symmetric matrix's gradient is right for symmetric changes of it.

    So are textbook gradients, and JAX's own of functions that read one triangle,
    Cholesky's among them. Only a claim that is symmetric itself, or that is the exact
    derivative, is taken for such a one.

    Args:
      case: The case; its differences are trusted.
      leaf: Position of the leaf among those that move.
      claimed: Claimed gradients of all leaves.
      exact: The exact gradient of this one.
      floor: Norm below which a difference of two gradients of it is noise.
    """
    own = claimed[leaf]
    part, exact_part = (case.symmetric(leaf, g) for g in (own, exact))

    def differ(one: np.ndarray, other: np.ndarray) -> bool:
        return leaf_gap(one, other, rtol=case.rtol, floor=floor).is_exceeded

    if differ(part, exact_part) or (differ(own, part) and differ(own, exact)):
        return False
    scale = float(case.contributions(claimed)[leaf])
    for k in range(_DIRECTIONS):
        drawn = case.direction(leaf, f"symmetric {k}")
        direction = case.symmetric(leaf, drawn)
        if direction is drawn:
            return False
        slope = case.measure({leaf: direction}, scale)
        allowed = case.rtol * scale + 3 * slope.error
        gap = slope.distance(pair(own, direction))
        if gap > allowed or allowed > SWAMPED * scale:
            return False
    return True
