"""The tables of a report: leaves, rules, entries of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradtest._src.findings import Exhibit, Finding, Gap, Hazard, Rule, Verdict
from gradtest._src.report import legible, rules, wording
from gradtest._src.report.parts import Row, Table

# So many rows are shown where room is short, and so many entries of an array.
SHOWN, ENTRIES = 20, 10
_VERDICT, _LEAF, _OF, _GAP, _ALLOWED, _ROUNDING, _CAN_ROUND, _REMARKS = range(8)
_HEADS = (
    "verdict", "leaf", "compared", "gap", "allowed", "rounding", "allowed", "remarks"
)  # fmt: skip
_COUNTED = {
    Verdict.FAIL: "that failed",
    Verdict.INCONCLUSIVE: "that are inconclusive",
    Verdict.NOT_CHECKED: "that were not checked",
    Verdict.PASS: "that passed",
}


def leaves(findings: Sequence[Finding], says: str) -> Table:
    """Returns one row for each finding, those that did not pass first."""
    few = len(findings) <= SHOWN
    ranked = sorted(
        findings, key=lambda f: (-f.verdict.severity, 0.0 if few else -f.strain)
    )
    rows = [_row(finding) for finding in ranked]
    columns = [
        i
        for i in range(len(_HEADS))
        if i in (_VERDICT, _LEAF) or any(row.cells[i] for row in rows)
    ]
    if all(f.gap in (Gap.FORMULA, Gap.CLOSE) for f in findings) and _OF in columns:
        columns.remove(_OF)
    numbers = {_GAP, _ALLOWED, _ROUNDING, _CAN_ROUND}
    return Table(
        tuple(_HEADS[i] for i in columns),
        tuple(
            Row(tuple(row.cells[i] for i in columns), row.verdict, row.strain)
            for row in rows
        ),
        says,
        frozenset(new for new, old in enumerate(columns) if old in numbers),
        SHOWN,
        _rest(ranked[SHOWN:]),
    )


def _row(finding: Finding) -> Row:
    gap, allowed, compared = "", "", ""
    is_open = finding.verdict is Verdict.INCONCLUSIVE and not finding.size
    if finding.gap in wording.GAPS and not is_open:
        gap, allowed = legible.scale(finding.size), legible.allowance(finding.allowed)
        compared = finding.gap.value
    elif finding.gap is not Gap.REACH:
        compared = finding.gap.value
    order = f", order {finding.order}" if finding.order > 1 else ""
    rounding = finding.rounding
    cells = (
        finding.verdict.value,
        f"{wording.place(finding)}{order}",
        compared,
        gap,
        allowed,
        legible.scale(rounding[0]) if rounding else "",
        legible.allowance(rounding[1]) if rounding else "",
        wording.remarks(finding),
    )
    return Row(cells, finding.verdict, finding.strain if gap else None)


def _rest(findings: Sequence[Finding]) -> str:
    """Counts the rows that are not shown, with the largest gap of those that passed."""
    parts = []
    for verdict, words in _COUNTED.items():
        some = [f for f in findings if f.verdict is verdict]
        if not some:
            continue
        part = f"{len(some):,} more {words}"
        with_gap = [f for f in some if f.gap in wording.GAPS]
        if with_gap:
            worst = max(with_gap, key=lambda f: f.strain)
            allowed = legible.allowance(worst.allowed)
            part += f", largest gap {legible.scale(worst.size)} of {allowed}"
        parts.append(part)
    return f"and {'; '.join(parts)}" if parts else ""


def other_rules(found: Sequence[tuple[Rule, Verdict, int]]) -> Table:
    """Returns one row for each rule that has no section of its own."""
    rows = [
        Row(
            (
                verdict.value,
                legible.name(rule.name),
                rule.kind,
                legible.counted(checks, "check"),
                rules.whereabouts(rule),
            ),
            verdict,
        )
        for rule, verdict, checks in found
    ]
    return Table(
        ("verdict", "rule", "kind", "looked at in", "where"),
        tuple(rows),
        "Further rules",
        shown=SHOWN,
        rest=f"and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else "",
    )


def hazards(found: Sequence[Hazard]) -> Table:
    """Returns one row for each special point of which there is something to be said."""
    told = [tried for tried in found if tried.says or tried.verdict is not Verdict.PASS]
    told.sort(key=lambda tried: -tried.verdict.severity)
    rows = [
        Row(
            (
                tried.verdict.value,
                legible.name(tried.name),
                legible.one_line(tried.says),
            ),
            tried.verdict,
        )
        for tried in told
    ]
    return Table(
        ("verdict", "special point", "remarks"),
        tuple(rows),
        "Special points",
        shown=SHOWN,
        rest=f"and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else "",
    )


def entries(exhibit: Exhibit) -> Table:
    """Returns the entries of two arrays that are farthest apart."""
    claimed = np.asarray(exhibit.claimed)
    true = None if exhibit.true is None else np.asarray(exhibit.true)
    if true is not None and true.shape != claimed.shape:
        true = None
    with np.errstate(all="ignore"):
        off = np.abs(claimed if true is None else claimed - true).ravel()
    off = np.where(np.isnan(off), np.inf, off)
    order = np.argsort(-off, kind="stable")[:ENTRIES]
    heads = ("index", "claimed") if true is None else ("index", "claimed", "true")
    start = exhibit.start or (0,) * claimed.ndim
    rows = []
    for flat in order.tolist():
        place = np.unravel_index(flat, claimed.shape)
        index = tuple(int(i) + begin for i, begin in zip(place, start, strict=True))
        values = [claimed[place]] if true is None else [claimed[place], true[place]]
        shown = (f"{value:.6g}" for value in values)
        rows.append(Row((legible.index(index) or "the number", *shown)))
    left = claimed.size - len(rows)
    return Table(
        heads,
        tuple(rows),
        f"Entries of {legible.name(exhibit.name)} that are farthest off",
        frozenset({1, 2}),
        ENTRIES,
        f"and {legible.counted(left, 'entry', 'entries')} more" if left else "",
    )
