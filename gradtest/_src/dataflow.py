"""Which values reach what in a program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Body, Eqn, Jaxpr


def reached_primitives(jaxpr: Jaxpr, moving: Sequence[bool]) -> set[str]:
    """Returns the names of the primitives that make floats of moving inputs.

    Integers made of them (a sign, an index) have no derivative to be wrong.

    Args:
      jaxpr: The program.
      moving: For each of its inputs, whether it moves.
    """
    found: set[str] = set()
    _follow(jaxprs.open_body(jaxpr), moving, found)
    return found


def _follow(body: Body, moving: Sequence[bool], found: set[str]) -> list[bool]:
    """Follows moving values through a program; returns which results move."""
    moves = set(itertools.compress(body.invars, moving))
    for eqn in body.eqns:
        operands = [not jaxprs.is_literal(a) and a in moves for a in eqn.invars]
        if not any(operands):
            continue
        if any(map(jaxprs.is_floating, eqn.outvars)):
            found.add(eqn.primitive.name)
        results = [True] * len(eqn.outvars)
        if (
            eqn.primitive.name in jaxprs.CALLS
            or eqn.primitive.name in jaxprs.CUSTOM_RULES
        ):
            inner = jaxprs.open_body(next(iter(jaxprs.subprograms(eqn))))
            results = _follow(inner, operands, found)
        elif eqn.primitive.name == "scan":
            results = _follow_scan(eqn, operands, found)
        else:
            for program in jaxprs.subprograms(eqn):
                found |= jaxprs.primitives(program)
        moves |= set(itertools.compress(eqn.outvars, results))
    return [not jaxprs.is_literal(a) and a in moves for a in body.outvars]


def _follow_scan(eqn: Eqn, operands: list[bool], found: set[str]) -> list[bool]:
    """Follows moving values through a loop until its carry holds all that move."""
    scan = jaxprs.read_scan(eqn)
    body, start = jaxprs.open_body(scan.body), scan.num_consts
    stop = start + scan.num_carry
    carry = operands[start:stop]
    while True:
        moving = [*operands[:start], *carry, *operands[stop:]]
        results = _follow(body, moving, found)
        grown = [a or b for a, b in zip(carry, results, strict=False)]
        if grown == carry:
            return results
        carry = grown


# --- stopped values ---------------------------------------------------------------


def solver_only_stops(jaxpr: Jaxpr) -> set[int]:
    """Finds the `stop_gradient` equations that feed nothing but linear solvers.

    `jnp.linalg.solve` hides its LU factors from differentiation in this way: they
    follow the matrix, so a difference quotient must move them too.

    Returns:
      The `id` of each such equation, at any depth of `jit` nesting.
    """
    found: set[int] = set()
    body = jaxprs.open_body(jaxpr)
    _live_inputs(body, [True] * len(body.outvars), found)
    for eqn in jaxprs.walk(jaxpr):
        if eqn.primitive.name in _LOOPS:
            for inner in jaxprs.subprograms(eqn):
                found |= solver_only_stops(inner)
    return found


_LOOPS = frozenset({"scan", "while", "cond", "shard_map"})


def _live_inputs(body: Body, live_out: Sequence[bool], found: set[int]) -> list[bool]:
    """Marks which inputs reach a live result otherwise than through a solver."""
    live = {
        var
        for var, is_live in zip(body.outvars, live_out, strict=True)
        if is_live and not jaxprs.is_literal(var)
    }
    for eqn in reversed(body.eqns):
        outs = [var in live for var in eqn.outvars]
        if not any(outs):
            if eqn.primitive.name == jaxprs.STOP_GRADIENT:
                found.add(id(eqn))
            if eqn.primitive.name not in jaxprs.CALLS:
                continue
        operands = _live_operands(eqn, outs, found)
        live |= {
            var
            for var, is_live in zip(eqn.invars, operands, strict=True)
            if is_live and not jaxprs.is_literal(var)
        }
    return [var in live for var in body.invars]


def _live_operands(eqn: Eqn, outs: list[bool], found: set[int]) -> list[bool]:
    """Marks which operands of one equation are live, given its live results."""
    name = eqn.primitive.name
    if name == jaxprs.LINEAR_SOLVE:
        slots = jaxprs.solver_const_slots(eqn)
        return [i not in slots for i in range(len(eqn.invars))]
    if name in jaxprs.CALLS or name in jaxprs.CUSTOM_RULES:
        inner = next(iter(jaxprs.subprograms(eqn)))
        return _live_inputs(jaxprs.open_body(inner), outs, found)
    return [True] * len(eqn.invars)
