"""Which entries of a step's results an operand's entries take part in.

Structure alone is asked, not values: an entry of a masked or untaken operand takes part
as well, so that it can be said where its derivative is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradtest._src.lifting import Evaluator, is_inexact
from gradtest._src.localise.steps import Step

# True for each entry that is reached; None for what holds no derivative at all.
Reach = Any

_ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "complex",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "igamma",
        "igammac",
        "imag",
        "integer_pow",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "nextafter",
        "neg",
        "optimization_barrier",
        "polygamma",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "zeta",
    ]
)
# They put entries elsewhere: what they do to values they do to reach as well.
_MOVING = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "pad",
        "reshape",
        "rev",
        "scatter",
        "scatter-add",
        "scatter_add",
        "slice",
        "squeeze",
        "stack",
        "transpose",
    ]
)
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


def moves_entries(step: Step) -> bool:
    """Whether a step only puts entries elsewhere, as they are."""
    return step.eqn is None or step.name in _MOVING


def reached(
    run: Evaluator, step: Step, operands: Sequence[Any], reach: Sequence[Reach]
) -> list[Reach]:
    """Returns the reach of a step's results, given that of its operands."""
    results = [None] * len(step.results)
    if all(each is None for each in reach):
        return results
    if step.eqn is None:
        assert step.compute is not None
        known = [_known(o, r) for o, r in zip(operands, reach, strict=True)]
        return [step.compute(*known)]
    return [
        _of_result(run, step, var.aval, operands, reach) if _is_float(var) else None
        for var in step.eqn.outvars
    ]


def _is_float(var: Any) -> bool:
    return is_inexact(getattr(var.aval, "dtype", None))


def _known(operand: Any, reach: Reach) -> Any:
    return jnp.zeros(jnp.shape(operand), bool) if reach is None else reach


def _of_result(
    run: Evaluator,
    step: Step,
    aval: Any,
    operands: Sequence[Any],
    reach: Sequence[Reach],
) -> Reach:
    shape = aval.shape
    present = [each for each in reach if each is not None]
    if step.name in _ELEMENTWISE:
        total = jnp.zeros(shape, bool)
        for each in present:
            total |= each
        return total
    if step.name.startswith("reduce_") and "axes" in step.params:
        return jnp.any(present[0], axis=tuple(step.params["axes"])).reshape(shape)
    if step.name.startswith("cum"):
        every = jnp.any(present[0], axis=step.params["axis"], keepdims=True)
        return jnp.broadcast_to(every, shape)
    if step.name in _MOVING:
        return _applied(run, step, [
            operand if each is None and not _has_float(operand)
            else _known(operand, each).astype(operand.dtype)
            for operand, each in zip(operands, reach, strict=True)
        ])  # fmt: skip
    if step.name in _PRODUCTS:
        total = jnp.zeros(shape, bool)
        for k, each in enumerate(reach):
            if each is not None:
                ones = [jnp.ones_like(operand) for operand in operands]
                ones[k] = each.astype(operands[k].dtype)
                total |= _applied(run, step, ones)
        return total
    some = jnp.stack([jnp.any(each) for each in present]).any()
    return jnp.broadcast_to(some, shape)


def _has_float(operand: Any) -> bool:
    return is_inexact(getattr(operand, "dtype", None))


def _applied(run: Evaluator, step: Step, operands: Sequence[Any]) -> Reach:
    assert step.eqn is not None
    (result,) = run.apply(step.eqn, list(operands))
    return jnp.real(result) > 0
