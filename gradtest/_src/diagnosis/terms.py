"""Causes that are a known array too much or too little: added, or multiplied in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import (
    Clues,
    all_entries,
    coefficient,
    independent,
    likelihood,
    sample,
    spread_over,
    times,
    unexplained,
    written,
)
from gradtest._src.findings import Cause

_MOST_SOURCES = 12
# A ratio of fewer entries than these shows no function of an argument.
_LEAST_ENTRIES = 8
_LEAST_LIKELIHOOD = 0.9
# How likely a constant is that fits; one that may be another term; float32's rounding.
_CONSTANT, _GUESS, _FLOAT32 = 0.89, 0.475, 1e-6

_Function = Callable[[np.ndarray], np.ndarray]
# What an argument may be multiplied in as, with its name in words.
_FACTORS: tuple[tuple[str, _Function], ...] = (
    ("{}", lambda x: x),
    ("{}^2", lambda x: x * x),
    ("exp({})", np.exp),
    ("(1 - {}^2)", lambda x: 1 - x * x),
    ("{0} (1 - {0})", lambda x: x * (1 - x)),
    ("(1 - {})", lambda x: 1 - x),
    ("(1 + {})", lambda x: 1 + x),
    ("(1 + {}^2)", lambda x: 1 + x * x),
    ("sqrt(|{}|)", lambda x: np.sqrt(np.abs(x))),
    ("sign({})", np.sign),
    ("log(|{}|)", lambda x: np.log(np.abs(x))),
    ("sin({})", np.sin),
    ("cos({})", np.cos),
    ("tanh({})", np.tanh),
    ("sigmoid({})", lambda x: 1 / (1 + np.exp(-x))),
)
# What an argument may be added as.
_TERMS: tuple[tuple[str, _Function], ...] = (
    ("{}", lambda x: x),
    ("sign({})", np.sign),
    ("{}^2", lambda x: x * x),
    ("{}^3", lambda x: x**3),
    ("exp({})", np.exp),
)


def added(clues: Clues) -> Cause | None:
    """Claimed less true is a multiple of a known array."""
    gap = clues.gap
    entries = independent(gap)
    if entries == 0 or clues.true.size < 2 or not clues.true.any():
        return None
    tries = 0
    for name, pattern in _addends(clues):
        tries += 1
        ratio = _fitting(gap, pattern)
        term = ratio * pattern
        if not ratio or not clues.explains(term):
            continue
        closeness = clues.closeness(term)
        if name == "1":
            return _constant(clues, ratio, closeness)
        count = min(entries, max(independent(pattern), 1))
        sure = likelihood(closeness, count, 1, tries)
        if sure >= 0.5:
            return _added(clues, name, ratio, closeness, 0.95 * sure)
    return None


def _constant(clues: Clues, number: float, rest: float) -> Cause:
    """Names one number that is added in all entries, which the truth does not have."""
    # A path of the program may explain it: one that is found there is likelier.
    sure = _CONSTANT * likelihood(rest, independent(clues.true), 1)
    if not _is_round(number, rest):
        sure = 0.0
    return _added(clues, "1", number, rest, max(_GUESS, sure))


def _is_round(number: float, rest: float) -> bool:
    """Whether somebody may have written a number; one that is computed is longer."""
    return abs(float(f"{number:.3g}") / number - 1) <= max(10 * rest, _FLOAT32)


def _fitting(found: np.ndarray, pattern: np.ndarray) -> float:
    """Returns the factor that fits some entries best; 0 where it is none."""
    few, wanted = sample(found), sample(pattern)
    ratio = coefficient(few, wanted)
    if not ratio or norm(few - ratio * wanted) > 0.05 * norm(few):
        return 0.0
    return coefficient(found, pattern)


def _added(clues: Clues, name: str, ratio: float, rest: float, sure: float) -> Cause:
    # A coefficient that nobody would write was computed: by a term that is lost.
    is_extra = _is_round(ratio, rest) and norm(clues.claimed) >= norm(clues.true)
    number = written(abs(ratio), rest)
    term = number if name == "1" else f"{number} * {name}"
    sign = "+" if ratio > 0 else "-"
    says = f"claimed = true {sign} {term} in {all_entries(clues.true)}"
    if is_extra:
        remedy = f"drop the term with {name}" if name != "1" else "drop the constant"
        return Cause("extra term", says, f"{remedy} from the gradient", sure)
    other = "-" if ratio > 0 else ""
    return Cause("missing term", says, f"add the term {other}{term}", sure)


def _addends(clues: Clues) -> Iterator[tuple[str, np.ndarray]]:
    shape = clues.true.shape
    yield "1", np.ones(shape)
    for name, value in _sources(clues):
        for words, function in _TERMS:
            yield words.format(name), function(value)
    for i, other in enumerate(clues.all_true[:_MOST_SOURCES]):
        if i != clues.leaf and np.shape(other) == shape:
            yield f"the gradient of {clues.scene.name(i)}", np.asarray(other)


def _sources(clues: Clues) -> Iterator[tuple[str, np.ndarray]]:
    """Yields arguments, outputs and cotangents at the entries of the leaf."""
    shape = clues.true.shape
    scene = clues.scene
    sources = [*scene.arguments, *scene.outputs, *scene.cotangents]
    for each in sources[:_MOST_SOURCES]:
        value = np.asarray(each.value)
        if not np.issubdtype(value.dtype, np.number):
            continue
        spread = spread_over(value, shape)
        if spread is not None and np.isfinite(spread).all():
            yield each.name, spread.astype(np.result_type(spread, np.float64))


def along_lines(clues: Clues) -> Cause | None:
    """Claimed less true is a multiple of a known array on each line along an axis."""
    gap = clues.gap
    if not np.isrealobj(gap) or gap.ndim == 0 or gap.size > 1e6:
        return None
    sources = list(_sources(clues))
    ones = np.ones_like(gap)
    # A gap that is alike along a line is no chance where the gradient is not.
    entries = max(independent(clues.claimed), independent(clues.true))
    for axis in range(gap.ndim):
        count = gap.size // max(gap.shape[axis], 1)
        bases = [("", [ones])] + [(name, [value]) for name, value in sources]
        bases += [(name, [value, ones]) for name, value in sources]
        for name, basis in bases:
            free = count * len(basis)
            if gap.shape[axis] <= len(basis) + 1 or entries <= free:
                continue
            term = _projected(gap, basis, axis)
            if not clues.explains(term):
                continue
            sure = likelihood(clues.closeness(term), entries, free, len(bases))
            if sure >= _LEAST_LIKELIHOOD:
                most = 0.94 if name else _as_computed(clues, axis)
                if not most:
                    return None
                return _along(clues, name, len(basis), axis, count, most * sure)
    return None


def _as_computed(clues: Clues, axis: int) -> float:
    """Returns how likely a mean or sum is, where the gap is alike along an axis.

    Not at all where it is one round number, which is added; nor where the program is
    known, and no value in it sends back what is alike along the axis.
    """
    ones = np.ones_like(clues.gap)
    term = coefficient(clues.gap, ones) * ones
    is_one_number = clues.explains(term)
    if is_one_number and _is_round(float(term.flat[0]), clues.closeness(term)):
        return 0.0
    asked = clues.scene.questions
    parts = asked.parts() if asked is not None else []
    sent = [part.gradients[clues.leaf] for part in parts]
    if sent and not any(
        clues.fits(each, _projected(each, [ones], axis)) for each in sent
    ):
        return 0.0
    return _CONSTANT if is_one_number else 0.94


def _projected(gap: np.ndarray, basis: list[np.ndarray], axis: int) -> np.ndarray:
    """Returns the part of an array, on each line, that a few others span."""
    rest, total = gap, np.zeros_like(gap)
    used: list[np.ndarray] = []
    for vector in basis:
        for other in used:
            vector = vector - _onto(vector, other, axis)
        used.append(vector)
        part = _onto(rest, vector, axis)
        total = total + part
        rest = rest - part
    return total


def _onto(found: np.ndarray, vector: np.ndarray, axis: int) -> np.ndarray:
    scale = np.sum(vector * vector, axis=axis, keepdims=True)
    inner = np.sum(found * vector, axis=axis, keepdims=True)
    return inner / np.where(scale > 0, scale, 1) * vector


def _along(
    clues: Clues, name: str, terms: int, axis: int, lines: int, sure: float
) -> Cause:
    what = f"a multiple of {name}" if name else "one number"
    if terms == 2:
        what += " and one number"
    each = f"on each of {lines} lines along axis {axis}" if lines > 1 else "all over"
    through = "a norm, variance or weighted sum" if name else "a mean or sum"
    if terms == 2:
        through = "the mean and the variance (or norm)"
    return Cause(
        "missing term",
        f"claimed less true is {what} {each}: what flows through {through} over that "
        "axis is missing",
        f"add what flows back through {through} over axis {axis}: it depends on the "
        "argument too",
        sure,
    )


def multiplied(clues: Clues) -> Cause | None:
    """Claimed is true times, or divided by, a known array."""
    claimed, true = clues.claimed, clues.true
    if true.size < 2:
        return None
    for name, value in [*_sources(clues), *_counts(clues)]:
        if independent(value) < 2:
            continue
        for words, function in _FACTORS:
            known = function(value)
            if not np.isfinite(known).all() or independent(known) + _signs(known) < 2:
                continue
            named = words.format(name)
            for is_extra in (True, False):
                left, right = (
                    (claimed, true * known) if is_extra else (true, claimed * known)
                )
                ratio = _fitting(left, right)
                if not ratio or not clues.fits(left, ratio * right):
                    continue
                entries = max(independent(known), 2)
                rest = unexplained(left, ratio * right)
                sure = likelihood(rest, entries, 1, len(_FACTORS) * 8)
                if sure >= _LEAST_LIKELIHOOD:
                    return _multiplied(clues, named, is_extra, ratio, rest, 0.96 * sure)
    return None


def _signs(values: np.ndarray) -> int:
    return int((values > 0).any() and (values < 0).any())


def _multiplied(
    clues: Clues, name: str, is_extra: bool, ratio: float, rest: float, sure: float
) -> Cause:
    number = "" if abs(ratio - 1) < clues.fit else f"{times(ratio, rest)} * "
    where = all_entries(clues.true)
    if is_extra:
        return Cause(
            "extra factor",
            f"claimed = {number}true * {name} in {where}",
            f"take the factor {name} out: it is multiplied in once too often, or "
            "should be divided by",
            sure,
        )
    return Cause(
        "missing factor",
        f"true = {number}claimed * {name} in {where}",
        f"multiply by {name}: the factor is missing",
        sure,
    )


def _counts(clues: Clues) -> Iterator[tuple[str, np.ndarray]]:
    """Yields how often each entry's label occurs, for every argument of labels."""
    for argument in clues.scene.arguments:
        labels = np.asarray(argument.value)
        if not np.issubdtype(labels.dtype, np.integer) or labels.size < 2:
            continue
        spread = spread_over(labels, clues.true.shape)
        _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if spread is None:
            continue
        often = counts[places].reshape(labels.shape).astype(float)
        found = spread_over(often, clues.true.shape)
        if found is not None:
            yield f"(how often {argument.name} has each label)", found


