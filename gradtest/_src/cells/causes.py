"""Why a cell departs, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import norm
from gradtest._src.cells.gaps import Difference
from gradtest._src.cells.ways import Cell
from gradtest._src.findings import Cause
from gradtest._src.program import Values

# Families whose causes the checks of single rules know already.
_KNOWN = ("repeat", "eager", "jit", "remat", "vmap", "scan")
_REMEDIES = {
    "donated": "read no argument once it was donated: no array kept from an earlier "
    "call, no buffer that a kernel or callback still holds",
    "pmap": "look for what knows of devices: axis names, axis_index, device "
    "counts, callbacks, arrays kept on one device",
    "shard_map": "look for what knows of devices: axis names, axis_index, device "
    "counts; under check_vma=True the gradient of a replicated input is summed already",
    "sharded jit": "look for what sees a shard in place of the whole array: "
    "custom_partitioning, kernels and callbacks that reduce",
}
# What differs, in words that speak of neither claims nor truths.
_WORDS = {
    "zero gradient": "it is zero in every entry",
    "gradient where none is": "it is not zero, as it should be in every entry",
    "sign flipped": "its sign is flipped",
    "conjugate": "it is conjugated",
    "transposed": "it is transposed",
    "leaves swapped": "it has changed places with another leaf's",
    "different": "it is another one, and no multiple",
}
_NEUTRAL = (
    ("claimed = true", "it is what it should be"),
    ("claimed less true", "what it is off by"),
    ("claimed / true", "how many times too large it is"),
    ("the true gradient", "what it should be"),
    ("the true one is", "what it should be is"),
    ("the true ones", "what they should be"),
)
_VARY = (
    "let each cotangent vary over the axes that its argument varies over: compute it "
    "from the cotangent that comes in, or use jax.lax.pcast"
)
# How closely a factor must be a number of devices, or its square.
_COUNTED = 1e-3
_OWN_REMEDY = "look for what the transformation changes of the function's arguments"
UNSETTLED = Cause(
    "decided by rounding",
    "it differs in working precision alone, and by no more than rounding every "
    "operation otherwise would do at this point",
    "move the point off ties and steps (argmax, round, sort), or give `rounding_rtol`",
)
NOT_FINITE = Cause(
    "reference not finite",
    "the derivative itself is not finite at this point, so there is nothing to compare "
    "with",
    "choose a point inside the function's domain; assert_grads_finite says where it "
    "comes from",
)


def nothing_ran(name: str, lacks: str) -> Cause:
    """Names what lacks where none of the cells asked for can run."""
    return Cause(
        "nothing could run",
        f"{name} can't run here, nor can anything else that was asked for: {lacks}",
        "set what is named, or choose other variants",
    )


def departs(
    cell: Cell, chief: Difference, all_parts: Sequence[Difference], outputs: int
) -> Cause:
    """Names the factor by which a cell departs, and on which devices or points.

    Args:
      cell: What departs.
      chief: Its worst part.
      all_parts: Every part of the same comparison.
      outputs: How many items are values; the rest are gradients.
    """
    how = _how(cell, chief, all_parts, outputs)
    says = f"{cell.says} {how}{_where(chief, cell, all_parts)}"
    return Cause(f"wrong under {cell.family}", says, _remedy(cell))


def _remedy(cell: Cell) -> str:
    if cell.family in _KNOWN and not cell.is_own:
        return diagnose.departs(cell.family, "").remedy
    return _REMEDIES.get(cell.family, _OWN_REMEDY)


def _how(
    cell: Cell, chief: Difference, all_parts: Sequence[Difference], outputs: int
) -> str:
    """Says by what factor the worst part is off, or what else it looks like."""
    found, truth = chief.part.found, chief.truth
    if not np.isfinite(found).all():
        return "it is not finite"
    counted = _counted(cell, chief.part.places, found, truth)
    if counted:
        return counted
    claimed, true, leaf = _beside(chief, all_parts, outputs)
    fit = max(diagnose.FIT, chief.gap.allowed / 8)
    cause = diagnose.leaf_cause(claimed, true, leaf, chief.gap.allowed, fit)
    return _WORDS.get(cause.name) or _neutral(cause.says)


def _neutral(says: str) -> str:
    """Says of two runs what is said of a claim and the truth."""
    for word, instead in _NEUTRAL:
        says = says.replace(word, instead)
    return says


def _counted(cell: Cell, places: int, found: np.ndarray, truth: np.ndarray) -> str:
    """Recognises the number of devices or points, or its square, as the factor."""
    count = cell.devices if cell.devices > 1 else places
    what = f"{_kind(cell)}s"
    factor = diagnose.factor_between(found, truth)
    if count < 2 or factor is None:
        return ""
    if norm(found - factor * truth) > _COUNTED * norm(factor * truth):
        return ""
    for power, words in ((1, "the number"), (2, "the square of the number")):
        for times, word in ((count**power, "large"), (count**-power, "small")):
            if abs(factor / times - 1) < _COUNTED:
                return f"it is {count**power} times too {word} ({words} of {what})"
    return ""


def _beside(
    chief: Difference, all_parts: Sequence[Difference], outputs: int
) -> tuple[Values, Values, int]:
    """Returns the gradients (or values) at the same row, and the place of the worst."""
    is_value = chief.part.item < outputs
    own = [
        d
        for d in all_parts
        if d.part.place == chief.part.place and (d.part.item < outputs) == is_value
    ]
    if chief not in own:
        own = [chief]
    leaf = next(i for i, d in enumerate(own) if d is chief)
    return [d.part.found for d in own], [d.truth for d in own], leaf


def _where(chief: Difference, cell: Cell, all_parts: Sequence[Difference]) -> str:
    """Says which devices or points are wrong, where not all are."""
    if chief.part.places < 2:
        return ""
    what = _kind(cell)
    places = {d.part.place for d in all_parts if d.is_exceeded}
    right = chief.part.places - len(places)
    if not right:
        return ""
    named = ", ".join(map(str, sorted(places)))
    plural = "s" * (len(places) != 1)
    others = f"the other {right} are right" if right > 1 else "the other is right"
    return f", on {what}{plural} {named} alone: {others}"


def _kind(cell: Cell) -> str:
    """Returns what each place of a cell's results is."""
    one_point = len(set(cell.rows)) == 1
    return "device" if cell.devices > 1 or one_point else "point"


def raises(cell: Cell, error: Exception) -> Cause:
    """Names what is raised where the derivative runs in a cell."""
    says = first_line(error)
    remedy = (
        "write the rules for traced values of any batch and layout: no Python branches "
        "on values, nothing kept between calls"
    )
    if "deleted" in says:
        remedy = _REMEDIES["donated"]
    elif cell.family == "shard_map" and "manual axis" in says:
        remedy = _VARY
    return Cause(
        f"raises under {cell.family}",
        f"{cell.says} it raises {type(error).__name__}: {says}",
        remedy,
    )


def first_line(error: Exception) -> str:
    """Returns what an exception says first."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
