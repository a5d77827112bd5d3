"""A program run equation by equation, with all values kept, and pulled back the same.

The whole path that a point takes is written out: calls, loops and branches are entered.
Each equation is differentiated by itself, by JAX's own rule or the custom one that it
calls, so that what an equation does to a cotangent is seen apart from all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr, Place
from gradtest._src.lifting import Evaluator, is_inexact, widen
from gradtest._src.nans.on_numpy import QuickEvaluator

# Programs that take more steps, or more entries to keep, are not looked into.
_MOST_EVENTS, _MOST_ENTRIES = 20_000, 30_000_000

Values = list[Any]
# Takes the values of operands, returns those of the results.
Compute = Callable[..., Values]
# Takes cotangents of the results (None: no cotangent), returns those of the operands.
Pull = Callable[[Values], Values]


class TooLargeError(Exception):
    """A program takes more steps than are looked into."""


@dataclasses.dataclass(eq=False)
class Node:
    """A value of a running program.

    Attributes:
      value: The value.
      aval: Its type in the program itself.
      moves: Whether it depends on what is differentiated.
      event: What made it; None for arguments and constants.
      place: Which of the event's results it is.
    """

    value: Any
    aval: Any
    moves: bool
    event: Event | None = None
    place: int = 0


@dataclasses.dataclass(eq=False)
class Event:
    """One run of one equation.

    Attributes:
      name: The name of its primitive.
      eqn: The equation; None for what hands arrays to the turns of a loop.
      operands: What it took.
      results: What it made.
      line: The user's line that it was traced from.
      compute: What is computed, where that is not the equation.
      pull: Its derivative, where that is not asked of JAX.
    """

    name: str
    eqn: Eqn | None
    operands: list[Node]
    results: list[Node]
    line: Place | None
    compute: Compute | None = None
    pull: Pull | None = None

    @property
    def is_rule(self) -> bool:
        """Whether a custom rule is called."""
        return self.name in jaxprs.CUSTOM_RULES


# Another way to compute an equation: of which values, and how; None for the usual way.
Guard = Callable[[Event, Evaluator], "tuple[list[Node], Compute] | None"]


class Tape:
    """A program run at a point.

    Attributes:
      inputs: The values of its arguments.
      outputs: Its results.
      events: What was run, in order.
      wide: Whether it ran in float64.
    """

    def __init__(
        self,
        jaxpr: Jaxpr,
        moving: Sequence[Any],
        held: Sequence[Any],
        *,
        wide: bool = False,
        guards: Mapping[int, Guard] | None = None,
        derivatives: dict[Any, Jaxpr] | None = None,
    ):
        self.wide = wide
        self.events: list[Event] = []
        self._guards = guards or {}
        self._run = QuickEvaluator(wide=wide)
        self._lines: dict[int, Place | None] = {}
        self._entries = 0
        self._derivatives = {} if derivatives is None else derivatives
        # Derivatives are traced as the program was, whatever mode they run in.
        self._x64: bool = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        with self.settings():
            taken = [*moving, *held]
            body = jaxprs.open_body(jaxpr)
            self.inputs = [
                Node(
                    self._value(value, var.aval),
                    var.aval,
                    i < len(moving) and is_inexact(getattr(var.aval, "dtype", None)),
                )
                for i, (value, var) in enumerate(zip(taken, body.invars, strict=True))
            ]
            self.outputs = self._open(jaxpr, self.inputs, None, None)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Settings for all that is computed of the tape's values."""
        how = execution.float64 if self.wide else execution.working_precision
        with how(), np.errstate(all="ignore"):
            yield

    def _value(self, value: Any, aval: Any) -> Any:
        if self.wide:
            return self._run.widen(widen(value), aval)
        if not hasattr(value, "dtype"):
            value = np.asarray(value, dtype=aval.dtype)
        return self._run.widen(value, aval)

    # --- forwards -------------------------------------------------------------------

    def _open(
        self,
        jaxpr: Jaxpr,
        arguments: Sequence[Node],
        place: Place | None,
        around: Place | None,
    ) -> list[Node]:
        """Runs the equations of a program.

        Args:
          jaxpr: The program.
          arguments: Its arguments.
          place: Where all of its equations stand, if it is a library's.
          around: Where those stand that have no line of their own.
        """
        body = jaxprs.open_body(jaxpr)
        env: dict[Any, Node] = {
            var: Node(self._value(const, var.aval), var.aval, False)
            for var, const in zip(body.constvars, body.consts, strict=True)
        }
        env.update(zip(body.invars, arguments, strict=True))

        def read(atom: Any) -> Node:
            if not jaxprs.is_literal(atom):
                return env[atom]
            value = np.asarray(atom.val, dtype=atom.aval.dtype)
            return Node(self._value(value, atom.aval), atom.aval, False)

        for eqn in body.eqns:
            operands = [read(atom) for atom in eqn.invars]
            at = place or self._line(eqn) or around
            results = self._step(eqn, operands, place, at)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in body.outvars]

    def _line(self, eqn: Eqn) -> Place | None:
        if id(eqn) not in self._lines:
            self._lines[id(eqn)] = jaxprs.users_place(eqn)
        return self._lines[id(eqn)]

    def _step(
        self, eqn: Eqn, operands: list[Node], place: Place | None, at: Place | None
    ) -> list[Node]:
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            (inner,) = jaxprs.entered(eqn)
            within = at if place or jaxprs.calls_library(eqn) else None
            return self._open(inner, operands, within, at)
        if name == "scan":
            return self._scan(eqn, operands, place, at)
        if name == "while" and _counts_alone(eqn):
            return self._while(eqn, operands, place, at)
        if name == "cond":
            branches = jaxprs.entered(eqn)
            chosen = int(np.clip(operands[0].value, 0, len(branches) - 1))
            return self._open(branches[chosen], operands[1:], place, at)
        return self._event(Event(name, eqn, operands, [], at))

    def _event(self, event: Event) -> list[Node]:
        """Runs one equation, in the way that its guard says, if it has one."""
        eqn = event.eqn
        assert eqn is not None
        guard = self._guards.get(id(eqn))
        instead = guard(event, self._run) if guard is not None else None
        if instead is not None:
            event.operands, event.compute = instead
            results = event.compute(*[node.value for node in event.operands])
        else:
            operands = [node.value for node in event.operands]
            results = list(self._run.apply(eqn, operands))
        avals = [var.aval for var in eqn.outvars]
        return self._made(event, results, avals)

    def _made(self, event: Event, results: Values, avals: Sequence[Any]) -> list[Node]:
        moves = any(node.moves for node in event.operands)
        event.results = [
            Node(
                self._run.widen(value, aval),
                aval,
                moves and is_inexact(getattr(aval, "dtype", None)),
                event,
                i,
            )
            for i, (value, aval) in enumerate(zip(results, avals, strict=True))
        ]
        self.events.append(event)
        self._entries += sum(int(np.prod(jnp.shape(each))) for each in results)
        if len(self.events) > _MOST_EVENTS or self._entries > _MOST_ENTRIES:
            raise TooLargeError
        return event.results

    def _scan(
        self, eqn: Eqn, operands: list[Node], place: Place | None, at: Place | None
    ) -> list[Node]:
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        consts, carry, arrays = operands[:first], operands[first:last], operands[last:]
        taken = scan.body.in_avals[last:]
        parts = [
            self._parts(array, aval, scan.length, at)
            for array, aval in zip(arrays, taken, strict=True)
        ]
        given: dict[int, list[Node]] = {}
        turns = range(scan.length)
        for turn in reversed(turns) if scan.reverse else turns:
            inputs = [*consts, *carry, *(part[turn] for part in parts)]
            results = self._open(scan.body, inputs, place, at)
            carry, given[turn] = results[: len(carry)], results[len(carry) :]
        stacked = [
            self._stacked([given[turn][k] for turn in turns], var.aval, at)
            for k, var in enumerate(eqn.outvars[len(carry) :])
        ]
        return [*carry, *stacked]

    def _parts(self, array: Node, aval: Any, length: int, at: Any) -> list[Node]:
        """Cuts an array into what the turns of a loop take."""

        def pull(cotangents: Values) -> Values:
            zero = jnp.zeros(jnp.shape(array.value)[1:], array.value.dtype)
            return [jnp.stack([zero if ct is None else ct for ct in cotangents])]

        event = Event("loop_parts", None, [array], [], at, pull=pull)
        values = [array.value[turn] for turn in range(length)]
        return self._made(event, values, [aval] * length)

    def _stacked(self, parts: list[Node], aval: Any, at: Any) -> Node:
        """Puts together what the turns of a loop return."""

        def pull(cotangents: Values) -> Values:
            return list(cotangents[0])

        event = Event("loop_whole", None, parts, [], at, pull=pull)
        values = [part.value for part in parts]
        dtype = getattr(aval, "dtype", None)
        whole = jnp.stack(values) if values else jnp.zeros(aval.shape, dtype)
        return self._made(event, [whole], [aval])[0]

    def _while(
        self, eqn: Eqn, operands: list[Node], place: Place | None, at: Place | None
    ) -> list[Node]:
        loop = jaxprs.read_while(eqn)
        first, last = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts
        tested, consts, carry = operands[:first], operands[first:last], operands[last:]

        def goes_on() -> bool:
            values = [node.value for node in (*tested, *carry)]
            return bool(self._run(loop.cond, values)[0])

        while goes_on():
            carry = self._open(loop.body, [*consts, *carry], place, at)
        return carry

    # --- backwards ------------------------------------------------------------------

    def pull(self, event: Event, cotangents: Values) -> Values:
        """Returns the cotangents of an event's operands; None for those without.

        It runs under the tape's settings.

        Args:
          event: The event.
          cotangents: Those of its results; None for one that takes no part.
        """
        if event.pull is not None:
            return event.pull(cotangents)
        moving = [i for i, node in enumerate(event.operands) if node.moves]
        present = [k for k, ct in enumerate(cotangents) if ct is not None]
        given = [cotangents[k] for k in present]
        operands = [node.value for node in event.operands]
        if event.compute is not None:
            pulled = _derivative(event.compute, moving, present, operands, given)
        else:
            program = self.derivative(event, tuple(moving), tuple(present))
            pulled = self._run(program, [*operands, *given])
        found: Values = [None] * len(operands)
        for i, value in zip(moving, pulled, strict=True):
            found[i] = value
        return found

    def derivative(
        self, event: Event, moving: Sequence[int], present: Sequence[int]
    ) -> Jaxpr:
        """Traces the derivative of an event's equation.

        Args:
          event: The event.
          moving: Which operands are differentiated.
          present: Which results have a cotangent.

        Returns:
          A program of the operands and those cotangents.
        """
        eqn = event.eqn
        assert eqn is not None
        key = (id(eqn), tuple(moving), tuple(present))
        if key not in self._derivatives:
            results = jaxprs.result_types(eqn)
            types = [*jaxprs.operand_types(eqn), *(results[k] for k in present)]
            count = len(eqn.invars)

            def derivative(*values: Any) -> Values:
                operands, given = list(values[:count]), list(values[count:])
                compute = functools.partial(_bound, eqn)
                return _derivative(compute, moving, present, operands, given)

            with jax.enable_x64(self._x64), jaxprs.hand_written_lines():
                traced = jax.make_jaxpr(derivative)(*types)
                self._derivatives[key] = jaxprs.expand_all(traced)
        return self._derivatives[key]


def _bound(eqn: Eqn, *operands: Any) -> Values:
    return jaxprs.bind(eqn, operands, eqn.params)


def _derivative(
    compute: Compute,
    moving: Sequence[int],
    present: Sequence[int],
    operands: Values,
    cotangents: Values,
) -> Values:
    """Pulls cotangents of some results back to some operands."""

    def results(*values: Any) -> Values:
        whole = list(operands)
        for i, value in zip(moving, values, strict=True):
            whole[i] = value
        found = compute(*whole)
        return [found[k] for k in present]

    _, pull = jax.vjp(results, *[operands[i] for i in moving])
    return list(pull(cotangents))


def _counts_alone(eqn: Eqn) -> bool:
    """Whether a loop has one condition, and not one for each example of a batch."""
    return jaxprs.open_body(jaxprs.read_while(eqn).cond).outvars[0].aval.shape == ()
