"""Where the points of a check are drawn, anew for each trial.

A domain stands in the arguments of a check for the arrays it draws. Its shape is a
tuple of sizes, or one size; a string in it is a size with a name, 3 unless it is given
when the domain is drawn. Values are drawn in float64 and rounded to `dtype`.

Domains are drawn with a NumPy generator of their own: a draw depends on that generator
alone, and is the same with and without `jax_enable_x64`.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradtest._src import domain as _domain
from gradtest._src import samplers as _samplers
from gradtest._src.domain import Domain as Domain
from gradtest._src.domain import ShapeLike as ShapeLike

__all__ = [
    "Domain",
    "ShapeLike",
    "away_from",
    "integers",
    "invertible",
    "normal",
    "one_hot",
    "orthogonal",
    "positive",
    "simplex",
    "spd",
    "uniform",
    "unit_interval",
]


def normal(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Standard normal entries; complex ones have independent real and imaginary parts.

    Two and more entries are never all of one sign, so that both branches of a function
    such as relu are seen: were they drawn so, every second sign is turned.

    Args:
      shape: Sizes and names of the axes.
      dtype: Floating or complex; each part of a complex entry has variance 1.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: A size is negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> domains.normal((3, 4)).draw(np.random.default_rng(0)).shape
      (3, 4)
    """
    checked = _domain.checked_shape(shape)
    return Domain("normal", checked, _domain.inexact_dtype(dtype), _samplers.normal)


