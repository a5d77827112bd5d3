"""A rule's call as a function that can be checked at the values that reach it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs, rules
from gradtest._src.inputs import Inputs, Point, Recorded
from gradtest._src.jaxprs import Eqn
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.program import Program
from gradtest._src.reach import Call, find_calls
from gradtest._src.rules import RuleUse


@dataclasses.dataclass(frozen=True)
class WideCall:
    """A call in a program that was traced in float64, and what it closes over."""

    call: Call
    consts: list[Any]


class TracedAnew:
    """Traces a program again, and finds the calls of rules in it."""

    def __init__(
        self, trace: Callable[[Inputs, Point], Program], inputs: Inputs, point: Point
    ):
        self._trace, self._inputs, self._point = trace, inputs, point

    def again(self, use: RuleUse) -> Eqn:
        """Returns the same call in a new trace."""
        program = self._trace(self._inputs, self._point)
        return jaxprs.equation_at(program.jaxpr, use.call.place)

    @functools.cached_property
    def _wide_point(self) -> tuple[Inputs, Point]:
        return self._inputs.widened(self._point)

    @functools.cached_property
    def _wide_program(self) -> Program:
        with jax.enable_x64(True):
            return self._trace(*self._wide_point)

    def in_float64(self, use: RuleUse) -> WideCall | None:
        """Returns a call of the same rule and shapes, traced with float64 inputs."""
        first = use.source.num_consts
        wanted = [aval.shape for aval in jaxprs.operand_types(use.call.eqn)[first:]]
        program = self._wide_program
        for call in find_calls(program.jaxpr, [True] * len(program.jaxpr.in_avals)):
            source = jaxprs.read_rule(call.eqn)
            types = jaxprs.operand_types(call.eqn)[source.num_consts :]
            same = [aval.shape for aval in types] == wanted
            if same and source.identity == use.source.identity:
                return self._with_consts(call, source.num_consts)
        return None

    def _with_consts(self, call: Call, count: int) -> WideCall | None:
        """Reads what the call closes over: in float64 a table can be a longer one."""
        if not count:
            return WideCall(call, [])
        with jax.enable_x64(True):
            chosen = {call.place: call.eqn}
            taps = rules.run(self._wide_program, self._wide_point[1], chosen)
        samples = rules.reached(taps[call.place])
        return WideCall(call, list(samples[0][:count])) if samples else None


class RuleCall:
    """A rule's call as a function of its operands, finite where they move.

    An operand that holds infinities (masked logits) moves in its finite entries; the
    others are handed over as further arguments. Results are zero where the rule's own
    are infinite.
    """

    def __init__(self, use: RuleUse, anew: TracedAnew | None = None):
        self.use = use
        self.call = use.call
        self.__name__ = use.rule.name
        self._anew = anew
        # Stands for the call while it is traced anew in float64.
        self.wide: WideCall | None = None
        self._same = _same_operands(use)
        self._split = [
            i
            for i in self.argnums()
            if not all(_is_finite(sample[i]) for sample in use.samples)
        ]

    def __call__(self, *arguments: Any) -> list[Any]:
        count = len(self.call.eqn.invars)
        operands = [arguments[i] for i in self._same]
        if self.wide is not None:
            first = self.use.source.num_consts
            operands = [*self.wide.consts, *operands[first:]]
        rest = list(arguments[count:])
        for i in self._split:
            mask, held = rest.pop(0), rest.pop(0)
            operands[i] = jnp.where(mask, operands[i], held)
        call = self.call if self.wide is None else self.wide.call
        results = list(rules.as_function(call)(*operands))
        for k in self._infinite:
            results[k] = jnp.where(rest.pop(0), results[k], 0)
        return results

    def closed_over(self) -> dict[int, int]:
        """Returns which operand has each traced value that the rule closes over.

        By the value's `id`; -1 where no operand has it.
        """
        return {
            tracer: next(
                (i for i, chain in enumerate(self.call.same) if variable in chain), -1
            )
            for tracer, variable in jaxprs.closed_over(self.call.eqn).items()
        }

    def renew(self) -> None:
        """Takes the call from a new trace, where the rule sees what is differentiated.

        JAX keeps the residuals' tree of the last pattern that a traced call was
        differentiated in, so each pattern needs a call of its own.
        """
        if self.use.source.symbolic_zeros and self._anew is not None:
            self.call = dataclasses.replace(self.call, eqn=self._anew.again(self.use))

    @functools.cached_property
    def _results(self) -> list[list[Any]]:
        """The rule's results at each sample, where it was given infinities."""
        if not self._split:
            return []
        with execution.working_precision():
            return [
                [np.asarray(value) for value in rules.as_function(self.call)(*sample)]
                for sample in self.use.samples
            ]

    @functools.cached_property
    def _infinite(self) -> list[int]:
        """The results that have infinite entries."""
        columns = zip(*self._results, strict=True)
        return [
            k
            for k, column in enumerate(columns)
            if is_inexact(column[0].dtype) and any(map(_has_infinity, column))
        ]

    def argnums(self) -> tuple[int, ...]:
        """Returns the operands that are differentiated."""
        found = [
            i
            for i, aval in enumerate(jaxprs.operand_types(self.use.call.eqn))
            if i >= self.use.source.num_consts
            and is_inexact(aval.dtype)
            and aval.size
            and self._same[i] == i
        ]
        reached = [i for i in found if self.use.moving[i]]
        return tuple(reached or found)

    def names(self) -> list[str]:
        """Returns the names of the arguments."""
        known, first = self.use.source.operands, self.use.source.num_consts
        count = len(self.call.eqn.invars)
        fits = len(known) == count - first
        names = [
            known[i - first] if fits and i >= first else f"operand {i}"
            for i in range(count)
        ]
        extra = [f"{names[i]}.{part}" for i in self._split for part in ("mask", "rest")]
        return [*names, *extra, *(f"result[{k}].mask" for k in self._infinite)]

    def arguments(self) -> tuple[Recorded, ...]:
        """Returns the values of the arguments, one for each sample."""
        columns = [list(column) for column in zip(*self.use.samples, strict=True)]
        extra = []
        for i in self._split:
            masks = [np.isfinite(widen(value)) for value in columns[i]]
            extra += [masks, columns[i]]
            columns[i] = [
                np.where(mask, value, np.zeros((), value.dtype))
                for mask, value in zip(masks, columns[i], strict=True)
            ]
        for k in self._infinite:
            extra.append([np.isfinite(widen(row[k])) for row in self._results])
        return tuple(Recorded(tuple(column)) for column in [*columns, *extra])


def _same_operands(use: RuleUse) -> tuple[int, ...]:
    """Returns, for each operand, the first one that is moved along with it.

    A library's rule may take one value twice, as of its function and as of its solver.
    """
    if jaxprs.is_users(use.source):
        return tuple(range(len(use.call.eqn.invars)))
    return rules.first_places(use.call.eqn)


def _is_finite(value: np.ndarray) -> bool:
    return bool(np.isfinite(widen(value)).all())


def _has_infinity(value: np.ndarray) -> bool:
    return bool(np.isinf(widen(value)).any())
