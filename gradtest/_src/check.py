"""One check from end to end: trace, evaluate, compare, explain, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from gradtest._src.hazards import special_arguments
from gradtest._src.inputs import Inputs, Point, Role, read_inputs
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.options import Options
from gradtest._src.parallel.causes import explain_devices
from gradtest._src.primal import solver_findings, value_findings
from gradtest._src.program import Program
from gradtest._src.pushed import judge_pushed
from gradtest._src.rounding import (
    judge_pushed_rounding,
    judge_rounding,
    product_note,
)
from gradtest._src.special_verdict import Usual, is_ordinary, judge_special
from gradtest._src.trust import Trust


class Evidence:
    """What the report tells of all cases, kept without their arrays."""

    def __init__(self) -> None:
        self.seed: list[Any] = []
        self.islands: set[str] = set()
        self.why_no_exact: set[str] = set()
        self.precision: set[str] = set()
        self.devices = 0

    def add(self, case: Case) -> None:
        """Takes note of a case; the first one's cotangents serve the second order."""
        self.seed = self.seed or case.seed
        self.islands |= set(case.bench.islands)
        self.why_no_exact |= {case.bench.why_no_exact} - {""}
        self.precision |= {case.bench.devices, product_note(case)} - {""}
        found = [*case.readings.copies, *case.bench.worked]
        copies = [each.count for each in found if each.count > 1]
        self.devices = max(self.devices, case.claim.devices, *copies)


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
        self._evidence = Evidence()
        self._off_branch = False
        # What came of each special point, and the gradient's usual size by level.
        self.hazards: list[Hazard] = []
        self._usual: dict[int, Usual] = {}
        self.why_no_second_order = ""
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
            return [*self._at_special_points(), *found.values()]
        return list(found.values())

    def _at_special_points(self) -> list[Finding]:
        """Tries the special points; returns what is wrong at the first that fails."""
        wrong: list[Finding] = []
        points = list(special_arguments(self.inputs, self._first))
        for name, point in progress.following(points, "special points"):
            tried, found = self.at_point(name, point)
            self.hazards.append(tried)
            wrong = wrong or found
        return wrong

    def at_point(self, name: str, point: Point) -> tuple[Hazard, list[Finding]]:
        """Tries one point, in every order that is checked.

        Second derivatives are tried where numbers are of an ordinary size alone.

        Args:
          name: What is special about the point.
          point: Values of the leaves, in the order of `inputs`.

        Returns:
          What came of it, and the findings of a claim that is wrong there.
        """
        tried, off_branch = Hazard(name, Verdict.PASS), self._off_branch
        self._off_branch = False
        try:
            for level in range(self.options.order if is_ordinary(point) else 1):
                if not self._has_level(level):
                    break
                tried, found = self._at_point(name, point, level)
                if tried.verdict is not Verdict.PASS:
                    return tried, found
        finally:
            self._off_branch = off_branch
        return tried, []

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

    def _has_level(self, level: int) -> bool:
        """Whether there are programs of this order; of the second they are made."""
        if level == 0:
            return True
        if self.why_no_second_order:
            return False
        try:
            if level == len(self._programs):
                self._usual_gradient(0)
                self._add_second_order(self._first)
            self._usual_gradient(level)
        except Exception as error:  # whatever the second differentiation raises
            says = (str(error).strip().splitlines() or [""])[0]
            self.why_no_second_order = says or type(error).__name__
            return False
        return True

    def _at_point(
        self, name: str, point: Point, level: int
    ) -> tuple[Hazard, list[Finding]]:
        usual = self._usual_gradient(level)
        traced, claims = self._programs[level], self._claims[level]
        case = self.case_at(point, level)

        def judge(judged: Case) -> list[Finding]:
            found = self._judge_case(level, judged, claims)
            return found if level else self._reopened(found, point)

        tried, found = judge_special(name, case, usual, judge)
        if found and level == 1 and self._programs[2:]:
            # Whether fwd calls its own rule decides what its second derivative is.
            otherwise = self._at_point(name, point, 2)
            if not otherwise[1]:
                return otherwise
        if found:
            self.troubled.setdefault(traced.order, case)
        return tried, found

    def _reopened(self, found: list[Finding], point: Point) -> list[Finding]:
        if self._programs[0].opened:
            return self._judge_opened(found, point, 0)
        return found

    def _usual_gradient(self, level: int) -> Usual:
        """Returns what the gradient is like at the first point."""
        if level not in self._usual:
            case = self.case_at(self._first, level)
            self._evidence.add(case)
            self._usual[level] = Usual.of(case)
        return self._usual[level]

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
            self._add_second_order(point)
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

    def _add_second_order(self, point: Point) -> None:
        first = self._programs[0]
        if self._claims[0].reverse is None:
            raise ValueError(
                "`order` 2 needs a reverse mode, which the function does not have: "
                + "; ".join(self._claims[0].unsupported)
            )
        second = first.gradient(self._evidence.seed)
        claims = self.claiming(second, point)
        self._programs.append(second)
        self._claims.append(claims)
        if first.declared:
            once = first.declared_once().gradient(self._evidence.seed)
            self._programs.append(once)
            self._claims.append(claims)

    def _judge(self, level: int, point: Point, trial: int) -> list[Finding]:
        claims, traced = self._claims[level], self._programs[level]
        case = self._case(traced, claims, point, trial)
        self._evidence.add(case)
        found = self._judge_case(level, case, claims)
        if worst(f.verdict for f in found) is not Verdict.PASS:
            self.troubled.setdefault(traced.order, case)
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
            retrace=lambda: self._retrace(point, trial, traced.order),
            works=works,
        )

    def _retrace(self, point: Point, trial: int, order: int) -> Case | None:
        """Traces everything anew in float64: the user's Python runs again."""
        inputs, wide = self.inputs.widened(point)
        try:
            case = self._retraced_case(inputs, wide, trial, order)
            if _fits_together(case):
                return case
        except SlipError:
            return None
        except TypeError:
            pass
        except Exception:  # the user's code does not work in float64
            return None
        # Functions that JAX traced in the other mode may be cached with indices of that
        # mode's integers, or whole as they were.
        jax.clear_caches()
        try:
            case = self._retraced_case(inputs, wide, trial, order)
            return case if _fits_together(case) else None
        except Exception:
            return None

    def _retraced_case(
        self, inputs: Inputs, point: Point, trial: int, order: int
    ) -> Case:
        with jax.enable_x64(True):
            traced = self._trace(inputs, point)
            if traced.order < order:
                seed = [widen(s) for s in self._evidence.seed]
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
            hazards=tuple(self.hazards),
        )

    def _subject(self) -> str:
        """Names what is under test."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _not_compared(self) -> list[str]:
        """Names what a kind of check leaves out beyond what all leave out."""
        if self.options.hazards and not self.hazards:
            return ["special points (it fails at an ordinary one)"]
        return []

    def _precision(self) -> list[str]:
        lines = ["precision: everything in float64 (lifted), claim in its own as well"]
        if self._evidence.islands:
            lines = [
                "precision: float64 (lifted), but in its own precision ran "
                + ", ".join(sorted(self._evidence.islands))
            ]
        lines += sorted(self._evidence.precision)
        reasons = sorted(self._evidence.why_no_exact)
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
        if self._evidence.devices and not cut:
            notes.append(
                f"the result of each of {self._evidence.devices} devices was checked"
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


def _fits_together(case: Case) -> bool:
    traces = (case.program.jaxpr, case.claim.jaxpr)
    return all(jaxprs.fits_together(jaxpr) for jaxpr in traces)


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
