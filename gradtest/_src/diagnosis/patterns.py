"""Causes that show in the leaf as a whole: another leaf, sign, order, conjugate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import (
    Clues,
    all_entries,
    coefficient,
    independent,
    likelihood,
    sample,
    times,
    unexplained,
)
from gradtest._src.diagnosis.recognised import USUAL, reasons, usual
from gradtest._src.findings import Cause

# Axes of more than so many can be permuted in too many ways.
_MOST_AXES = 5
# So many leaves of one shape are looked at for a gradient that changed places.
_MOST_LEAVES = 64
ZERO = Cause(
    "zero gradient",
    "the claimed gradient is zero in every entry, the true one is not",
    "return this leaf's cotangent from the rule; look for a missing term, a "
    "stop_gradient, or zeros_like",
)


def zero(clues: Clues) -> Cause | None:
    """The claimed gradient is zero."""
    if clues.claimed.any() or not clues.true.any():
        return None
    if clues.scene.order == 1:
        return ZERO
    remedy = (
        "let the rule's own derivative depend on this leaf: look for a "
        "stop_gradient, or a constant, in its bwd or jvp"
    )
    return dataclasses.replace(ZERO, remedy=remedy)


def should_be_zero(clues: Clues) -> Cause | None:
    """The true gradient is zero."""
    if clues.true.any() or not clues.claimed.any():
        return None
    return Cause(
        "gradient where none is",
        "the true gradient is zero in every entry: the function does not depend on it",
        "return zeros for this leaf",
    )


def sign(clues: Clues) -> Cause | None:
    """Every entry has the other sign."""
    if not clues.fits(clues.claimed, -clues.true):
        return None
    return Cause(
        "sign flipped",
        f"the sign is flipped: claimed = -1 x true in {all_entries(clues.true)}",
        "negate the result",
    )


def factor(clues: Clues) -> Cause | None:
    """Every entry is the same number of times the true one."""
    ratio = coefficient(clues.claimed, clues.true)
    if not ratio or not clues.fits(clues.claimed, ratio * clues.true):
        return None
    size = max(abs(ratio), 1 / abs(ratio))
    if abs(ratio + 1) < clues.fit:
        return None  # the sign alone
    known = reasons(ratio, clues)
    chance = _factor_likelihood(clues, ratio, bool(known))
    if not chance:
        return None
    word = "large" if abs(ratio) > 1 else "small"
    rest = unexplained(clues.claimed, ratio * clues.true)
    number = usual(size, clues.fit) or times(size, rest)
    flipped = "with its sign flipped and " if ratio < 0 else ""
    because = f": {number} is {' and '.join(known)}" if known else ""
    if known and known[0].startswith("2^"):
        because = f": {number} = {known[0]}"
    return Cause(
        "constant factor",
        f"it is {flipped}{number} times too {word} in "
        f"{all_entries(clues.true)}{because}",
        f"multiply by {times(1 / ratio, rest)}; look for a missing or doubled factor, "
        + (
            "or a mean where a sum is" if abs(ratio) < 1 else "or a sum where a mean is"
        ),
        chance,
    )


def _factor_likelihood(clues: Clues, ratio: float, is_known: bool) -> float:
    """A single number fits any factor: it proves nothing by itself."""
    entries = independent(clues.true)
    if entries > 1:
        rest = unexplained(clues.claimed, ratio * clues.true)
        return 0.99 * likelihood(rest, entries, 1)
    if clues.true.size > 1:
        return 0.9  # one number all over: a term that is added would show as well
    for claimed, true in zip(clues.all_claimed, clues.all_true, strict=True):
        is_other = true is not clues.all_true[clues.leaf]
        if is_other and independent(true) > 1 and clues.fits(claimed, ratio * true):
            return 0.95
    is_usual = any(
        abs(abs(ratio) ** power / number - 1) < clues.fit
        for number in USUAL
        for power in (1, -1)
    )
    return 0.6 if is_usual else 0.5 if is_known else 0.0


def conjugate(clues: Clues) -> Cause | None:
    """Every entry is conjugated."""
    if not np.iscomplexobj(clues.true):
        return None
    if not clues.fits(clues.claimed, np.conj(clues.true)):
        return None
    return Cause(
        "conjugate",
        "it is the complex conjugate of the true gradient",
        "take the conjugate: JAX's gradient of a real function of z = x + iy is "
        "df/dx - i df/dy",
        0.995,
    )


def transposed(clues: Clues) -> Cause | None:
    """Axes are permuted."""
    for axes in _permutations(clues.true.shape):
        turned = np.transpose(clues.true, axes)
        if clues.fits(turned, clues.true):
            continue
        ratio = coefficient(clues.claimed, turned)
        if not ratio or not clues.fits(clues.claimed, ratio * turned):
            continue
        rest = unexplained(clues.claimed, ratio * turned)
        sure = likelihood(clues.fit, independent(clues.true), 1)
        return _permuted(clues, axes, ratio, rest, sure)
    return None


def _permuted(
    clues: Clues, axes: tuple[int, ...], ratio: float, rest: float, sure: float
) -> Cause | None:
    last_two = (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2)
    says, remedy = "it is the transpose of the true gradient", "swap the last two axes"
    if axes != last_two:
        says = f"it is the true gradient with its axes in the order {axes}"
        remedy = f"transpose by {tuple(int(n) for n in np.argsort(axes))}"
    if abs(ratio + 1) < clues.fit:
        says, remedy = says + " with its sign flipped", remedy + " and negate"
    elif abs(ratio - 1) >= clues.fit:
        says, remedy = (
            f"{says}, times {times(ratio, rest)}",
            f"{remedy}; mend the factor",
        )
    return Cause("transposed", says, remedy, 0.99 * sure)


def _permutations(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the orders of the axes that leave the shape, the last two's swap first."""
    count = len(shape)
    if not 2 <= count <= _MOST_AXES:
        return
    own = tuple(range(count))
    found = [
        axes
        for axes in itertools.permutations(own)
        if axes != own and tuple(shape[axis] for axis in axes) == shape
    ]
    swap = (*range(count - 2), count - 1, count - 2)
    yield from sorted(found, key=lambda axes: axes != swap)


