"""Finds where in a leaf a claim and the measured slopes part.

Only after a failure, and only where the exact derivative can't tell. A small leaf is
measured entry by entry; the entries of a large one are halved again and again, each
half measured along a direction of its own.
"""

from __future__ import annotations

import numpy as np

from gradtest._src.case import Case, pair
from gradtest._src.findings import Entry

_MOST_HALVINGS = 24
_MOST_ENTRIES = 64


def measured_gradient(case: Case, leaf: int, claimed: np.ndarray) -> np.ndarray | None:
    """Returns the gradient of a small leaf by differences, entry by entry.

    At a kink the entry is the claimed one where that lies between the slopes.

    Args:
      case: The case; its differences are trusted.
      leaf: Position of the leaf among those that move.
      claimed: The leaf's claimed gradient, in float64.

    Returns:
      An array like `claimed`, or None for a leaf of more than 64 entries.
    """
    if claimed.size > _MOST_ENTRIES:
        return None
    measured = np.zeros_like(claimed)
    units = (1.0, -1j) if np.iscomplexobj(claimed) else (1.0,)
    for index in np.ndindex(claimed.shape):
        for unit in units:
            direction = np.zeros_like(claimed)
            direction[index] = case.sizes[leaf] * unit
            predicted = pair(claimed, direction)
            slope = case.measure({leaf: direction}, abs(predicted))
            inside = slope.distance(predicted) <= 3 * slope.error
            value = predicted if inside else slope.value
            # Re(g v) = value for v = s and for v = -i s: the parts of g in turn.
            measured[index] += np.conj(unit) * value / case.sizes[leaf]
    return measured


def locate_entry(case: Case, leaf: int, claimed: np.ndarray) -> Entry | None:
    """Returns one wrong entry, or None where differences can't single one out.

    Args:
      case: The case; its differences are trusted.
      leaf: Position of the leaf among those that move.
      claimed: The leaf's claimed gradient, in float64.
    """
    direction = case.direction(leaf, "locate")
    # Of like sizes, so that an entry can't hide behind its neighbours' noise.
    size = np.abs(direction)
    direction = np.where(size > 0, direction / np.where(size > 0, size, 1), 1)
    direction = direction * case.sizes[leaf]
    places = np.arange(claimed.size)
    for _ in range(_MOST_HALVINGS):
        if places.size <= 1:
            break
        halves = np.array_split(places, 2)
        gaps = [_gap(case, leaf, claimed, _only(direction, half)) for half in halves]
        places = halves[int(np.argmax(gaps))]
    if places.size != 1:
        return None
    index = np.unravel_index(int(places[0]), claimed.shape)
    alone = _only(direction, places)
    unit = alone[index]
    slope = case.measure({leaf: alone}, abs(pair(claimed, alone)))
    if slope.distance(pair(claimed, alone)) <= 3 * slope.error:
        return None
    along = pair(claimed, alone) / abs(unit)
    return Entry(
        tuple(int(n) for n in index),
        along * _sign(unit),
        slope.value / abs(unit) * _sign(unit),
    )


def _gap(case: Case, leaf: int, claimed: np.ndarray, direction: np.ndarray) -> float:
    predicted = pair(claimed, direction)
    return case.measure({leaf: direction}, abs(predicted)).distance(predicted)


def _only(direction: np.ndarray, places: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(direction)
    kept.ravel()[places] = direction.ravel()[places]
    return kept


def _sign(unit: np.generic) -> float:
    return 1.0 if np.iscomplexobj(unit) else float(np.sign(unit))
