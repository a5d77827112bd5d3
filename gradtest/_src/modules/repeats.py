"""Whether two calls of a function at one point, with fixed keys, are the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.devices import spanning
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.inputs import Point
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.program import Program

# Makes a key of a number: one that is no argument may be the time, in whole seconds.
_MAKES_KEY = "random_seed"
_ONE_TICK = 1.05

_REMEDY = (
    "draw every random number from the module's streams (self.make_rng, nnx.Rngs), "
    "and pass all else as an input or a variable"
)


class Repeat:
    """A traced function, to be traced and run again.

    Args:
      program: What the first trace gave.
      trace: Traces the function once more.
    """

    def __init__(self, program: Program, trace: Callable[[], Program]):
        self._program, self._trace = program, trace
        self._started = time.monotonic()

    def differs(self, point: Point) -> Finding | None:
        """Returns a finding where a second trace, or a second run, differs."""
        jaxpr, again = self._program.jaxpr, self._trace().jaxpr
        if list(_shape_of(jaxpr)) != list(_shape_of(again)):
            return _finding(
                "traced twice with the same keys, the module gives two programs of "
                "unlike structure: it branches on a random number or on a state "
                "outside of its variables"
            )
        numbers = zip(_numbers(jaxpr), _numbers(again), strict=True)
        changed = [(one, two) for one, two in numbers if not _same(one, two)]
        if changed:
            return _finding(
                "traced twice with the same keys, the module computes with other "
                f"numbers ({_told(*changed[0])}): it draws from Python's or NumPy's "
                "random numbers, from a key that it makes itself (of the time, say), "
                "or from a counter outside of its variables"
            )
        return self._runs_differ(point)

    def differs_later(self, point: Point) -> Finding | None:
        """Asks again where the module makes keys: a second may have to pass."""
        if _MAKES_KEY not in jaxprs.primitives(self._program.jaxpr):
            return None
        time.sleep(max(0.0, _ONE_TICK - (time.monotonic() - self._started)))
        return self.differs(point)

    def _runs_differ(self, point: Point) -> Finding | None:
        """Runs a program that calls back twice; no other can differ from itself."""
        if jaxprs.CALLBACKS.isdisjoint(jaxprs.primitives(self._program.jaxpr)):
            return None
        held = self._program.held(point)
        with execution.working_precision():
            run = jax.jit(self._program.call)
            one, two = (execution.to_host(run(point.moving, held)) for _ in range(2))
        if all(map(_same, one, two)):
            return None
        return _finding(
            "run twice with the same keys, the module returns other values: a callback "
            "in it draws random numbers, or reads a state that changes"
        )


def _shape_of(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yields what a program is made of, numbers left out."""
    for eqn in jaxprs.walk(jaxpr):
        yield eqn.primitive.name, [str(out.aval) for out in eqn.outvars]
        yield [jaxprs.is_literal(operand) for operand in eqn.invars]


def _numbers(jaxpr: Jaxpr) -> list[Any]:
    """Returns every number in a program: constants, literals, plain parameters."""
    found = list(jaxprs.nested_consts(jaxpr))
    for eqn in jaxprs.walk(jaxpr):
        literals: list[Any] = [each for each in eqn.invars if jaxprs.is_literal(each)]
        found += [literal.val for literal in literals]
        found += [
            value
            for _, value in sorted(eqn.params.items())
            if isinstance(value, bool | int | float | np.ndarray | np.generic)
        ]
    return found


def _same(one: Any, two: Any) -> bool:
    first, second = _plain(one), _plain(two)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first.tobytes() == second.tobytes()


def _plain(value: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(spanning.whole(value) if isinstance(value, jax.Array) else value)


def _told(one: Any, two: Any) -> str:
    first, second = _plain(one), _plain(two)
    if first.shape != second.shape or not first.size:
        return f"arrays of shapes {list(first.shape)} and {list(second.shape)}"
    place = np.flatnonzero(first.ravel() != second.ravel())
    entry = int(place[0]) if len(place) else 0
    return f"{first.ravel()[entry]:.6g} once, then {second.ravel()[entry]:.6g}"


def _finding(says: str) -> Finding:
    cause = Cause("not repeatable", says, _REMEDY)
    return Finding(
        "all parameters",
        (),
        "",
        Verdict.FAIL,
        Gap.AGREEMENT,
        size=math.inf,
        judged_by="the module itself",
        cause=cause,
        check="repeat",
    )
