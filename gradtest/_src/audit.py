"""Audits custom rules one by one, at the values that reach them in a program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gradtest._src import (
    diagnose,
    intentions,
    jaxprs,
    progress,
    rules,
    seeding,
    variants,
)
from gradtest._src.agreement import agreed, judge_ways
from gradtest._src.case import Case
from gradtest._src.devices import homes
from gradtest._src.execution import SlipError
from gradtest._src.exhibits import MOST_LEAVES, inputs_at
from gradtest._src.explain import explained, with_branches
from gradtest._src.findings import (
    Cause,
    Exhibit,
    Finding,
    Gap,
    Hazard,
    Report,
    Rule,
    Verdict,
    worst,
)
from gradtest._src.inputs import Inputs, Point, read_inputs
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.localise.naming import return_line
from gradtest._src.malformed import malformed, not_transposable
from gradtest._src.options import Options
from gradtest._src.program import Program, trace_program
from gradtest._src.reruns import discrete, eager, repeated
from gradtest._src.rule_call import RuleCall, TracedAnew
from gradtest._src.rule_check import SECOND_ORDER, RuleCheck
from gradtest._src.rules import RuleUse
from gradtest._src.ways import ALONG, BY_DIFFERENCES

# What a rule that passed was looked at for, beside what has findings of its own.
_SILENT_CHECKS = ("value", "structure")


@dataclasses.dataclass
class Audit:
    """What came of one rule.

    Attributes:
      findings: The verdicts, check by check.
      unchecked: What was not looked at.
      notes: What else is to be known.
      precision: What did not run in float64.
      hint: How the rule is declared, if it differs on purpose.
      exhibits: Arrays of what is wrong.
      hazards: What came of each special point of its operands.
      has_second_order: Whether all of its second derivatives were judged.
    """

    findings: list[Finding] = dataclasses.field(default_factory=list)
    unchecked: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    precision: list[str] = dataclasses.field(default_factory=list)
    hint: str = ""
    exhibits: tuple[Exhibit, ...] = ()
    hazards: tuple[Hazard, ...] = ()
    has_second_order: bool = False


def audit_rule(use: RuleUse, options: Options, anew: TracedAnew) -> Audit:
    """Audits one rule.

    Args:
      use: The rule, with values.
      options: The user's; `argnums`, `trials` and `exclude` are not looked at.
      anew: Traces the program again, where that is needed.
    """
    audit = Audit()
    label = f"{use.rule.kind} {use.rule.name}"
    if use.samples and not use.is_invoked:
        audit.notes.append(
            f"{label}: the derivative never goes through it: {use.why_not_invoked()}"
        )
    if jaxprs.closed_over(use.call.eqn):
        audit.notes.append(
            f"{label}: it closes over a traced value, which JAX loses under jit or in "
            "a loop; better make that an argument of the rule"
        )
    why = use.trouble or _why_not_alone(use)
    if why:
        audit.unchecked.append(f"{label}: {why}")
        if use.trouble.startswith("NaN"):
            audit.findings.append(_unreached(use, why))
        return audit
    lost = [i for i in RuleCall(use).closed_over().values() if use.moving[i]]
    if lost:
        audit.findings.append(_structure(use, _CLOSES_OVER_MOVING))
        return audit
    try:
        rule_check = RuleCheck(use, options, anew)
    except NotImplementedError as error:
        audit.unchecked.append(f"{label}: {error}")
        return audit
    except (homes.NoHomeError, variants.BackendRefusedError):
        raise
    except NameError as error:
        if "axis name" not in str(error):
            raise
        why = "it uses a named axis that is bound around its call alone"
        audit.unchecked.append(f"{label}: {why}")
        return audit
    except Exception as error:  # whatever a malformed rule makes JAX raise
        audit.findings.append(_structure(use, _why_malformed(use, options, error)))
        return audit
    findings = _run(rule_check)
    audit.hazards = tuple(
        dataclasses.replace(tried, name=f"{use.rule.name}, {tried.name}")
        for tried in rule_check.special.hazards
    )
    explanation = explained(findings, rule_check.troubled, use.source)
    findings = with_branches(
        explanation.findings, rule_check.case, use.source, rule_check.function.renew
    )
    is_open = worst(f.verdict for f in findings) is Verdict.INCONCLUSIVE
    if is_open and not use.is_invoked:
        # In vain: nothing depends on it, also not in a branch that is not taken.
        audit.unchecked.append(f"{label}: {_why_open(findings)}")
        return audit
    audit.findings = [dataclasses.replace(f, rule=use.rule) for f in findings]
    audit.unchecked += [f"{label}: {line}" for line in rule_check.unchecked]
    audit.has_second_order = _has_second_order(rule_check, findings)
    audit.precision += [f"{label}: {line}" for line in rule_check.precision()]
    audit.hint = _hint(rule_check, findings)
    audit.exhibits = tuple(
        dataclasses.replace(exhibit, rule=use.rule) for exhibit in explanation.exhibits
    )
    return audit


def _why_open(findings: list[Finding]) -> str:
    causes = [f.cause for f in findings if f.verdict is Verdict.INCONCLUSIVE]
    return next((cause.says for cause in causes if cause), "nothing to conclude")


def _why_not_alone(use: RuleUse) -> str:
    """Says why a rule can't be run by itself; empty where it can."""
    call = RuleCall(use)
    if -1 in call.closed_over().values():
        return (
            "its derivative closes over a traced value that its function does not use: "
            "pass that as an argument of the rule to have it audited"
        )
    results = use.call.eqn.outvars
    if not any(is_inexact(getattr(out.aval, "dtype", None)) for out in results):
        return "it has no float or complex result"
    if not any(math.prod(getattr(out.aval, "shape", ())) for out in results):
        return "its results have no entry"
    return "" if call.argnums() else "it has no float or complex operand"


