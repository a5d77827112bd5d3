"""The primitives that need care where they are lifted, each with a small handler."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from gradtest._src import jaxprs
from gradtest._src.devices import homes
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.lifting import (
    Evaluator,
    Replayer,
    handles,
    is_inexact,
    lifted_dtype,
    lifted_params,
)


@handles(jaxprs.STOP_GRADIENT)
def _stop_gradient(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    (value,) = operands
    if run.stops is not None and id(eqn) not in run.solver_only:
        if isinstance(run.stops, Replayer):
            return [run.stops.take()]
        run.stops.keep(value)
    return [lax.stop_gradient(value)]


@handles(*jaxprs.CALLS)
def _inline(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Enters the one program that a call holds, in place of the call."""
    (program,) = jaxprs.subprograms(eqn)
    return run(program, operands)


@handles("reduce_precision")
def _identity(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    return operands if run.wide else jaxprs.bind(eqn, operands, eqn.params)


@handles("device_put", "layout_constraint")
def _unmoved(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Leaves values where they are: devices and layouts carry no mathematics."""
    return operands


# The draws of some depend on the dtype: a lifted draw would be another number.
@handles(*jaxprs.CALLBACKS, "random_gamma", "rng_uniform", "nextafter")
def _own_precision(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    return run.in_own_precision(eqn, operands)


@handles(*jaxprs.COMPILED)
def _compiled(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Runs what was compiled for one kind of device, there and in its own precision."""
    homes.require_accelerator(eqn.primitive.name)
    return run.in_own_precision(eqn, operands)


@handles("bitcast_convert_type")
def _bits(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Keeps the meaning of bits: random floats are made of them.

    The bits of a float are those of its own dtype. As integers they are exact (a sign,
    an exponent); a float that is made of them can't be lifted.
    """
    (result,) = eqn.outvars
    if is_inexact(getattr(result.aval, "dtype", None)):
        return run.in_own_precision(eqn, operands)
    return jaxprs.bind(eqn, run.narrow(operands, eqn.invars), eqn.params)


@handles("debug_callback", "debug_print")
def _silent(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Drops a debugging print: the check evaluates the program many times."""
    return []


@handles(*jaxprs.WITH_SCALAR_PROGRAM)
def _with_scalar_program(
    run: Evaluator, eqn: Eqn, operands: list[Any]
) -> Sequence[Any]:
    """Lifts the combiner of a scatter or reduction, which works on scalars."""
    if not run.wide:
        return jaxprs.bind(eqn, operands, eqn.params)
    params = {
        name: _lifted_scalar_program(value) if jaxprs.is_program(value) else value
        for name, value in lifted_params(eqn.params).items()
    }
    return jaxprs.bind(eqn, operands, params)


@functools.lru_cache(maxsize=256)
def _lifted_scalar_program(program: Jaxpr) -> Jaxpr:
    avals = [
        jax.ShapeDtypeStruct(var.aval.shape, lifted_dtype(var.aval.dtype))
        for var in jaxprs.open_body(program).invars
    ]
    lifted = jax.make_jaxpr(lambda *args: Evaluator()(program, args))(*avals)
    return lifted if isinstance(program, core.ClosedJaxpr) else lifted.jaxpr