def reordered(clues: Clues) -> Cause | None:
    """The right numbers stand in another order."""
    claimed, true = clues.claimed, clues.true
    if true.size < 3 or independent(true) < 3:
        return None
    for axis in range(true.ndim):
        where = f" along axis {axis}" if true.ndim > 1 else ""
        if clues.fits(claimed, np.flip(true, axis)):
            return _order(f"reversed{where}", f"reverse it{where}")
        for shift in dict.fromkeys((_shift(claimed, true, axis), 1, -1, 2, -2)):
            if not 0 < abs(shift) < true.shape[axis]:
                continue
            remedy = f"shift it by {-shift}{where}"
            if clues.fits(claimed, np.roll(true, shift, axis)):
                return _order(f"shifted by {shift}{where}", remedy, 0.97)
            if _is_slid(clues, shift, axis):
                how = f"shifted by {shift}{where}, with others at the edge"
                return _order(how, remedy, 0.95)
    turned = np.reshape(true.T, true.shape)
    if true.ndim > 1 and clues.fits(claimed, turned):
        return _order(
            "read in column-major order into this shape",
            "transpose before the reshape",
        )
    if true.size < 1e5 and np.isrealobj(true):
        same = clues.fits(np.sort(claimed, axis=None), np.sort(true, axis=None))
        if same and independent(true) > 4:
            return _order(
                "in another order", "look at the permutation, or its inverse", 0.8
            )
    return None


def _is_slid(clues: Clues, shift: int, axis: int) -> bool:
    """Whether claimed and true agree where they overlap, one of them shifted."""
    length = clues.true.shape[axis] - abs(shift)
    if abs(shift) > 2 or length < 3:
        return False
    places = np.arange(length)
    found = np.take(clues.claimed, places + max(shift, 0), axis)
    wanted = np.take(clues.true, places + max(-shift, 0), axis)
    return independent(wanted) > 2 and clues.fits(found, wanted)


def _order(how: str, remedy: str, sure: float = 0.98) -> Cause:
    return Cause(
        "reordered", f"it has the numbers of the true gradient {how}", remedy, sure
    )


def _shift(claimed: np.ndarray, true: np.ndarray, axis: int) -> int:
    """Returns how far the first numbers along an axis stand from their places."""
    length = true.shape[axis]
    rows = np.moveaxis(true, axis, 0).reshape(length, -1)[:, :64]
    first = np.moveaxis(claimed, axis, 0).reshape(length, -1)[0, :64]
    nearest = int(np.argmin(np.sum(np.abs(rows - first) ** 2, axis=1)))
    shift = -nearest % length
    return shift - length if shift > length // 2 else shift


