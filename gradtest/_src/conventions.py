"""What JAX itself takes for the derivative at a kink.

Its rules choose: relu has the derivative 0 at 0. Where several such pieces meet, their
sum may have a derivative that no point nearby has, and that is no mistake of a user's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from gradtest._src import claims, execution, jaxprs
from gradtest._src.case import Case
from gradtest._src.jaxprs import Eqn
from gradtest._src.lifting import Evaluator
from gradtest._src.program import Program, Values, derivative

# Units in the last place that the derivative may be off in its own precision.
_ULPS = 128
# In a coarser dtype nothing could be told apart.
_MOST_EPS = 1e-5


class Convention(NamedTuple):
    """A derivative, and how closely it is known."""

    gradient: Values
    rtol: float


def convention(case: Case) -> Convention | None:
    """Returns what JAX takes for the derivative of a case's program, or None.

    Users' rules play no part: their functions are entered. Where there are none it is
    evaluated in float64, else in the program's own precision, in which JAX's rules are.
    """
    if case.program.declared or case.claim.mode != "rev":
        return None
    try:
        if not has_users_rules(case.program):
            return Convention(_in_float64(case), case.rtol)
        if case.working_eps > _MOST_EPS:
            return None
        return Convention(_as_it_runs(case), _ULPS * case.working_eps)
    except Exception:  # whatever JAX raises where there is no reverse mode
        return None


def has_users_rules(program: Program) -> bool:
    """Whether a program calls a custom rule that no library wrote."""
    return any(_is_users(eqn) for eqn in _rules(program))


def _rules(program: Program) -> Iterator[Eqn]:
    for eqn in jaxprs.walk(program.jaxpr):
        if eqn.primitive.name in jaxprs.CUSTOM_RULES:
            yield eqn


def _is_users(eqn: Eqn) -> bool:
    return jaxprs.is_users(jaxprs.read_rule(eqn))


def _in_float64(case: Case) -> Values:
    own = claims.reverse_claim(case.program, case.point)
    count = len(case.program.outputs)

    def gradient(moving: Any, held: Any, seed: Any) -> Values:
        return Evaluator()(own.jaxpr, [*moving, *held, *seed])[count:]

    arguments = case.bench.lifted_arguments(case.point)
    return execution.to_host(execution.lifted(gradient, arguments)(*arguments))


def _as_it_runs(case: Case) -> Values:
    program = case.program
    library = {id(eqn) for eqn in _rules(program) if not _is_users(eqn)}

    def gradient(moving: Any, held: Any, seed: Any) -> Values:
        run = Evaluator(wide=False, keeps=lambda eqn: id(eqn) in library)
        return derivative(program.mathematics, run, moving, held, seed)[1]

    moving, held = list(case.point.moving), list(program.held(case.point))
    arguments = [jax.tree_util.tree_map(jax.numpy.asarray, moving), held, case.seed]
    with execution.working_precision():
        return execution.to_host(jax.jit(gradient)(*arguments))
