"""Lifts linear solves: refined to float64, and audited before they are refined.

An iterative solver stops at its tolerance, so the value is off its own definition and
a difference of two such values shows it. Refining the lifted solution,
`x += solve(b - A x)`, is exact and cures that. It would also heal a wrong `solve` or
`transpose_solve`, so the relative residual of each solve is recorded first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn
from gradtest._src.lifting import Evaluator, handles
from gradtest._src.structure import structure_key

_MOST_REFINEMENTS = 30
_CONVERGED = 1e-15
Vector = list[Any]


class SolveKind(enum.IntEnum):
    """Places in the audit vector: which solver, and whether it iterates."""

    SOLVE_DIRECT = 0
    SOLVE_ITERATIVE = 1
    TRANSPOSE_DIRECT = 2
    TRANSPOSE_ITERATIVE = 3


def classify(forward_solvers: frozenset[Any]) -> Callable[[Any], SolveKind]:
    """Returns a function from a solver's program to its place in the audit vector.

    Args:
      forward_solvers: Structure keys of the `solve` programs of the primal program;
        any other program that a derivative solves with is a transposed solver.
    """

    def kind(program: Any) -> SolveKind:
        transposed = structure_key(program) not in forward_solvers
        return SolveKind(2 * transposed + is_iterative(program))

    return kind


def forward_solvers(jaxpr: Any) -> frozenset[Any]:
    """Returns the structure keys of the `solve` programs in a primal program."""
    return frozenset(
        structure_key(eqn.params["jaxprs"].solve)
        for eqn in jaxprs.walk(jaxpr)
        if eqn.primitive.name == jaxprs.LINEAR_SOLVE
    )


def is_iterative(program: Any) -> bool:
    """Whether a program loops: what it solves it may solve to a tolerance."""
    return not jaxprs.primitives(program).isdisjoint({"while", "scan"})


@handles(jaxprs.LINEAR_SOLVE)
def _linear_solve(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
    plain = run.fork(stops=None, solver_audit=None)
    parts = jaxprs.read_linear_solve(eqn, operands, plain)
    _audit(run, parts)

    def solver(
        raw: Callable[..., Vector], program: Any
    ) -> Callable[..., Vector | tuple[Vector, Vector]]:
        def solve(matvec: Callable[[Vector], Vector], b: Vector) -> Any:
            size = len(b)
            results = raw(*b)
            x, aux = results[:size], results[size:]
            if run.wide and is_iterative(program):
                x = _refine(matvec, lambda r: raw(*r)[:size], b, x)
            return (x, aux) if parts.has_aux else x

        return solve

    transpose = parts.transpose_solve
    solution = lax.custom_linear_solve(
        lambda x: parts.matvec(*x),
        parts.rhs,
        solver(parts.solve, parts.solve_program),
        None if transpose is None else solver(transpose, parts.transpose_program),
        has_aux=parts.has_aux,
    )
    return [*solution[0], *solution[1]] if parts.has_aux else solution


def _audit(run: Evaluator, parts: jaxprs.LinearSolve) -> None:
    """Records the residual that the solver leaves by itself."""
    if run.solver_audit is None:
        return
    x = parts.solve(*parts.rhs)[: len(parts.rhs)]
    residual = _subtract(parts.rhs, parts.matvec(*x))
    relative = _norm(residual) / jnp.maximum(_norm(parts.rhs), _tiny())
    place = run.solver_audit(parts.solve_program)
    run.residual = run.residual.at[place].max(relative)


def _refine(
    matvec: Callable[[Vector], Vector],
    solve: Callable[[Vector], Vector],
    b: Vector,
    x: Vector,
) -> Vector:
    """Iterative refinement, for as long as each round at least halves the residual.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
    SIAM 2002, chapter 12.
    """
    target = _CONVERGED * _norm(b)

    def residual(x: Vector) -> Vector:
        return _subtract(b, matvec(x))

    def going(state: Any) -> Any:
        count, _, size, previous = state
        # Written so that a NaN residual ends the loop.
        return (count < _MOST_REFINEMENTS) & (size > target) & (size < 0.5 * previous)

    def step(state: Any) -> Any:
        count, x, size, _ = state
        better = [a + c for a, c in zip(x, solve(residual(x)), strict=True)]
        new_size = _norm(residual(better))
        x = [
            jnp.where(new_size < size, new, old)
            for new, old in zip(better, x, strict=True)
        ]
        return count + 1, x, jnp.minimum(new_size, size), size

    size = _norm(residual(x))
    _, x, _, _ = lax.while_loop(going, step, (0, x, size, jnp.full_like(size, jnp.inf)))
    return x


def _subtract(minuend: Vector, subtrahend: Vector) -> Vector:
    return [m - s for m, s in zip(minuend, subtrahend, strict=True)]


def _norm(vector: Vector) -> Any:
    squares = [jnp.sum(jnp.real(part * jnp.conj(part))) for part in vector]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _tiny() -> float:
    return float(jnp.finfo(jnp.float64).tiny)
