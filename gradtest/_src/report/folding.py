"""Arrays of any shape as rows or matrices of a size that a picture can show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Folded:
    """An array as a matrix.

    Attributes:
      matrix: Its entries.
      start: The index of the first row and column, where they are indices of an axis.
      row_label: What the rows are: an axis, or several with the last one fastest.
      column_label: The same of the columns.
    """

    matrix: np.ndarray
    start: tuple[int, int]
    row_label: str
    column_label: str


def long_axes(shape: Sequence[int]) -> list[int]:
    """Returns the axes that have more than one entry."""
    return [axis for axis, size in enumerate(shape) if size != 1]


def fold(array: np.ndarray, start: Sequence[int] = ()) -> Folded:
    """Folds an array of two or more long axes to a matrix, as square as can be.

    Args:
      array: Its leading axes become the rows, the others the columns.
      start: Where each axis begins, if it is a part of a larger array.
    """
    axes = long_axes(array.shape)
    sizes = [array.shape[axis] for axis in axes]
    cut = min(
        range(1, len(axes)),
        key=lambda k: abs(math.log(math.prod(sizes[:k]) / math.prod(sizes[k:]))),
    )
    matrix = array.reshape(math.prod(sizes[:cut]), math.prod(sizes[cut:]))
    firsts = [start[axis] if start else 0 for axis in axes]
    top = firsts[0] if cut == 1 else 0
    left = firsts[-1] if len(axes) - cut == 1 else 0
    rows, columns = axes[:cut], axes[cut:]
    return Folded(
        matrix, (top, left), _label(rows, array.shape), _label(columns, array.shape)
    )


def _label(axes: Sequence[int], shape: Sequence[int]) -> str:
    if len(axes) == 1:
        return f"index of axis {axes[0]}"
    sizes = " × ".join(str(shape[axis]) for axis in axes)
    return f"axes {', '.join(map(str, axes))} folded ({sizes}, the last fastest)"


def block_maxima(values: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Returns the largest entry of each block of a row, and how long a block is.

    A block that holds NaN, or infinity, is NaN, or infinite.

    Args:
      values: float64[n].
      most: How many blocks there may be.
    """
    maxima, (_, length) = block_maxima_2d(values[None, :], most)
    return maxima[0], length


def block_maxima_2d(
    matrix: np.ndarray, most: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the largest entry of each block of a matrix, and the blocks' shape.

    Args:
      matrix: float64[rows, columns].
      most: How many blocks there may be along each axis.
    """
    lengths = [max(math.ceil(size / most), 1) for size in matrix.shape]
    for axis, length in enumerate(lengths):
        if length > 1:
            edges = np.arange(0, matrix.shape[axis], length)
            matrix = np.maximum.reduceat(matrix, edges, axis=axis)
    return matrix, (lengths[0], lengths[1])