def swapped(clues: Clues) -> Cause | None:
    """It is another leaf's gradient."""
    claimed = clues.claimed
    others = [
        other
        for other, pattern in enumerate(clues.all_true)
        if other != clues.leaf and np.shape(pattern) == claimed.shape
    ]
    start = sample(claimed)[:64]
    for other in others[:_MOST_LEAVES]:
        pattern = np.asarray(clues.all_true[other])
        wanted = sample(pattern)[:64]
        if norm(start - wanted) > 1e-2 * norm(wanted):
            continue
        if not clues.fits(claimed, pattern):
            continue
        entries = 0 if _hold_the_same(clues, other) else independent(pattern)
        if clues.fits(np.asarray(clues.all_claimed[other]), clues.true):
            sure = 0.97 if entries > 1 else 0.6
            return Cause(
                "leaves swapped",
                f"its gradient and that of {clues.scene.name(other)} have changed "
                "places",
                "return the cotangents in the order of the arguments",
                sure,
            )
        return Cause(
            "leaves swapped",
            f"it is the gradient of {clues.scene.name(other)}",
            "return the cotangents in the order of the arguments, each once",
            0.93 if entries > 1 else 0.4,
        )
    return None


def _hold_the_same(clues: Clues, other: int) -> bool:
    """Whether two leaves have the same values, which makes their gradients alike."""
    arguments = clues.scene.arguments
    if max(other, clues.leaf) >= len(arguments):
        return False
    return np.array_equal(arguments[clues.leaf].value, arguments[other].value)


def by_rows(clues: Clues) -> Cause | None:
    """Along an axis all entries share a factor, another one in each row."""
    true, claimed = clues.true, clues.claimed
    if true.ndim < 2:
        return None
    for axis in range(true.ndim):
        if true.shape[axis] < 2:
            continue
        lines = np.sum(np.abs(true) ** 2, axis=axis, keepdims=True)
        inner = np.sum(claimed * np.conj(true), axis=axis, keepdims=True).real
        ratios = inner / np.where(lines > 0, lines, 1)
        if not clues.fits(claimed, ratios * true):
            continue
        rest = norm(claimed - ratios * true) / norm(clues.gap)
        sure = likelihood(rest, independent(true), ratios.size)
        off = ratios[np.abs(ratios - 1) > 10 * clues.fit]
        if sure < 0.9 or independent(np.round(off, 6)) < 2:
            continue  # one factor in some of the rows: that is where they are wrong
        low, high = float(ratios.min()), float(ratios.max())
        return Cause(
            "factor by rows",
            f"it is a multiple of the true gradient in each of {ratios.size} lines "
            f"along axis {axis}, from {low:.4g} to {high:.4g} times",
            f"look for a normalisation over axis {axis} (a sum, mean or count) that "
            "is left out or taken over other entries",
            0.88 * sure,
        )
    return None


def reduced(clues: Clues) -> Cause | None:
    """It is a mean or sum of the true gradient over an axis, in every place."""
    true = clues.true
    for axis in range(true.ndim):
        length = true.shape[axis]
        if length < 2:
            continue
        mean = np.broadcast_to(np.mean(true, axis=axis, keepdims=True), true.shape)
        for what, pattern in (("mean", mean), ("sum", length * mean)):
            if clues.fits(clues.claimed, pattern) and independent(pattern) > 1:
                return Cause(
                    "reduced over an axis",
                    f"it is the {what} of the true gradient over axis {axis}, in each "
                    f"of its {length} places",
                    f"let each place of axis {axis} keep its own gradient: look for a "
                    f"{what}, pmean or psum over it in the rule",
                    0.96,
                )
    return None


def no_pattern(clues: Clues) -> Cause:
    """Nothing fits."""
    says = "it is no multiple, transpose or conjugate of the true gradient"
    if clues.true.size == 1:
        ratio = coefficient(clues.claimed, clues.true)
        says = f"claimed = {ratio:.6g} x true, and one number shows no pattern"
    return Cause(
        "different",
        says,
        "compare the rule with the function's own derivative, term by term",
        0.1,
    )
