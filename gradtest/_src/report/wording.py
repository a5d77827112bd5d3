"""The words of a report: what one finding says, in the user's own names."""

from __future__ import annotations

import math

from gradtest._src.findings import (
    INNER,
    Cause,
    Entry,
    Finding,
    Gap,
    Line,
    Report,
    Verdict,
)
from gradtest._src.report import cells, legible, rules
from gradtest._src.report.parts import Numbers

MODES = {"rev": "reverse mode", "fwd": "forward mode"}
_HEADLINES = {
    Gap.VALUE: "{subject} returns another value under differentiation: {where}.",
    Gap.SOLVER: "{subject} uses a linear solver that is wrong: {name}.",
    Gap.LINEAR: "{subject} is not linear: {where}.",
    Gap.ROUNDING: "the {kind} of {subject} loses its accuracy at {where}.",
    Gap.CLOSE: "the gradients differ at {where}.",
    Gap.TREE: "the gradients can't be compared at {where}.",
    Gap.FINITE: "the gradient of {subject} is not finite at {where}.",
    Gap.FLOW: "no gradient of {subject} reaches {where}.",
    Gap.SIZE: "the gradient of {subject} vanishes or explodes at {where}.",
    Gap.STATE: "{subject} does not hold its state in evaluation mode: {where}.",
    Gap.AGREEMENT: "two calls of {subject} with the same keys differ.",
}
GAPS = {
    Gap.FORMULA: "relative gap",
    Gap.VALUE: "relative gap of the value",
    Gap.ROUNDING: "relative gap between its own dtype and float64",
    Gap.SOLVER: "relative residual",
    Gap.CLOSE: "relative difference",
    Gap.AGREEMENT: "relative difference",
    Gap.LINEAR: "relative gap",
}
_JUDGES = {
    "exact": "rule-free autodiff in float64, confirmed by differences",
    "measured": "differences in float64",
}
# What an assertion speaks of, where that is no gradient.
_KINDS = {
    "assert_vjp_matches": "vector-Jacobian product",
    "assert_jvp_matches": "Jacobian-vector product",
    "assert_hvp_matches": "Hessian-vector product",
    "assert_transpose_matches": "transpose",
    "assert_update_matches": "update",
    "assert_masked": "update",
    "assert_overflow_skipped": "skipped step",
}


def chief_of(report: Report) -> Finding | None:
    """Returns the finding that a message is about; None where nothing was found."""
    findings = [f for f in report.findings if f.verdict is report.verdict]
    if not findings or report.verdict not in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        return None
    if cells.speaks_of(report):
        return findings[0]
    of_leaves = [finding for finding in findings if finding.rule is None]
    return max(of_leaves or findings, key=_importance)


def _importance(finding: Finding) -> tuple[bool, bool, float]:
    """What explains most comes first: solvers and values, then reverse mode."""
    is_root = finding.gap in (Gap.SOLVER, Gap.VALUE, Gap.LINEAR)
    is_root |= finding.judged_by == "linearity"
    return is_root, finding.mode == "rev", finding.strain


def headline(report: Report, chief: Finding | None) -> str:
    """Says what is wrong and where, in one sentence."""
    if chief is None:
        return _quiet_headline(report)
    where = place(chief)
    if chief.rule is not None:
        return rules.headline(chief.rule, chief, where)
    if cells.speaks_of(report):
        return cells.headline(report, chief, where)
    subject = legible.name(report.subject)
    if report.verdict is Verdict.INCONCLUSIVE:
        return f"nothing can be concluded about {subject} at {where}."
    kind = "second derivative" if chief.order > 1 else "gradient"
    if report.assertion in _KINDS:
        kind = _KINDS[report.assertion]
        where = where.removesuffix(f", {MODES['fwd']}")
    if report.assertion == "assert_grads_agree":
        if chief.gap is Gap.VALUE:
            return f"{subject} and the reference differ in value: {where}."
        if chief.gap is Gap.FORMULA:
            return f"the gradient of {subject} is not the reference's at {where}."
    if chief.gap in _HEADLINES:
        own = legible.name(chief.name)
        if chief.check == INNER:
            return f"the value of {subject} rests on a wrong derivative: {where}."
        return _HEADLINES[chief.gap].format(
            subject=subject, where=where, name=own, kind=kind
        )
    return f"the {kind} of {subject} is wrong at {where}."


def _quiet_headline(report: Report) -> str:
    """Says what came of a check that found nothing wrong, or did not look."""
    subject = legible.name(report.subject)
    if report.verdict is Verdict.NOT_CHECKED:
        return f"nothing of {subject} was checked."
    if report.verdict is not Verdict.PASS:  # a report made by hand
        return f"{subject} did not pass."
    if report.rules:
        return (
            f"{legible.counted(len(report.rules), 'custom rule')} of {subject}: right."
        )
    if cells.speaks_of(report):
        ways = legible.counted(len(report.findings), "way")
        return f"{subject} has one gradient in {ways} to run it."
    leaves = len({finding.name for finding in report.findings})
    found = f"nothing wrong was found with {subject}"
    return f"{found} in {legible.counted(leaves, 'leaf', 'leaves')}."


def place(finding: Finding) -> str:
    """Names a leaf with its type, and the mode where that is not the usual one."""
    kind = f" ({finding.dtype}{list(finding.shape)})" if finding.dtype else ""
    mode = f", {MODES['fwd']}" if finding.mode == "fwd" else ""
    return f"{legible.name(finding.name)}{kind}{mode}"


