"""Reports as plain text: a few lines for an exception, all of it on demand."""

from __future__ import annotations

import math

from gradtest._src.findings import Entry, Finding, Gap, Report, Rule, Verdict
from gradtest._src.report import cells, rules

_OTHERS_NAMED = 4
_MODES = {"rev": "reverse mode", "fwd": "forward mode"}
_HEADLINES = {
    Gap.VALUE: "{subject} returns another value under differentiation: {where}.",
    Gap.SOLVER: "{subject} uses a linear solver that is wrong: {name}.",
    Gap.LINEAR: "{subject} is not linear: {where}.",
    Gap.ROUNDING: "the {kind} of {subject} loses its accuracy at {where}.",
    Gap.CLOSE: "the gradients differ at {where}.",
    Gap.TREE: "the gradients can't be compared at {where}.",
    Gap.FINITE: "the gradient of {subject} is not finite at {where}.",
    Gap.FLOW: "no gradient of {subject} reaches {where}.",
}
_GAPS = {
    Gap.FORMULA: "relative gap",
    Gap.VALUE: "relative gap of the value",
    Gap.ROUNDING: "relative gap between its own dtype and float64",
    Gap.SOLVER: "relative residual",
    Gap.CLOSE: "relative difference",
    Gap.AGREEMENT: "relative difference",
    Gap.LINEAR: "relative gap",
}
# What an assertion speaks of, where that is no gradient.
_KINDS = {
    "assert_vjp_matches": "vector-Jacobian product",
    "assert_jvp_matches": "Jacobian-vector product",
    "assert_hvp_matches": "Hessian-vector product",
    "assert_transpose_matches": "transpose",
}


def message(report: Report) -> str:
    """Returns the two to eight lines of a failed or inconclusive check."""
    findings = [f for f in report.findings if f.verdict is report.verdict]
    by_cell = cells.speaks_of(report)
    chief = findings[0] if by_cell else max(findings, key=_importance)
    lines = [_headline(report, chief)]
    if chief.rule is not None:
        lines.append(rules.whereabouts(chief.rule))
    lines += cells.numbers(chief) if by_cell else _numbers(chief)
    if chief.cause is not None:
        label = "Likely cause" if report.verdict is Verdict.FAIL else "Reason"
        lines.append(f"{label}: {chief.cause.says}.")
        lines.append(f"Try: {chief.cause.remedy}.")
    if chief.rule is not None:
        rest = rules.others(report, chief)
    elif by_cell:
        rest = cells.others(report, findings, chief)
    else:
        rest = _others(report, findings, chief)
    hint = f"{report.hint}." if report.hint else ""
    if rest or hint:
        lines.append(" ".join(part for part in (rest, hint) if part))
    if report.found_in:
        lines.append(f"Found in {report.found_in} alone.")
    if report.replay:
        lines.append(f"Replay: {report.replay}")
    return "\n  ".join(lines)


def _importance(finding: Finding) -> tuple[bool, bool, float]:
    """What explains most comes first: solvers and values, then reverse mode."""
    is_root = finding.gap in (Gap.SOLVER, Gap.VALUE, Gap.LINEAR)
    is_root |= finding.judged_by == "linearity"
    return is_root, finding.mode == "rev", finding.strain


def full(report: Report) -> str:
    """Returns everything that a report knows."""
    lines = [f"{report.verdict.value}: {report.assertion}({report.subject})"]
    if cells.speaks_of(report):
        lines += [f"  {line}" for line in cells.table(report)]
    else:
        lines += [f"  {_line(f)}" for f in report.findings if f.rule is None]
    for rule in report.rules:
        own = [finding for finding in report.findings if finding.rule == rule]
        lines += [f"  {line}" for line in _of_rule(rule, own)]
    if math.isfinite(report.smallest_seen):
        lines.append(
            f"  smallest relative error that would have been seen: "
            f"{report.smallest_seen:.1e}"
        )
    if report.modes:
        modes = ", ".join(_MODES[mode] for mode in report.modes)
        trials = f"{report.trials} trial{'s' * (report.trials != 1)}"
        lines.append(f"  checked: {modes}, order {report.order}, {trials}")
    lines += [f"  {line}" for line in report.precision]
    lines += [f"  not checked: {line}" for line in report.unchecked]
    lines += [f"  note: {line}" for line in report.notes]
    if report.found_in:
        lines.append(f"  note: found in {report.found_in} alone")
    if report.replay:
        lines.append(f"  replay: {report.replay}")
    return "\n".join(lines)


