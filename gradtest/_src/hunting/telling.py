"""The report of a hunt: what was tried, and the smallest input that is wrong."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from gradtest._src import seeding
from gradtest._src.findings import Finding, Hazard, Report, Verdict
from gradtest._src.hunting import printing
from gradtest._src.hunting.checks import HuntedCheck
from gradtest._src.hunting.engine import Hunt
from gradtest._src.hunting.places import Example
from gradtest._src.report import legible

# So many special points are listed one by one.
_MOST_LISTED = 60
_MOST_REASONS = 4
# Options that the line of code repeats where they are not the usual ones.
_REPEATED = ("argnums", "has_aux", "modes", "rtol", "rounding_rtol", "exclude")


def passed(hunt: Hunt, assertion: str) -> Report:
    """Returns the report of a hunt that found nothing."""
    home = hunt.ground.home()
    base = home.check.report(assertion)
    if base.verdict is not Verdict.PASS:
        sound = [f for f in base.findings if f.verdict is not Verdict.FAIL]
        passed_at_all = any(h.verdict is Verdict.PASS for h in hunt.tried)
        verdict = Verdict.PASS if passed_at_all else Verdict.INCONCLUSIVE
        base = dataclasses.replace(base, verdict=verdict, findings=tuple(sound))
    return _completed(base, hunt)


def failed(hunt: Hunt, example: Example, assertion: str) -> Report:
    """Returns the report on an example that is wrong."""
    wrong = hunt.judge(example).wrong
    if example.place.rule is not None:
        base = _of_rule(example, wrong, assertion)
    else:
        base = _of_program(hunt, example, wrong, assertion)
    base = dataclasses.replace(
        base, subject=_name(hunt.ground.fn), verdict=Verdict.FAIL
    )
    only_second = all(f.order > 1 for f in wrong)
    notes = [_ONLY_SECOND] if only_second else []
    notes += [f"smallest failing input: {line}" for line in _inputs(hunt, example)]
    return _completed(dataclasses.replace(base, notes=(*base.notes, *notes)), hunt)


_ONLY_SECOND = "the first derivative is right there: only the second one is wrong"


def _of_program(
    hunt: Hunt, example: Example, wrong: Sequence[Finding], assertion: str
) -> Report:
    """Returns what a check of its own says of the example, as a user would run it."""
    ground, order = hunt.ground, min(f.order for f in wrong)
    options = dataclasses.replace(ground.options, order=order)
    args = ground.arguments(example.values)
    check = HuntedCheck(ground.fn, args, options, may_lack=True)
    report = check.report(assertion)
    if any(f.verdict is Verdict.FAIL and f.order == order for f in report.findings):
        return report
    check = example.place.check  # type: ignore[assignment]
    return _at_point(check, example, assertion)


def _at_point(check: Any, example: Example, assertion: str) -> Report:
    check.hunted = (example.name, example.place.point(example.values))
    try:
        return check.report(assertion)
    finally:
        check.hunted = None


def _of_rule(example: Example, wrong: Sequence[Finding], assertion: str) -> Report:
    place = example.place
    assert place.rule is not None
    rule = place.rule.rule
    report = _at_point(place.check, example, assertion)
    findings = report.findings if report.verdict is Verdict.FAIL else wrong
    return dataclasses.replace(
        report,
        findings=tuple(dataclasses.replace(f, rule=rule) for f in findings),
        rules=(rule,),
    )


def _completed(report: Report, hunt: Hunt) -> Report:
    """Adds what was tried."""
    ground = hunt.ground
    home = ground.home().check
    unchecked = list(ground.unchecked)
    if isinstance(home, HuntedCheck) and home.lacks:
        unchecked.append(f"second order: {home.lacks}")
    key = seeding.describe(ground.options.key)
    replay = f"gradtest.hunt({report.subject}, ..., key={key})"
    return dataclasses.replace(
        report,
        trials=len(hunt.tried),
        key=key,
        order=home.options.order,
        notes=(*report.notes, *_notes(hunt)),
        unchecked=tuple(dict.fromkeys([*report.unchecked, *unchecked])),
        replay="" if report.verdict is Verdict.PASS else replay,
        hazards=tuple(_listed(hunt.tried)),
    )


def _notes(hunt: Hunt) -> list[str]:
    """Says what was tried, what was skipped, and what stayed open."""
    ground, tried = hunt.ground, hunt.tried
    places = [place.label or "as given" for place in hunt.places]
    counts = collections.Counter(h.verdict for h in tried)
    notes = [
        f"{len(tried)} examples were tried: {counts[Verdict.PASS]} right, "
        f"{counts[Verdict.INCONCLUSIVE]} inconclusive, {counts[Verdict.NOT_CHECKED]} "
        "where the function has no value",
        f"sizes: {'; '.join(dict.fromkeys(places))}",
    ]
    notes += [f"skipped {label}: {why}" for label, why in ground.skipped.items()]
    reasons = collections.Counter(
        h.says for h in tried if h.verdict is Verdict.INCONCLUSIVE
    )
    notes += [
        f"inconclusive ({number} examples): {says}"
        for says, number in reasons.most_common(_MOST_REASONS)
        if says
    ]
    return notes + ground.shapes.fixed


def _listed(tried: Sequence[Hazard]) -> list[Hazard]:
    """Returns each special point, and mixtures that are alike in one line."""
    own = [h for h in tried if not h.name.startswith("a mixture")]
    mixed = collections.Counter(
        (h.name, h.verdict, h.says if h.verdict is not Verdict.PASS else "")
        for h in tried
        if h.name.startswith("a mixture")
    )
    gathered = [
        Hazard(f"{name}, {number} times" if number > 1 else name, verdict, says)
        for (name, verdict, says), number in mixed.items()
    ]
    listed = own + gathered
    if len(listed) <= _MOST_LISTED:
        return listed
    return sorted(listed, key=lambda h: -h.verdict.severity)[:_MOST_LISTED]


# --- the input as code ----------------------------------------------------------------


def lines(hunt: Hunt, example: Example) -> list[str]:
    """Returns the lines below a message: the smallest failing input as code."""
    order = min(f.order for f in hunt.judge(example).wrong)
    entries = legible.counted(example.entries, "entry", "entries")
    among = legible.counted(len(hunt.tried), "example")
    found = [f"{_ONLY_SECOND.capitalize()}."] if order > 1 else []
    found.append(f"Smallest failing input, {entries}, after {among}:")
    found += [f"  {line}" for line in _inputs(hunt, example)]
    return [*found, f"  {_call(hunt, example, order)}"]


def _inputs(hunt: Hunt, example: Example) -> list[str]:
    rule = example.place.rule
    inputs = hunt.ground.inputs if rule is None else example.place.check.inputs
    return printing.code(inputs, example.values)


def _call(hunt: Hunt, example: Example, order: int) -> str:
    ground, rule = hunt.ground, example.place.rule
    name = _name(ground.fn) if rule is None else rule.rule.name
    inputs = ground.inputs if rule is None else example.place.check.inputs
    parts = [name, *printing.variables(inputs)]
    if rule is None:
        usual = type(ground.options)()
        parts += [
            f"{option}={getattr(ground.options, option)!r}"
            for option in _REPEATED
            if getattr(ground.options, option) != getattr(usual, option)
        ]
    if order > 1:
        parts.append(f"order={order}")
    return f"gradtest.assert_autodiff_matches({', '.join(parts)})"


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
