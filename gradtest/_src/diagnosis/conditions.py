"""Causes that show at special values of an argument: zeros, ties, branches, masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from gradtest._src.diagnosis.clues import (
    Clues,
    Named,
    Scene,
    chance_of_set,
    spread_over,
)
from gradtest._src.diagnosis.places import behaviour, bounds, shape_of, told_places
from gradtest._src.findings import Cause

# Arguments with more integers than these are no labels.
_MOST_LABELS = 16
_MOST_ARGUMENTS = 12
_LEAST_SURE = 0.7
# How likely it is that an array that is constant matters for being so.
_CONSTANT = 0.45


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """A set of entries that values of an argument tell apart from the others.

    Attributes:
      kind: "zero", "tie", "bound", "branch", "mask" or "label".
      words: What holds in the set.
      holds: Which entries are in it, in the shape of the leaf.
      tries: Of how many like sets it was chosen.
      at: How far each entry is from the bound that was chosen, if one was.
      is_constant: Whether the argument is one number in all its entries.
    """

    kind: str
    words: str
    holds: np.ndarray
    tries: float = 1.0
    at: np.ndarray | None = None
    is_constant: bool = False


def at_special_values(clues: Clues) -> Cause | None:
    """The wrong entries are those where a condition on an argument holds."""
    best = _best(clues)
    return None if best is None else _cause(clues, *best)


def where_in_words(chosen: np.ndarray, scene: Scene) -> str:
    """Says at which values of an argument chosen entries are; "" where none fit."""
    clues = Clues([1.0 + chosen], [np.ones(chosen.shape)], 0, 1e-6, scene=scene)
    try:
        best = _best(clues)
    except Exception:  # a diagnosis must never hide the failure that it explains
        return ""
    return "" if best is None or best[0] < _LEAST_SURE else best[1].words


def _best(clues: Clues) -> tuple[float, Condition] | None:
    wrong = clues.wrong
    if not wrong.any():
        return None
    telling = clues.telling
    best: tuple[float, Condition] | None = None
    for condition in _conditions(clues):
        holds = condition.holds & telling
        if not np.array_equal(holds, wrong & telling) or not holds.any():
            continue
        sure = _likelihood(wrong & telling, telling, condition)
        if condition.at is not None and _fades(clues, condition.at):
            continue
        if best is None or sure > best[0] + 1e-3:
            best = sure, condition
    return best if best is not None and best[0] >= 0.3 else None


def _likelihood(wrong: np.ndarray, telling: np.ndarray, condition: Condition) -> float:
    """How unlikely it is that as many entries, drawn by chance, are the very set."""
    count, told = int(wrong.sum()), int(telling.sum())
    if count == told:  # nothing right to compare with
        if condition.kind not in ("zero", "tie"):
            return 0.0
        if condition.is_constant:  # so many parameters begin: as zeros, or as ones
            return _CONSTANT
        return 0.89 if condition.kind == "tie" and count > 1 else 0.6
    chance = condition.tries * chance_of_set(count, told)
    # An argument seldom holds exact zeros, or equal numbers, without a reason.
    least = 0.7 if condition.kind in ("zero", "tie") else 0.0
    return 0.98 * max(least, 1 - chance)


def _fades(clues: Clues, distance: np.ndarray) -> bool:
    """Whether what is wrong fades out towards a bound: there is then no branch."""
    wrong = clues.wrong & clues.telling
    size = np.maximum(np.abs(clues.true), np.abs(clues.claimed))[wrong]
    gap = np.abs(clues.gap)[wrong] / size
    near = np.argsort(distance[wrong])[:3]
    return bool(np.median(gap[near]) < np.median(gap) / 20)


def _cause(clues: Clues, sure: float, condition: Condition) -> Cause:
    wrong = clues.wrong
    how = behaviour(clues)
    count = int(wrong.sum())
    is_are = "is" if count == 1 else "are"
    there = f", where {how}" if how else ""
    if wrong.all():
        says = f"{condition.words} in all entries, and all of them are wrong{there}"
    else:
        says = (
            f"{count} of {wrong.size} entries {is_are} wrong, within "
            f"[{bounds(wrong)}], exactly where {condition.words}{there}; the others "
            "are right"
        )
    is_leak = not clues.true[wrong].any()
    is_lost = not clues.claimed[wrong].any()
    if condition.kind in ("mask", "label") and is_leak:
        return Cause("padded entries get gradient", says, _MASK_THEM, sure)
    if condition.kind in ("mask", "label") and is_lost:
        return Cause("masked out", says, _UNMASK, sure)
    name, remedy = _NAMES[condition.kind]
    return Cause(name, says, remedy.format(condition.words), sure)


_MASK_THEM = (
    "return zero for the entries that the function leaves out: apply its mask to the "
    "cotangent too"
)
_UNMASK = "give these entries their gradient: the function does read them"
_NAMES = {
    "zero": (
        "wrong at exact zeros",
        "give the rule a case of its own for exact zeros, with the true limit there "
        "(guard the argument, not only the result)",
    ),
    "tie": (
        "wrong at ties",
        "see what the rule does with equal values: a maximum, sort or comparison that "
        "picks one, or counts each",
    ),
    "bound": (
        "wrong at a bound",
        "see what the rule does where the argument is clamped or saturates",
    ),
    "branch": (
        "wrong on one branch",
        "look at the branch of the rule for {0}: its slope, its factor, or whether "
        "the rule has that branch at all",
    ),
    "mask": (
        "wrong on one branch",
        "look at what the rule does where {0}: a weight or mask of the function that "
        "the derivative lacks",
    ),
    "label": (
        "wrong on one branch",
        "look at what the rule does where {0}: a weight or case of the function that "
        "the derivative lacks",
    ),
}


def leaks(clues: Clues) -> Cause | None:
    """The wrong entries are exactly those that are truly zero, or that are claimed so.

    Which argument masks them is not known here.
    """
    wrong, telling = clues.wrong & clues.telling, clues.telling
    if not wrong.any() or wrong.sum() == telling.sum():
        return None
    place = shape_of(clues.wrong, telling)
    says = told_places(clues, place, behaviour(clues))
    sure = 0.9 * (1 - chance_of_set(int(wrong.sum()), int(telling.sum())))
    if np.array_equal(wrong, (clues.true == 0) & telling):
        return Cause("padded entries get gradient", says, _MASK_THEM, sure)
    if np.array_equal(wrong, (clues.claimed == 0) & telling):
        return Cause("masked out", says, _UNMASK, 0.8 / 0.9 * sure)
    return None


def another_mask(clues: Clues) -> Cause | None:
    """Entries are dropped that should be kept, and kept that should be dropped."""
    lost = clues.wrong & (clues.claimed == 0)
    leaked = clues.wrong & (clues.true == 0)
    right = ~clues.wrong & clues.telling
    if min(lost.sum(), leaked.sum(), right.sum()) < 2:
        return None
    if not np.array_equal(lost | leaked, clues.wrong):
        return None
    return Cause(
        "another mask",
        f"{int(lost.sum())} entries are zero that should not be and "
        f"{int(leaked.sum())} are not that should be, of {lost.size}; the others are "
        "right",
        "use the forward pass's own mask: keep it as a residual, or draw it with the "
        "same key",
        0.93,
    )


def overwritten(clues: Clues) -> Cause | None:
    """The wrong rows are those that an integer argument names more than once."""
    true = clues.true
    if true.ndim == 0 or not clues.wrong.any():
        return None
    others = tuple(range(1, true.ndim))
    rows = clues.wrong.any(axis=others) if others else clues.wrong
    able = clues.telling.any(axis=others) if others else clues.telling
    for argument in _integers(clues):
        ids = argument.value.ravel()
        ids = np.where(ids < 0, ids + true.shape[0], ids)
        inside = ids[(ids >= 0) & (ids < true.shape[0])]
        counts = np.bincount(inside, minlength=true.shape[0])
        repeated = counts > 1
        if not repeated.any() or not np.array_equal(repeated & able, rows & able):
            continue
        count = int(repeated.sum())
        sure = 0.97 if (able & ~repeated).any() else 0.6
        return Cause(
            "duplicates overwritten",
            f"{count} of {true.shape[0]} rows are wrong: those that {argument.name} "
            "names more than once; the others are right",
            "add up what duplicates send back: .at[ids].add or segment_sum, not "
            ".at[ids].set",
            sure,
        )
    return None


def _integers(clues: Clues) -> Iterator[Named]:
    for argument in clues.scene.arguments:
        value = np.asarray(argument.value)
        if np.issubdtype(value.dtype, np.integer) and value.size > 1:
            yield Named(argument.name, value)


# --- the conditions ---------------------------------------------------------------


def _conditions(clues: Clues) -> Iterator[Condition]:
    shape = clues.true.shape
    fitting = []
    sources = [*clues.scene.arguments[:_MOST_ARGUMENTS], *clues.scene.outputs[:2]]
    for source in sources:
        value = np.asarray(source.value)
        spread = spread_over(value, shape) if np.isrealobj(value) else None
        if spread is not None:
            fitting.append(Named(source.name, spread))
    for each in fitting:
        if each.value.dtype == bool:
            yield Condition("mask", f"{each.name} is True", each.value)
            yield Condition("mask", f"{each.name} is False", ~each.value)
        elif np.issubdtype(each.value.dtype, np.integer):
            yield from _of_integers(each)
        elif np.issubdtype(each.value.dtype, np.floating):
            yield from _of_floats(each, clues)
    yield from _of_pairs(fitting)


def _of_integers(each: Named) -> Iterator[Condition]:
    labels = np.unique(each.value)
    if labels.size <= _MOST_LABELS:
        for label in labels:
            holds = each.value == label
            yield Condition("label", f"{each.name} is {label}", holds)
            yield Condition("label", f"{each.name} is not {label}", ~holds, 2)
    for bound in labels[1 :: max(1, labels.size // _MOST_LABELS)]:
        holds = each.value >= bound
        yield Condition("label", f"{each.name} >= {bound}", holds, labels.size)
        yield Condition("label", f"{each.name} < {bound}", ~holds, labels.size)


def _of_floats(each: Named, clues: Clues) -> Iterator[Condition]:
    value, name = each.value, each.name
    zero = value == 0
    is_constant = value.size > 1 and bool(np.all(value == value.flat[0]))
    yield Condition("zero", f"{name} is 0", zero, is_constant=is_constant)
    kind = "mask" if np.unique(value.ravel()[:4096]).size <= 2 else "branch"
    yield Condition(kind, f"{name} is not 0", ~zero)
    for bound, words in ((np.nanmax(value), "largest"), (np.nanmin(value), "smallest")):
        holds = value == bound
        if bound and holds.sum() > 1:
            says = f"{name} is {bound:.6g}, its {words} value"
            yield Condition("bound", says, holds)
    is_own = _is_own(each, clues)
    if is_own and value.size <= 1e5 and value.ndim:
        _, places, counts = np.unique(value, return_inverse=True, return_counts=True)
        repeated = (counts[places] > 1).reshape(value.shape) & ~zero
        if repeated.any():
            words = f"{name} has the same value twice"
            yield Condition("tie", words, repeated, is_constant=is_constant)
    if zero.any():
        yield Condition("branch", f"{name} <= 0", value <= 0)
        yield Condition("branch", f"{name} >= 0", value >= 0)
    yield from _intervals(each, clues)


def _is_own(each: Named, clues: Clues) -> bool:
    """Whether an argument has the leaf's shape by itself, and repeats nothing."""
    sources = (*clues.scene.arguments, *clues.scene.outputs)
    return any(
        source.name == each.name and np.shape(source.value) == clues.true.shape
        for source in sources
    )