def _of_rule(rule: Rule, findings: list[Finding]) -> list[str]:
    lines = [f"{rule.kind} {rule.name}: {rules.whereabouts(rule)}"]
    told = [_line(f) for f in findings if not rules.is_summed_up(f)]
    summary = rules.passed_checks(findings)
    return lines + [f"  {line}" for line in [*told, summary] if line]


def _headline(report: Report, chief: Finding) -> str:
    where = _where(chief)
    if chief.rule is not None:
        return rules.headline(chief.rule, chief, where)
    if cells.speaks_of(report):
        return cells.headline(report, chief, where)
    if report.verdict is Verdict.INCONCLUSIVE:
        return f"nothing can be concluded about {report.subject} at {where}."
    kind = {1: "gradient", 2: "second derivative"}[chief.order]
    if report.assertion in _KINDS:
        kind = _KINDS[report.assertion]
        where = where.removesuffix(f", {_MODES['fwd']}")
    if report.assertion == "assert_grads_agree":
        if chief.gap is Gap.VALUE:
            return f"{report.subject} and the reference differ in value: {where}."
        if chief.gap is Gap.FORMULA:
            return (
                f"the gradient of {report.subject} is not the reference's at {where}."
            )
    if chief.gap in _HEADLINES:
        return _HEADLINES[chief.gap].format(
            subject=report.subject, where=where, name=chief.name, kind=kind
        )
    return f"the {kind} of {report.subject} is wrong at {where}."


def _where(finding: Finding) -> str:
    kind = f" ({finding.dtype}{list(finding.shape)})" if finding.dtype else ""
    mode = f", {_MODES[finding.mode]}" if finding.mode == "fwd" else ""
    return f"{finding.name}{kind}{mode}"


def _numbers(finding: Finding) -> list[str]:
    if finding.verdict is Verdict.INCONCLUSIVE and not finding.size:
        return []
    parts = []
    if finding.entry is not None:
        parts.append(_entry(finding, finding.entry))
    if finding.gap not in _GAPS or not math.isfinite(finding.size):
        return parts
    judge = {
        "exact": "rule-free autodiff in float64, confirmed by differences",
        "measured": "differences in float64",
    }.get(finding.judged_by)
    by = f"; judged by {judge}" if judge and finding.gap is Gap.FORMULA else ""
    parts.append(
        f"{_GAPS[finding.gap]} {finding.size:.3g}, allowed {finding.allowed:.1g}{by}."
    )
    return parts


def _entry(finding: Finding, entry: Entry) -> str:
    index = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
    place = f"{entry.of or finding.name}{index}"
    if finding.gap is Gap.FINITE:
        return f"{place}: {entry.claimed:.6g}."
    judge = "reference" if finding.gap is Gap.CLOSE else "true"
    if entry.true is None:
        return f"{place}: claimed {entry.claimed:.6g}."
    for digits in (6, 10, 17):  # as many as tell the two apart
        claimed, true = f"{entry.claimed:.{digits}g}", f"{entry.true:.{digits}g}"
        if claimed != true:
            break
    return f"{place}: claimed {claimed}, {judge} {true}."


def _others(report: Report, findings: list[Finding], chief: Finding) -> str:
    others = list(dict.fromkeys(f.name for f in findings if f.name != chief.name))
    bad = {f.name for f in report.findings if f.verdict is not Verdict.PASS}
    right = len({f.name for f in report.findings if f.mode == "rev"} - bad)
    if not others:
        return f"The other {right} leaves are right." if right > 1 else ""
    named = ", ".join(others[:_OTHERS_NAMED])
    more = f" and {len(others) - _OTHERS_NAMED} more" * (len(others) > _OTHERS_NAMED)
    word = "Wrong" if report.verdict is Verdict.FAIL else "Open"
    rest = f"; right: {right}" if right else ""
    return f"{word} as well: {named}{more}{rest}."


def _line(finding: Finding) -> str:
    parts = [f"{finding.verdict.value:12s} {_where(finding)}"]
    if finding.order > 1:
        parts.append(f"order {finding.order}")
    if finding.gap in _GAPS:
        name = finding.gap.value + " gap" * (finding.gap is not Gap.CLOSE)
        parts.append(f"{name} {finding.size:.1e} of {finding.allowed:.0e}")
    if finding.rounding is not None:
        gap, allowed = finding.rounding
        parts.append(f"rounding {gap:.1e} of {allowed:.0e}")
    if finding.approximation is not None:
        parts.append(approximation(finding))
    if finding.cause is not None:
        parts.append(finding.cause.name)
    parts += finding.notes
    return "; ".join(parts)


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
