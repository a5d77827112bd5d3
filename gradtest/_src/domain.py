"""What a domain is: a shape, a dtype, and a way to draw."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

DEFAULT_SIZE = 3

Axis = int | str
Shape = tuple[Axis, ...]
ShapeLike = Axis | Sequence[Axis]

_REAL = ("float16", "bfloat16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
_INTEGER = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


@dataclasses.dataclass(frozen=True, repr=False)
class Domain:
    """A set of arrays from which test points are drawn.

    Made by the functions of `gradtest.domains`. A domain is hashable, equal to one made
    with the same arguments, and a leaf to `jax.tree_util`, so that it may stand
    anywhere in the arguments of a check.

    Attributes:
      name: What the domain is called, in reports too.
      shape: Sizes of the axes; a string is a size with a name, fixed when drawn.
      dtype: Of the arrays drawn.
      sampler: Called with a generator, the shape in numbers and `dtype`, and with
        `parameters` as keywords; returns an array of that shape, drawn in float64 or
        complex128, which `draw` casts to `dtype`.
      parameters: Names and values of the sampler's further arguments.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    sampler: Callable[..., np.ndarray]
    parameters: tuple[tuple[str, Any], ...] = ()

    def draw(
        self,
        generator: np.random.Generator,
        sizes: Mapping[str, int] | None = None,
    ) -> np.ndarray:
        """Draws one array.

        Args:
          generator: Source of randomness; successive draws differ.
          sizes: Sizes of the named axes; a name that is missing stands for 3, one that
            the shape does not have is ignored.

        Returns:
          An array of the domain's dtype, and of its shape with the names replaced.

        Raises:
          TypeError: `generator` is no `numpy.random.Generator`, or a size no integer.
          ValueError: A size is negative, or leaves the domain empty.

        Example:
          >>> import numpy as np
          >>> from gradtest import domains
          >>> batch = domains.normal(("batch", 4))
          >>> batch.draw(np.random.default_rng(0), sizes={"batch": 2}).shape
          (2, 4)
        """
        if not isinstance(generator, np.random.Generator):
            raise TypeError(
                "`generator` must be a numpy.random.Generator, got "
                f"{type(generator).__name__}"
            )
        shape = self.sized_shape(sizes)
        samples = self.sampler(generator, shape, self.dtype, **dict(self.parameters))
        # NumPy returns a scalar, not an array, for arithmetic on arrays without axes.
        return np.asarray(samples, self.dtype)

    def sized_shape(self, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Returns the shape in numbers, each named size from `sizes` or 3."""
        sizes = {} if sizes is None else sizes
        return tuple(
            _checked_size(sizes.get(axis, DEFAULT_SIZE), f"sizes[{axis!r}]")
            if isinstance(axis, str)
            else axis
            for axis in self.shape
        )

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.parameters]
        return f"{self.name}({', '.join([repr(self.shape), *options])}, {self.dtype})"


def checked_shape(shape: ShapeLike) -> Shape:
    """Returns `shape` as a tuple of sizes and names; one size or name is one axis."""
    axes = (shape,) if isinstance(shape, int | np.integer | str) else shape
    if not isinstance(axes, tuple | list):
        raise TypeError(
            "`shape` must be a tuple of sizes and names, got "
            f"{type(shape).__name__}: {shape!r}"
        )
    return tuple(_checked_axis(axis) for axis in axes)


def checked_square(shape: ShapeLike, name: str) -> Shape:
    """Returns `shape` as a tuple whose last two axes are the same."""
    checked = checked_shape(shape)
    if len(checked) < 2 or checked[-2] != checked[-1]:
        raise ValueError(
            f"`shape` of {name} must end in two equal axes, got {checked!r}"
        )
    return checked


def checked_last_axis(shape: ShapeLike, name: str) -> Shape:
    """Returns `shape` as a tuple whose last axis is there, and not of size 0."""
    checked = checked_shape(shape)
    if not checked or checked[-1] == 0:
        raise ValueError(
            f"`shape` of {name} must end in an axis of size 1 or more, got {checked!r}"
        )
    return checked


def real_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype` if it is a real floating one."""
    return _checked_dtype(dtype, _REAL, "a real floating dtype")


def inexact_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype` if it is a floating or complex one."""
    return _checked_dtype(dtype, _REAL + _COMPLEX, "a floating or complex dtype")


def integer_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype` if it is an integer one."""
    return _checked_dtype(dtype, _INTEGER, "an integer dtype")


def countable_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype` if zero and one in it are plain numbers, or truth values."""
    allowed = ("bool", *_INTEGER, *_REAL)
    return _checked_dtype(dtype, allowed, "a real floating, integer or bool dtype")


def checked_real(value: Any, name: str, dtype: np.dtype) -> float:
    """Returns `value` as a float, if it is finite in `dtype`."""
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not is_number:
        raise TypeError(
            f"`{name}` must be a real number, got {type(value).__name__}: {value!r}"
        )
    if abs(value) > float(jnp.finfo(dtype).max) or not np.isfinite(value):
        raise ValueError(f"`{name}` must be finite in {dtype.name}, got {value!r}")
    return float(value)


def checked_integer(value: Any, name: str) -> int:
    """Returns `value` as an int; bools and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"`{name}` must be an integer, got {type(value).__name__}: {value!r}"
        )
    return operator.index(value)


def _checked_axis(axis: Any) -> Axis:
    """Returns one entry of a shape."""
    if not isinstance(axis, str):
        return _checked_size(axis, "shape")
    if not axis.isidentifier():
        raise ValueError(f"`shape` names an axis {axis!r}, which is no identifier")
    return axis


def _checked_size(size: Any, name: str) -> int:
    """Returns one size in numbers."""
    checked = checked_integer(size, name)
    if checked < 0:
        raise ValueError(f"`{name}` must not be negative, got {checked}")
    return checked


def _checked_dtype(dtype: Any, allowed: tuple[str, ...], wanted: str) -> np.dtype:
    """Returns `dtype` as NumPy's, if its name is one of `allowed`."""
    try:
        # None is NumPy's word for float64, and nobody else's.
        checked = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None:
        raise TypeError(f"`dtype` must be {wanted}, got {dtype!r}")
    if checked.name not in allowed:
        raise TypeError(f"`dtype` must be {wanted}, got {checked.name}")
    return checked
