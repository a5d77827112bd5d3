"""Which custom rule makes the derivative of a whole program wrong.

Asked only after a failure: each rule of the program is then audited by itself, at the
values that reached it.
"""

from __future__ import annotations

import dataclasses

from gradtest._src import jaxprs, rules
from gradtest._src.audit import Audit, audit_rule
from gradtest._src.case import Case
from gradtest._src.check import Check
from gradtest._src.findings import Cause, Finding, Gap, Report, Verdict
from gradtest._src.inputs import Inputs, Point
from gradtest._src.program import Program
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rules import RuleUse

# So many rules are audited, users' own first: counted, not timed, so that every machine
# finds the same.
_MOST_RULES = 12
# So many further causes are kept.
_MOST_OTHERS = 3
# Gaps that a wrong rule explains, and what of a rule explains them.
_EXPLAINED = (Gap.FORMULA, Gap.VALUE, Gap.ROUNDING)
_EXPLAIN = (*_EXPLAINED, Gap.AGREEMENT)


class AutodiffCheck(Check):
    """A check of what JAX differentiates; a failure names the rule that is wrong."""

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        report = super().report(assertion)
        if report.verdict is not Verdict.FAIL or not self.troubled:
            return report
        case = self.troubled[min(self.troubled)]
        is_alone = jaxprs.current_job() is None  # others need not have failed
        if not (case.program.has_rules and is_alone):
            return report
        blamed = self._blamed(case)
        return _with_blame(report, blamed) if blamed else report

    def _blamed(self, case: Case) -> list[tuple[RuleUse, Finding]]:
        """Returns the rules that are wrong, each with its gravest finding."""
        options = dataclasses.replace(
            self.options, exclude=(), variant=None, has_aux=False, trials=1,
            order=max(self.troubled),
        )  # fmt: skip
        anew = TracedAnew(self._traced_anew, self.inputs, case.point)
        try:
            uses = rules.find_rules(self._programs[0], case.point, None)
        except Exception:  # what can't be run equation by equation
            return []
        found = []
        uses.sort(key=lambda use: not jaxprs.is_users(use.source))
        for use in uses[:_MOST_RULES]:
            wrong = _gravest(audit_rule(use, options, anew))
            if wrong is not None:
                found.append((use, wrong))
        return found

    def _traced_anew(self, inputs: Inputs, point: Point) -> Program:
        return self._trace(inputs, point)


def _gravest(audit: Audit) -> Finding | None:
    failed = [f for f in audit.findings if f.verdict is Verdict.FAIL]
    wrong = [f for f in failed if f.gap in _EXPLAIN]
    return max(wrong, key=lambda f: (f.gap in _EXPLAINED, f.strain), default=None)


def _with_blame(report: Report, blamed: list[tuple[RuleUse, Finding]]) -> Report:
    """Returns the report with the wrong rules as the causes of what they explain."""
    causes = [_cause(use, finding) for use, finding in blamed]
    line = next((finding.line for _, finding in blamed if finding.line), None)

    def explained(finding: Finding) -> Finding:
        if finding.verdict is not Verdict.FAIL or finding.gap not in _EXPLAINED:
            return finding
        own = (finding.cause, *finding.other_causes)
        others = [*causes[1:], *(c for c in own if c and c.name != causes[0].name)]
        return dataclasses.replace(
            finding,
            cause=causes[0],
            other_causes=tuple(others[:_MOST_OTHERS]),
            line=line or finding.line,
        )

    return dataclasses.replace(
        report, findings=tuple(explained(finding) for finding in report.findings)
    )


def _cause(use: RuleUse, finding: Finding) -> Cause:
    """Says which rule is wrong, and how: the cause of its own finding."""
    own = finding.cause or Cause("wrong rule", "it departs from its function", "")
    parts = ("fwd", "jvp") if finding.gap is Gap.VALUE else ("bwd", "jvp")
    places = [w for w in use.rule.where if w.partition(" at ")[0] in parts]
    where = next(iter(places or use.rule.where), "")
    place = f" ({where})" if where else ""
    says = f"the {use.rule.kind} rule of {use.rule.name}{place} is wrong at "
    return dataclasses.replace(own, says=f"{says}{finding.name}: {own.says}")
