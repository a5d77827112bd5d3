"""What a claim should return, in either mode, and which of its results do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import dataflow, execution, jaxprs, seeding
from gradtest._src.case import Case
from gradtest._src.claims import Claim
from gradtest._src.findings import Finding, Verdict
from gradtest._src.hand_written import COTANGENT
from gradtest._src.inputs import Point
from gradtest._src.kit import pushforward
from gradtest._src.lifting import Evaluator, Recorder, widen
from gradtest._src.localise.scene import relative_gap
from gradtest._src.localise.steps import Steps

Values = list[Any]


class Target:
    """A claim that is wrong at a point, for a seed, and the truth there.

    Attributes:
      steps: The claim's equations, with the lines of what is hand-written in them.
      point: Where it is wrong.
      seed: The cotangents, or tangents, for which it is.
      claimed: What it returns: the function's results, where it has them, first.
      truth: What it should return; None where that is not known entry by entry.
      wrong: Which of its results are wrong.
      findings: What was found of it.
    """

    def __init__(self, case: Case, claim: Claim, findings: Sequence[Finding] = ()):
        self.case, self.claim = case, claim
        self.findings = findings
        self.steps = _steps(case, claim)
        self.point, self.seed = case.point, list(case.seed)
        if claim is case.bench.forward:
            self.seed = list(case.tangents)
        self._exactly: Any = None
        self.claimed, self.truth = self._read(self.point, self.seed)
        self.wrong = self._wrong()
        if not self.wrong and self._takes_seed:
            # Right for the cotangent 1, it may not be for another.
            seed = [np.asarray(widen(s) * COTANGENT) for s in self.seed]
            self.claimed, self.truth = self._read(self.point, seed)
            self.wrong = self._wrong()
            self.seed = seed if self.wrong else self.seed
        if not self.wrong:  # differences alone speak against it
            self.truth, self.wrong = None, self._named(findings)

    @property
    def _takes_seed(self) -> bool:
        """Whether the claim looks at its cotangent: a gradient by hand has none."""
        return self.claim.is_autodiff or bool(self.claim.by_hand)

    def _read(self, point: Point, seed: Values) -> tuple[Values, Values | None]:
        bench = self.case.bench
        if self.claim is bench.forward:
            readings = bench.read(point, tangents=seed)
            assert readings.slopes is not None
            values = readings.claimed_values or readings.values
            claimed = [*values, *readings.slopes]
            try:
                return claimed, [*readings.values, *self._tangents(point, seed)]
            except Exception:  # whatever differentiating a program may raise
                return claimed, None
        tangents = self.case.tangents if bench.forward else ()
        readings = bench.read(point, seed=seed, tangents=tangents)
        claimed = [*(readings.claimed_values or ()), *readings.claimed]
        if readings.exact is None:
            return claimed, None
        values = readings.values if readings.claimed_values is not None else []
        return claimed, [*values, *readings.exact]

    def _tangents(self, point: Point, seed: Values) -> Values:
        """Returns the rule-free derivative along tangents."""
        program = self.case.program
        constants = self.case.bench.lifted_constants(point)
        names = list(constants)
        moving, held, _ = self.case.bench.lifted_arguments(point)
        arguments = [moving, held, list(map(widen, seed)), list(constants.values())]
        if self._exactly is None:
            solver_only = frozenset(dataflow.solver_only_stops(program.jaxpr))

            def exactly(moving: Any, held: Any, tangents: Any, consts: Any) -> Any:
                run = Evaluator(
                    hoisted=dict(zip(names, consts, strict=True)),
                    stops=Recorder(),
                    solver_only=solver_only,
                )
                return pushforward(program, run, moving, held, tangents)[1]

            self._exactly = execution.lifted(exactly, arguments)
        return list(execution.to_host(self._exactly(*arguments)))

    def elsewhere(self) -> tuple[Point, Values, Values] | None:
        """Returns another point and seed, and what is true there."""
        case = self.case
        drawn = case.program.inputs.draw(case.key, case.trial + 1)
        point = case.at(drawn).perturbed(0.03, "elsewhere").point
        generator = seeding.generator(case.key, "elsewhere", case.trial)
        seed = self.seed
        if self._takes_seed:
            seed = [
                widen(s) * (0.6 + 0.8 * generator.random(np.shape(s)))
                for s in self.seed
            ]
        truth = self._read(point, seed)[1]
        if truth is None or not all(np.isfinite(t).all() for t in truth):
            return None
        return point, seed, truth

    def _named(self, findings: Sequence[Finding]) -> list[int]:
        """Returns the results that findings are about."""
        program = self.case.program
        items: Sequence[Any] = self.case.leaves
        if self.claim.mode == "fwd":
            items = program.outputs
        names = {f.name for f in findings if f.verdict is Verdict.FAIL}
        first = len(self.claimed) - len(items)
        return [first + i for i, item in enumerate(items) if item.name in names]

    def _wrong(self) -> list[int]:
        if self.truth is None:
            return list(range(len(self.claimed)))
        return [
            i
            for i, (claimed, true) in enumerate(
                zip(self.claimed, self.truth, strict=True)
            )
            if not relative_gap([claimed], [true], [claimed]) <= 10 * self.case.rtol
        ]

    def feeding(self, outputs: Sequence[int]) -> set[int]:
        """Returns the steps of users' that feed some of the results."""
        found = self.steps.feeding([self.steps.outputs[i] for i in outputs])
        return {i for i in found if self.steps.steps[i].place is not None}


def _steps(case: Case, claim: Claim) -> Steps:
    """Returns the steps of a claim, with the lines of what is hand-written in it."""
    arguments = [list(case.point.moving), list(case.program.held(case.point))]
    seed = list(case.seed if claim is not case.bench.forward else case.tangents)
    if claim.mode == "fwd":
        seed = [
            np.asarray(tangent).astype(leaf.dtype)
            for tangent, leaf in zip(seed, case.leaves, strict=True)
        ]
    try:
        with execution.user_code(), jaxprs.hand_written_lines():
            # The wrapper is new to JAX, which remembers traces by function.
            traced = jax.make_jaxpr(lambda *at: claim.call(*at))(*arguments, seed)
            steps = Steps(jaxprs.expand_all(traced))
    except Exception:  # what runs once need not run twice
        return Steps(claim.jaxpr)
    same = len(steps.outputs) == len(claim.jaxpr.out_avals)
    return steps if same else Steps(claim.jaxpr)
