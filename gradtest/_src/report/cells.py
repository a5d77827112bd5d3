"""The parts of a text report that speak of ways to run one derivative."""

from __future__ import annotations

import math

from gradtest._src.findings import Finding, Gap, Report, Verdict

_ASSERTION = "assert_variants_agree"
_OTHERS_NAMED = 4
# What a finding notes where it is a value that departs, no gradient.
VALUE = "its value"
_HEADS = ("variant", "verdict", "in float64", "as it runs", "allowed", "worst at")


def speaks_of(report: Report) -> bool:
    """Whether a report is about ways to run one derivative."""
    alike = all(finding.gap is Gap.AGREEMENT for finding in report.findings)
    return report.assertion == _ASSERTION and bool(report.findings) and alike


def headline(report: Report, chief: Finding, where: str) -> str:
    """Says in which way of running it the derivative departs."""
    if chief.check == "reference" and not chief.dtype:
        return f"nothing can be concluded about {report.subject}, however it runs."
    if chief.verdict is Verdict.INCONCLUSIVE:
        return f"nothing can be concluded about {report.subject} in {chief.check!r}."
    if not chief.dtype:
        return f"the gradient of {report.subject} fails in the variant {chief.check!r}."
    what = "value" if VALUE in chief.notes else "gradient"
    return (
        f"the {what} of {report.subject} departs in the variant {chief.check!r} "
        f"at {where}."
    )


def numbers(finding: Finding) -> list[str]:
    """Shows the worst entry and the difference beside what is allowed."""
    lines, entry = [], finding.entry
    if entry is not None:
        index = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
        lines.append(
            f"{finding.name}{index}: {entry.claimed:.6g} there, {entry.true:.6g} by "
            "itself."
        )
    if finding.dtype and math.isfinite(finding.size):
        lines.append(
            f"relative difference {finding.size:.3g}, allowed {finding.allowed:.1g}; "
            f"in {finding.judged_by}."
        )
    return lines


def others(report: Report, findings: list[Finding], chief: Finding) -> str:
    """Names the other ways with the same verdict, and counts those that agree."""
    names = [finding.check for finding in findings if finding is not chief]
    right = sum(finding.verdict is Verdict.PASS for finding in report.findings)
    agree = f"{right} agree{'s' * (right == 1)}" if right else ""
    if not names:
        return f"The other {agree}." if right else ""
    more = f" and {len(names) - _OTHERS_NAMED} more" * (len(names) > _OTHERS_NAMED)
    word = "Departs as well" if report.verdict is Verdict.FAIL else "Open"
    rest = f"; {agree}" if agree else ""
    return f"{word}: {', '.join(names[:_OTHERS_NAMED])}{more}{rest}."


def table(report: Report) -> list[str]:
    """Returns one line for each way to run it."""
    rows = [_HEADS, *(_row(finding) for finding in report.findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(finding: Finding) -> tuple[str, ...]:
    wide = finding.judged_by == "float64" and finding.dtype
    where = finding.name
    if finding.cause is not None:
        where = f"{where}; {finding.cause.name}"
    narrow = finding.rounding
    return (
        finding.check,
        finding.verdict.value,
        f"{finding.size:.1e}" if wide else "-",
        f"{narrow[0]:.1e}" if narrow else "-",
        f"{narrow[1]:.0e}" if narrow else "-",
        where,
    )
