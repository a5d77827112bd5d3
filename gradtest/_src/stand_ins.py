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
from gradtest._src.lifting import Evaluator, Replayer, handles


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a custom rule is declared to differentiate like, in place of its function.

    Attributes:
      program: Takes the call's operands and returns results like the call's; or, for
        a product, takes operands and cotangents and returns the operands' cotangents.
      is_product: Whether it is a vector-Jacobian product, of no function.
      is_once: Whether it stands in for the first derivative alone: where that is
        differentiated again, values are those of the rule's function. So it is where
        fwd computes the function itself, and does not call the rule.
    """

    program: Jaxpr
    is_product: bool
    is_once: bool = False


@handles(*jaxprs.CUSTOM_RULES)
def _enter_rule(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    stand_in = run.declared.get(id(eqn))
    if stand_in is None:
        return run(jaxprs.rule_free_program(eqn), operands)
    if stand_in.is_product:
        return _with_product(run, eqn, operands, stand_in)
    if stand_in.is_once:
        return _with_slope_once(run, eqn, operands, stand_in)
    return _with_slope_of(run, eqn, operands, stand_in)


def _with_slope_once(
    run: Evaluator, eqn: Eqn, operands: list[Any], stand_in: StandIn
) -> Sequence[Any]:
    """Returns the values of a rule's function; the first derivative is the stand-in's.

    For second derivatives: differences are then taken of the gradient, not of values.
    """
    plain = run.fork(stops=None)
    moving = _Moving(eqn, operands)

    def values(*at: Any) -> list[Any]:
        return plain(jaxprs.rule_free_program(eqn), moving.whole(at))

    def jvp(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        def stand(*at: Any) -> list[Any]:
            return plain(stand_in.program, moving.whole(at))

        return values(*primals), jax.jvp(stand, primals, tangents)[1]

    function = jax.custom_jvp(values)
    function.defjvp(jvp)
    return function(*moving.values)


class _Moving:
    """The floating operands of an equation, apart from the others."""

    def __init__(self, eqn: Eqn, operands: list[Any]):
        self._operands = operands
        self.places = [
            i for i, atom in enumerate(eqn.invars) if jaxprs.is_floating(atom)
        ]
        self.values = [operands[place] for place in self.places]

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        """Returns all operands, these in place of the floating ones."""
        values = list(self._operands)
        for place, value in zip(self.places, moving, strict=True):
            values[place] = value
        return values


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
    if run.stops is not None and not stand_in.is_once:
        as_function = run(jaxprs.rule_free_program(eqn), operands)
        if isinstance(run.stops, Replayer):
            return as_function  # otherwise run for what it stops
    plain = run.fork(stops=None)
    moving = _Moving(eqn, operands)

    def values(*at: Any) -> list[Any]:
        return plain(jaxprs.rule_free_program(eqn), moving.whole(at))

    function = jax.custom_vjp(values)

    def forward(*at: Any) -> tuple[list[Any], Any]:
        return (values(*at) if stand_in.is_once else function(*at)), at

    def backward(at: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        pulled = plain(stand_in.program, [*moving.whole(at), *cotangents])
        return tuple(pulled[place] for place in moving.places)

    function.defvjp(forward, backward)
    return function(*moving.values)
