"""Domains inferred around arrays that were given."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest import domains
from gradtest._src.domain import Domain
from gradtest._src.hunting import kinds

Axes = tuple[Any, ...]


def inferred(array: np.ndarray, axes: Axes) -> tuple[Domain, tuple[Domain, ...]]:
    """Returns the domain that an array seems to come from, and wider ones.

    What lies in a wider one alone the function may not have been written for.

    Args:
      array: What was given; finite.
      axes: Its shape, with names for sizes that may change.
    """
    dtype = array.dtype
    if dtype == np.bool_:
        return kinds.mask(axes), ()
    if np.issubdtype(dtype, np.integer):
        low = min(0, int(array.min(initial=0)))
        high = int(array.max(initial=0)) + 1
        return domains.integers(axes, low, max(high, low + 1), dtype=dtype), ()
    is_complex = np.issubdtype(dtype, np.complexfloating)
    wide = array.astype(np.complex128 if is_complex else np.float64)
    matrices = _of_matrices(wide, axes, dtype)
    if matrices is not None:
        return matrices, ()
    if is_complex:
        return kinds.reals(axes, dtype, _scale(wide)), ()
    return _of_rows(wide, axes, dtype) or _of_numbers(wide, axes, dtype)


def _scale(wide: np.ndarray) -> float:
    """Returns the size of an array's entries, 1 where they are zero."""
    size = float(np.sqrt(np.mean(np.abs(wide) ** 2))) if wide.size else 1.0
    return size or 1.0


def _is_constant(wide: np.ndarray) -> bool:
    return bool(wide.size == 0 or (wide == wide.ravel()[0]).all())


def _of_matrices(wide: np.ndarray, axes: Axes, dtype: Any) -> Domain | None:
    """Returns a domain of matrices that the array can't be in by accident."""
    square = wide.ndim >= 2 and wide.shape[-1] == wide.shape[-2] > 1
    if not square or _is_constant(wide) or axes[-1] != axes[-2]:
        return None
    choices = [
        domains.spd(axes, dtype=dtype),
        domains.orthogonal(axes, dtype=dtype),
        kinds.symmetric(axes, dtype),
        kinds.triangular(axes, dtype, lower=True),
        kinds.triangular(axes, dtype, lower=False),
    ]
    return next((each for each in choices if kinds.contains(each, wide)), None)


def _of_rows(
    wide: np.ndarray, axes: Axes, dtype: Any
) -> tuple[Domain, tuple[Domain, ...]] | None:
    """Returns a domain of rows that belong together."""
    if not wide.size or not wide.ndim or wide.shape[-1] < 2:
        return None
    if np.isin(wide, (0, 1)).all() and not _is_constant(wide):
        one_hot = domains.one_hot(axes, dtype=dtype)
        is_one_hot = kinds.contains(one_hot, wide) and wide.size > 2
        return (one_hot if is_one_hot else kinds.flags(axes, dtype)), ()
    simplex = domains.simplex(axes, dtype=dtype)
    if not kinds.contains(simplex, wide):
        return None
    if (wide > 0).all():
        return kinds.open_simplex(axes, dtype), (simplex,)
    return simplex, ()


def _of_numbers(
    wide: np.ndarray, axes: Axes, dtype: Any
) -> tuple[Domain, tuple[Domain, ...]]:
    anything = kinds.reals(axes, dtype, _scale(wide))
    low, high = float(wide.min(initial=0)), float(wide.max(initial=0))
    if not wide.size or low < 0 or high <= 0:
        return anything, ()
    has_zeros = bool((wide == 0).any())
    if high < 1 and not has_zeros:
        closed = domains.unit_interval(axes, dtype=dtype)
        return kinds.open_unit(axes, dtype), (closed, anything)
    if high <= 1 and not _is_constant(wide) and jnp.issubdtype(dtype, jnp.floating):
        return domains.unit_interval(axes, dtype=dtype), (anything,)
    if has_zeros:
        return kinds.nonnegatives(axes, dtype, _scale(wide)), (anything,)
    return kinds.positives(axes, dtype, _scale(wide)), (anything,)
