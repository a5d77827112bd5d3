"""One check of a watcher: a screen, and a closer look where it asks for one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradtest._src import jaxprs, rules, seeding, variants
from gradtest._src.audit import ProgramAudit
from gradtest._src.blame import AutodiffCheck
from gradtest._src.claiming import autodiff_claims
from gradtest._src.findings import Finding, Report, Verdict, worst
from gradtest._src.inputs import Inputs, Leaf, Role, read_inputs
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Reporter, reported
from gradtest._src.options import Options
from gradtest._src.program import trace_program
from gradtest._src.watching.programs import Numbers
from gradtest._src.watching.record import Record
from gradtest._src.watching.screen import (
    NUDGE,
    Screen,
    live_point,
    not_finite,
    signature,
)
from gradtest._src.watching.verdict import (
    SLOPE,
    Explained,
    read,
    rounding_gaps,
)

Loss = Callable[..., Any]
Args = tuple[Any, ...]
WATCH = "watch"
_CHECKED, _AUDITED = "assert_autodiff_matches", "assert_custom_rules_match"
# Screens of so many sets of shapes are kept.
_KEPT = 16
# A gap that a whole check accepted is that of an approximation up to so many times the
# tolerance; beyond, unless the check says so, it is that of a kink.
_SMALL = 100
# Directions of so many checks on are drawn where one direction did not do.
_OTHER_DIRECTION = 2**30
_KINK = "at a kink, as a whole check has found; judged right beside it"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
      report: The report.
      how: How it was made, in a few words.
      in_full: Whether the gradient was checked in full.
      leaves: Positions of the leaves that were compared.
    """

    report: Report
    how: str
    in_full: bool = False
    leaves: tuple[int, ...] = ()


