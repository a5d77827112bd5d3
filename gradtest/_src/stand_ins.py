"""Lifts calls of custom rules: their functions, or what they are declared to be.

A custom rule is entered through its primal program, the rule itself is left out. One
that differs from its function on purpose has a stand-in, whose derivative counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.lifting import Evaluator, Replayer, handles, is_inexact


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a custom rule is declared to differentiate like, in place of its function.

    Attributes:
      program: Takes the call's operands and returns results like the call's; or, for
        a product, takes operands and cotangents and returns the operands' cotangents.
      is_product: Whether it is a vector-Jacobian product, of no function.
    """

    program: Jaxpr
    is_product: bool


@handles(*jaxprs.CUSTOM_RULES)
def _enter_rule(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    stand_in = run.declared.get(id(eqn))
    if stand_in is None:
        return run(jaxprs.rule_free_program(eqn), operands)
    if stand_in.is_product:
        return _with_product(run, eqn, operands, stand_in)
    return _with_slope_of(run, eqn, operands, stand_in)


def _with_slope_of(
    run: Evaluator, eqn: Eqn, operands: list[Any], stand_in: StandIn
) -> Sequence[Any]:
    """Returns the values of a rule's function, which move as the stand-in's do.

    What the stand-in lacks of the value is stopped: a difference quotient, which takes
    it from the base point, then moves with the stand-in alone.
    """
    moves = run.fork(stops=None)(stand_in.program, operands)
    if isinstance(run.stops, Replayer):
        rests = [run.stops.take() for _ in moves]
        return [move + rest for move, rest in zip(moves, rests, strict=True)]
    values = run.fork(stops=None)(jaxprs.rule_free_program(eqn), operands)
    rests = [value - move for value, move in zip(values, moves, strict=True)]
    if run.stops is not None:
        for rest in rests:
            run.stops.keep(rest)
    return [
        move + lax.stop_gradient(rest) for move, rest in zip(moves, rests, strict=True)
    ]


def _with_product(
    run: Evaluator, eqn: Eqn, operands: list[Any], stand_in: StandIn
) -> Sequence[Any]:
    """Returns the values of a rule's function, with the declared product as its VJP.

    Differences can't follow a product: where a point is moved, the function counts.
    """
    if run.stops is not None:
        as_function = run(jaxprs.rule_free_program(eqn), operands)
        if isinstance(run.stops, Replayer):
            return as_function  # otherwise run for what it stops
    plain = run.fork(stops=None)
    places = [
        i
        for i, atom in enumerate(eqn.invars)
        if is_inexact(getattr(atom.aval, "dtype", None))
    ]

    def whole(moving: Sequence[Any]) -> list[Any]:
        values = list(operands)
        for place, value in zip(places, moving, strict=True):
            values[place] = value
        return values

    @jax.custom_vjp
    def function(*moving: Any) -> list[Any]:
        return plain(jaxprs.rule_free_program(eqn), whole(moving))

    def forward(*moving: Any) -> tuple[list[Any], Any]:
        return function(*moving), moving

    def backward(moving: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        pulled = plain(stand_in.program, [*whole(moving), *cotangents])
        return tuple(pulled[place] for place in places)

    function.defvjp(forward, backward)
    return function(*[operands[place] for place in places])
