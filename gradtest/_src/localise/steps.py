"""A program as one list of steps, its calls opened, each with its line of source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr, Place
from gradtest._src.lifting import Evaluator, is_inexact
from gradtest._src.structure import structure_key

# Loops of so many turns, and equations in all of them, are written out.
_MOST_TURNS, _MOST_IN_LOOP = 32, 500

# A value's number, in the order in which the values are made.
Slot = int


@dataclasses.dataclass(frozen=True)
class Constant:
    """An operand that is written into the program; one number is a literal."""

    value: Any
    is_literal: bool


Atom = Slot | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation, with the values that it takes and makes.

    Attributes:
      name: The name of its primitive.
      eqn: The equation; never a plain call. None for what hands arrays to the turns of
        a loop and puts their results together: see `compute`.
      operands: What it takes.
      results: What it makes.
      place: The user's line that it was traced from.
      compute: Makes the one result of the operands where there is no equation.
      scope: The modules and named scopes around it, outermost first.
    """

    name: str
    eqn: Eqn | None
    operands: tuple[Atom, ...]
    results: tuple[Slot, ...]
    place: Place | None
    compute: Callable[..., Any] | None = None
    scope: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation."""
        return self.eqn.params if self.eqn is not None else {}

    @property
    def literals(self) -> list[int]:
        """The places of the operands that are numbers of the source."""
        return [
            i
            for i, atom in enumerate(self.operands)
            if isinstance(atom, Constant) and atom.is_literal
        ]


class Steps:
    """A program's equations in the order in which they run, calls opened.

    Attributes:
      jaxpr: The program.
      steps: The equations.
      inputs: The program's arguments.
      outputs: Its results.
      types: Shape and dtype of each value in the program itself, by slot.
    """

    def __init__(self, jaxpr: Jaxpr):
        self.jaxpr = jaxpr
        self.steps: list[Step] = []
        self.types: list[Any] = []
        body = jaxprs.open_body(jaxpr)
        self.inputs: list[Slot] = [self._slot(var.aval) for var in body.invars]
        self.outputs: list[Atom] = self._open(jaxpr, self.inputs, None, None)

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for programs of the same structure."""
        return structure_key(self.jaxpr)

    def _slot(self, aval: Any) -> Slot:
        self.types.append(aval)
        return len(self.types) - 1

    def _open(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[Atom],
        place: Place | None,
        around: Place | None,
        scope: tuple[str, ...] = (),
    ) -> list[Atom]:
        """Adds the equations of a program.

        Args:
          jaxpr: The program.
          arguments: Its arguments.
          place: Where all of its equations stand, if it is a library's.
          around: Where those stand that have no line of their own.
          scope: The modules around all of them.
        """
        body = jaxprs.open_body(jaxpr)
        env: dict[Any, Atom] = {
            var: Constant(const, is_literal=False)
            for var, const in zip(body.constvars, body.consts, strict=True)
        }
        env.update(zip(body.invars, arguments, strict=True))

        def read(atom: Any) -> Atom:
            if jaxprs.is_literal(atom):
                value = np.asarray(atom.val, dtype=atom.aval.dtype)
                return Constant(value, is_literal=True)
            return env[atom]

        for eqn in body.eqns:
            operands = [read(atom) for atom in eqn.invars]
            at = place or jaxprs.users_place(eqn) or around
            names = (*scope, *jaxprs.scope_names(eqn))
            if eqn.primitive.name in jaxprs.CALLS | jaxprs.CUSTOM_RULES:
                (inner,) = jaxprs.entered(eqn)
                within = at if place or jaxprs.calls_library(eqn) else None
                results = self._open(inner, operands, within, at, names)
            elif self._is_short_loop(eqn):
                results = self._turns(eqn, operands, place, at, names)
            else:
                slots = tuple(self._slot(var.aval) for var in eqn.outvars)
                name = eqn.primitive.name
                self.steps.append(
                    Step(name, eqn, tuple(operands), slots, at, scope=names)
                )
                results = list(slots)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in body.outvars]

    def _is_short_loop(self, eqn: Eqn) -> bool:
        """Whether a loop can be written out turn by turn."""
        if eqn.primitive.name != "scan":
            return False
        scan = jaxprs.read_scan(eqn)
        size = sum(1 for _ in jaxprs.walk(scan.body))
        return 0 < scan.length <= _MOST_TURNS and scan.length * size <= _MOST_IN_LOOP

    def _turns(
        self,
        eqn: Eqn,
        operands: list[Atom],
        place: Place | None,
        around: Place | None,
        scope: tuple[str, ...],
    ) -> list[Atom]:
        """Adds the equations of a loop, turn after turn."""
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        consts, carry, arrays = operands[:first], operands[first:last], operands[last:]
        taken = scan.body.in_avals[last:]
        turns = range(scan.length)
        given: dict[int, list[Atom]] = {}
        for turn in reversed(turns) if scan.reverse else turns:
            parts = [
                self._made("loop_part", functools.partial(_part, turn), [array], aval)
                for array, aval in zip(arrays, taken, strict=True)
            ]
            results = self._open(
                scan.body, [*consts, *carry, *parts], place, around, scope
            )
            carry, given[turn] = results[: len(carry)], results[len(carry) :]
        stacked = [
            self._made("loop_whole", _stacked, [given[t][k] for t in turns], var.aval)
            for k, var in enumerate(eqn.outvars[len(carry) :])
        ]
        return [*carry, *stacked]

    def _made(
        self, name: str, compute: Callable[..., Any], operands: list[Atom], aval: Any
    ) -> Slot:
        slot = self._slot(aval)
        step = Step(name, None, tuple(operands), (slot,), None, compute)
        self.steps.append(step)
        return slot

    def run(
        self,
        evaluator: Evaluator,
        arguments: Sequence[Any],
        changed: Callable[[int, Any], Any] = lambda _, value: value,
        rewired: Callable[[int, Atom], Atom] = lambda _, atom: atom,
    ) -> tuple[list[Any], dict[Slot, Any]]:
        """Evaluates the program.

        Args:
          evaluator: How each equation is evaluated.
          arguments: The program's arguments.
          changed: Gives the first result of a step, by the step's number, its value.
          rewired: Gives a step, by its number, another operand for one of its own.

        Returns:
          The program's results, and every value by slot.
        """
        env: dict[Slot, Any] = dict(zip(self.inputs, arguments, strict=True))

        def read(atom: Atom) -> Any:
            if not isinstance(atom, Constant):
                return env[atom]
            value = evaluator.hoisted.get(id(atom.value), atom.value)
            return evaluator.widen(value, value)

        for i, step in enumerate(self.steps):
            operands = [read(rewired(i, atom)) for atom in step.operands]
            if step.eqn is None:
                assert step.compute is not None
                results = [step.compute(*operands)]
            else:
                results = list(evaluator.apply(step.eqn, operands))
            results = [
                evaluator.widen(result, self.types[slot])
                for slot, result in zip(step.results, results, strict=True)
            ]
            if results:
                results[0] = changed(i, results[0])
            env.update(zip(step.results, results, strict=True))
        return [read(atom) for atom in self.outputs], env

    def feeding(self, outputs: Iterable[Atom]) -> set[int]:
        """Returns the numbers of the steps that some values are computed from."""
        wanted = {atom for atom in outputs if not isinstance(atom, Constant)}
        found = set()
        for i in range(len(self.steps) - 1, -1, -1):
            step = self.steps[i]
            if wanted.isdisjoint(step.results):
                continue
            found.add(i)
            wanted.update(a for a in step.operands if not isinstance(a, Constant))
        return found

    def reached_from(self, slots: Iterable[Slot]) -> set[int]:
        """Returns the numbers of the steps whose results depend on some values."""
        reached, found = set(slots), set()
        for i, step in enumerate(self.steps):
            if any(a in reached for a in step.operands if not isinstance(a, Constant)):
                found.add(i)
                reached.update(step.results)
        return found

    def is_floating(self, slot: Slot) -> bool:
        """Whether a value is of a floating or complex dtype."""
        return is_inexact(getattr(self.types[slot], "dtype", None))


def _part(turn: int, array: Any) -> Any:
    return array[turn]


def _stacked(*parts: Any) -> Any:
    return jnp.stack(parts)
