"""What a call's results are made of: which inputs, and which updated averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.findings import Line
from gradtest._src.flow import routes_to_inputs, routes_to_operands
from gradtest._src.lifting import Evaluator, is_inexact
from gradtest._src.localise.steps import Atom, Constant, Slot, Step, Steps
from gradtest._src.silence.influence import moves_entries
from gradtest._src.silence.observed import line_of

Sources = frozenset[int]
_NOTHING: Sources = frozenset()
# They may put many entries into one: what they make of data is a statistic.
_REDUCING = ("reduce_", "cum", "dot_general", "argm")
_PICKING = frozenset(
    {
        "convert_element_type", "copy", "copy_p", "device_put", "optimization_barrier",
        "select_n", "sharding_constraint", "stop_gradient",
    }
)  # fmt: skip
# What an average keeps of the held one lies between these.
_LEAST_KEPT, _MOST_KEPT = 1e-6, 1 - 1e-9


@dataclasses.dataclass(frozen=True)
class Average:
    """An updated running average that the output depends on.

    Attributes:
      statistic: The number of the input that holds the average.
      kept: How much of it the updated one keeps.
      line: Where it is updated.
    """

    statistic: int
    kept: float
    line: Line | None


class Dataflow:
    """Follows the inputs of a traced call to its results.

    Where a branch or `where` is decided by what is known before the call's data are
    (flags, counters, held state), the way that is taken counts alone.

    Args:
      jaxpr: The call.
      values: Its inputs.
      data: The numbers of the inputs that are data: what the module is called with.
      state: Those that are held state.

    Attributes:
      steps: The call's steps.
      values: Its inputs.
      data: The numbers of the inputs that are data.
    """

    def __init__(
        self,
        jaxpr: jaxprs.Jaxpr,
        values: Sequence[Any],
        data: Sequence[int],
        state: Sequence[int],
    ):
        self.steps = Steps(jaxpr)
        self.values = list(values)
        self.data, self._state = frozenset(data), frozenset(state)
        places = {slot: i for i, slot in enumerate(self.steps.inputs)}
        self._undecided = frozenset(
            i for slot, i in places.items()
            if i not in self._state and self.steps.is_floating(slot)
        )  # fmt: skip
        self._sources: dict[Slot, Sources] = {
            slot: frozenset({i}) for slot, i in places.items()
        }
        self._is_statistic: set[Slot] = set()
        self._chosen = self._decisions()
        for step in self.steps.steps:
            self._follow(step)

    def of_result(self, number: int) -> Sources:
        """Returns the numbers of the inputs that a result depends on."""
        return self._of(self.steps.outputs[number])

    def is_handed_through(self, number: int, source: int) -> bool:
        """Whether a result is one of the inputs as it came."""
        atom = self.steps.outputs[number]
        return not isinstance(atom, Constant) and atom == self.steps.inputs[source]

    def is_computed(self, number: int) -> bool:
        """Whether a result is computed, and not just put elsewhere or picked.

        What a loop or branch returns that is one step here counts as picked.
        """
        if isinstance(self.steps.outputs[number], Constant):
            return True
        found = [self.steps.steps[i] for i in self.feeding([number], _only_moves)]
        return any(not _only_moves(step) for step in found) or not self.of_result(
            number
        )

    def is_data(self, step: Step) -> bool:
        """Whether a step takes something that is made of the data."""
        return any(self._of(atom) & self.data for atom in step.operands)

    def feeding(
        self,
        results: Sequence[int],
        goes_on: Callable[[Step], bool] = lambda step: True,
    ) -> set[int]:
        """Returns the numbers of the steps that some results are made of.

        Args:
          results: The numbers of the results.
          goes_on: Whether to look at what a step takes.
        """
        wanted: set[Slot] = set()

        def want(atoms: Iterable[Atom]) -> None:
            wanted.update(atom for atom in atoms if not isinstance(atom, Constant))

        want(self.steps.outputs[k] for k in results)
        found: set[int] = set()
        for i in range(len(self.steps.steps) - 1, -1, -1):
            step = self.steps.steps[i]
            places = [k for k, slot in enumerate(step.results) if slot in wanted]
            if places:
                found.add(i)
            if places and goes_on(step):
                operands = [self._of(atom) for atom in step.operands]
                for k in places:
                    used = self._used(step, k, operands)
                    want(step.operands[place] for place in used)
        return found

    def line_of_result(self, number: int) -> Line | None:
        """Returns the line of source that makes a result."""
        atom = self.steps.outputs[number]
        for step in self.steps.steps:
            if not isinstance(atom, Constant) and atom in step.results:
                return line_of(step)
        return None

    @property
    def unopened(self) -> bool:
        """Whether held state goes into a loop or branch that is one step here."""
        return any(
            step.eqn is not None
            and any(True for _ in jaxprs.subprograms(step.eqn))
            and not step.name.startswith(("reduce", "scatter", "custom_linear"))
            and any(self._of(atom) & self._state for atom in step.operands)
            for step in self.steps.steps
        )

    # --- sources -----------------------------------------------------------------

    def _of(self, atom: Atom) -> Sources:
        return (
            _NOTHING
            if isinstance(atom, Constant)
            else self._sources.get(atom, _NOTHING)
        )

    def _decisions(self) -> Mapping[Slot, np.ndarray]:
        """Returns the values of what decides branches."""
        wanted = sorted(
            {
                step.operands[0]
                for step in self.steps.steps
                if step.name in ("select_n", "cond")
                and not isinstance(step.operands[0], Constant)
            }
        )
        if not wanted:
            return {}

        def run(values: Sequence[Any]) -> list[Any]:
            _, env = self.steps.run(Evaluator(wide=False), values)
            return [env[slot] for slot in wanted]

        with execution.working_precision():
            found = jax.jit(run)(self.values)
        return dict(zip(wanted, map(np.asarray, found), strict=True))

    def _follow(self, step: Step) -> None:
        operands = [self._of(atom) for atom in step.operands]
        ways = [self._used(step, k, operands) for k in range(len(step.results))]
        for slot, used in zip(step.results, ways, strict=True):
            total = _NOTHING
            for k in used:
                total |= operands[k]
            self._sources[slot] = total
            reduces = step.name.startswith(_REDUCING) and bool(total & self.data)
            carries = any(self._is_made_of_one(step.operands[k]) for k in used)
            if reduces or carries:
                self._is_statistic.add(slot)

    def _used(
        self, step: Step, result: int, operands: Sequence[Sources]
    ) -> Sequence[int]:
        """Returns the places of the operands that a result depends on."""
        every = range(len(step.operands))
        if step.eqn is None:
            return every
        if step.name == "select_n" and not operands[0] & self._undecided:
            chosen = self._decided(step.operands[0])
            return every[1:] if chosen is None else [1 + chosen]
        wanted = [k == result for k in range(len(step.results))]
        if step.name == "cond" and not operands[0] & self._undecided:
            chosen = self._decided(step.operands[0])
            if chosen is not None:
                branch = jaxprs.entered(step.eqn)[chosen]
                routes = routes_to_inputs(branch, wanted)
                return [1 + k for k, route in enumerate(routes) if not route.is_none]
        routes = routes_to_operands(step.eqn, wanted)
        return [k for k, route in enumerate(routes) if not route.is_none]

    def _decided(self, atom: Atom) -> int | None:
        """Returns which case a decision picks, where it is the same everywhere."""
        value = atom.value if isinstance(atom, Constant) else self._chosen.get(atom)
        if value is None:
            return None
        cases = np.unique(np.asarray(value))
        return int(cases[0]) if len(cases) == 1 else None

    # --- averages ----------------------------------------------------------------

    def averages(self, outputs: Sequence[int]) -> list[Average]:
        """Returns the updated averages that some results depend on.

        Such a one is the sum of a part of a held average, and of a statistic of the
        data in the same shape.
        """
        feeding = self.steps.feeding(self.steps.outputs[k] for k in outputs)
        candidates = [
            (i, statistic)
            for i in sorted(feeding)
            for statistic in sorted(self._blended(self.steps.steps[i]))
        ]
        found: dict[int, Average] = {}
        for (i, statistic), kept in zip(
            candidates, self._kept(candidates), strict=True
        ):
            if kept.min() > _LEAST_KEPT and kept.max() < _MOST_KEPT:
                line = line_of(self.steps.steps[i])
                average = Average(statistic, float(np.mean(kept)), line)
                found.setdefault(statistic, average)
        return list(found.values())

    def _blended(self, step: Step) -> set[int]:
        """Returns the held averages that a step adds to a statistic of the data."""
        if step.name not in ("add", "sub", "add_any"):
            return set()
        if not any(map(self._is_made_of_one, step.operands)):
            return set()
        shape = tuple(self.steps.types[step.results[0]].shape)
        found: set[int] = set()
        for one, other in (step.operands, step.operands[::-1]):
            own = self._of(one)
            is_held = bool(own) and own <= self._state
            if is_held and self._is_made_of_one(other):
                found |= {i for i in own if self._has_shape(i, shape)}
        return found

    def _is_made_of_one(self, atom: Atom) -> bool:
        """Whether a value is a statistic of the data, or made of one."""
        return not isinstance(atom, Constant) and atom in self._is_statistic

    def _has_shape(self, source: int, shape: tuple[int, ...]) -> bool:
        slot = self.steps.inputs[source]
        own = tuple(self.steps.types[slot].shape)
        return self.steps.is_floating(slot) and own[len(own) - len(shape) :] == shape

    def _kept(self, candidates: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns how much of a held average each candidate keeps, by entry."""
        if not candidates:
            return []

        def run(values: Sequence[Any]) -> list[Any]:
            kept = []
            for i, statistic in candidates:
                slot = self.steps.steps[i].results[0]

                def of(held: Any, slot: Slot = slot, place: int = statistic) -> Any:
                    at = [*values[:place], held, *values[place + 1 :]]
                    return self.steps.run(Evaluator(wide=False), at)[1][slot]

                held = jnp.asarray(values[statistic])
                kept.append(jax.jvp(of, (held,), (jnp.ones_like(held),))[1])
            return kept

        with execution.working_precision():
            return [np.asarray(each, np.float64) for each in jax.jit(run)(self.values)]


def _only_moves(step: Step) -> bool:
    """Whether a step picks values or puts them elsewhere; loops may do no more."""
    is_inner = step.eqn is not None and any(True for _ in jaxprs.subprograms(step.eqn))
    return is_inner or moves_entries(step) or step.name in _PICKING


def is_real(value: Any) -> bool:
    """Whether a value is an array of real or complex numbers."""
    return is_inexact(getattr(value, "dtype", None))