class Rounds:
    """Makes the checks of one loss, and keeps what they compile.

    Attributes:
      compile_seconds: What tracing and compiling of screens took, all in all.
      compiled: How many screens were compiled.
    """

    def __init__(
        self, loss: Loss, options: Options, what: str, sample: int | None, known: Record
    ):
        self._loss = loss
        self._options = options
        self._what = what
        self._sample = sample
        self._record = known
        self._screens: dict[Any, Screen] = {}
        self._rules: dict[Any, list[str]] = {}
        self.compile_seconds = 0.0
        self.compiled = 0

    def prepare(self, arguments: Args) -> None:
        """Compiles what the next check of these arguments' shapes will run."""
        inputs = self._inputs(arguments)
        if self._what != "rules":
            self._screen(inputs, self._chosen(inputs))
        if self._what != "gradient":
            self._rule_names(inputs)

    def run(self, step: int, arguments: Args) -> Outcome:
        """Runs one check."""
        inputs = self._inputs(arguments)
        if self._what == "rules":
            return self._audit(inputs, step, arguments)
        found = self._look(inputs, step, arguments)
        if self._what == "gradient" or found.report.verdict is not Verdict.PASS:
            return found
        if not self._rule_names(inputs):
            return found
        audit = self._audit(inputs, step, arguments)
        return dataclasses.replace(
            found,
            report=_together(found.report, audit.report),
            how=f"{found.how}; {audit.how}",
        )

    def _inputs(self, arguments: Args) -> Inputs:
        inputs = read_inputs(
            self._loss, arguments, argnums=0, exclude=self._options.exclude
        )
        live_point(inputs)
        described = [str(leaf) for leaf in inputs.moving]
        self._record.of_leaves([leaf.name for leaf in inputs.moving], described)
        return inputs

    # --- the gradient ---------------------------------------------------------------

    def _look(self, inputs: Inputs, step: int, arguments: Args) -> Outcome:
        turn = self._record.checks
        chosen = self._chosen(inputs)
        screen = self._screen(inputs, chosen)
        point = live_point(_only(inputs, chosen))
        rounding_rtol = self._options.rounding_rtol
        known = self._known(chosen)
        numbers = screen(point, turn, known.kinks)
        reading = read(numbers, screen, known, rounding_rtol)
        if reading.reasons == [SLOPE] and not reading.at_kink:
            # Along this one it may have met a kink; what is wrong shows along any.
            other = screen(point, turn + _OTHER_DIRECTION, known.kinks)
            reading = read(other, screen, known, rounding_rtol)
        if reading.trouble is not None:
            return Outcome(self._report([reading.trouble], screen, step), "screened")
        reasons, findings = list(reading.reasons), list(reading.findings)
        if reading.at_kink and not reasons:
            beside = screen(point, turn, known.kinks, nudge=NUDGE)
            near = read(beside, screen, known, rounding_rtol)
            is_right = not near.at_kink and near.trouble is None
            for i in reading.at_kink:
                if is_right:
                    findings[i] = dataclasses.replace(near.findings[i], notes=(_KINK,))
                else:
                    reasons.append(f"{screen.leaves[i].name}: the formula")
        if reasons:
            report = self._whole(step, arguments, reasons)
            if report.verdict is Verdict.PASS:
                self._explain(numbers, screen, chosen, report)
            count = range(len(inputs.moving))
            return Outcome(report, "in full", in_full=True, leaves=tuple(count))
        report = self._report(findings, screen, step, reading.notes)
        return Outcome(report, "screened", leaves=chosen)

    def _chosen(self, inputs: Inputs) -> tuple[int, ...]:
        """Returns the positions of the leaves whose turn it is."""
        count = len(inputs.moving)
        if self._sample is None or self._what != "gradient" or self._sample >= count:
            return tuple(range(count))
        return self._turn_of(count, self._sample)

    def _turn_of(self, count: int, size: int) -> tuple[int, ...]:
        """Returns so many of so many, in an order that the key decides."""
        order = seeding.generator(self._options.key, "sample").permutation(count)
        groups = [order[k : k + size] for k in range(0, count, size)]
        turn = self._record.checks % len(groups)
        return tuple(sorted(int(i) for i in groups[turn]))

    def _screen(self, inputs: Inputs, chosen: tuple[int, ...]) -> Screen:
        place = signature(inputs), chosen
        if place in self._screens:
            return self._screens[place]
        part = _only(inputs, chosen)
        start = time.perf_counter()
        try:
            found = Screen(self._loss, part, live_point(part), self._options)
        finally:
            self.compile_seconds += time.perf_counter() - start
        self.compiled += 1
        while len(self._screens) >= _KEPT:
            del self._screens[next(iter(self._screens))]
        self._screens[place] = found
        return found

    def _known(self, chosen: Sequence[int]) -> Explained:
        known, places = self._record.explained, list(chosen)
        return Explained(
            known.gaps[places], known.rounding[places], known.kinks[places]
        )

    def _explain(
        self, numbers: Numbers, screen: Screen, chosen: Sequence[int], report: Report
    ) -> None:
        """Remembers what a whole check found to be no mistake."""
        known = self._record.explained
        rounding, allowed = rounding_gaps(numbers, screen, self._options.rounding_rtol)
        for i, place in enumerate(chosen):
            if rounding[i] > allowed[i] and np.isfinite(rounding[i]):
                known.rounding[place] = max(known.rounding[place], rounding[i])
            if "gap" not in numbers or not numbers["exceeded"][i]:
                continue
            gap = float(numbers["gap"][i])
            approximate = report.leaf(screen.leaves[i].name).approximation is not None
            if approximate or gap <= _SMALL * self._options.rtol:
                known.gaps[place] = max(known.gaps[place], gap)
            else:
                known.kinks[place] = True

    def _report(
        self,
        findings: Sequence[Finding],
        screen: Screen,
        step: int,
        notes: Sequence[str] = (),
    ) -> Report:
        """Returns the report of a screen."""
        options = self._options
        looked = {leaf.name for leaf in screen.leaves}
        names = self._record.names
        unchecked = [f"{name} (excluded)" for name in options.exclude]
        unchecked += [f"{name} (another turn)" for name in names if name not in looked]
        if options.variant is not None:
            notes = [*notes, f"run under {variants.describe_variant(options.variant)}"]
        verdict = worst(finding.verdict for finding in findings)
        return Report(
            assertion=WATCH,
            subject=_name(self._loss),
            verdict=verdict,
            findings=tuple(findings),
            trials=1,
            key=seeding.describe(options.key),
            modes=("rev",),
            precision=_precision(screen),
            unchecked=tuple(unchecked),
            notes=(f"at step {step}", _how(screen), *notes),
        )

    def _whole(self, step: int, arguments: Args, reasons: Sequence[str]) -> Report:
        report = _check_in_full(self._loss, arguments, options=self._options)
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        shown = ", ".join(reasons[:3])
        note = f"the screen asked for a whole check: {shown}{more}"
        return _at_step(report, step, note)

    # --- the rules ------------------------------------------------------------------

    def _audit(self, inputs: Inputs, step: int, arguments: Args) -> Outcome:
        broken = not_finite(inputs)
        if broken is not None:
            return Outcome(self._open(broken, step), "not audited")
        names = self._rule_names(inputs)
        if not names:
            raise ValueError(rules.NO_RULES.replace("`fn`", "`loss`"))
        size = min(self._sample or 1, len(names))
        only = tuple(names[i] for i in self._turn_of(len(names), size))
        options = dataclasses.replace(self._options, rounding_rtol=None)
        report = _audit_rules(self._loss, arguments, options=options, only=only)
        left = [f"{name} (another turn)" for name in names if name not in only]
        report = dataclasses.replace(report, unchecked=(*report.unchecked, *left))
        return Outcome(_at_step(report, step), f"audited {', '.join(only)}")

    def _open(self, finding: Finding, step: int) -> Report:
        key = seeding.describe(self._options.key)
        return Report(
            WATCH, _name(self._loss), Verdict.INCONCLUSIVE, (finding,), 1, key,
            notes=(f"at step {step}",),
        )  # fmt: skip

    def _rule_names(self, inputs: Inputs) -> list[str]:
        """Returns the names of the custom rules that the loss calls."""
        place = signature(inputs)
        if place not in self._rules:
            program = trace_program(
                self._loss, inputs, live_point(inputs),
                has_aux=self._options.has_aux, role="loss",
                variant=self._options.variant,
            )  # fmt: skip
            calls = rules.wanted_calls(program)
            names = [jaxprs.read_rule(first.eqn).name for first, *_ in calls]
            self._rules[place] = list(dict.fromkeys(names))
        return self._rules[place]


