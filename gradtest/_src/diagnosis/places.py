"""Where in a leaf a gradient is wrong, as ranges of indices, and how it is there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradtest._src.diagnosis.clues import (
    Clues,
    chance_of_set,
    coefficient,
    independent,
    times,
    unexplained,
)
from gradtest._src.findings import Cause

_MOST_NAMED = 6
_LEAST_RIGHT = 0.02
# Blocks of so many rows at the most are looked for.
_LARGEST_BLOCK = 64
_LOOK = "look for masks, padding, ties, exact zeros or block edges at these places"


def some_entries(clues: Clues) -> Cause | None:
    """Some entries are wrong and the others are right."""
    wrong = clues.wrong
    count = int(wrong.sum())
    if not 0 < count < wrong.size:
        return None
    place = shape_of(wrong, clues.telling)
    how = behaviour(clues)
    told = int(clues.telling.sum())
    right = (told - int((wrong & clues.telling).sum())) / max(told, 1)
    if right < _LEAST_RIGHT:
        return None  # a few of many may be right by chance
    sure = 0.6 if right >= 0.25 else 0.3
    if how:
        sure = max(sure, 0.7)
    if _is_structure(place, wrong, told):
        sure = 0.985 if "triangle" in place or "diagonal" in place else 0.85
    if told < 3 or not right:
        sure = min(sure, 0.5)
    return Cause(
        "some entries wrong",
        told_places(clues, place, how),
        _remedy(place, how),
        sure,
    )


def _is_structure(place: str, wrong: np.ndarray, told: int) -> bool:
    """Whether a place is one that entries drawn by chance would not fill."""
    if not place or (wrong.ndim == 1 and place.startswith(("entries", "number"))):
        return False
    count = min(int(wrong.sum()), told)
    return 4 * max(wrong.shape) * chance_of_set(count, told) < 0.5


def told_places(clues: Clues, place: str, how: str) -> str:
    """Says which entries are wrong, and what they are."""
    wrong = clues.wrong
    count = int(wrong.sum())
    is_are = "is" if count == 1 else "are"
    where = f" ({place})" if place else ""
    there = f": {how}" if how else ""
    return (
        f"{count} of {wrong.size} entries {is_are} wrong, within "
        f"[{bounds(wrong)}]{where}{there}; the others are right"
    )


def _remedy(place: str, how: str) -> str:
    if "triangle" in place or "diagonal" in place:
        return (
            "treat that part as the function does: mask what it does not read "
            "(jnp.tril, jnp.triu), or count what it reads twice"
        )
    if "block" in place or "every" in place:
        return "look at the grid or index map that cuts the axis into these blocks"
    if place.startswith("the last"):
        return "look at the end of the axis: padding, a remainder, an off-by-one"
    return _LOOK


def bounds(wrong: np.ndarray) -> str:
    """Returns the smallest box of indices that holds all wrong entries."""
    places = np.argwhere(wrong)
    return ", ".join(
        f"{low}" if low == high else f"{low}..{high}"
        for low, high in zip(places.min(0), places.max(0), strict=True)
    )


def behaviour(clues: Clues) -> str:
    """Says what the claim is at its wrong entries; "" where nothing fits."""
    claimed, true = clues.claimed[clues.wrong], clues.true[clues.wrong]
    is_one = claimed.size == 1
    they = "it is" if is_one else "they are"
    if np.isnan(claimed).all():
        return f"{they} NaN"
    if not claimed.any():
        return f"{they} zero, the true {'one is' if is_one else 'ones are'} not"
    if not true.any():
        return f"the true {'one is' if is_one else 'ones are'} zero"
    fit = 10 * clues.fit
    ratio = coefficient(claimed, true)
    rest = unexplained(claimed, ratio * true) if ratio else np.inf
    if rest <= fit:
        if abs(ratio + 1) < fit:
            return "their sign is flipped" if not is_one else "its sign is flipped"
        if independent(true) > 1 or abs(ratio - round(ratio)) < fit:
            return (
                f"{they} {times(ratio, rest)} x the true {'one' if is_one else 'ones'}"
            )
    if independent(claimed - true) == 1 and independent(true) > 1:
        return f"{they} off by {float(np.abs(claimed - true)[0]):.6g} each"
    return ""


# --- the shape of a set of entries ------------------------------------------------


def shape_of(wrong: np.ndarray, telling: np.ndarray) -> str:
    """Returns the shape of a set of entries in words; "" where it has none.

    Args:
      wrong: The entries in the set.
      telling: Entries that could be in it; the others count as either.
    """
    if wrong.ndim == 0 or wrong.all():
        return ""
    slabs = [_slab(wrong, telling, axis) for axis in range(wrong.ndim)]
    named = [words for words in slabs if words]
    if named:
        return named[0]
    if wrong.ndim >= 2:
        for words, pattern in _matrix_patterns(wrong.shape):
            if np.array_equal(wrong & telling, pattern & telling):
                return words
    return _box(wrong, telling)


def _slab(wrong: np.ndarray, telling: np.ndarray, axis: int) -> str:
    """Names whole rows that are wrong, and alone so."""
    others = tuple(n for n in range(wrong.ndim) if n != axis)
    touched = np.asarray(wrong.any(axis=others) if others else wrong)
    if touched.all():
        return ""
    able = np.asarray(telling.any(axis=others) if others else telling)
    whole = np.moveaxis(wrong | ~telling, axis, 0)[touched]
    if not whole.all():
        return ""
    words = indices_in_words(touched, able)
    if not words:
        return ""
    if wrong.ndim == 1:
        return words.replace("#", "entries")
    if wrong.ndim == 2:
        return words.replace("#", "rows" if axis == 0 else "columns")
    return words.replace("#", f"indices of axis {axis}")


def indices_in_words(chosen: np.ndarray, able: np.ndarray) -> str:
    """Names a set of indices along an axis; "#" stands for what they index.

    Args:
      chosen: bool[n], which indices are in the set.
      able: bool[n], which could be.
    """
    length = chosen.size
    places = np.flatnonzero(chosen)
    low, high = int(places[0]), int(places[-1])
    inside = np.zeros_like(chosen)
    inside[low : high + 1] = True
    if np.array_equal(inside & able, chosen & able):
        return _run(low, high, length)
    for block in range(1, min(length // 2, _LARGEST_BLOCK) + 1):
        for start in (0, 1):
            pattern = np.arange(length) // block % 2 == start
            if np.array_equal(pattern & able, chosen & able):
                if block == 1:
                    return f"every second of the #, from {start}"
                return f"every second block of {block} #, from {start * block}"
    for step in range(3, length // 2 + 1):
        pattern = np.arange(length) % step == places[0] % step
        if np.array_equal(pattern & able, chosen & able):
            return f"one in {step} of the #, from {places[0] % step}"
    if places.size <= _MOST_NAMED:
        return f"# {', '.join(map(str, places))}"
    return ""


def _run(low: int, high: int, length: int) -> str:
    count = high - low + 1
    if high == length - 1 and low > 0:
        return f"the last {count} #" if count > 1 else f"the last of the {length} #"
    if low == 0 and high < length - 1:
        return f"the first {count} #" if count > 1 else f"the first of the {length} #"
    return f"# {low}..{high}" if count > 1 else f"number {low} of the {length} #"


def _matrix_patterns(shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    rows, columns = np.ogrid[: shape[-2], : shape[-1]]
    for words, pattern in (
        ("the diagonal", rows == columns),
        ("all but the diagonal", rows != columns),
        ("the upper triangle", rows < columns),
        ("the lower triangle", rows > columns),
        ("the upper triangle and the diagonal", rows <= columns),
        ("the lower triangle and the diagonal", rows >= columns),
    ):
        yield words, np.broadcast_to(pattern, shape)


def _box(wrong: np.ndarray, telling: np.ndarray) -> str:
    """Names a box of entries that are all wrong."""
    if wrong.ndim < 2:
        return ""
    places = np.argwhere(wrong)
    low, high = places.min(0), places.max(0)
    inside = np.zeros_like(wrong)
    inside[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    if int(wrong.sum()) > 1 and not (inside & telling & ~wrong).any():
        return "a block of " + " x ".join(str(n) for n in high - low + 1)
    return ""
