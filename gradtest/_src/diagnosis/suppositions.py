"""Causes that are the true derivative of something else: other operands, a part only.

Each supposes a slip and asks the true derivative what would come of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import (
    Clues,
    coefficient,
    independent,
    likelihood,
    times,
    unexplained,
)
from gradtest._src.diagnosis.places import indices_in_words
from gradtest._src.findings import Cause
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.program import Values

# More leaves than these are not swapped one by one.
_MOST_LEAVES = 6
_MOST_AXES = 4
# Sums of more slices than these are not taken apart.
_MOST_SLICES = 16
_MOST_TIMES = 4


def lost_output(clues: Clues) -> Cause | None:
    """The cotangent of one of several outputs is ignored."""
    asked = clues.scene.questions
    if asked is None or len(asked.seed) < 2:
        return None
    for k, output in enumerate(clues.scene.outputs):
        seed = [np.zeros_like(s) if n == k else s for n, s in enumerate(asked.seed)]
        if _is(clues, asked.gradient(seed=seed)):
            return Cause(
                "dropped term",
                f"the term that comes from the cotangent of {output.name} is missing, "
                "the others are right",
                f"multiply the cotangent of {output.name} in: it is not used",
                _sure(clues, 0.97),
            )
    return None


def part_of_a_sum(clues: Clues) -> Cause | None:
    """Some slices of the cotangent are left out of a sum, or count otherwise."""
    asked = clues.scene.questions
    if asked is None or clues.scene.order > 1:
        return None
    for k, value in enumerate(asked.seed):
        for axis in range(min(value.ndim, _MOST_AXES)):
            length = value.shape[axis]
            if length < 2:
                continue
            for place in (0, length - 1):
                if _is(clues, asked.gradient(seed=_only(asked.seed, k, axis, place))):
                    which = "first" if place == 0 else "last"
                    return _slice(clues, k, axis, which, length)
            found = _weights(clues, k, axis) if length <= _MOST_SLICES else None
            if found is not None:
                return _slices(clues, k, axis, found)
    return None


def _only(seed: Values, k: int, axis: int, place: int) -> Values:
    """Returns cotangents of which one slice is left, in one of them."""
    only = np.zeros_like(seed[k])
    at = (slice(None),) * axis + (place,)
    only[at] = seed[k][at]
    return [only if n == k else value for n, value in enumerate(seed)]


def _weights(clues: Clues, k: int, axis: int) -> np.ndarray | None:
    """Returns how often each slice counts; None where no whole numbers fit."""
    asked = clues.scene.questions
    assert asked is not None
    length = asked.seed[k].shape[axis]
    if independent(clues.claimed) <= length + 1 or np.iscomplexobj(clues.claimed):
        return None
    parts = []
    for place in range(length):
        part = asked.gradient(seed=_only(asked.seed, k, axis, place))
        if part is None:
            return None
        parts.append(part[clues.leaf].ravel())
    rest = clues.true.ravel() - np.sum(parts, axis=0)  # of the other cotangents
    columns = np.stack(parts, axis=1)
    wanted = clues.claimed.ravel() - rest
    if not (np.isfinite(columns).all() and np.isfinite(wanted).all()):
        return None
    weights = np.asarray(np.linalg.lstsq(columns, wanted, rcond=None)[0])
    whole: np.ndarray = np.round(weights)
    supposed = (columns @ whole + rest).reshape(clues.true.shape)
    if np.abs(whole).max() > _MOST_TIMES or not clues.fits(clues.claimed, supposed):
        return None
    return whole


def _slice(clues: Clues, k: int, axis: int, which: str, length: int) -> Cause:
    name = clues.scene.outputs[k].name
    return Cause(
        "missing sum",
        f"it is what the {which} of {length} slices of the cotangent of {name} along "
        f"axis {axis} gives alone: the sum over that axis is missing",
        f"sum over axis {axis}, over which the argument is broadcast, in place of "
        f"taking the {which} slice",
        _sure(clues, 0.97),
    )


def _slices(clues: Clues, k: int, axis: int, weights: np.ndarray) -> Cause:
    name = clues.scene.outputs[k].name
    off = weights != 1
    where = indices_in_words(off, np.ones_like(off)).replace("#", "slices")
    where = where or f"{int(off.sum())} of {off.size} slices"
    counts = np.unique(weights[off])
    how = "count " + " or ".join(f"{count:g}" for count in counts) + " times"
    if np.array_equal(counts, [0]):
        how = "are left out"
    return Cause(
        "part left out" if not weights[off].any() else "part counted otherwise",
        f"of the cotangent of {name} along axis {axis}, {where} {how}; the others "
        "count as they should",
        f"sum over all of axis {axis}: look at the range, mask or blocks of that sum",
        _sure(clues, 0.96),
    )


def adjoint(clues: Clues) -> Cause | None:
    """The conjugate transpose was applied, perhaps with a factor."""
    asked = clues.scene.questions
    if asked is None or not any(np.iscomplexobj(value) for value in asked.seed):
        return None
    supposed = asked.gradient(seed=[np.conj(value) for value in asked.seed])
    if supposed is None:
        return None
    pattern = np.conj(supposed[clues.leaf])
    ratio = coefficient(clues.claimed, pattern)
    if not ratio or not clues.fits(clues.claimed, ratio * pattern):
        return None
    if clues.fits(clues.true, pattern):
        return None
    rest = unexplained(clues.claimed, ratio * pattern)
    number = "" if abs(ratio - 1) < clues.fit else f", times {times(ratio, rest)}"
    return Cause(
        "conjugate",
        f"it is the conjugate transpose, the adjoint of mathematics{number}: JAX's "
        "convention has no conjugates",
        "take the transpose alone, as jax.linear_transpose and jax.vjp do",
        _sure(clues, 0.96),
    )


def other_operands(clues: Clues) -> Cause | None:
    """The derivative was taken at other values: swapped, transposed, reversed, ..."""
    asked = clues.scene.questions
    if asked is None:
        return None
    for moving, held, cause in _replacements(clues):
        if _is(clues, asked.gradient(moving=moving, held=held)):
            return cause
    return None


def _replacements(
    clues: Clues,
) -> Iterator[tuple[dict[int, np.ndarray], dict[int, np.ndarray], Cause]]:
    asked = clues.scene.questions
    assert asked is not None
    point, scene = asked.point, clues.scene
    values = [np.asarray(widen(value)) for value in point.moving[:_MOST_LEAVES]]
    for i, one in enumerate(values):
        for j in range(i + 1, len(values)):
            if values[j].shape == one.shape and one.dtype == values[j].dtype:
                yield (
                    {i: values[j], j: one},
                    {},
                    _swap(clues, scene.name(i), scene.name(j)),
                )
    for i, value in enumerate(values):
        for made, how in _variants(value):
            yield {i: made}, {}, _instead(clues, scene.name(i), how)
        for output in scene.outputs[:2]:
            made = np.asarray(output.value)
            if made.shape == value.shape and made.dtype == value.dtype:
                yield {i: made}, {}, _residual(clues, scene.name(i), output.name)
    names = [each.name for each in scene.arguments[len(point.moving) :]]
    for i, held in enumerate(point.held[:_MOST_LEAVES]):
        dtype = getattr(held, "dtype", None)
        if dtype is None or i >= len(names):
            continue
        if not (is_inexact(dtype) or getattr(dtype, "kind", "") == "i"):
            continue
        for made, how in _variants(np.asarray(widen(held))):
            yield {}, {i: made}, _instead(clues, names[i], how)


def _variants(value: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    if value.ndim >= 2 and value.shape[-1] == value.shape[-2]:
        yield np.swapaxes(value, -1, -2).copy(), "transposed"
    if np.iscomplexobj(value):
        yield np.conj(value), "conjugated"
    if value.size and value.any():
        yield -value, "negated"
    if value.size > 1:
        for axis in range(min(value.ndim, 2)):
            if value.shape[axis] > 1:
                where = f" along axis {axis}" if value.ndim > 1 else ""
                yield np.flip(value, axis).copy(), f"reversed{where}"


def _swap(clues: Clues, one: str, other: str) -> Cause:
    return Cause(
        "operands swapped",
        f"it is the true gradient with {one} and {other} in each other's place",
        "unpack the residuals in the order in which fwd packs them",
        _sure(clues, 0.97),
    )


def _instead(clues: Clues, name: str, how: str) -> Cause:
    kinds = {"transposed": "transposed", "conjugated": "conjugate"}
    return Cause(
        kinds.get(how, "wrong operand"),
        f"it is the true gradient with {name} {how}",
        f"use {name} as it is: in the backward pass it is {how} once too often, or "
        "once too little",
        _sure(clues, 0.96),
    )


def _residual(clues: Clues, name: str, output: str) -> Cause:
    return Cause(
        "wrong operand",
        f"it is the true gradient with {output} in the place of {name}",
        f"keep {name} as the residual, not the result of the function",
        _sure(clues, 0.95),
    )


def forwards(clues: Clues) -> Cause | None:
    """The function itself was applied to the cotangent, not its transpose."""
    asked = clues.scene.questions
    if asked is None or len(asked.seed) != 1:
        return None
    (seed,) = asked.seed
    true = clues.true
    if seed.shape != true.shape or seed.dtype != true.dtype:
        return None
    if seed.ndim == 0 or not seed.any():
        return None
    pushed = asked.pushed(clues.leaf, seed)
    if pushed is None or norm(clues.claimed - pushed[0]) > 1e-5 * norm(pushed[0]):
        return None
    if norm(pushed[0] - true) < 100 * clues.fit * norm(true):
        return None
    return Cause(
        "transposed",
        "it is what the function's derivative makes of the cotangent in the forward "
        "direction: its transpose is wanted",
        "apply the transpose: turn, shift, flip or accumulate the other way round",
        _sure(clues, 0.96),
    )


def _is(clues: Clues, supposed: Values | None) -> bool:
    return supposed is not None and clues.fits(clues.claimed, supposed[clues.leaf])


def _sure(clues: Clues, most: float) -> float:
    entries = independent(clues.claimed)
    return most * likelihood(10 * clues.fit, entries, 0, 30)