def constant_slope(clues: Clues) -> Cause | None:
    """The claim is a multiple of the cotangent, whatever the arguments are."""
    if independent(clues.claimed) < 2:
        return None
    for each in clues.scene.cotangents:
        pattern = spread_over(np.asarray(each.value), clues.true.shape)
        if pattern is None or pattern.dtype.kind not in "fc":
            continue
        ratio = _fitting(clues.claimed, pattern)
        if not ratio or not clues.fits(clues.claimed, ratio * pattern):
            continue
        rest = unexplained(clues.claimed, ratio * pattern)
        sure = likelihood(rest, independent(pattern), 1)
        return Cause(
            "constant slope",
            f"claimed = {times(ratio, rest)} x {each.name} in "
            f"{all_entries(clues.true)}: the slope is taken for a constant",
            "multiply the cotangent by the function's slope, all terms of it: a term "
            "may be missing that depends on the argument",
            0.89 * sure,
        )
    return None


def elementwise(clues: Clues) -> Cause | None:
    """Claimed over true is a smooth function of one argument, entry by entry."""
    claimed, true = clues.claimed, clues.true
    safe = clues.telling & (np.abs(true) > 1e-6 * np.abs(true).max(initial=0.0))
    if not np.isrealobj(true) or safe.sum() < _LEAST_ENTRIES:
        return None
    ratio = claimed[safe] / true[safe]
    if independent(ratio) < 4:
        return None
    best: tuple[float, str, np.ndarray] | None = None
    tries = 0
    for name, value in _sources(clues):
        if not np.isrealobj(value) or independent(value) < _LEAST_ENTRIES:
            continue
        tries += 1
        at = value[safe]
        log_chance = _smoothness(at, ratio)
        if best is None or log_chance < best[0]:
            best = log_chance, name, at
    if best is None:
        return None
    chance = tries * math.exp(max(best[0], -700.0))
    if chance > 0.02:
        return None
    name, at = best[1:]
    order = np.argsort(at)
    shown = [order[0], order[len(order) // 2], order[-1]]
    values = ", ".join(f"{ratio[n]:.4g} at {at[n]:.4g}" for n in shown)
    return Cause(
        "wrong slope",
        f"claimed / true is a smooth function of {name} alone: {values}",
        f"compare the slope of the elementwise function of {name}: a term or factor "
        "of it is missing, or it belongs to another formula",
        0.85 * (1 - chance),
    )


def _smoothness(at: np.ndarray, values: np.ndarray) -> float:
    """Returns the log of the chance that values in order are so smooth by accident.

    Von Neumann's ratio of ranks: the mean square of successive differences.

    Source: R. Bartels, "The Rank Version of von Neumann's Ratio Test for Randomness",
      JASA 77 (1982).
    """
    if at.size > 2000:
        at, values = at[:: at.size // 2000], values[:: values.size // 2000]
    ranks = np.argsort(np.argsort(values[np.argsort(at, kind="stable")]))
    steps = np.diff(ranks.astype(float))
    spread = np.sum((ranks - ranks.mean()) ** 2)
    ratio = float(np.sum(steps**2) / spread)
    distance = (2 - ratio) * math.sqrt(at.size) / 2
    return -(distance**2) / 2 if distance > 0 else 0.0
