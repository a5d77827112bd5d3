"""Constant factors that the sizes of mesh axes explain."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnose import factor_between
from gradtest._src.parallel.layout import Layout

# Powers of mesh axes' sizes that reductions leave out or do too often.
_POWERS = (1, -1, 2, -2)


@dataclasses.dataclass(frozen=True)
class AxisPower:
    """A factor that is a power of the sizes of mesh axes.

    Attributes:
      factor: The factor.
      size: The product of the sizes of these axes.
      names: The axes.
      words: What the factor is.
      argument: The axes as an argument of a reduction.
    """

    factor: float
    size: int
    names: tuple[str, ...]
    words: str
    argument: str


def power_of_axes(
    found: np.ndarray, truth: np.ndarray, layout: Layout, fit: float
) -> AxisPower | None:
    """Recognises a factor between two arrays that mesh axes explain.

    Args:
      found: The array with the factor.
      truth: The array without it.
      layout: The devices.
      fit: How closely, relative to their norms, the numbers must fit.
    """
    factor = factor_between(found, truth)
    if factor is None or norm(found - factor * truth) > fit * norm(factor * truth):
        return None
    axes = layout.axes
    for power, length in itertools.product(_POWERS, range(1, len(axes) + 1)):
        sizes = {
            names: math.prod(axes[name] for name in names)
            for names in itertools.combinations(axes, length)
        }
        fitting = [
            names
            for names, size in sizes.items()
            if abs(factor / float(size) ** power - 1) < fit
        ]
        if fitting:
            words = _words(fitting, is_square=abs(power) == 2)
            argument = " or ".join(
                repr(names[0] if len(names) == 1 else names) for names in fitting
            )
            size, names = sizes[fitting[0]], fitting[0]
            return AxisPower(factor, size, names, words, argument)
    return None


def _words(fitting: Sequence[tuple[str, ...]], *, is_square: bool) -> str:
    """Says what a factor is, where these axes have it; several alike are all named."""
    square = "the square of " * is_square
    if len(fitting[0]) > 1:
        return f"{square}the product of the sizes of mesh axes " + " and ".join(
            map(repr, fitting[0])
        )
    return f"{square}the size of mesh axis " + " or ".join(
        repr(names[0]) for names in fitting
    )


def times(factor: float) -> str:
    """Says how many times too large or too small something is."""
    if factor < 0:
        return f"{factor:.6g} times what it should be"
    size = f"{factor:.6g}" if factor > 1 else f"{1 / factor:.6g}"
    return f"{size} times too {'large' if factor > 1 else 'small'}"
