"""Which calls of custom rules a program makes, and which its derivative goes through.

A derivative goes through a call where a moving input reaches one of its operands, and
one of its results reaches a result of the program, both otherwise than under
`stop_gradient`. Loops are followed until nothing new is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr

# Where a call stands: positions of equation and sub-program, from the outside in.
Place = tuple[int, ...]
Flags = list[bool]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a custom rule in a program, before any value is known.

    Attributes:
      place: Where it stands; a loop's body has it once.
      eqn: The call.
      scopes: Module names, transformations and loops around it, outermost first.
      outer: The custom rules and device regions that it stands in.
      moving: For each operand, whether it moves with the program's inputs.
      times: How often `scan`s run it; a `while` counts once.
      is_live: Whether its results reach a result of the program.
      same: For each operand, the variables of programs around it that it equals.
    """

    place: Place
    eqn: Eqn
    scopes: tuple[str, ...]
    outer: tuple[Eqn, ...]
    moving: tuple[bool, ...]
    times: int
    is_live: bool = False
    same: tuple[tuple[Any, ...], ...] = ()


def find_calls(jaxpr: Jaxpr, moving: Sequence[bool]) -> list[Call]:
    """Returns every custom-rule call of a program, at any depth, in program order.

    Args:
      jaxpr: The program.
      moving: For each of its inputs, whether it moves.
    """
    search = _Search()
    search.follow(jaxpr, list(moving), _Context(), {})
    outvars = jaxprs.open_body(jaxpr).outvars
    live: set[Place] = set()
    _mark_live(jaxpr, [jaxprs.is_floating(var) for var in outvars], (), live)
    return [
        dataclasses.replace(call, is_live=call.place in live)
        for _, call in sorted(search.calls.items())
    ]


@dataclasses.dataclass(frozen=True)
class _Context:
    """What stands around a program."""

    place: Place = ()
    scopes: tuple[str, ...] = ()
    outer: tuple[Eqn, ...] = ()
    times: int = 1

    def at(self, position: int) -> _Context:
        return dataclasses.replace(self, place=(*self.place, position))

    def inside(self, eqn: Eqn, program: int) -> _Context:
        """The context of one of an equation's programs."""
        name = eqn.primitive.name
        around: tuple[str, ...] = ()
        outer, times = self.outer, self.times
        if name in jaxprs.CUSTOM_RULES:
            around = (f"{jaxprs.read_rule(eqn).name}()",)
        elif name == "cond":
            around = (f"branch {program}",)
        elif name not in jaxprs.CALLS or "remat" in name or name == "checkpoint":
            around = (name.removesuffix("2"),)
        if name in jaxprs.CUSTOM_RULES or name == "shard_map":
            outer = (*outer, eqn)
        if name == "scan":
            times *= jaxprs.read_scan(eqn).length
        scopes = (*self.scopes, *_scope(eqn), *around)
        return _Context((*self.place, program), scopes, outer, times)


def _scope(eqn: Eqn) -> tuple[str, ...]:
    return tuple(part for part in [jaxprs.scope(eqn)] if part)


_Same = dict[Any, tuple[Any, ...]]


def _chain(atom: Any, same: _Same) -> tuple[Any, ...]:
    """Returns a variable and those of programs around it that it equals."""
    return () if jaxprs.is_literal(atom) else (atom, *same.get(atom, ()))


class _Search:
    """Follows moving values through a program and notes each call on the way."""

    def __init__(self) -> None:
        self.calls: dict[Place, Call] = {}

    def follow(
        self, jaxpr: Jaxpr, moving: Flags, context: _Context, same: _Same
    ) -> Flags:
        """Returns which results move; `same` has what the inputs equal outside."""
        body = jaxprs.open_body(jaxpr)
        moves = {var for var, m in zip(body.invars, moving, strict=True) if m}
        for i, eqn in enumerate(body.eqns):
            operands = [not jaxprs.is_literal(a) and a in moves for a in eqn.invars]
            here = context.at(i)
            if eqn.primitive.name in jaxprs.CUSTOM_RULES:
                self._note(eqn, operands, here, same)
            results = self._results(eqn, operands, here, same)
            moves |= {
                var
                for var, m in zip(eqn.outvars, results, strict=True)
                if m and jaxprs.is_floating(var)
            }
        return [not jaxprs.is_literal(a) and a in moves for a in body.outvars]

    def _note(self, eqn: Eqn, operands: Flags, here: _Context, same: _Same) -> None:
        self.calls[here.place] = Call(
            here.place,
            eqn,
            here.scopes + _scope(eqn),
            here.outer,
            tuple(operands),
            here.times,
            same=tuple(_chain(atom, same) for atom in eqn.invars),
        )

    def _results(self, eqn: Eqn, operands: Flags, here: _Context, same: _Same) -> Flags:
        if eqn.primitive.name == jaxprs.STOP_GRADIENT:
            return [False]

        def enter(program: int, flags: Flags) -> Flags:
            inner = jaxprs.entered(eqn)[program]
            outside = jaxprs.same_inside(eqn, program)
            chains = {
                var: _chain(atom, same)
                for var, atom in zip(
                    jaxprs.open_body(inner).invars, outside, strict=True
                )
                if atom is not None
            }
            return self.follow(inner, flags, here.inside(eqn, program), chains)

        return _through(eqn, operands, enter)


