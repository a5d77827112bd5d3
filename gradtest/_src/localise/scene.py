"""All values inside of a claim at one point, and how much each matters.

A scene is made by one compiled program: it evaluates the claim with every candidate's
result shifted by an argument, and pulls cotangents back to the shifts. So what any
change of one result would do can be asked again and again without compiling anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import execution, seeding
from gradtest._src.case import Case, norm
from gradtest._src.claims import Claim
from gradtest._src.inputs import Point, Role
from gradtest._src.kit import array_constants
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.localise.source import expression
from gradtest._src.localise.steps import Atom, Constant, Slot, Step, Steps

Values = list[Any]

# How many cotangents tell whether a change explains the gap.
PROBES = 3
# Beyond this many entries in all values together no scene is made.
MOST_ENTRIES = 8_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A claim at one point.

    Attributes:
      steps: The claim's equations.
      values: What each value is, by slot, in float64.
      outputs: What the claim returns.
      truth: What it should return.
      pulled: For each of some cotangents of the outputs, what it becomes at the first
        result of each candidate, by the candidate's number.
      wanted: What each of these cotangents sees of the gap: the sum that a change of
        a candidate's result must have with what was pulled back, for the gap to close.
    """

    steps: Steps
    values: dict[Slot, np.ndarray]
    outputs: Values
    truth: Values
    pulled: list[dict[int, np.ndarray]]
    wanted: list[float]

    def read(self, atom: Atom) -> np.ndarray:
        """Returns the value of an operand."""
        if isinstance(atom, Constant):
            return np.asarray(widen(atom.value))
        return self.values[atom]

    def step(self, number: int) -> Step:
        """Returns a step by its number."""
        return self.steps.steps[number]

    def operands(self, step: Step) -> Values:
        """Returns what a step takes."""
        return [self.read(atom) for atom in step.operands]

    def result(self, step: Step) -> np.ndarray:
        """Returns the first result of a step."""
        return self.values[step.results[0]]


def relative_gap(outputs: Values, truth: Values, beside: Values) -> float:
    """Returns the largest relative gap of all outputs, each against its own size."""
    largest = 0.0
    for output, true, claimed in zip(outputs, truth, beside, strict=True):
        scale = max(norm(true), norm(claimed))
        gap = norm(np.asarray(output) - true)
        if not np.isfinite(gap):
            return np.inf
        largest = max(largest, gap / scale if scale else gap)
    return largest


