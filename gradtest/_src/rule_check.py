"""The check of one rule: as a function of its own operands, to second order."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gradtest._src import intentions, jaxprs
from gradtest._src.case import Case
from gradtest._src.check import Check
from gradtest._src.claiming import Claims, autodiff_claims
from gradtest._src.findings import Finding, Gap, Hazard, Verdict
from gradtest._src.inputs import Inputs, Point
from gradtest._src.options import Options
from gradtest._src.program import Program
from gradtest._src.rule_call import RuleCall, TracedAnew
from gradtest._src.rules import RuleUse

# How what was left out, and what was looked at, of second derivatives begins.
SECOND_ORDER = "second order"


class RuleCheck(Check):
    """The check of one rule as a function of its own operands."""

    def __init__(self, use: RuleUse, options: Options, anew: TracedAnew | None):
        self.use = use
        self.case: Case | None = None
        self.unchecked: list[str] = []
        self._anew = anew
        self.function = call = RuleCall(use, anew)
        super().__init__(
            call,
            call.arguments(),
            self._claims_of,
            dataclasses.replace(
                options,
                argnums=call.argnums(),
                trials=len(use.samples),
                expect_differs=declared_here(use.call.eqn, options),
            ),
            names=call.names(),
        )

    def _claims_of(self, traced: Program, point: Point) -> Claims:
        claims = autodiff_claims(self.options)(traced, point)
        own = claims.beside

        def beside(case: Case) -> list[Finding]:
            if case.program.order == 1 and self.case is None:
                self.case = case
            return own(case)

        return dataclasses.replace(claims, beside=beside)

    def precision(self) -> list[str]:
        """Says what did not run in float64, and why differences alone judged."""
        return [line for line in self._precision() if "everything" not in line]

    def points(self) -> list[Point]:
        """Returns the values of every call that is looked at."""
        return [
            self.inputs.draw(self.options.key, trial)
            for trial in range(self.options.trials)
        ]

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        function = self.function
        if inputs is not self.inputs:  # traced anew, in float64
            anew = self._anew
            function.wide = None if anew is None else anew.in_float64(self.use)
            if function.wide is None:
                raise NotImplementedError("the call is not there in float64")
        program = super()._trace(inputs, point)
        return dataclasses.replace(program, closed_over=function.closed_over())

    def _retraced_case(self, *args: Any) -> Case:
        try:
            return super()._retraced_case(*args)
        finally:
            self.function.wide = None

    def _run_trial(self, point: Point, trial: int) -> list[Finding]:
        try:
            return super()._run_trial(point, trial)
        except _NoSecondOrder as error:
            self.unchecked.append(f"{SECOND_ORDER}: {error}")
            return error.first

    def _judge(self, level: int, point: Point, trial: int) -> list[Finding]:
        if level == 0:
            self._first_order = super()._judge(level, point, trial)
            return self._first_order
        try:
            found = super()._judge(level, point, trial)
        except Exception as error:
            raise _NoSecondOrder(self._first_order, error) from error
        self.unchecked += [
            f"{SECOND_ORDER}: {finding.cause.says}"
            for finding in found
            if finding.cause is not None and _is_open(finding)
        ]
        return [
            dataclasses.replace(finding, check=SECOND_ORDER)
            for finding in found
            if not _is_open(finding)
        ]

    def at_point(self, name: str, point: Point) -> tuple[Hazard, list[Finding]]:
        """Tries one point; what is wrong in second order is told as such."""
        tried, found = super().at_point(name, point)
        return tried, [
            dataclasses.replace(finding, check=SECOND_ORDER)
            if finding.order > 1
            else finding
            for finding in found
        ]

    def judge_at(self, level: int, case: Case) -> list[Finding]:
        """Judges the rule at a point; see `_is_open` for its second derivatives."""
        found = super().judge_at(level, case)
        if level == 0:
            return found
        return [
            dataclasses.replace(finding, verdict=Verdict.INCONCLUSIVE)
            if _is_open(finding)
            else finding
            for finding in found
        ]

    def add_second_order(self, point: Point) -> None:
        """Traces the rule's second derivative, where it has one."""
        try:
            super().add_second_order(point)
        except Exception as error:  # whatever the rule raises when differentiated
            del self._programs[1:]
            raise _NoSecondOrder(self._first_order, error) from error


def _is_open(finding: Finding) -> bool:
    """Whether a finding on second derivatives is told without being a verdict.

    Few programs take them: what is right as a formula and only rounds badly, or can't
    be judged at these values, is no reason to refuse the rule.
    """
    is_inaccurate = finding.gap is Gap.ROUNDING and math.isfinite(finding.size)
    return finding.verdict is Verdict.INCONCLUSIVE or (
        is_inaccurate and finding.verdict is Verdict.FAIL
    )


class _NoSecondOrder(Exception):
    """A rule has no second derivative; holds what the first one's check found."""

    def __init__(self, first: list[Finding], error: Exception):
        super().__init__((str(error).strip().splitlines() or [type(error).__name__])[0])
        self.first = first


def declared_here(eqn: jaxprs.Eqn, options: Options) -> Any:
    """Returns the declarations that concern a rule's call or those inside of it."""
    if not options.expect_differs:
        return None
    program = jaxprs.rule_free_program(eqn)
    inside = [
        jaxprs.read_rule(eqn)
        for eqn in jaxprs.walk(program)
        if eqn.primitive.name in jaxprs.CUSTOM_RULES
    ]
    sources = [jaxprs.read_rule(eqn), *inside]
    return {
        rule: alternative
        for rule, alternative in options.expect_differs.items()
        if any(intentions.names(rule, source) for source in sources)
    }
