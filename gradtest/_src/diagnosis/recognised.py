"""Numbers that factors are recognised by: sizes, scalar arguments, constants."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradtest._src.diagnosis.clues import Clues, Named

# Constants that have a usual reason, in words.
USUAL = {
    2.0: "2",
    3.0: "3",
    4.0: "4",
    math.pi: "pi",
    2 * math.pi: "2 pi",
}
_OTHERS = {
    math.sqrt(2): "the square root of 2",
    math.sqrt(math.pi): "the square root of pi",
    math.sqrt(2 * math.pi): "the square root of 2 pi",
    math.sqrt(math.pi / 2): "the square root of pi/2",
    2 / math.sqrt(math.pi): "2 / sqrt(pi)",
    math.log(2): "ln 2",
    math.log(10): "ln 10",
    180 / math.pi: "180/pi: degrees for radians",
}
_LEAST_SCALE, _MOST_SCALE = 16, 2**32
_MOST_REASONS = 2


def usual(times: float, fit: float) -> str:
    """Returns a usual factor in words, or ""."""
    for known, words in USUAL.items():
        if abs(times / known - 1) < fit:
            return words
    return ""


def reasons(factor: float, clues: Clues) -> list[str]:
    """Returns what a factor may be, in words, the likelier first.

    Args:
      factor: How many times the claim is the truth.
      clues: Where the sizes and the numbers to compare it with are found.
    """
    times = abs(factor) if abs(factor) > 1 else 1 / abs(factor)
    fit = min(max(clues.fit, 1e-9), 1e-3)
    kinds = [_plain(clues)]
    if not usual(times, fit):
        kinds += [_scalars(clues), _constants(), _made_of_sizes(clues)]
    for kind in kinds:
        found = [words for known, words in kind if abs(times / known - 1) < fit]
        if found:
            return list(dict.fromkeys(found))[:_MOST_REASONS]
    return [f"2^{round(math.log2(times))}: a loss scale"] * _is_loss_scale(times, fit)


def _is_loss_scale(times: float, fit: float) -> bool:
    if not _LEAST_SCALE <= times * (1 + fit) <= _MOST_SCALE:
        return False
    return abs(math.log2(times) - round(math.log2(times))) < fit


def _plain(clues: Clues) -> Iterator[tuple[float, str]]:
    """Yields what a factor usually is: sizes, and what heads and masks make of them."""
    devices = clues.scene.devices
    if devices > 1:
        yield devices, "the number of devices"
        yield devices**2, "the square of the number of devices"
    for number, what in _sizes(clues):
        if number > 2:
            yield number, what
    yield from _heads(clues)
    yield from _masks(clues)


def _constants() -> Iterator[tuple[float, str]]:
    for number, words in _OTHERS.items():
        yield max(number, 1 / number), words


def _made_of_sizes(clues: Clues) -> Iterator[tuple[float, str]]:
    for number, what in _sizes(clues):
        if number > 2:
            yield math.sqrt(number), f"the square root of {number}, {what}"
            yield number / (number - 1), f"{number} / {number - 1}, of {what}"
            yield number**2, f"the square of {number}, {what}"
    shape = clues.true.shape
    for one in shape:
        for other in shape:
            if one > other > 1:
                yield one / other, f"{one} / {other}, the sizes of two of its axes"


def _sizes(clues: Clues) -> Iterator[tuple[int, str]]:
    # The leading axis first: a batch is one.
    for axis in (0, -1, None):
        for each in (*clues.scene.outputs, *clues.scene.arguments):
            shape = np.shape(each.value)
            places = range(1, len(shape) - 1) if axis is None else (axis,)
            for place in places:
                if shape:
                    number = place % len(shape)
                    yield shape[place], f"the size of axis {number} of {each.name}"
    shape = clues.true.shape
    for length in sorted({clues.true.size, *shape} - {0}):
        yield length, "the size of the leaf or of an axis"
    for each in (*clues.scene.outputs, *clues.scene.arguments):
        yield np.size(each.value), f"the number of entries of {each.name}"


def _heads(clues: Clues) -> Iterator[tuple[float, str]]:
    """Yields square roots of the last axes of arguments that have heads."""
    for each in clues.scene.arguments:
        shape = np.shape(each.value)
        if len(shape) >= 3 and shape[-1] > 1:
            words = f"the square root of {shape[-1]}, the last axis of {each.name}"
            yield math.sqrt(shape[-1]), words


def _masks(clues: Clues) -> Iterator[tuple[float, str]]:
    """Yields how many entries of masks count."""
    for each in clues.scene.arguments:
        value = np.asarray(each.value)
        if value.size < 2 or not np.isin(value, (0, 1)).all():
            continue
        count = int(value.sum())
        if 1 < count < value.size:
            yield count, f"the number of entries that {each.name} lets through"
            words = f"{value.size} / {count}, of the entries that {each.name} lets"
            yield value.size / count, f"{words} through"


def _scalars(clues: Clues) -> Iterator[tuple[float, str]]:
    """Yields numbers made of the arguments that are one number."""
    for each in clues.scene.arguments:
        number = _number(each)
        if number is None:
            continue
        for made, words in (
            (number, each.name),
            (number**2, f"{each.name} squared"),
            (number**0.5, f"the square root of {each.name}"),
            (1 - number, f"1 - {each.name}"),
            (1 + number, f"1 + {each.name}"),
            (2 * number, f"2 {each.name}"),
        ):
            if made > 0 and abs(made - 1) > 1e-3 and abs(made - 2) > 1e-3:
                yield max(made, 1 / made), words if made > 1 else f"1 / ({words})"
    for number in clues.scene.numbers:
        if number > 0 and abs(math.log(number)) > 1e-3 and not usual(number, 1e-6):
            words = f"{number:.6g}" if number > 1 else f"1 / {number:.6g}"
            yield max(number, 1 / number), f"{words}, a number that the function has"


def _number(each: Named) -> float | None:
    value = np.asarray(each.value)
    if value.size != 1 or not np.isrealobj(value) or value.dtype == bool:
        return None
    try:
        number = abs(float(value.ravel()[0]))
    except (TypeError, ValueError):
        return None
    return number if 0 < number < np.inf else None
