"""From a report to a neutral document, which all renderers draw from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradtest._src.findings import Cause, Finding, Report, Rule, Verdict, worst
from gradtest._src.report import cells, excerpts, legible, rules, tables, wording
from gradtest._src.report.parts import (
    OTHER_CAUSE,
    Block,
    Document,
    Facts,
    Guess,
    Notes,
    Numbers,
    Section,
    Sentence,
)

# A cause that is less likely than this is not told in a message.
_WORTH_TELLING = 0.3
# So many rules have a section of their own.
_RULES = 12
# A message of a check has at most so many lines; a second cause is told where it fits.
_MOST_LINES = 8


def document(report: Report, pictures: Sequence[Block] = ()) -> Document:
    """Returns a report as a document.

    Args:
      report: Any report.
      pictures: What was drawn of it, or why nothing could be.
    """
    chief = wording.chief_of(report)
    call = f"{legible.name(report.assertion)}({legible.name(report.subject)})"
    headline = wording.headline(report, chief)
    summary = tuple(_summary(report, chief)) if chief is not None else ()
    if len(summary) >= _MOST_LINES:
        summary = tuple(line for line in summary if line.label != OTHER_CAUSE)
    sections = tuple(s for s in _sections(report, chief, pictures) if s.blocks)
    return Document(report.verdict, call, headline, summary, sections)


def _summary(report: Report, chief: Finding) -> Iterator[Sentence]:
    """Yields the lines of a message below its headline."""
    if chief.rule is not None:
        yield Sentence(rules.whereabouts(chief.rule))
    if chief.hazard:
        yield Sentence(wording.special_point(report, chief), "Where")
    if chief.line is not None:
        label, says = wording.at_line(chief.line)
        yield Sentence(says, label)
    for line in _in_words(report, chief):
        yield Sentence(line)
    if chief.cause is not None:
        yield Sentence(
            f"{legible.one_line(chief.cause.says)}.",
            wording.cause_label(report, chief.cause),
        )
        yield Sentence(f"{legible.one_line(chief.cause.remedy)}.", "Try")
    for other in _other_causes(chief)[:1]:
        if other.likelihood >= _WORTH_TELLING:
            yield Sentence(f"{legible.one_line(other.says)}.", OTHER_CAUSE)
    found_in = legible.one_line(report.found_in)
    rest = [wording.others(report, chief), _hint(report)]
    rest += [f"Found in {found_in} alone."] if found_in else []
    if any(rest):
        yield Sentence(" ".join(part for part in rest if part))
    if report.replay:
        yield Sentence(legible.one_line(report.replay), "Replay")


def _other_causes(chief: Finding) -> list[Cause]:
    """Returns the causes that say something else than the likeliest."""
    said = chief.cause.says if chief.cause is not None else ""
    return [other for other in chief.other_causes if other.says not in said]


def _in_words(report: Report, chief: Finding) -> list[str]:
    if chief.rule is None and cells.speaks_of(report):
        return cells.sentences(cells.numbers(chief))
    return wording.sentences(wording.numbers(chief))


def _hint(report: Report) -> str:
    return f"{legible.one_line(report.hint)}." if report.hint else ""


def _sections(
    report: Report, chief: Finding | None, pictures: Sequence[Block]
) -> Iterator[Section]:
    """Yields all sections in the order of their worth; some may be empty."""
    if chief is not None:
        yield from _about(report, chief)
    if cells.speaks_of(report):
        yield Section("Ways to run it", (cells.table(report),))
    else:
        whole = [finding for finding in report.findings if finding.rule is None]
        if whole:
            yield Section("Leaves", (tables.leaves(whole, "The verdict on each leaf"),))
    yield from _rules(report)
    special = tables.hazards(report.hazards)
    yield Section("Special points", (special,) if special.rows else ())
    for exhibit in report.exhibits:
        of = f"{exhibit.of}, " if exhibit.of else ""
        rule = f" of {legible.name(exhibit.rule.name)}" if exhibit.rule else ""
        title = f"Entries of {of}{legible.name(exhibit.name)}{rule}"
        yield Section(title, (tables.entries(exhibit),), is_detail=True)
    yield Section("Pictures", tuple(pictures), is_detail=True)
    yield Section("How it was checked", tuple(_how(report)))
    yield Section("Not checked", _notes(report.unchecked, "not checked"))
    found_in = (f"found in {report.found_in} alone",) if report.found_in else ()
    yield Section("Notes", _notes((*report.notes, *found_in), "note"))
    if report.replay:
        replay = Sentence(legible.one_line(report.replay), "replay")
        yield Section("Replay", (replay,), is_summed_up=chief is not None)
    pairs = tuple(
        (legible.one_line(n), legible.one_line(v)) for n, v in report.environment
    )
    blocks = (Facts(pairs, is_minor=True),) if pairs else ()
    yield Section("Environment", blocks, is_detail=True)


def _about(report: Report, chief: Finding) -> Iterator[Section]:
    """Yields what there is to say of the chief finding: numbers, place, causes."""
    by_cell = chief.rule is None and cells.speaks_of(report)
    found = cells.numbers(chief) if by_cell else wording.numbers(chief)
    if found != Numbers():
        yield Section("Numbers", (found,), is_summed_up=True)
    causes = [chief.cause] if chief.cause is not None else []
    causes += _other_causes(chief)
    guesses = tuple(
        Guess(
            wording.cause_label(report, cause) if i == 0 else OTHER_CAUSE,
            legible.one_line(cause.says),
            legible.one_line(cause.remedy),
            cause.likelihood,
        )
        for i, cause in enumerate(causes)
    )
    yield Section("Why", guesses, is_summed_up=len(guesses) < 2)
    if chief.line is not None:
        yield Section("Where", (excerpts.excerpt(chief.line),))
    more = [wording.others(report, chief), _hint(report)]
    sentences = tuple(Sentence(line) for line in more if line)
    yield Section("What else", sentences, is_summed_up=True)


def _rule_title(rule: Rule) -> str:
    return f"{legible.one_line(rule.kind)} {legible.name(rule.name)}"


def _rules(report: Report) -> Iterator[Section]:
    """Yields a section for each rule, of many for the gravest, and a table of them."""
    own: dict[Rule, list[Finding]] = {rule: [] for rule in report.rules}
    for finding in report.findings:
        if finding.rule is not None:
            own.setdefault(finding.rule, []).append(finding)
    found = [(rule, worst(f.verdict for f in some), some) for rule, some in own.items()]
    if len(found) > _RULES:
        found.sort(key=lambda item: -item[1].severity)
    for rule, _, some in found[:_RULES]:
        yield Section(_rule_title(rule), tuple(_of_rule(rule, some)))
    if found[_RULES:]:
        rest = [(rule, verdict, len(some)) for rule, verdict, some in found[_RULES:]]
        yield Section("Further rules", (tables.other_rules(rest),))


def _of_rule(rule: Rule, findings: list[Finding]) -> Iterator[Block]:
    yield Sentence(rules.whereabouts(rule), _rule_title(rule))
    told = [finding for finding in findings if not rules.is_summed_up(finding)]
    if told:
        yield tables.leaves(told, f"What was looked at in {legible.name(rule.name)}")
    passed = rules.passed_checks(findings)
    if passed:
        yield Sentence(passed, f"{Verdict.PASS.value} also")


def _how(report: Report) -> Iterator[Block]:
    """Yields what was run, how well it could see, and in which precision."""
    pairs = []
    if math.isfinite(report.smallest_seen):
        seen = f"{report.smallest_seen:.1e}"
        pairs.append(("smallest relative error that would have been seen", seen))
    if report.modes:
        modes = ", ".join(wording.MODES.get(mode, mode) for mode in report.modes)
        trials = legible.counted(report.trials, "trial")
        pairs.append(("checked", f"{modes}, order {report.order}, {trials}"))
    elif report.trials:
        trials = legible.counted(report.trials, "trial")
        pairs.append(("checked", f"order {report.order}, {trials}"))
    if report.hazards:
        pairs.append(("special points", wording.special_points(report)))
    pairs += [_labelled(line) for line in report.precision]
    if pairs:
        yield Facts(tuple(pairs))


def _labelled(line: str) -> tuple[str, str]:
    """Splits a line at its first colon, if it is one of the form "label: text"."""
    label, colon, says = legible.one_line(line).partition(": ")
    return (label, says) if colon else ("precision", label)


def _notes(lines: Sequence[str], label: str) -> tuple[Block, ...]:
    items = tuple(legible.one_line(line) for line in lines)
    return (Notes(items, label),) if items else ()