def uniform(
    shape: ShapeLike,
    low: float = 0.0,
    high: float = 1.0,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Domain:
    """Entries uniform between `low` and `high`, either of which rounding may reach.

    Args:
      shape: Sizes and names of the axes.
      low: Lower end, finite in `dtype`.
      high: Upper end, finite in `dtype` and above `low` there.
      dtype: Real floating.

    Raises:
      TypeError: An argument is of another kind.
      ValueError: `low` is not below `high`, an end is not finite, a size is negative,
        or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> angles = domains.uniform(100, -np.pi, np.pi).draw(np.random.default_rng(0))
      >>> bool(abs(angles).max() < 3.15)
      True
    """
    checked = _domain.checked_shape(shape)
    kind = _domain.real_dtype(dtype)
    ends = tuple(
        (name, _domain.checked_real(value, name, kind))
        for name, value in (("low", low), ("high", high))
    )
    # Judged in `dtype`: float32 ends that bfloat16 rounds together leave one value.
    rounded_low, rounded_high = np.array([low, high]).astype(kind)
    if not rounded_low < rounded_high:
        raise ValueError(
            f"`low` must be below `high` in {kind.name}, got low={low!r}, high={high!r}"
        )
    return Domain("uniform", checked, kind, _samplers.uniform, ends)


def positive(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Entries between 1/4 and 4, with a uniform logarithm.

    So far from 0 that a difference step stays positive too; zeros and tiny numbers are
    not drawn.

    Args:
      shape: Sizes and names of the axes.
      dtype: Real floating.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: A size is negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> bool((domains.positive(100).draw(np.random.default_rng(0)) > 0.2).all())
      True
    """
    checked = _domain.checked_shape(shape)
    return Domain("positive", checked, _domain.real_dtype(dtype), _samplers.positive)


def unit_interval(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Entries uniform between 1/64 and 63/64: inside the unit interval, off its ends.

    Args:
      shape: Sizes and names of the axes.
      dtype: Real floating.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: A size is negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> odds = domains.unit_interval(100).draw(np.random.default_rng(0))
      >>> bool((odds > 0).all() and (odds < 1).all())
      True
    """
    checked = _domain.checked_shape(shape)
    kind = _domain.real_dtype(dtype)
    return Domain("unit_interval", checked, kind, _samplers.unit_interval)


def integers(
    shape: ShapeLike, low: int, high: int, *, dtype: DTypeLike = jnp.int32
) -> Domain:
    """Integers from `low`, included, to `high`, excluded: labels, indices, lengths.

    Args:
      shape: Sizes and names of the axes.
      low: The smallest integer drawn.
      high: One more than the largest integer drawn.
      dtype: Integer, signed or not, that holds them all.

    Raises:
      TypeError: An argument is of another kind.
      ValueError: `low` is not below `high`, `dtype` does not hold them, a size is
        negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> labels = domains.integers(5, 0, 10).draw(np.random.default_rng(0))
      >>> labels.tolist()
      [8, 6, 5, 2, 3]
    """
    checked = _domain.checked_shape(shape)
    kind = _domain.integer_dtype(dtype)
    low = _domain.checked_integer(low, "low")
    high = _domain.checked_integer(high, "high")
    if low >= high:
        raise ValueError(f"`low` must be below `high`, got low={low}, high={high}")
    limits = jnp.iinfo(kind)
    if low < limits.min or high - 1 > limits.max:
        raise ValueError(
            f"`dtype` must hold the integers from {low} to {high - 1}, got {kind.name}"
        )
    ends = (("low", low), ("high", high))
    return Domain("integers", checked, kind, _samplers.integers, ends)


def spd(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Symmetric (Hermitian) positive definite matrices, well conditioned.

    Their eigenvalues lie apart from each other between 1/4 and 4. Rounding to a half
    precision keeps the symmetry exactly and moves each eigenvalue a little.

    Args:
      shape: Sizes and names of the axes, the last two equal.
      dtype: Floating or complex.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: The last two axes differ, a size is negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> covariance = domains.spd((4, 4)).draw(np.random.default_rng(0))
      >>> bool((np.linalg.eigvalsh(covariance) > 0.2).all())
      True
    """
    checked = _domain.checked_square(shape, "spd")
    return Domain("spd", checked, _domain.inexact_dtype(dtype), _samplers.spd)


def invertible(
    shape: ShapeLike,
    *,
    det: Literal["any", "positive", "negative"] = "any",
    dtype: DTypeLike = jnp.float32,
) -> Domain:
    """Invertible matrices, well conditioned, with the sign of the determinant chosen.

    Their singular values lie apart from each other between 1/4 and 4.

    Args:
      shape: Sizes and names of the axes, the last two equal.
      det: Sign of the determinant, or "any" for both; complex ones have none.
      dtype: Floating or complex.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: The last two axes differ, a size is negative, a name no identifier, or
        `det` another word, or a sign for complex matrices or for empty ones.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> matrix = domains.invertible((3, 3), det="positive")
      >>> bool(np.linalg.det(matrix.draw(np.random.default_rng(0))) > 0)
      True
    """
    checked = _domain.checked_square(shape, "invertible")
    kind = _domain.inexact_dtype(dtype)
    if det not in ("any", "positive", "negative"):
        raise ValueError(f"`det` must be 'any', 'positive' or 'negative', got {det!r}")
    if det != "any" and kind.kind == "c":
        raise ValueError(f"`det` must be 'any' for {kind.name}, got {det!r}")
    sign = (("det", det),)
    return Domain("invertible", checked, kind, _samplers.invertible, sign)


def orthogonal(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Orthogonal (unitary) matrices, all equally likely; orthogonal up to rounding.

    Args:
      shape: Sizes and names of the axes, the last two equal.
      dtype: Floating or complex.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: The last two axes differ, a size is negative, or a name no identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> rotation = domains.orthogonal((3, 3)).draw(np.random.default_rng(0))
      >>> bool(np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-6))
      True
    """
    checked = _domain.checked_square(shape, "orthogonal")
    kind = _domain.inexact_dtype(dtype)
    return Domain("orthogonal", checked, kind, _samplers.orthogonal)


def simplex(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """Probabilities along the last axis: positive, with sum 1 up to rounding.

    None is below a fifth of their mean. A difference step leaves the simplex: check a
    function that is defined around it, or one of logits.

    Args:
      shape: Sizes and names of the axes, the last of size 1 or more.
      dtype: Real floating.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: There is no last axis or it is empty, a size is negative, or a name no
        identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> weights = domains.simplex((2, 5)).draw(np.random.default_rng(0))
      >>> bool((weights > 0.03).all() and np.allclose(weights.sum(axis=-1), 1))
      True
    """
    checked = _domain.checked_last_axis(shape, "simplex")
    return Domain("simplex", checked, _domain.real_dtype(dtype), _samplers.simplex)


def one_hot(shape: ShapeLike, *, dtype: DTypeLike = jnp.float32) -> Domain:
    """A single one along the last axis, at random, and zeros elsewhere.

    Args:
      shape: Sizes and names of the axes, the last of size 1 or more.
      dtype: Real floating, integer or bool.

    Raises:
      TypeError: `shape` holds something else, or `dtype` is another kind.
      ValueError: There is no last axis or it is empty, a size is negative, or a name no
        identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> domains.one_hot((2, 4), dtype=int).draw(np.random.default_rng(0)).tolist()
      [[0, 0, 0, 1], [0, 0, 1, 0]]
    """
    checked = _domain.checked_last_axis(shape, "one_hot")
    return Domain("one_hot", checked, _domain.countable_dtype(dtype), _samplers.one_hot)


def away_from(
    shape: ShapeLike,
    values: float | Sequence[float],
    *,
    margin: float = 0.1,
    dtype: DTypeLike = jnp.float32,
) -> Domain:
    """Normal entries, each at least `margin` away from each of `values`: the kinks.

    Args:
      shape: Sizes and names of the axes.
      values: One number or several, finite.
      margin: How far the entries stay away, above 0.
      dtype: Real floating.

    Raises:
      TypeError: An argument is of another kind.
      ValueError: `margin` is not positive, `values` and `margin` exclude more than 99 %
        of all normal numbers, a number is not finite, a size is negative, or a name no
        identifier.

    Example:
      >>> import numpy as np
      >>> from gradtest import domains
      >>> inputs = domains.away_from(100, values=0).draw(np.random.default_rng(0))
      >>> bool((abs(inputs) >= 0.1).all())
      True
    """
    checked = _domain.checked_shape(shape)
    kind = _domain.real_dtype(dtype)
    several = values if isinstance(values, Sequence | np.ndarray) else (values,)
    kinks = tuple(_domain.checked_real(value, "values", kind) for value in several)
    distance = _domain.checked_real(margin, "margin", kind)
    if distance <= 0:
        raise ValueError(f"`margin` must be above 0, got {margin!r}")
    if _samplers.normal_mass_away_from(kinks, distance) < 0.01:
        raise ValueError(
            "`values` and `margin` exclude more than 99 % of all normal numbers, got "
            f"values={values!r}, margin={margin!r}"
        )
    parameters = (("values", kinks), ("margin", distance))
    return Domain("away_from", checked, kind, _samplers.away_from, parameters)