def _run(rule_check: RuleCheck) -> list[Finding]:
    with np.errstate(all="ignore"):
        findings = rule_check.findings()
        case = rule_check.case
        if case is None:
            return findings
        points, renew = rule_check.points(), rule_check.function.renew
        if worst(f.verdict for f in findings) is not Verdict.PASS:
            again, _ = judge_ways(case, points[:1], renew, only="repeat")
            changes = [f for f in again if f.verdict is Verdict.FAIL]
            return changes or findings  # of what changes, no number means a thing
        findings += [agreed(case, check) for check in _SILENT_CHECKS]
        order = rule_check.options.order
        agreeing, unsupported = judge_ways(case, points, renew, order=order)
        findings += [*agreeing, repeated(case)]
        if order > 1 and not _has_second_order(rule_check, findings):
            by_differences, _ = judge_ways(
                case, points[:1], renew, only=BY_DIFFERENCES
            )  # which may meet a kink: it can only speak for the rule
            findings += [f for f in by_differences if f.verdict is Verdict.PASS]
        if not case.program.closed_over:  # those values are known to a trace alone
            findings += [*eager(case, findings), *discrete(case, rule_check.function)]
    rule_check.unchecked += unsupported
    return findings


def _has_second_order(rule_check: RuleCheck, findings: list[Finding]) -> bool:
    """Whether a rule's second derivatives were judged, by operands and cotangent."""
    checks = {finding.check for finding in findings}
    is_open = any(line.startswith(f"{SECOND_ORDER}:") for line in rule_check.unchecked)
    by_operands = SECOND_ORDER in checks and not is_open
    return ALONG in checks and (by_operands or BY_DIFFERENCES in checks)


def _hint(rule_check: RuleCheck, findings: list[Finding]) -> str:
    """Says how to declare a rule of the user's that may differ on purpose."""
    use, case = rule_check.use, rule_check.case
    departs = any(
        f.verdict is Verdict.FAIL and f.gap is Gap.FORMULA and f.order == 1
        for f in findings
    )
    if not departs or case is None or not jaxprs.is_users(use.source):
        return ""
    declared = rule_check.options.expect_differs or {}
    if any(intentions.names(rule, use.source) for rule in declared):
        return (
            f"It was compared with what expect_differs declares for {use.rule.name}: "
            "one of the two is wrong"
        )
    return diagnose.how_to_declare([use.rule.name], _stands_in(case))


def _stands_in(case: Case) -> str:
    """Returns the function that a rule differentiates like, where it is a plain one."""
    claimed, seed = case.readings.claimed, [widen(value) for value in case.seed]
    if len(claimed) != 1 or len(seed) != 1 or claimed[0].shape != seed[0].shape:
        return ""
    if np.array_equal(claimed[0], seed[0]):
        return "lambda x: x"
    return "lambda x: -x" if np.array_equal(claimed[0], -seed[0]) else ""


def _why_malformed(use: RuleUse, options: Options, error: Exception) -> Cause:
    if use.rule.kind == "custom_jvp":
        forward = dataclasses.replace(options, modes=("fwd",), order=1)
        try:
            RuleCheck(use, forward, None)
        except Exception:  # it has no forward mode either
            return malformed(error)
        return not_transposable(error)
    return malformed(error)


_CLOSES_OVER_MOVING = Cause(
    "closes over what is differentiated",
    "the rule closes over a value that depends on what is differentiated: the gradient "
    "on that way is lost, or JAX raises UnexpectedTracerError",
    "pass the value as an argument of the rule, and return its cotangent from bwd",
)


def _structure(use: RuleUse, cause: Cause) -> Finding:
    return Finding(
        "all arguments",
        (),
        "",
        Verdict.FAIL,
        Gap.STRUCTURE,
        judged_by="JAX",
        cause=cause,
        check="structure",
        rule=use.rule,
        line=return_line(use.source),
    )


