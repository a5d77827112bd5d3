"""One check from end to end: trace, evaluate, compare, explain, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import (
    dataflow,
    diagnose,
    forward,
    jaxprs,
    program,
    progress,
    seeding,
    variants,
)
from gradtest._src.approximation import explain_gaps
from gradtest._src.case import Case
from gradtest._src.claiming import Claiming, Claims
from gradtest._src.devices import spanning
from gradtest._src.execution import SlipError
from gradtest._src.explain import explained
from gradtest._src.findings import Finding, Gap, Hazard, Report, Verdict, worst
from gradtest._src.formula import judge_formula, overrules_exact
from gradtest._src.hand_written import hand_written_findings
from gradtest._src.inputs import Inputs, Point, Role, read_inputs
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.options import Options
from gradtest._src.parallel.causes import explain_devices
from gradtest._src.primal import solver_findings, value_findings
from gradtest._src.program import Program
from gradtest._src.pushed import judge_pushed
from gradtest._src.retracing import retraced
from gradtest._src.rounding import judge_pushed_rounding, judge_rounding
from gradtest._src.special_check import SpecialPoints
from gradtest._src.surroundings import Surroundings
from gradtest._src.trust import Trust


class Check:
    """A function, its claims and the options: runs trials and makes the report."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        claiming: Claiming,
        options: Options,
        *,
        names: Sequence[str] | None = None,
    ):
        self.fn = fn
        self.claiming = claiming
        self.options = options
        self.inputs = read_inputs(
            fn, args, argnums=options.argnums, exclude=options.exclude, names=names
        )
        self.trust = Trust(options, self.inputs, self._trace)
        self._first = self.inputs.draw(options.key, 0)
        try:
            self._programs = [self._trace(self.inputs, self._first)]
            self._claims = [claiming(self._programs[0], self._first)]
        except SlipError as error:
            raise TypeError(str(error)) from None
        self.surroundings = Surroundings()
        self._off_branch = False
        self.special = SpecialPoints(self)
        # The first case of each order that did not pass: what a failure is read from.
        self.troubled: dict[int, Case] = {}

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        return program.trace_program(
            self.fn,
            inputs,
            point,
            has_aux=self.options.has_aux,
            intentions=self.options.expect_differs,
            variant=self.options.variant,
            trusted=self.trust.rules,
        )

    def findings(self) -> list[Finding]:
        """Runs every trial; returns the worst finding of each leaf, mode and order."""
        found: dict[Any, Finding] = {}
        for trial in progress.following(range(self.options.trials), "trials"):
            point = self._first if trial == 0 else self._draw(trial)
            for finding in self._run_trial(point, trial):
                place = (finding.order, finding.mode, finding.name, finding.check)
                kept = found.get(place)
                if kept is None or _rank(finding) > _rank(kept):
                    found[place] = finding
        wrong = worst(finding.verdict for finding in found.values()) is Verdict.FAIL
        if self.options.hazards and not wrong:
            return [*self.special.findings(), *found.values()]
        return list(found.values())

    def at_point(self, name: str, point: Point) -> tuple[Hazard, list[Finding]]:
        """Tries one point; see `SpecialPoints.at_point`."""
        return self.special.at_point(name, point)

    @contextlib.contextmanager
    def off_branch_apart(self) -> Iterator[None]:
        """Forgets afterwards where rule-free autodiff follows a branch of one point."""
        before, self._off_branch = self._off_branch, False
        try:
            yield
        finally:
            self._off_branch = before

    @property
    def program(self) -> Program:
        """The function under test."""
        return self._programs[0]

    @property
    def first(self) -> Point:
        """The point of the first trial."""
        return self._first

    @property
    def orders(self) -> int:
        """How many orders of derivative were traced so far."""
        return min(2, len(self._programs))

    def case_at(self, point: Point, level: int = 0) -> Case:
        """Returns the claim at a point.

        Args:
          point: Values of the leaves, in the order of `inputs`.
          level: 0 for the first derivative, 1 for the second where that was traced.
        """
        return self._case(self._programs[level], self._claims[level], point, 0)

    @property
    def has_other_second_order(self) -> bool:
        """Whether a declared product may have another second derivative as well."""
        return len(self._programs) > 2

    def judge_at(self, level: int, case: Case) -> list[Finding]:
        """Judges a claim in full at a point that no trial has drawn."""
        found = self._judged(level, case)
        if level == 0 and self._programs[0].opened:
            return self._judge_opened(found, case.point, 0)
        return found

    def _draw(self, trial: int) -> Point:
        return self.inputs.draw(self.options.key, trial)

    def _run_trial(self, point: Point, trial: int) -> list[Finding]:
        found = self._judge(0, point, trial)
        if self._programs[0].opened:
            found = self._judge_opened(found, point, trial)
        passed = worst(f.verdict for f in found) is Verdict.PASS
        if self.options.order == 1 or not passed:
            return found
        if len(self._programs) == 1:
            self.add_second_order(point)
        second = self._judge(1, point, trial)
        if worst(f.verdict for f in second) is Verdict.FAIL and self._programs[2:]:
            # Whether fwd calls its own rule decides what its second derivative is.
            otherwise = self._judge(2, point, trial)
            if worst(f.verdict for f in otherwise) is Verdict.PASS:
                second = otherwise
        return found + second

    def _judge_opened(
        self, found: list[Finding], point: Point, trial: int
    ) -> list[Finding]:
        """Judges once more what fails for the way in which it was opened alone."""
        failed = worst(f.verdict for f in found) is Verdict.FAIL
        if failed and self.trust.grows(self._programs[0], point):
            self._programs = [self._trace(self.inputs, point)]
            self._claims = [self.claiming(self._programs[0], point)]
            self.troubled.clear()
            found = self._judge(0, point, trial)
            failed = worst(f.verdict for f in found) is Verdict.FAIL
        plainer = self._programs[0].declared_outside()
        if plainer is None or not failed:
            return found
        # Whether fwd calls its own rule decides what its second derivative is.
        whole, troubled = self._programs[0], dict(self.troubled)
        self._programs[0] = plainer
        otherwise = self._judge(0, point, trial)
        if worst(f.verdict for f in otherwise) is Verdict.PASS:
            self.troubled.clear()
            return otherwise
        self._programs[0], self.troubled = whole, troubled
        return found

    def add_second_order(self, point: Point) -> None:
        """Traces the second derivative, whose cotangents are those of the first.

        Raises:
          ValueError: There is no reverse mode, or none without the custom rules.
        """
        first = self._programs[0]
        if self._claims[0].reverse is None:
            raise ValueError(
                "`order` 2 needs a reverse mode, which the function does not have: "
                + "; ".join(self._claims[0].unsupported)
            )
        why_no_gradient = self.case_at(point).bench.why_no_exact
        if why_no_gradient:
            raise ValueError(
                "`order` 2 needs a gradient without custom rules to take differences "
                f"of, which the function does not have: {why_no_gradient}"
            )
        second = first.gradient(self.surroundings.seed)
        claims = self.claiming(second, point)
        self._programs.append(second)
        self._claims.append(claims)
        if first.declared:
            once = first.declared_once().gradient(self.surroundings.seed)
            self._programs.append(once)
            self._claims.append(claims)

    def _judge(self, level: int, point: Point, trial: int) -> list[Finding]:
        claims, traced = self._claims[level], self._programs[level]
        case = self._case(traced, claims, point, trial)
        self.surroundings.add(case)
        found = self._judged(level, case)
        if worst(f.verdict for f in found) is not Verdict.PASS:
            self.troubled.setdefault(traced.order, case)
        return found

    def _judged(self, level: int, case: Case) -> list[Finding]:
        """Judges a claim, but for what a sampler's derivative leaves open."""
        traced = self._programs[level]
        found = self._judge_case(level, case, self._claims[level])
        moving = [True] * len(self.inputs.moving)
        held = [False] * (len(traced.jaxpr.in_avals) - len(moving))
        reached = dataflow.reached_primitives(traced.jaxpr, moving + held)
        if jaxprs.SAMPLERS.isdisjoint(reached):
            return found
        return [_excused(finding) for finding in found]

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        if claims.reverse is None:
            found = explain_gaps(case, judge_pushed(case), judge_pushed)
            found = judge_pushed_rounding(case, found, self.options.rounding_rtol)
            return hand_written_findings(case, found)
        if level and self._off_branch:
            return [_unjudged_second(case)]
        found = explain_gaps(case, judge_formula(case), judge_formula)
        found = explain_devices(case, found)
        if not level:
            self._off_branch = overrules_exact(case, found)
        pushed = forward.judge_beside_reverse(case)
        if worst(f.verdict for f in found) is Verdict.INCONCLUSIVE:
            pushed = []  # it is open for the same reason
        values = value_findings(case)
        if values and self._is_impure(level, case.point):
            return [
                dataclasses.replace(
                    finding,
                    verdict=Verdict.INCONCLUSIVE,
                    cause=diagnose.IMPURE,
                    other_causes=(),
                )
                for finding in values
            ]
        return [
            *values,
            *hand_written_findings(
                case, judge_rounding(case, found, self.options.rounding_rtol)
            ),
            *claims.beside(case),
            *solver_findings(case),
            *explain_gaps(case, pushed, forward.judge_beside_reverse),
        ]

    def _is_impure(self, level: int, point: Point) -> bool:
        """Whether tracing the function once more gives other constants."""
        if level:
            return False
        first, again = self._programs[0], self._trace(self.inputs, point)
        constants = [jaxprs.nested_consts(traced.jaxpr) for traced in (first, again)]
        return first.key != again.key or not all(
            np.array_equal(spanning.whole(a), spanning.whole(b), equal_nan=True)
            for a, b in zip(*constants, strict=True)
            if is_inexact(a.dtype)
        )

    def _case(
        self,
        traced: Program,
        claims: Claims,
        point: Point,
        trial: int,
        *,
        works: bool = True,
    ) -> Case:
        claim = claims.reverse or claims.forward
        assert claim is not None
        return Case(
            traced,
            claim,
            point,
            forward=claims.forward if claims.reverse else None,
            rtol=self.options.rtol,
            key=self.options.key,
            trial=trial,
            retrace=lambda: retraced(
                self.inputs,
                point,
                lambda inputs, wide: self._retraced_case(
                    inputs, wide, trial, traced.order
                ),
            ),
            works=works,
        )

    def _retraced_case(
        self, inputs: Inputs, point: Point, trial: int, order: int
    ) -> Case:
        with jax.enable_x64(True):
            traced = self._trace(inputs, point)
            if traced.order < order:
                seed = [widen(s) for s in self.surroundings.seed]
                traced = traced.gradient(seed)
            claims = self.claiming(traced, point)
            return self._case(traced, claims, point, trial, works=False)

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        with np.errstate(all="ignore"):  # NaN and inf are judged, not warned about
            found = explained(self.findings(), self.troubled)
        findings = found.findings
        name = self._subject()
        unchecked = [f"{leaf} (excluded)" for leaf in self.inputs.unchecked]
        unchecked += [
            f"{leaf} (held)"
            for leaf in self.inputs.of_role(Role.HELD)
            if leaf.argument in self.inputs.argnums and not is_inexact(leaf.dtype)
        ]
        for claims in self._claims:
            unchecked += claims.unsupported
        unchecked += self.trust.unchecked(self._programs[0])
        unchecked += self._not_compared()
        return Report(
            assertion=assertion,
            subject=name,
            verdict=worst(f.verdict for f in findings),
            findings=tuple(findings),
            trials=self.options.trials,
            key=seeding.describe(self.options.key),
            modes=self._claims[0].modes,
            order=self.options.order,
            precision=tuple(self._precision()),
            unchecked=tuple(dict.fromkeys(unchecked)),
            notes=tuple(self._notes()),
            replay=self._replay(assertion, name, findings),
            hint=self._hint(findings),
            exhibits=found.exhibits,
            inputs=found.inputs,
            hazards=tuple(self.special.hazards),
        )

    def _subject(self) -> str:
        """Names what is under test."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _not_compared(self) -> list[str]:
        """Names what a kind of check leaves out beyond what all leave out."""
        if self.options.hazards and not self.special.hazards:
            return ["special points (it fails at an ordinary one)"]
        return []

    def _precision(self) -> list[str]:
        lines = ["precision: everything in float64 (lifted), claim in its own as well"]
        if self.surroundings.islands:
            lines = [
                "precision: float64 (lifted), but in its own precision ran "
                + ", ".join(sorted(self.surroundings.islands))
            ]
        lines += sorted(self.surroundings.precision)
        reasons = sorted(self.surroundings.why_no_exact)
        return lines + [f"judged by differences alone: {reason}" for reason in reasons]

    def _notes(self) -> list[str]:
        notes = []
        variant = self.options.variant
        if variant is not None:
            notes.append(f"run under {variants.describe_variant(variant)}")
        if jaxprs.STOP_GRADIENT in jaxprs.primitives(self._programs[0].jaxpr):
            notes.append("values under stop_gradient are held constant")
        traced = [self._programs[0], self._claims[0].reverse, self._claims[0].forward]
        cut = variants.cut_notes([each.jaxpr for each in traced if each])
        if self.surroundings.devices and not cut:
            notes.append(
                f"the result of each of {self.surroundings.devices} devices was checked"
            )
        notes += self.trust.notes(self._programs[0])
        return notes + cut

    def _hint(self, findings: list[Finding]) -> str:
        """Says how rules of the user's are declared that may differ on purpose."""
        departs = any(
            f.verdict is Verdict.FAIL and f.gap is Gap.FORMULA and f.order == 1
            for f in findings
        )
        claim = self._claims[0].reverse or self._claims[0].forward
        if not departs or claim is None or not claim.is_autodiff:
            return ""
        unique = self._users_rules()
        return diagnose.how_to_declare(unique) if unique else ""

    def _users_rules(self) -> list[str]:
        """Names the rules of the user's that are not declared."""
        traced = self._programs[0]
        sources = [
            jaxprs.read_rule(eqn)
            for eqn in jaxprs.walk(traced.jaxpr)
            if eqn.primitive.name in jaxprs.CUSTOM_RULES
            and id(eqn) not in traced.declared
        ]
        sources += traced.opened
        names = [source.name for source in sources if jaxprs.is_users(source)]
        return list(dict.fromkeys(names))

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        bad = [f for f in findings if f.verdict is not Verdict.PASS]
        if not bad:
            return ""
        more = f", trials={self.options.trials}" if self.options.trials > 1 else ""
        more += ", hazards=True" if self.options.hazards else ""
        at = f"  # trial {bad[0].trial}" if self.options.trials > 1 else ""
        key = seeding.describe(self.options.key)
        return f"gradtest.{assertion}({name}, ..., key={key}{more}){at}"


def _unjudged_second(case: Case) -> Finding:
    return Finding(
        "all arguments",
        (),
        "",
        Verdict.INCONCLUSIVE,
        order=case.program.order,
        trial=case.trial,
        cause=diagnose.OFF_BRANCH,
    )


def _excused(finding: Finding) -> Finding:
    """Concludes nothing where a sampler's derivative departs from its samples'."""
    if finding.verdict is Verdict.PASS or finding.gap is not Gap.FORMULA:
        return finding
    return dataclasses.replace(
        finding,
        verdict=Verdict.INCONCLUSIVE,
        cause=diagnose.SAMPLER,
        other_causes=(),
    )


def _rank(finding: Finding) -> tuple[int, float]:
    return finding.verdict.severity, finding.strain
