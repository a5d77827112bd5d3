"""What cells are compared with: the derivative as it is traced by itself.

It is evaluated in float64 and as it runs, at every point that a cell's result has a
row for; and, where that is asked, with all that rounds moved a little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import dataflow, execution, jaxprs, seeding
from gradtest._src.case import norm
from gradtest._src.cells.ways import MESH_AXIS, Derivative, Examples, Parts, Row
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.kit import array_constants
from gradtest._src.lifting import Evaluator, Jitter, is_inexact, widen
from gradtest._src.program import Values, describe

_SHAKES = 4


class LeakError(Exception):
    """A trace holds a value of another trace: something was kept between calls."""


def trace(run: Callable[..., Values], parts: Parts) -> Jaxpr:
    """Traces how a cell runs.

    Raises:
      LeakError: The trace holds a value of another trace.
      Exception: Whatever the function, its rules or JAX raise.
    """
    with execution.user_code():
        if hasattr(run, "trace"):
            jaxpr = jaxprs.expand_all(run.trace(*parts).jaxpr)
        else:
            jaxpr = jaxprs.expand_all(jax.make_jaxpr(run)(*parts))
    for stray in jaxprs.stray_values(jaxpr)[:1]:
        raise LeakError(f"a traced value is kept between calls ({describe(stray)})")
    return jaxpr


class Core:
    """What a program computes for one example, as a key for comparing it.

    In a region over devices that is the derivative that each of them runs, without the
    notes on which values vary. Anywhere else it is the program itself.
    """

    def __init__(self, jaxpr: Jaxpr, *, is_region: bool = False):
        inner = _inside(jaxpr) if is_region else jaxpr
        self._text = "" if inner is None else _VARYING.sub("", str(inner))
        # What asks for the axis may depend on how many devices there are.
        self._is_known = bool(self._text) and MESH_AXIS not in self._text
        self._consts = jaxprs.nested_consts(jaxpr)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Core) or not (self._is_known and other._is_known):
            return False
        if self._text != other._text:
            return False
        pairs = zip(self._consts, other._consts, strict=False)
        return len(self._consts) == len(other._consts) and all(
            a is b or _same_bits(a, b) for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]


def _inside(jaxpr: Jaxpr) -> Jaxpr | None:
    """Returns the derivative that each device of a region runs, if it has its mark."""
    for eqn in jaxprs.walk(jaxpr):
        if eqn.params.get("name") == "derivative":
            return next(jaxprs.subprograms(eqn))
    return None


# The types of what varies, and the casts that make it vary.
_VARYING = re.compile(r"\{[VRU]:[^}]*\}|(?<=pcast)\[[^]]*\]|(?<=pvary)\[[^]]*\]")


def _same_bits(one: Any, other: Any) -> bool:
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def lift(
    programs: Sequence[Jaxpr], parts: Sequence[Parts], islands: set[str]
) -> tuple[execution.Compiled, list[Any]]:
    """Lowers the float64 forms of several programs as one.

    Args:
      programs: What each of them is.
      parts: Their arguments.
      islands: Takes the names of primitives that ran in their own precision.

    Returns:
      The compiled program, and the constants that it takes after the arguments.
    """
    constants = array_constants(programs)

    def all_of_them(arguments: Any, consts: Any) -> list[Values]:
        hoisted = dict(zip(map(id, constants), consts, strict=True))
        run = Evaluator(hoisted=hoisted, islands=islands)
        return [
            run(program, jax.tree_util.tree_leaves(own))
            for program, own in zip(programs, arguments, strict=True)
        ]

    consts = [_wide(const) for const in constants]
    wide = [_widened(own) for own in parts]
    return execution.lifted(all_of_them, [wide, consts]), consts


def _wide(value: Any) -> Any:
    return execution.at_home(widen(value))


def _widened(parts: Parts) -> Parts:
    return jax.tree_util.tree_map(_wide, parts)


def run_lifted(
    compiled: execution.Compiled, parts: Sequence[Parts], consts: list[Any]
) -> list[Values]:
    """Evaluates programs that were lifted together."""
    return execution.to_host(compiled([_widened(own) for own in parts], consts))


class Reference:
    """The derivative traced by itself, evaluated where it is asked for."""

    def __init__(self, derivative: Derivative, examples: Examples, key: Any):
        parts = examples.at(examples.row(0))
        self.jaxpr = trace(derivative.fresh(), parts)
        self.core = Core(self.jaxpr)
        self.size = sum(1 for _ in jaxprs.walk(self.jaxpr)) or 1
        self.examples = examples
        self._key = key
        self._islands: set[str] = set()
        self._lifted, self._consts = lift([self.jaxpr], [parts], self._islands)
        self._constants = array_constants([self.jaxpr])
        run = self._evaluator(wide=False)
        self._working = execution.working(run, [*parts, self._constants])
        self._shaken: execution.Compiled | None = None
        self._memo: dict[tuple[str, Row], Values] = {}
        execution.compile_together([self._lifted, self._working])
        self._counts = [len(part) for part in parts]

    @property
    def islands(self) -> set[str]:
        """Names of primitives that what moves goes through, and that stay narrow."""
        leaves, held, seeds = self._counts
        moving = [True] * leaves + [False] * held + [True] * seeds
        return self._islands & dataflow.reached_primitives(self.jaxpr, moving)

    def move(self, examples: Examples) -> None:
        """Takes other points, of the same shapes and dtypes."""
        self.examples = examples
        self._memo.clear()

    def lifted(self, row: Row) -> Values:
        """Returns values and gradients in float64."""
        return self._read("lifted", row, self._read_lifted)

    def working(self, row: Row) -> Values:
        """Returns values and gradients as the derivative computes them by itself."""
        return self._read("working", row, self._read_working)

    def _read(self, kind: str, row: Row, read: Callable[[Row], Values]) -> Values:
        if (kind, row) not in self._memo:
            self._memo[kind, row] = read(row)
        return self._memo[kind, row]

    def _read_lifted(self, row: Row) -> Values:
        return run_lifted(
            self._lifted, [self.examples.shared([row], is_stacked=False)], self._consts
        )[0]

    def _read_working(self, row: Row) -> Values:
        parts = self.examples.shared([row], is_stacked=False)
        return execution.to_host(self._working(*parts, self._constants))

    def _evaluator(self, **settings: Any) -> Callable[..., Values]:
        constants = self._constants

        def run(moving: Any, held: Any, seed: Any, consts: Any) -> Values:
            hoisted = dict(zip(map(id, constants), consts, strict=True))
            return Evaluator(hoisted=hoisted, **settings)(
                self.jaxpr, [*moving, *held, *seed]
            )

        return run

    def losses(self, row: Row, eps: float) -> list[float]:
        """Returns how far rounding to this spacing may move values and gradients.

        Every operation's result, and every moving entry, is off by that much, at
        random: where something is decided by it (a tie, a `round`), that may flip.
        """
        here = self.lifted(row)
        most = [0.0] * len(here)
        for k in range(_SHAKES):
            there = self._read_shaken(row, eps, k)
            for i, (a, b) in enumerate(zip(here, there, strict=True)):
                moved = norm(a - b)
                most[i] = max(most[i], moved if np.isfinite(moved) else 0.0)
        return most

    def _read_shaken(self, row: Row, eps: float, k: int) -> Values:
        moving, held, seed = _widened(self.examples.shared([row], is_stacked=False))
        draw = seeding.generator(self._key, "shaken", k)
        signs = [draw.choice([-1.0, 1.0], value.shape) for value in moving]
        moving = [v * (1 + eps * s) for v, s in zip(moving, signs, strict=True)]
        shifts = eps * draw.choice([-1.0, 1.0], 64)
        arguments = [moving, held, seed, self._consts, shifts]
        if self._shaken is None:
            constants = self._constants

            def run(moving: Any, held: Any, seed: Any, consts: Any, by: Any) -> Values:
                hoisted = dict(zip(map(id, constants), consts, strict=True))
                evaluator = Evaluator(hoisted=hoisted, jitter=Jitter(by))
                return evaluator(self.jaxpr, [*moving, *held, *seed])

            self._shaken = execution.lifted(run, arguments)
        return execution.to_host(self._shaken(*arguments))

    @property
    def spacing(self) -> float:
        """The spacing of the coarsest dtype that anything is rounded to."""
        dtypes = [aval.dtype for aval in self.jaxpr.out_avals]
        for eqn in jaxprs.walk(self.jaxpr):
            dtypes += [getattr(var.aval, "dtype", None) for var in eqn.outvars]
        return max(
            float(jnp.finfo(dtype).eps) for dtype in set(filter(is_inexact, dtypes))
        )
