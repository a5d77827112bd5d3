"""Which custom rule makes the derivative of a whole program wrong.

Asked only after a failure: each rule of the program is then audited by itself, at the
values that reached it.
"""

from __future__ import annotations

import dataclasses

from gradtest._src import diagnose, jaxprs
from gradtest._src.audit import Audit
from gradtest._src.check import Check
from gradtest._src.findings import Cause, Finding, Gap, Report, Verdict
from gradtest._src.rules import RuleUse

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
        order = 2 if case.program.opened else max(self.troubled)
        audits = self.trust.audits(self._programs[0], case.point, order)
        found = [(use, _gravest(audit)) for use, audit in audits]
        blamed = [(use, wrong) for use, wrong in found if wrong is not None]
        return _with_blame(report, blamed) if blamed else report


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
        said = (causes[0].name, diagnose.INNER_VALUE.name)
        others = [*causes[1:], *(c for c in own if c and c.name not in said)]
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
