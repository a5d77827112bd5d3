"""Causes of a whole mode, order or precision: what is right elsewhere, and not here."""

from __future__ import annotations

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import Clues, coefficient
from gradtest._src.findings import Cause


def wrong_way(clues: Clues) -> Cause | None:
    """Forward mode is right, and reverse mode is not."""
    asked = clues.scene.questions
    if asked is None or not asked.is_right_forwards():
        return None
    return Cause(
        "wrong in reverse mode",
        "forward mode gives the true derivative, reverse mode another one: they are "
        "not transposes of each other",
        "compare the transpose with the tangent: <w, J v> must equal <J^T w, v>",
        0.97,
    )


def no_path(clues: Clues) -> Cause | None:
    """The gradient is zero because nothing leads from the cotangent to it."""
    asked = clues.scene.questions
    if asked is None or clues.scene.order > 1:
        return None
    if clues.claimed.any() or not clues.true.any() or asked.has_path(clues.leaf):
        return None
    return Cause(
        "no path",
        "the claimed gradient is not computed from the cotangent at all: zeros are "
        "returned, or a stop_gradient or integer cuts the way",
        "let the gradient of this leaf depend on the cotangent: look for zeros_like, "
        "stop_gradient and casts to integers",
        0.95,
    )


def second_order(clues: Clues) -> Cause | None:
    """The first derivative passed and the second one did not."""
    if clues.scene.order < 2:
        return None
    part = coefficient(clues.claimed, clues.true)
    return Cause(
        "second order only",
        "the gradient itself is right, and its own derivative is not (it has "
        f"{part:.3g} of the true one)",
        "look in the rule's bwd or jvp for a stop_gradient, a constant or another "
        "rule, and for a branch or tie that sets values right and not slopes",
        0.55,
    )


# Narrower dtypes: the spacing of their numbers, and bits of their significands.
_NARROW = (("bfloat16", 8), ("float16", 11), ("float32", 24))


def narrower(clues: Clues) -> Cause | None:
    """The claim is right to a narrower dtype's spacing, and holds its numbers alone."""
    return rounded_to(clues.claimed, clues.true)


def rounded_to(claimed: np.ndarray, true: np.ndarray) -> Cause | None:
    """Names the dtype that a right gradient was rounded to; None where it was not.

    Args:
      claimed: What was claimed.
      true: What it should be, in a wider dtype's precision.
    """
    known = (np.abs(claimed) > 1e-30) & np.isfinite(claimed) & np.isfinite(true)
    if known.sum() < 3 or np.iscomplexobj(claimed):
        return None
    values, wanted = claimed[known], true[known]
    if not norm(wanted):
        return None
    gap = norm(values - wanted) / norm(wanted)
    for name, bits in _NARROW:
        mantissa = np.frexp(values)[0] * 2.0**bits
        if not np.array_equal(mantissa, np.round(mantissa)):
            continue
        eps = 2.0 ** (1 - bits)
        exact = np.frexp(wanted)[0] * 2.0**bits
        if np.array_equal(exact, np.round(exact)) or not eps / 16 < gap < 64 * eps:
            return None
        return Cause(
            "downcast",
            f"it is right to {name}'s precision alone (relative gap {gap:.1e}, eps "
            f"{eps:.1e}), and all its entries are {name} numbers",
            f"look for a cast to {name} in the rule: compute in the dtype of the "
            "argument, and cast at the end at most",
            0.97,
        )
    return None