class Stage:
    """Makes the scenes of one claim, and tells what a change of one result does."""

    def __init__(
        self, case: Case, claim: Claim, steps: Steps, candidates: Sequence[int]
    ):
        self.case, self.claim, self.steps = case, claim, steps
        self.candidates = list(candidates)
        self._places = {number: k for k, number in enumerate(self.candidates)}
        self._zeros = [
            np.zeros(steps.types[slot].shape, _wide(steps.types[slot].dtype))
            for slot in (steps.steps[i].results[0] for i in self.candidates)
        ]
        self._constants = array_constants([steps.jaxpr])

    def scene(self, point: Point, seed: Values, truth: Values) -> Scene:
        """Returns the scene at a point, for one seed."""
        generator = seeding.generator(self.case.key, "localise", self.case.trial)
        found = self._run(point, seed, self._zeros, None)
        outputs, values = execution.to_host(found[:2])
        pulled, wanted = [], []
        for _ in range(PROBES):
            cotangents = []
            seen = 0.0
            for output, true in zip(outputs, truth, strict=True):
                drawn = seeding.normal(generator, true.shape, true.dtype)
                scale = max(norm(true), norm(output)) or 1.0
                drawn = np.asarray(drawn) / scale
                cotangents.append(drawn)
                seen += float(np.sum((drawn * (true - output)).real))
            back = execution.to_host(self._run(point, seed, self._zeros, cotangents)[2])
            pulled.append(dict(zip(self.candidates, back, strict=True)))
            wanted.append(seen)
        slots = range(len(self.steps.types))
        known = dict(zip((s for s in slots if s in self._kept), values, strict=True))
        return Scene(self.steps, known, outputs, truth, pulled, wanted)

    def outputs(
        self, point: Point, seed: Values, shifts: Mapping[int, np.ndarray]
    ) -> Values:
        """Returns what the claim gives where some steps' first results are shifted."""
        every = list(self._zeros)
        for number, shift in shifts.items():
            place = self._places[number]
            every[place] = np.asarray(shift, every[place].dtype)
        return execution.to_host(self._run(point, seed, every, None)[0])

    def describe(self, slot: Slot) -> str:
        """Says what a value of the program is: an argument, or the result of a line."""
        return self._names.get(slot) or "another value"

    @functools.cached_property
    def _names(self) -> dict[Slot, str]:
        inputs = self.case.program.inputs
        leaves = [*inputs.moving, *inputs.of_role(Role.HELD)]
        seed = "the tangent" if self.claim.mode == "fwd" else "the cotangent"
        if not (self.claim.is_autodiff or self.claim.by_hand):
            seed = "1"  # a gradient by hand has no cotangent
        count = len(self.steps.inputs)
        names = [*(leaf.name for leaf in leaves)][:count]
        names += [seed] * (count - len(names))
        found = {
            slot: expression(step.place)
            for step in self.steps.steps
            if step.place is not None
            for slot in step.results
        }
        return found | dict(zip(self.steps.inputs, names, strict=True))

    @functools.cached_property
    def _kept(self) -> set[Slot]:
        """The values that a scene keeps: all that are arrays of numbers."""
        made = set(self.steps.inputs)
        for step in self.steps.steps:
            made.update(step.results)
        return {
            slot
            for slot in made
            if getattr(self.steps.types[slot], "dtype", None) is not None
            and not jax.dtypes.issubdtype(
                self.steps.types[slot].dtype, jax.dtypes.extended
            )
        }

    def _run(
        self, point: Point, seed: Values, shifts: Values, cotangents: Values | None
    ) -> tuple[Values, Values, Values]:
        moving, held, _ = self.case.bench.lifted_arguments(point)
        arguments = [*moving, *held, *[widen(s) for s in seed]]
        known = self.case.program.closed_over_values(point)
        consts = [widen(known.get(id(c), c)) for c in self._constants]
        if cotangents is None:
            cotangents = [
                np.zeros(getattr(a, "shape", ()), _wide(a.dtype))
                for a in self.claim.jaxpr.out_avals
            ]
        at = [arguments, consts, shifts, cotangents]
        # Shared by all claims of this structure, as every compiled program is.
        key = ("localise", self.steps.key, tuple(self.candidates), _shapes(at))
        compiled = execution.cached(
            key, lambda: execution.lifted(self._program, at, mesh=self.claim.mesh)
        )
        return compiled(*at)

    def _program(self, arguments: Any, consts: Any, shifts: Any, seeds: Any) -> Any:
        hoisted = dict(zip(map(id, self._constants), consts, strict=True))

        def shifted(shifts: Any) -> Any:
            def changed(number: int, value: Any) -> Any:
                place = self._places.get(number)
                return value if place is None else value + shifts[place]

            run = Evaluator(hoisted=hoisted)
            outputs, env = self.steps.run(run, arguments, changed)
            kept = [env[slot] for slot in sorted(self._kept)]
            return outputs, kept

        outputs, pull, values = jax.vjp(shifted, shifts, has_aux=True)
        (back,) = pull([s.astype(o.dtype) for s, o in zip(seeds, outputs, strict=True)])
        return outputs, values, back


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves = jax.tree_util.tree_leaves(execution.shapes_of(tree))
    return tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def _wide(dtype: Any) -> Any:
    kind = jax.numpy.issubdtype(dtype, jax.numpy.complexfloating)
    return np.complex128 if kind else np.float64