@processes.agreed
def _check_in_full(loss: Loss, arguments: Args, *, options: Options) -> Report:
    """Checks the gradient by itself; within a call of a job it has no own verdict."""

    def make(options: Options) -> Reporter:
        return AutodiffCheck(loss, arguments, autodiff_claims(options), options)

    whole = dataclasses.replace(options, modes=("rev",))
    return reported(_CHECKED, loss, whole, make)


@processes.agreed
def _audit_rules(
    loss: Loss, arguments: Args, *, options: Options, only: tuple[str, ...]
) -> Report:
    """Audits some rules, as `_check_in_full` checks the gradient."""
    return reported(
        _AUDITED, loss, options, lambda o: ProgramAudit(loss, arguments, o, only)
    )


def _only(inputs: Inputs, chosen: Sequence[int]) -> Inputs:
    """Returns inputs of which only some leaves are differentiated."""
    kept = {inputs.moving[i].name for i in chosen}

    def role(leaf: Leaf) -> Leaf:
        if leaf.role is not Role.MOVES or leaf.name in kept:
            return leaf
        return dataclasses.replace(leaf, role=Role.HELD)

    return dataclasses.replace(inputs, leaves=tuple(map(role, inputs.leaves)))


def _at_step(report: Report, step: int, *notes: str) -> Report:
    replay = report.replay and f"{report.replay}  # with what step {step} was given"
    notes = (f"at step {step}", *notes)
    return dataclasses.replace(report, notes=(*notes, *report.notes), replay=replay)


def _together(look: Report, audit: Report) -> Report:
    """Returns one report of a screen that passed and of an audit."""
    if audit.verdict is not Verdict.PASS:
        return audit
    return dataclasses.replace(
        look,
        findings=(*look.findings, *audit.findings),
        rules=audit.rules,
        unchecked=(*look.unchecked, *audit.unchecked),
        notes=(*look.notes, *(n for n in audit.notes if n not in look.notes)),
    )


def _how(screen: Screen) -> str:
    slope = "one direction by differences"
    if screen.has_products:
        slope = "no differences, for they can't follow declared products"
    if screen.shares_exact:
        return f"screened: no rule is in it; {slope}"
    if screen.why_no_exact:
        return f"screened: {slope}, for there is no rule-free gradient"
    return f"screened: claimed against rule-free autodiff in float64, {slope}"


def _precision(screen: Screen) -> tuple[str, ...]:
    if screen.islands:
        ran = ", ".join(screen.islands)
        return (f"precision: float64 (lifted), but in its own precision ran {ran}",)
    return ("precision: everything in float64 (lifted), claim in its own as well",)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
