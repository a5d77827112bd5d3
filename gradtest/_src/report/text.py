"""Reports as plain text: a few lines for an exception, all of it on demand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from gradtest._src.findings import Report, Verdict
from gradtest._src.report import legible
from gradtest._src.report.document import document
from gradtest._src.report.parts import (
    OTHER_CAUSE,
    Block,
    Code,
    Document,
    Facts,
    Guess,
    Notes,
    Section,
    Sentence,
    Table,
)

# An exception's text has at most so many lines, the user's own message included.
MOST_LINES = 25
_MOST_NOTES = 20
# So wide may a column be that is not the last.
_WIDEST = 76


def message(report: Report) -> str:
    """Returns the few lines of a failed or inconclusive check."""
    told = document(report)
    lines = [told.headline, *map(str, told.summary)]
    return "\n  ".join(legible.shortened(line, legible.SENTENCE) for line in lines)


def capped(message: str) -> str:
    """Returns the text of an exception, cut where a user's own part makes it long."""
    lines = [
        legible.shortened(line, 2 * legible.SENTENCE) for line in message.split("\n")
    ]
    more = len(lines) - MOST_LINES
    if more <= 0:
        return "\n".join(lines)
    return "\n".join([*lines[: MOST_LINES - 1], f"… and {more + 1:,} more lines"])


def full(report: Report) -> str:
    """Returns everything that a report knows, but for the details of large trees."""
    return "\n".join(_lines(document(report)))


def _lines(told: Document) -> Iterator[str]:
    yield f"{told.verdict.value}: {told.call}"
    if told.summary or told.verdict is Verdict.NOT_CHECKED:
        yield f"  {told.headline}"
    yield from (f"  {line}" for line in told.summary if line.label != OTHER_CAUSE)
    if told.summary:
        yield ""
    for section in told.sections:
        for block in section.blocks:
            if is_told(section, block):
                yield from (f"  {line}" for line in block_lines(block))


def is_told(section: Section, block: Block) -> bool:
    """Whether a block adds to the summary, and is no detail of large arrays."""
    if section.is_summed_up:
        return False
    if isinstance(block, Guess):  # the summary has the likeliest
        return block.label == OTHER_CAUSE
    return not section.is_detail or isinstance(block, Facts)


def block_lines(block: Block) -> list[str]:
    """Returns a block as lines of text; of a picture, none."""
    match block:
        case Sentence():
            return [str(block)]
        case Facts(pairs, is_minor=True):
            told = ", ".join(f"{name} {value}" for name, value in pairs)
            return textwrap.wrap(f"ran with: {told}", 96, subsequent_indent="  ")
        case Facts(pairs):
            return [f"{name}: {value}" for name, value in pairs]
        case Guess():
            likelihood = f" ({block.likelihood:.0%})" if block.likelihood < 1 else ""
            return [f"{block.label}{likelihood}: {block.says}; {block.remedy}."]
        case Table():
            return table_lines(block)
        case Code():
            return code_lines(block)
        case Notes(items, label):
            shown = [f"{label}: {item}" for item in items[:_MOST_NOTES]]
            more = len(items) - _MOST_NOTES
            return shown + [f"{label}: and {more:,} more"] * (more > 0)
    return []


def table_lines(table: Table) -> list[str]:
    """Returns the heads, the rows that are shown, and what is said of the others."""
    rows = [table.heads]
    for row in table.rows[: table.shown]:
        *first, last = row.cells
        rows.append((*(legible.shortened(cell, _WIDEST) for cell in first), last))
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(table.heads))]
    lines = []
    for cells in rows:
        padded = [
            text.rjust(width) if i in table.numeric else text.ljust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return [*lines, table.rest] if table.rest else lines


def code_lines(code: Code) -> list[str]:
    """Returns numbered lines, with a mark at the one that is meant."""
    numbers = range(code.first, code.first + len(code.lines))
    width = len(str(numbers.stop))
    return [
        f"{'>' if number == code.marked else ' '} {number:{width}d}  "
        f"{legible.shortened(line, legible.NAME)}".rstrip()
        for number, line in zip(numbers, code.lines, strict=True)
    ]