def _through(eqn: Eqn, operands: Flags, enter: Callable[[int, Flags], Flags]) -> Flags:
    """Passes flags from the operands of an equation through its programs."""
    name = eqn.primitive.name
    if name == "scan":
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry

        def step(carry: Flags) -> Flags:
            return enter(0, [*operands[:first], *carry, *operands[last:]])

        return _settle(operands[first:last], step)
    if name == "while":
        loop = jaxprs.read_while(eqn)
        first, last = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts

        def turn(carry: Flags) -> Flags:
            enter(0, [*operands[:first], *carry])
            return enter(1, [*operands[first:last], *carry])

        return _settle(operands[last:], turn)
    if name == "cond":
        branches = len(jaxprs.entered(eqn))
        return _either([enter(k, operands[1:]) for k in range(branches)])
    if jaxprs.entered(eqn):
        return enter(0, operands)
    return [any(operands)] * len(eqn.outvars)


def _settle(carry: Flags, step: Callable[[Flags], Flags]) -> Flags:
    """Repeats a loop's step until its carry gains no flag."""
    while True:
        results = step(carry)
        gained = _either([carry, results[: len(carry)]])
        if gained == carry:
            return [*carry, *results[len(carry) :]]
        carry = gained


def _either(flags: Sequence[Flags]) -> Flags:
    return [any(each) for each in zip(*flags, strict=True)]


# --- backwards: which results are used --------------------------------------------


def _mark_live(jaxpr: Jaxpr, live_out: Flags, place: Place, found: set[Place]) -> Flags:
    """Notes the calls whose results are used; returns which inputs are."""
    body = jaxprs.open_body(jaxpr)
    live = {
        var
        for var, is_live in zip(body.outvars, live_out, strict=True)
        if is_live and not jaxprs.is_literal(var)
    }
    for i, eqn in reversed(list(enumerate(body.eqns))):
        outs = [var in live for var in eqn.outvars]
        if not any(outs) or eqn.primitive.name == jaxprs.STOP_GRADIENT:
            continue
        if eqn.primitive.name in jaxprs.CUSTOM_RULES:
            found.add((*place, i))

        def enter(
            program: int, flags: Flags, eqn: Eqn = eqn, here: Place = (*place, i)
        ) -> Flags:
            inner = jaxprs.entered(eqn)[program]
            return _mark_live(inner, flags, (*here, program), found)

        live |= {
            atom
            for atom, used in zip(eqn.invars, _back(eqn, outs, enter), strict=True)
            if used and not jaxprs.is_literal(atom)
        }
    return [var in live for var in body.invars]


def _back(eqn: Eqn, outs: Flags, enter: Callable[[int, Flags], Flags]) -> Flags:
    """Passes flags from the results of an equation back through its programs."""
    name = eqn.primitive.name
    if name == "scan":
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        ys = outs[scan.num_carry :]
        used: Flags = []

        def step(carry: Flags) -> Flags:
            nonlocal used
            used = enter(0, [*carry, *ys])
            return used[first:last]

        _settle(outs[: scan.num_carry], step)
        return used
    if name == "while":
        loop = jaxprs.read_while(eqn)
        consts = loop.body_nconsts
        used = []

        def turn(carry: Flags) -> Flags:
            nonlocal used
            used = enter(1, carry)
            return used[consts:]

        carry = _settle(outs, turn)
        return [*([False] * loop.cond_nconsts), *used[:consts], *carry]
    if name == "cond":
        branches = len(jaxprs.entered(eqn))
        return [False, *_either([enter(k, outs) for k in range(branches)])]
    if jaxprs.entered(eqn):
        return enter(0, outs)
    return [True] * len(eqn.invars)
