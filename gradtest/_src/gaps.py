"""The difference of two gradients of one leaf, norm-wise and entry by entry."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src.case import norm
from gradtest._src.findings import Entry

SILENT_NOTE = "zero but for rounding, and claimed so"


@dataclasses.dataclass(frozen=True)
class LeafGap:
    """The difference of two gradients of one leaf.

    Attributes:
      size: Norm of the difference relative to the truth's norm; infinite where a true
        gradient of zero is claimed to be something else.
      allowed: What is allowed of it, relative to the same.
      disputed: Which entries, or all of them together, exceed the allowance.
      entry: Where the two differ most.
      is_silent: The true gradient is zero but for rounding; `size` and `allowed` are
        then relative to the largest contribution of all leaves.
    """

    size: float
    allowed: float
    disputed: np.ndarray
    entry: Entry | None
    is_silent: bool = False

    @property
    def is_exceeded(self) -> bool:
        """Whether the two differ by more than is allowed, as a whole or anywhere."""
        return bool(self.disputed.any())


def leaf_gap(
    claimed: np.ndarray,
    truth: np.ndarray,
    *,
    rtol: float,
    floor: float,
    beside: float = 0.0,
) -> LeafGap:
    """Compares two gradients of one leaf, norm-wise and entry by entry.

    Args:
      claimed: The gradient under test.
      truth: What it should be, of the same shape.
      rtol: Allowed relative difference; never scaled by the size of the array.
      floor: Norm below which a difference is noise.
      beside: Norm that a truth below the floor is told relative to.
    """
    if claimed is truth and not floor:
        return LeafGap(0.0, rtol, np.zeros((), bool), None)
    difference = np.abs(claimed - truth)
    size, scale = norm(difference), norm(truth)
    count = max(truth.size, 1)
    allowed = rtol * scale + floor
    per_entry = 100 * rtol * np.abs(truth) + allowed / count**0.5
    disputed = difference > per_entry
    if size > allowed and not disputed.any():
        disputed = difference >= difference.max()
    is_silent = scale <= floor
    unit = max(beside, floor) if is_silent else scale
    return LeafGap(
        float(size / unit) if unit else (np.inf if size else 0.0),
        float(allowed / unit) if unit else rtol,
        disputed,
        _worst_entry(claimed, truth, difference),
        is_silent,
    )


def _worst_entry(
    claimed: np.ndarray, truth: np.ndarray, difference: np.ndarray
) -> Entry | None:
    if not difference.size:
        return None
    ranked = np.where(np.isfinite(difference), difference, np.inf)
    index = np.unravel_index(int(np.argmax(ranked)), difference.shape)
    place = tuple(int(i) for i in index)
    return Entry(place, as_number(claimed[place]), as_number(truth[place]))


def as_number(value: np.generic) -> complex:
    """Returns an entry as a Python number."""
    return complex(value) if np.iscomplexobj(value) else float(value)
