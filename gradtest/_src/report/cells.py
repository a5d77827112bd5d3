"""The words of a report that speak of ways to run one derivative."""

from __future__ import annotations

import math

from gradtest._src.findings import Finding, Gap, Report, Verdict
from gradtest._src.report import legible
from gradtest._src.report.parts import Numbers, Row, Table

_ASSERTION = "assert_variants_agree"
# What a finding notes where it is a value that departs, no gradient.
VALUE = "its value"
_HEADS = ("variant", "verdict", "in float64", "as it runs", "allowed", "worst at")


def speaks_of(report: Report) -> bool:
    """Whether a report is about ways to run one derivative."""
    alike = all(finding.gap is Gap.AGREEMENT for finding in report.findings)
    return report.assertion == _ASSERTION and bool(report.findings) and alike


def headline(report: Report, chief: Finding, where: str) -> str:
    """Says in which way of running it the derivative departs."""
    subject = legible.name(report.subject)
    if chief.check == "reference" and not chief.dtype:
        return f"nothing can be concluded about {subject}, however it runs."
    if chief.verdict is Verdict.INCONCLUSIVE:
        return f"nothing can be concluded about {subject} in {chief.check!r}."
    if not chief.dtype:
        return f"the gradient of {subject} fails in the variant {chief.check!r}."
    what = "value" if VALUE in chief.notes else "gradient"
    return f"the {what} of {subject} departs in the variant {chief.check!r} at {where}."


def numbers(finding: Finding) -> Numbers:
    """Returns the worst entry and the difference beside what is allowed."""
    place, claimed, true = "", ("", ""), ("", "")
    if finding.entry is not None:
        place = f"{legible.name(finding.name)}{legible.index(finding.entry.index)}"
        claimed = ("in the variant", f"{finding.entry.claimed:.6g}")
        if finding.entry.true is not None:
            true = ("by itself", f"{finding.entry.true:.6g}")
    if not finding.dtype or not math.isfinite(finding.size):
        return Numbers(place, claimed, true)
    return Numbers(
        place,
        claimed,
        true,
        ("relative difference", f"{finding.size:.3g}"),
        f"{finding.allowed:.1g}",
        f"in {finding.judged_by}",
        finding.strain,
    )


def sentences(numbers: Numbers) -> list[str]:
    """Puts the numbers into words."""
    lines = []
    if numbers.place:
        alone = f", {numbers.true[1]} by itself" if numbers.true[1] else ""
        lines.append(f"{numbers.place}: {numbers.claimed[1]} there{alone}.")
    if numbers.allowed:
        gap = " ".join(numbers.gap)
        lines.append(f"{gap}, allowed {numbers.allowed}; {numbers.judge}.")
    return lines


def others(report: Report, findings: list[Finding], chief: Finding) -> str:
    """Names the other ways with the same verdict, and counts those that agree."""
    names = [finding.check for finding in findings if finding is not chief]
    right = sum(finding.verdict is Verdict.PASS for finding in report.findings)
    agree = f"{right} agree{'s' * (right == 1)}" if right else ""
    if not names:
        count = f" {right} agree" if right > 1 else " agrees"
        return f"The other{count}." if right else ""
    word = "Departs as well" if report.verdict is Verdict.FAIL else "Open"
    rest = f"; {agree}" if agree else ""
    return f"{word}: {legible.listed(names)}{rest}."


def table(report: Report) -> Table:
    """Returns one row for each way to run it."""
    rows = tuple(_row(finding) for finding in report.findings)
    return Table(_HEADS, rows, "Ways to run it", frozenset({2, 3, 4}))


def _row(finding: Finding) -> Row:
    wide = finding.judged_by == "float64" and finding.dtype
    where = legible.name(finding.name)
    if finding.cause is not None:
        where = f"{where}; {legible.one_line(finding.cause.name)}"
    narrow = finding.rounding
    cells = (
        legible.one_line(finding.check),
        finding.verdict.value,
        legible.scale(finding.size) if wide else "-",
        legible.scale(narrow[0]) if narrow else "-",
        legible.allowance(narrow[1]) if narrow else "-",
        where,
    )
    return Row(cells, finding.verdict)
