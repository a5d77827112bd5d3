"""The words of a report that speak of custom rules."""

from __future__ import annotations

from gradtest._src.findings import Finding, Gap, Report, Rule, Verdict
from gradtest._src.report import legible


def headline(rule: Rule, chief: Finding, where: str) -> str:
    """Says which rule is wrong, and in what respect."""
    own = legible.name(rule.name)
    name = f"the {rule.kind} rule of {own}"
    if chief.verdict is Verdict.INCONCLUSIVE:
        return f"nothing can be concluded about {name} at {where}."
    if chief.gap is Gap.VALUE:
        return f"{name} returns another value than {own} itself: {where}."
    if chief.gap is Gap.STRUCTURE:
        return f"{name} is malformed at {where}."
    if chief.gap is Gap.ROUNDING:
        what = "'s second derivative" if chief.order > 1 else ""
        return f"{name}{what} loses its accuracy at {where}."
    if chief.gap is Gap.AGREEMENT:
        return f"{name} gives another derivative in the check {chief.check!r}: {where}."
    if chief.order > 1:
        return f"{name} has a wrong second derivative at {where}."
    return f"{name} is wrong at {where}."


def whereabouts(rule: Rule) -> str:
    """Says where a rule was written and where it is called."""
    path = f" in {legible.name(rule.path)}" if rule.path else ""
    called = f"; called at {rule.call}{path}" if rule.call else f"; called{path}"
    times = f", {rule.count} calls" if rule.count > 1 else ""
    if rule.count > rule.looked_at:
        times += f" ({rule.looked_at} looked at)"
    where = ", ".join(rule.where)
    return legible.one_line(f"{where}{called if rule.call or path else ''}{times}.")


def others(report: Report, chief: Finding) -> str:
    """Names the other rules with the same verdict, or counts those that are right."""
    findings = [f for f in report.findings if f.verdict is report.verdict]
    named = [
        f"{legible.name(f.rule.name)} ({legible.name(f.name)})"
        for f in findings
        if f.rule is not None and f.rule != chief.rule
    ]
    if named:
        some = list(dict.fromkeys(named))
        word = "Wrong" if report.verdict is Verdict.FAIL else "Open"
        return f"{word} as well: {legible.listed(some)}."
    right = len(report.rules) - 1
    if right <= 0:
        return ""
    return f"The other {right} rules are right." if right > 1 else "The other is right."


def passed_checks(findings: list[Finding]) -> str:
    """Sums up the checks of one rule that passed without numbers of their own."""
    return ", ".join(
        f.check + "".join(f" ({legible.one_line(note)})" for note in f.notes)
        for f in findings
        if is_summed_up(f)
    )


def is_summed_up(finding: Finding) -> bool:
    """Whether a finding is one of those that `passed_checks` names."""
    return finding.gap is Gap.AGREEMENT and finding.verdict is Verdict.PASS