def special_point(report: Report, finding: Finding) -> str:
    """Says at which special point a finding was made, and whether it is alone."""
    wrong = [tried for tried in report.hazards if tried.verdict is Verdict.FAIL]
    more = f"; wrong at {len(wrong) - 1} more of these" if len(wrong) > 1 else ""
    tried = legible.counted(len(report.hazards), "special point")
    return f"{legible.name(finding.hazard)} ({tried} tried{more})."


def special_points(report: Report) -> str:
    """Counts what came of the special points."""
    counts = dict.fromkeys(Verdict, 0)
    for tried in report.hazards:
        counts[tried.verdict] += 1
    told = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
    return f"{len(report.hazards)} tried: {', '.join(told)}"


def at_line(line: Line) -> tuple[str, str]:
    """Returns the label and the text of a line of source."""
    code = f": {legible.shortened(legible.one_line(line.code))}" if line.code else ""
    says = f"  ({legible.one_line(line.says)})" if line.says else ""
    label = "At" if line.likelihood >= 0.5 else "Possibly at"
    return label, f"{at_place(line)}{code}{says}"


def at_place(line: Line) -> str:
    """Names the file, the line's number, and the function."""
    own = line.function.rpartition("<locals>.")[2]
    function = f" in {legible.name(own)}" if own else ""
    return f"{legible.path(line.file)}:{line.number}{function}"


def cause_label(report: Report, cause: Cause) -> str:
    """Says how sure the cause is."""
    if report.verdict is not Verdict.FAIL:
        return "Reason"
    return "Likely cause" if cause.likelihood >= 0.5 else "Possible cause"


def numbers(finding: Finding) -> Numbers:
    """Returns the numbers that a finding rests on."""
    if finding.verdict is Verdict.INCONCLUSIVE and not finding.size:
        return Numbers()
    entry = _entry(finding, finding.entry) if finding.entry else Numbers()
    if finding.gap not in GAPS or not math.isfinite(finding.size):
        return entry
    judge = _JUDGES.get(finding.judged_by) if finding.gap is Gap.FORMULA else None
    return Numbers(
        entry.place,
        entry.claimed,
        entry.true,
        (GAPS[finding.gap], f"{finding.size:.3g}"),
        f"{finding.allowed:.1g}",
        f"judged by {judge}" if judge else "",
        finding.strain,
    )


def _entry(finding: Finding, entry: Entry) -> Numbers:
    place = f"{legible.name(entry.of or finding.name)}{legible.index(entry.index)}"
    if finding.gap is Gap.FINITE:
        return Numbers(place, ("", f"{entry.claimed:.6g}"))
    if finding.gap is Gap.STATE and entry.true is not None:
        after, before = told_apart(entry.claimed, entry.true)
        return Numbers(place, ("after the call", after), ("before", before))
    judge = "reference" if finding.gap is Gap.CLOSE else "true"
    if entry.true is None:
        return Numbers(place, ("claimed", f"{entry.claimed:.6g}"))
    claimed, true = told_apart(entry.claimed, entry.true)
    return Numbers(place, ("claimed", claimed), (judge, true))


def told_apart(one: complex, other: complex) -> tuple[str, str]:
    """Writes two numbers with as many digits as tell them apart."""
    for digits in (6, 10, 17):
        written = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if written[0] != written[1]:
            break
    return written


def sentences(numbers: Numbers) -> list[str]:
    """Puts the numbers into words: one line, or none."""
    values = [" ".join(pair).strip() for pair in (numbers.claimed, numbers.true)]
    parts = []
    if numbers.place:
        parts.append(f"{numbers.place}: {', '.join(v for v in values if v)}")
    if numbers.allowed:
        parts.append(f"{' '.join(numbers.gap)}, allowed {numbers.allowed}")
        parts += [numbers.judge] if numbers.judge else []
    return [f"{'; '.join(parts)}."] if parts else []


def others(report: Report, chief: Finding) -> str:
    """Names what else has the verdict, and counts what is right."""
    findings = [f for f in report.findings if f.verdict is report.verdict]
    if chief.rule is not None:
        return rules.others(report, chief)
    if cells.speaks_of(report):
        return cells.others(report, findings, chief)
    leaves = [finding for finding in report.findings if finding.rule is None]
    same = dict.fromkeys(f.name for f in leaves if f.verdict is report.verdict)
    found = [name for name in same if name != chief.name]
    bad = {f.name for f in leaves if f.verdict is not Verdict.PASS}
    right = len({f.name for f in leaves if f.mode == "rev"} - bad)
    if not found:
        return f"The other {right} leaves are right." if right > 1 else ""
    named = legible.listed([legible.name(other) for other in found])
    word = "Wrong" if report.verdict is Verdict.FAIL else "Open"
    rest = f"; right: {right}" if right else ""
    return f"{word} as well: {named}{rest}."


def remarks(finding: Finding) -> str:
    """Returns what a table says of a finding beside its numbers."""
    parts = [approximation(finding)] if finding.approximation is not None else []
    if finding.cause is not None:
        parts.append(finding.cause.name)
    return "; ".join(legible.one_line(part) for part in (*parts, *finding.notes))


def approximation(finding: Finding) -> str:
    """Returns the sentence about a gap that is an approximation, with its numbers."""
    found = finding.approximation
    assert found is not None
    if found.retraced is not None:
        rounding = f", rounding {finding.rounding[0]:.1e}" if finding.rounding else ""
        return (
            f"approximate, not wrong: gap {found.lifted:.1e} as computed for "
            f"{finding.dtype}, {found.retraced:.1e} when traced in float64{rounding}"
        )
    return (
        f"constants rounded to half precision: gap {found.lifted:.1e}, "
        f"explained up to {3 * (found.literals or 0.0):.1e}"
    )