def _intervals(each: Named, clues: Clues) -> Iterator[Condition]:
    """Yields half-lines and intervals whose bounds lie between right and wrong."""
    value, name = each.value, each.name
    wrong = clues.wrong & clues.telling
    right = ~clues.wrong & clues.telling
    if not wrong.any() or not right.any() or not np.isfinite(value).all():
        return
    bad, good = value[wrong], value[right]
    told = int(wrong.sum() + right.sum())
    if good.max() < bad.min():
        bound = _between(good.max(), bad.min())
        words, tries = f"{name} > {bound:g}", 1 if bound == 0 else told
        yield Condition("branch", words, value >= bad.min(), tries, value - bound)
    if bad.max() < good.min():
        bound = _between(bad.max(), good.min())
        words, tries = f"{name} < {bound:g}", 1 if bound == 0 else told
        yield Condition("branch", words, value <= bad.max(), tries, bound - value)
    below, above = bad[bad < good.min()], bad[bad > good.max()]
    if below.size and above.size and below.size + above.size == bad.size:
        low = _between(below.max(), good.min())
        high = _between(good.max(), above.min())
        words = f"{name} < {low:g} or {name} > {high:g}"
        holds = (value <= below.max()) | (value >= above.min())
        if abs(np.abs(bad).min()) > np.abs(good).max():
            bound = _between(np.abs(good).max(), np.abs(bad).min())
            words = f"|{name}| > {bound:g}"
        away = np.maximum(low - value, value - high)
        yield Condition("branch", words, holds, told, away)
    below, above = good[good < bad.min()], good[good > bad.max()]
    if below.size and above.size and below.size + above.size == good.size:
        low = _between(below.max(), bad.min())
        high = _between(bad.max(), above.min())
        words = f"{low:g} < {name} < {high:g}"
        holds = (value >= bad.min()) & (value <= bad.max())
        if bad.min() < 0 < bad.max() and np.abs(bad).max() < np.abs(good).min():
            bound = _between(np.abs(bad).max(), np.abs(good).min())
            words = f"|{name}| < {bound:g}"
        away = np.minimum(value - low, high - value)
        yield Condition("branch", words, holds, told * told, away)


def _between(low: float, high: float) -> float:
    """Returns the roundest number between two: where a bound was probably written."""
    if low < 0 < high:
        return 0.0
    for digits in range(-12, 17):
        step = 10.0**-digits
        for unit in (5 * step, step):
            number = math.ceil(low / unit) * unit
            if low < number < high or (number == low and number < high):
                return float(f"{number:.12g}")
    return float(low)


def _of_pairs(fitting: list[Named]) -> Iterator[Condition]:
    floats = [each for each in fitting if np.issubdtype(each.value.dtype, np.floating)]
    for i, one in enumerate(floats[:4]):
        for other in floats[i + 1 : 4]:
            same = one.value == other.value
            yield Condition("tie", f"{one.name} = {other.name}", same)
            more = one.value > other.value
            yield Condition("branch", f"{one.name} > {other.name}", more)
            less = one.value < other.value
            yield Condition("branch", f"{one.name} < {other.name}", less)
