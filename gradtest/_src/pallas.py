"""Lifts Pallas kernels: a loop over the grid around the kernel's pure form.

Being made of ordinary operations it has a derivative, forward and reverse, which
neither Pallas nor its interpreter has. A kernel that has no pure form runs in its own
precision, in the interpreter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.devices import homes
from gradtest._src.grid import blank, evaluate_kernel
from gradtest._src.jaxprs import Eqn, kernels
from gradtest._src.jaxprs.kernels import Kernel
from gradtest._src.lifting import (
    HANDLERS,
    Evaluator,
    Points,
    handles,
    lifted_dtype,
    points_of,
)

# What memory holds that nothing was written to. For values NaN, so that a kernel which
# uses it shows it; for derivatives a number, because the zero cotangent of what is not
# used would make NaN of NaN.
_UNUSED, _HARMLESS = math.nan, 0.5


@handles(kernels.PALLAS_CALL)
def _pallas_call(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    kernel = kernels.read_pallas_call(eqn)
    if kernel is None or not _runs(eqn, kernel, run.wide):
        return _interpreted(run, eqn, operands)
    on_device = not run.wide and not homes.is_on_cpu()
    points = points_of(run, eqn, operands)
    inner = run.fork(stops=None, solver_audit=None)

    @jax.custom_jvp
    def evaluate(points: Points) -> list[Any]:
        if on_device:
            return jaxprs.bind(eqn, points[-1], eqn.params)
        return evaluate_kernel(inner, kernel, points, _UNUSED)

    @evaluate.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        def harmless(points: Points) -> list[Any]:
            return evaluate_kernel(inner, kernel, points, _HARMLESS)

        return evaluate(*primals), jax.jvp(harmless, primals, tangents)[1]

    try:
        return evaluate(points)
    except NotImplementedError:
        return _interpreted(run, eqn, operands)


@handles(kernels.PROGRAM_ID)
def _program_id(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    return [run.place.indices[eqn.params["axis"]]]


@handles(kernels.NUM_PROGRAMS)
def _num_programs(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    return [run.place.sizes[eqn.params["axis"]]]


@handles(kernels.RUN_SCOPED)
def _run_scoped(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    scoped = run.place.scoped[id(eqn)]
    buffers = [blank(run, aval, run.place.fill) for aval in scoped.buffers]
    return run(scoped.program, [*operands, *buffers])[: scoped.results]


@handles("multiple_of", "max_contiguous")
def _hint(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    return operands


@handles("reciprocal")
def _reciprocal(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Takes the reciprocal itself, also for one that may be approximate."""
    return [1 / operands[0]]


@handles("roll")
def _roll(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Takes the ordinary operation: that of kernels has no derivative."""
    if eqn.params["stride"] is not None:
        return jaxprs.bind(eqn, operands, eqn.params)
    value, shift = operands
    return [jnp.roll(value, shift, eqn.params["axis"])]


# --- what has no pure form ------------------------------------------------------


def _interpreted(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    """Runs a kernel in its own precision: compiled, or interpreted on a CPU."""
    if run.wide:
        run.islands.add(eqn.primitive.name)
    params = eqn.params
    if homes.is_on_cpu():
        params = kernels.interpreted(params)
        _require_interpreter(eqn)

    @jax.custom_jvp
    def interpret(operands: list[Any]) -> list[Any]:
        return jaxprs.bind(eqn, run.narrow(operands, eqn.invars), params)

    @interpret.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"the Pallas kernel {kernels.name_of(eqn)!r} has no pure form to "
            "differentiate"
        )

    return interpret(operands)


@functools.lru_cache(maxsize=256)
def _require_interpreter(eqn: Eqn) -> None:
    """Raises where not even the interpreter can run a kernel on a CPU."""

    def interpret(*operands: Any) -> list[Any]:
        return jaxprs.bind(eqn, operands, kernels.interpreted(eqn.params))

    error = _lowering_error(interpret, [_shape(atom) for atom in eqn.invars])
    if error is None:
        return
    homes.require_accelerator(f"the Pallas kernel {kernels.name_of(eqn)!r}")
    raise NotImplementedError(
        f"gradtest: the Pallas kernel {kernels.name_of(eqn)!r} runs on its accelerator "
        f"alone. Neither float64 nor the interpreter on a CPU takes it: {error}"
    )


@functools.lru_cache(maxsize=256)
def _runs(eqn: Eqn, kernel: Kernel, wide: bool) -> bool:
    """Whether a CPU has all operations of a kernel's pure form.

    Asked only where there are operations other than those of `jax.lax`.
    """
    programs = [kernel.program, *(s.program for s in kernel.scoped.values())]
    names = frozenset().union(*map(jaxprs.primitives, programs))
    if all(name in HANDLERS or _is_of_lax(name) for name in names):
        return True

    def evaluate(*operands: Any) -> Sequence[Any]:
        return evaluate_kernel(Evaluator(wide=wide), kernel, [list(operands)], _UNUSED)

    shapes = [_shape(atom) for atom in eqn.invars]
    if wide:
        shapes = [s.update(dtype=lifted_dtype(s.dtype)) for s in shapes]
    return _lowering_error(evaluate, shapes) is None


def _shape(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def _is_of_lax(name: str) -> bool:
    return hasattr(lax, name.replace("-", "_") + "_p")


def _lowering_error(
    function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]
) -> str | None:
    """Returns why a function can't be lowered for a CPU, or None where it can."""
    try:
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cpu",))
    except Exception as error:  # whatever Pallas raises for what it can't do
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
