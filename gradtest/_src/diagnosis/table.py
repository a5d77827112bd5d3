"""The table of causes, and the ranking of those that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gradtest._src.diagnosis import (
    conditions,
    modes,
    operators,
    paths,
    patterns,
    places,
    suppositions,
    terms,
)
from gradtest._src.diagnosis.clues import FIT, Clues, Scene
from gradtest._src.findings import Cause

Recogniser = Callable[[Clues], Cause | None]

# Each stage costs more than the one before, and is tried where none was as sure.
_SURE = 0.9
_AT_FIRST_SIGHT: tuple[Recogniser, ...] = (
    patterns.zero,
    patterns.should_be_zero,
    modes.no_path,
    patterns.sign,
    patterns.conjugate,
    patterns.transposed,
    patterns.factor,
    patterns.swapped,
    patterns.reordered,
    places.some_entries,
)
_STAGES: tuple[tuple[Recogniser, ...], ...] = (
    (
        patterns.by_rows,
        patterns.reduced,
        conditions.at_special_values,
        conditions.leaks,
        conditions.another_mask,
        conditions.overwritten,
        terms.constant_slope,
        modes.wrong_way,
        modes.narrower,
    ),
    (terms.added, terms.multiplied, terms.along_lines, operators.misused),
    (
        suppositions.lost_output,
        suppositions.part_of_a_sum,
        suppositions.adjoint,
        suppositions.other_operands,
        suppositions.forwards,
        paths.missing_path,
        terms.elementwise,
        modes.second_order,
    ),
)
_MOST_OTHERS = 3
_OF_THE_WHOLE = ("sign flipped", "conjugate", "transposed", "constant factor")
_OF_ENTRIES = ("some entries wrong", "reordered")
_LEAST = 0.3


def leaf_causes(
    claimed: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    leaf: int,
    rtol: float,
    fit: float = FIT,
    scene: Scene | None = None,
) -> tuple[Cause, ...]:
    """Returns the causes that fit one leaf's gap, the likeliest first.

    Args:
      claimed: Claimed gradients of all leaves, not only this one.
      truth: True gradients of all leaves.
      leaf: Which one to explain.
      rtol: The relative gap that the check allows.
      fit: How closely the claim must fit a pattern; more than its own rounding.
      scene: What is known around the gradients.

    Returns:
      At least one cause, and at most four of different names.
    """
    scene = scene or Scene()
    clues = Clues(claimed, truth, leaf, rtol, fit, scene)
    with np.errstate(all="ignore"):
        found = _seen(_AT_FIRST_SIGHT, clues)
        for stage in _STAGES if scene.effort.spend(clues.claimed.size) else ():
            if any(cause.likelihood >= _SURE for cause in found):
                break
            found += _seen(stage, clues)
    return ranked(found) or (patterns.no_pattern(clues),)


def at_first_sight(
    claimed: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    leaf: int,
    rtol: float,
) -> Cause:
    """Returns the likeliest cause that shows in the gradients alone, cheaply."""
    clues = Clues(claimed, truth, leaf, rtol)
    with np.errstate(all="ignore"):
        found = ranked(_seen(_AT_FIRST_SIGHT, clues))
    return found[0] if found else patterns.no_pattern(clues)


def leaf_cause(
    claimed: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    leaf: int,
    rtol: float,
    fit: float = FIT,
    scene: Scene | None = None,
) -> Cause:
    """Returns the likeliest cause of one leaf's gap; see `leaf_causes`."""
    return leaf_causes(claimed, truth, leaf, rtol, fit, scene)[0]


def ranked(found: Sequence[Cause]) -> tuple[Cause, ...]:
    """Returns the likeliest of some causes, each name once, the likelier first."""
    kept: dict[str, Cause] = {}
    for cause in sorted(found, key=lambda cause: -cause.likelihood):
        if cause.likelihood >= _LEAST:
            kept.setdefault(cause.name, cause)
    first = next(iter(kept.values()), None)
    if first is not None and first.name in _OF_THE_WHOLE and first.likelihood >= 0.97:
        # The same numbers, seen with less of an eye for what they have in common.
        kept = {name: c for name, c in kept.items() if name not in _OF_ENTRIES}
    return tuple(kept.values())[: 1 + _MOST_OTHERS]


def _seen(recognisers: Sequence[Recogniser], clues: Clues) -> list[Cause]:
    found = []
    for recognise in recognisers:
        try:
            cause = recognise(clues)
        except Exception:  # a diagnosis must never hide the failure that it explains
            continue
        if cause is not None:
            found.append(cause)
    return found
