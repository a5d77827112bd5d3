"""The primitives that hold programs: what their parameters say of how they run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

Jaxpr = Any  # jax.extend.core.Jaxpr or ClosedJaxpr: one class from jax 0.12 on
Eqn = core.JaxprEqn


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `scan`: its body and how many operands are constants and carries."""

    body: Jaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def read_scan(eqn: Eqn) -> Scan:
    """Reads a `scan` equation of either layout."""
    params = eqn.params
    if "ft_in" in params:  # jax >= 0.11
        num_consts, num_carry, _ = (len(part) for part in params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    return Scan(
        params["jaxpr"],
        num_consts,
        num_carry,
        params["length"],
        params["reverse"],
        params["unroll"],
    )


@dataclasses.dataclass(frozen=True)
class While:
    """A `while`: its two programs and how many constants each one takes."""

    cond: Jaxpr
    body: Jaxpr
    cond_nconsts: int
    body_nconsts: int


def read_while(eqn: Eqn) -> While:
    """Reads a `while` equation."""
    params = eqn.params
    return While(
        params["cond_jaxpr"],
        params["body_jaxpr"],
        params["cond_nconsts"],
        params["body_nconsts"],
    )


@dataclasses.dataclass(frozen=True)
class LinearSolve:
    """A `custom_linear_solve`: its programs, each with its own constants, and b."""

    matvec: Callable[..., list[Any]]
    solve: Callable[..., list[Any]]
    transpose_solve: Callable[..., list[Any]] | None
    rhs: list[Any]
    solve_program: Jaxpr
    transpose_program: Jaxpr | None
    has_aux: bool


def read_linear_solve(
    eqn: Eqn, operands: Sequence[Any], evaluate: Callable[..., list[Any]]
) -> LinearSolve:
    """Reads a `custom_linear_solve`; `evaluate(program, args)` runs its programs."""
    lengths, programs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    parts = _split(
        operands,
        [lengths.matvec, lengths.vecmat, lengths.solve, lengths.transpose_solve],
    )
    matvec_consts, _, solve_consts, transpose_consts, rhs = parts

    def closed(program: Jaxpr, consts: list[Any]) -> Callable[..., list[Any]]:
        return lambda *vectors: evaluate(program, [*consts, *vectors])

    transpose = programs.transpose_solve
    return LinearSolve(
        closed(programs.matvec, matvec_consts),
        closed(programs.solve, solve_consts),
        None if transpose is None else closed(transpose, transpose_consts),
        rhs,
        programs.solve,
        transpose,
        len(programs.solve.out_avals) > len(programs.matvec.out_avals),
    )


def solver_const_slots(eqn: Eqn) -> range:
    """The operands of a `custom_linear_solve` that only its solvers read."""
    lengths = eqn.params["const_lengths"]
    start = lengths.matvec + lengths.vecmat
    return range(start, start + lengths.solve + lengths.transpose_solve)


def _split(items: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """Cuts `items` into parts of the given lengths and what remains."""
    parts, rest = [], list(items)
    for length in lengths:
        parts.append(rest[:length])
        rest = rest[length:]
    return [*parts, rest]


@dataclasses.dataclass(frozen=True)
class ShardMap:
    """A `shard_map`: its per-device program and how values are laid out."""

    body: Jaxpr
    mesh: Any
    in_specs: Sequence[Any]
    out_specs: Sequence[Any]
    axis_names: frozenset[Any]
    check_vma: bool


def read_shard_map(eqn: Eqn) -> ShardMap:
    """Reads a `shard_map` equation; `axis_names` are the newly manual axes."""
    params = eqn.params
    return ShardMap(
        params["jaxpr"],
        params["mesh"],
        params["in_specs"],
        params["out_specs"],
        frozenset(params["newly_manual_axes"]),
        params["check_vma"],
    )