def _unreached(use: RuleUse, why: str) -> Finding:
    cause = Cause(
        "not reached",
        why,
        "choose arguments at which the program is finite and calls the rule",
    )
    return Finding(
        "all arguments",
        (),
        "",
        Verdict.INCONCLUSIVE,
        Gap.REACH,
        cause=cause,
        check="reach",
        rule=use.rule,
    )


# --- the whole program ---------------------------------------------------------------


def _under(variant: Callable[..., Any] | None, fn: Callable[..., Any]) -> Any:
    """Returns a function as a variant makes it, of the same arguments."""
    if variant is None:
        return fn
    if variants.only_places_arguments(variant):
        variants.apply_variant(variant, fn)  # Chex asks that it be called
        return fn

    def under(*args: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten(args)
        places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

        def of_arrays(arrays: list[Any]) -> Any:
            whole = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                whole[place] = array
            return fn(*jax.tree_util.tree_unflatten(tree, whole))

        return variants.apply_variant(variant, of_arrays)([leaves[i] for i in places])

    return under


class ProgramAudit:
    """Audits every custom rule that a function calls."""

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], options: Options, only: Any
    ):
        self.fn, self.options, self.only = fn, options, only
        self._fn = _under(options.variant, fn)
        self._hidden: list[str] = []
        self._cut: list[str] = []
        self.inputs = read_inputs(
            fn, args, argnums=options.argnums, exclude=options.exclude
        )

    def report(self, assertion: str) -> Report:
        """Audits every rule at the values of each trial.

        Raises:
          ValueError: The function calls no custom rule, or none that is wanted.
        """
        audits: list[Audit] = []
        found: list[Rule] = []
        for trial in progress.following(range(self.options.trials), "trials"):
            for use, anew in progress.following(self._uses(trial), "rules"):
                found.append(use.rule)
                options = dataclasses.replace(
                    self.options, exclude=(), variant=None, has_aux=False
                )
                audits.append(audit_rule(use, options, anew))
        return self._report(assertion, audits, tuple(dict.fromkeys(found)))

    def _uses(self, trial: int) -> list[tuple[RuleUse, TracedAnew]]:
        point = self.inputs.draw(self.options.key, trial)
        try:
            program = self._trace(self.inputs, point, self.options.expect_differs)
        except SlipError as error:
            raise TypeError(str(error)) from None
        self._hidden += [
            f"{name}: called inside of a linear solver, a reduction or a kernel"
            for name in rules.hidden_rules(program)
        ]
        self._cut = variants.cut_notes([program.jaxpr])
        uses = rules.find_rules(program, point, self.only)
        if not uses:
            raise ValueError(rules.NO_RULES)
        anew = TracedAnew(self._trace, self.inputs, point)
        return [(use, anew) for use in uses]

    def _trace(self, inputs: Inputs, point: Point, intentions: Any = None) -> Program:
        return trace_program(
            self._fn,
            inputs,
            point,
            has_aux=self.options.has_aux,
            intentions=intentions,
        )

    def _report(
        self, assertion: str, audits: list[Audit], found: tuple[Rule, ...]
    ) -> Report:
        findings = [finding for audit in audits for finding in audit.findings]
        unchecked = [line for audit in audits for line in audit.unchecked]
        unchecked += self._hidden
        if not findings:
            findings = [_nothing_reached(unchecked)]
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        key = seeding.describe(self.options.key)
        verdict = worst(finding.verdict for finding in findings)
        more = ", hazards=True" if self.options.hazards else ""
        replay = f"gradtest.{assertion}({name}, ..., key={key}{more})"
        hints = [audit.hint for audit in audits if audit.hint]
        return Report(
            assertion=assertion,
            subject=name,
            verdict=verdict,
            findings=tuple(findings),
            trials=self.options.trials,
            key=key,
            order=self.options.order,
            precision=tuple(dict.fromkeys(p for a in audits for p in a.precision)),
            unchecked=tuple(dict.fromkeys(unchecked)),
            notes=(
                *dict.fromkeys(note for a in audits for note in a.notes),
                *self._cut,
            ),
            replay="" if verdict is Verdict.PASS else replay,
            rules=found,
            hint=hints[0] if hints else "",
            exhibits=tuple(x for audit in audits for x in audit.exhibits)[:MOST_LEAVES],
            inputs=() if verdict is Verdict.PASS else self._inputs(),
            hazards=tuple(tried for audit in audits for tried in audit.hazards),
        )

    def _inputs(self) -> tuple[tuple[str, Any], ...]:
        """Returns the program's own arguments at the first trial, by leaf."""
        return inputs_at(self.inputs, self.inputs.draw(self.options.key, 0))


def _nothing_reached(unchecked: list[str]) -> Finding:
    cause = Cause(
        "not reached",
        "no rule could be audited: " + "; ".join(unchecked[:3]),
        "mend what is said there, or choose arguments at which the rules are called",
    )
    return Finding(
        "every rule",
        (),
        "",
        Verdict.INCONCLUSIVE,
        Gap.REACH,
        cause=cause,
        check="reach",
    )
