"""Lifts loops, branches and device-parallel regions by rebuilding them.

Each one is rebuilt through JAX's public function around its lifted body. Where values
are stopped inside (`lax.stop_gradient`), a difference quotient needs the stopped value
of the base point, iteration by iteration: the moved point's evaluation then carries
the base point's along and copies what is stopped. So every handler here works on a
list of points: one, or the base point and the moved one, whose results it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.devices import homes
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.lifting import Evaluator, Points, at_points, handles, points_of


def _note_residual(run: Evaluator, residual: Any) -> None:
    if residual is not None:
        run.residual = jnp.maximum(run.residual, residual)


@handles("scan")
def _scan(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    scan = jaxprs.read_scan(eqn)
    points = points_of(run, eqn, operands)
    first, last = scan.num_consts, scan.num_consts + scan.num_carry
    is_bare = len(operands) == last and len(eqn.outvars) == scan.num_carry
    further = run.overrun if run.overruns_scans and is_bare else 0

    def body(carry: Points, xs: Points) -> tuple[Points, Any]:
        args = [
            [*point[:first], *c, *x]
            for point, c, x in zip(points, carry, xs, strict=True)
        ]
        results, residual = at_points(run, scan.body, args)
        carry = [result[: scan.num_carry] for result in results]
        return carry, ([result[scan.num_carry :] for result in results], residual)

    carry, (ys, residuals) = lax.scan(
        body,
        [point[first:last] for point in points],
        [point[last:] for point in points],
        length=scan.length + further,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    if residuals is not None and scan.length:
        _note_residual(run, residuals.max(axis=0))
    return [*carry[-1], *ys[-1]]


@handles("while")
def _while(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    loop = jaxprs.read_while(eqn)
    points = points_of(run, eqn, operands)
    first, last = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts
    State = tuple[Points, Any]

    def alive(state: State) -> list[Any]:
        plain = run.fork(stops=None, solver_audit=None)
        return [
            plain(loop.cond, [*point[:first], *carry])[0]
            for point, carry in zip(points, state[0], strict=True)
        ]

    def any_alive(state: State) -> Any:
        going = [jnp.any(each) for each in alive(state)]
        return functools.reduce(jnp.logical_or, going)

    def step(state: State) -> State:
        carries, residual = state
        args = [
            [*point[first:last], *carry]
            for point, carry in zip(points, carries, strict=True)
        ]
        results, new_residual = at_points(run, loop.body, args)
        if residual is not None:
            residual = jnp.maximum(residual, new_residual)
        return results, residual

    def body(state: State) -> State:
        results, residual = step(state)
        if not waits:
            return results, residual
        kept = [
            [_keep(going, old, new) for old, new in zip(carry, result, strict=True)]
            for going, carry, result in zip(
                alive(state), state[0], results, strict=True
            )
        ]
        return kept, residual

    start = ([point[last:] for point in points], run.fork().residual)
    # Of several points, or of the examples that `vmap` made of a loop, those that are
    # done wait for the others.
    waits = len(points) > 1 or jaxprs.open_body(loop.cond).outvars[0].aval.shape != ()
    end = lax.while_loop(any_alive, body, start)
    for _ in range(run.overrun):
        end = step(end)
    carries, residual = end
    _note_residual(run, residual)
    return carries[-1]


def _keep(going: Any, old: Any, new: Any) -> Any:
    """Returns the new value where the loop goes on; `going` has its leading axes."""
    if not hasattr(new, "dtype"):
        return new
    if jnp.ndim(going):
        going = lax.broadcast_in_dim(going, jnp.shape(new), range(jnp.ndim(going)))
    return lax.select_n(going, old, new)


@handles("cond")
def _cond(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    points = points_of(run, eqn, operands)
    index = operands[0]

    def branch(program: Jaxpr) -> Any:
        return lambda args: at_points(run, program, args)

    results, residual = lax.switch(
        index,
        [branch(program) for program in eqn.params["branches"]],
        [point[1:] for point in points],
    )
    _note_residual(run, residual)
    return results[-1]


def _laid_out(operand: Any, spec: Any, mesh: Any) -> Any:
    """Gives an operand the sharding that a region of an explicit mesh asks for.

    JAX's own transposition hands cotangents to a region without asking for it.
    """
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    if not explicit or jax.typeof(operand).sharding.spec == spec:
        return operand
    return jax.sharding.reshard(operand, jax.sharding.NamedSharding(mesh, spec))


@handles("shard_map")
def _shard_map(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    region = jaxprs.read_shard_map(eqn)
    operands = [
        _laid_out(operand, spec, region.mesh)
        for operand, spec in zip(operands, region.in_specs, strict=True)
    ]
    points = points_of(run, eqn, operands)
    audited = run.residual is not None and jaxprs.LINEAR_SOLVE in jaxprs.primitives(
        region.body
    )

    def body(*points: list[Any]) -> tuple[Points, Any]:
        results, residual = at_points(run, region.body, [list(p) for p in points])
        if not audited:
            return results, None
        return results, lax.pmax(residual, tuple(region.axis_names))

    results, residual = jax.shard_map(
        body,
        mesh=homes.moved(region.mesh),
        in_specs=tuple([list(region.in_specs)] * len(points)),
        out_specs=(
            [list(region.out_specs)] * len(points),
            jax.sharding.PartitionSpec() if audited else None,
        ),
        axis_names=region.axis_names,
        check_vma=region.check_vma,
    )(*points)
    _note_residual(run, residual)
    return results[-1]
