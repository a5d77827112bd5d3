"""Equations of common primitives, computed by NumPy.

A program is run equation by equation a few dozen times, on small arrays. JAX compiles
each equation anew for every shape, which takes some hundred times as long as to compute
it; NumPy has nothing to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src.jaxprs import Eqn
from gradtest._src.lifting import Evaluator, lifted_dtype, lifted_params

Params = Mapping[str, Any]
Compute = Callable[..., Any]
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class QuickEvaluator(Evaluator):
    """Runs programs with NumPy where it gives what JAX gives, and else with JAX.

    In working precision that are the primitives of which the result is moved, chosen or
    rounded correctly; in float64 also those that round in some way of their own.
    """

    def apply(self, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
        """Returns the results of one equation."""
        found = self._by_numpy(eqn, operands)
        return super().apply(eqn, operands) if found is None else found

    def _by_numpy(self, eqn: Eqn, operands: Sequence[Any]) -> list[Any] | None:
        name = eqn.primitive.name
        compute = _EXACT.get(name) or (_ROUNDED.get(name) if self.wide else None)
        if compute is None or not all(map(_is_plain, operands)):
            return None
        params = lifted_params(eqn.params) if self.wide else eqn.params
        arrays = [np.asarray(operand) for operand in operands]
        aval: Any = eqn.outvars[0].aval
        wanted = lifted_dtype(aval.dtype) if self.wide else np.dtype(aval.dtype)
        try:
            result = np.asarray(compute(params, *arrays))
        except (TypeError, ValueError):
            return None
        fits = result.dtype == wanted and result.shape == tuple(aval.shape)
        return [result] if fits and not _has_subnormal(result) else None


def _is_plain(operand: Any) -> bool:
    """Whether a value is an array of real numbers, as NumPy has them itself."""
    if isinstance(operand, jax.core.Tracer) or not hasattr(operand, "dtype"):
        return False
    dtype = operand.dtype
    if not isinstance(dtype, np.dtype) or (dtype.kind not in "iub") > (
        dtype in _FLOATS
    ):
        return False
    is_here = not isinstance(operand, jax.Array) or operand.is_fully_addressable
    return is_here and not _has_subnormal(operand)


def _has_subnormal(value: Any) -> bool:
    """Whether an array has numbers that some backends take for zero."""
    if value.dtype not in _FLOATS:
        return False
    size = np.abs(np.asarray(value))
    return bool(((size < np.finfo(size.dtype).tiny) & (size > 0)).any())


def _of(function: Compute) -> Compute:
    """Makes of a function of arrays one that takes parameters as well."""
    return lambda params, *operands: function(*operands)


def _only_floats(function: Compute) -> Compute:
    """Refuses integers, of which NumPy's function is another than JAX's."""

    def compute(params: Params, *operands: Any) -> Any:
        if any(operand.dtype.kind != "f" for operand in operands):
            raise TypeError
        return function(*operands)

    return compute


# --- moved ------------------------------------------------------------------------


def _broadcast(params: Params, operand: Any) -> Any:
    shape = [1] * len(params["shape"])
    for size, axis in zip(operand.shape, params["broadcast_dimensions"], strict=True):
        shape[axis] = size
    return np.broadcast_to(operand.reshape(shape), params["shape"])


def _reshape(params: Params, operand: Any) -> Any:
    if params.get("dimensions") is not None:
        raise ValueError
    return operand.reshape(params["new_sizes"])


def _slice(params: Params, operand: Any) -> Any:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [1] * operand.ndim
    return operand[tuple(map(slice, starts, limits, strides))]


def _convert(params: Params, operand: Any) -> Any:
    dtype = np.dtype(params["new_dtype"])
    if operand.dtype.kind == "f" and dtype.kind != "f":
        raise TypeError
    return operand.astype(dtype)


def _select(params: Params, which: Any, *cases: Any) -> Any:
    if which.dtype != np.bool_ or len(cases) != 2:
        raise TypeError
    return np.where(which, cases[1], cases[0])


# --- rounded ----------------------------------------------------------------------


def _power(params: Params, operand: Any) -> Any:
    if operand.dtype.kind != "f":
        raise TypeError
    exponent = params["y"]
    power = operand ** abs(exponent)
    return power if exponent >= 0 else 1 / power


def _over_axes(function: Compute) -> Compute:
    def compute(params: Params, operand: Any) -> Any:
        axes = tuple(params["axes"])
        return function(operand, axis=axes).astype(operand.dtype) if axes else operand

    return compute


def _dot(params: Params, left: Any, right: Any) -> Any:
    (summed_left, summed_right), (batch_left, batch_right) = params["dimension_numbers"]
    first, batch, left_free = _as_matrices(left, summed_left, batch_left, last=True)
    other, _, right_free = _as_matrices(right, summed_right, batch_right, last=False)
    return np.matmul(first, other).reshape((*batch, *left_free, *right_free))


def _as_matrices(
    operand: Any, summed: Sequence[int], batch: Sequence[int], *, last: bool
) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """Lays an operand of a product out as matrices.

    Returns:
      The matrices, with what is summed over as their last or first axis; the sizes of
      the batch; and those of the axes that remain.
    """
    taken = {*summed, *batch}
    free = [axis for axis in range(operand.ndim) if axis not in taken]
    order = [*batch, *free, *summed] if last else [*batch, *summed, *free]
    sizes, rest = (
        tuple(operand.shape[axis] for axis in axes) for axes in (batch, free)
    )
    depth = int(np.prod([operand.shape[axis] for axis in summed]))
    width = int(np.prod(rest))
    shape = (width, depth) if last else (depth, width)
    return operand.transpose(order).reshape((*sizes, *shape)), sizes, rest


def _logistic(operand: Any) -> Any:
    return 1 / (1 + np.exp(-operand))


def _inverse_root(operand: Any) -> Any:
    return 1 / np.sqrt(operand)


# The same in every implementation: moved, chosen, or rounded to the nearest number.
_EXACT: dict[str, Compute] = {
    "add": _of(np.add),
    "add_any": _of(np.add),
    "and": _of(np.bitwise_and),
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _of(np.array),
    "div": _only_floats(np.divide),
    "eq": _of(np.equal),
    "ge": _of(np.greater_equal),
    "gt": _of(np.greater),
    "le": _of(np.less_equal),
    "lt": _of(np.less),
    "max": _of(np.maximum),
    "min": _of(np.minimum),
    "mul": _of(np.multiply),
    "ne": _of(np.not_equal),
    "neg": _of(np.negative),
    "not": _of(np.invert),
    "or": _of(np.bitwise_or),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reshape": _reshape,
    "select_n": _select,
    "slice": _slice,
    "sqrt": _only_floats(np.sqrt),
    "square": _only_floats(np.square),
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "sub": _of(np.subtract),
    "transpose": lambda params, x: np.transpose(x, params["permutation"]),
}
# The same but for rounding.
_ROUNDED: dict[str, Compute] = {
    "cos": _of(np.cos),
    "dot_general": _dot,
    "exp": _of(np.exp),
    "expm1": _of(np.expm1),
    "integer_pow": _power,
    "log": _of(np.log),
    "log1p": _of(np.log1p),
    "logistic": _of(_logistic),
    "pow": _only_floats(np.power),
    "reduce_sum": _over_axes(np.sum),
    "rsqrt": _of(_inverse_root),
    "sin": _of(np.sin),
    "tanh": _of(np.tanh),
}
