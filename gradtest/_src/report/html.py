"""Reports as HTML: a page of its own, or a part of a notebook.

Every string of a report passes through `_text`, which escapes it, on its way into the
page; tags, classes and widths are this file's own.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence

from gradtest._src.findings import Report, Verdict
from gradtest._src.report import pictures, style
from gradtest._src.report.document import document
from gradtest._src.report.parts import (
    OTHER_CAUSE,
    Block,
    Code,
    Document,
    Facts,
    Guess,
    Notes,
    Numbers,
    Picture,
    Row,
    Section,
    Sentence,
    Table,
)

# Nothing is loaded, sent or run: a style and pictures inside the file are all.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_CLASSES = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "fail",
    Verdict.INCONCLUSIVE: "open",
    Verdict.NOT_CHECKED: "none",
}
# A bar is drawn on a scale of so many powers of ten, to both sides of the allowance.
_DECADES = 6
# A part of a notebook has tables of at most so many rows.
_MOST_ROWS = 200
_KEY = "A bar is the gap in powers of ten; the stroke in it is what is allowed."


def page(report: Report) -> str:
    """Returns a whole, self-contained page."""
    told = document(report, pictures.drawn(report))
    title = _text(f"{told.verdict.value}: {told.call}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · gradtest</title>\n"
        f"<style>{style.PAGE}{style.FRAGMENT}</style>\n</head>\n<body>\n"
        f'<main class="{style.ROOT}">\n{_body(told, 1)}</main>\n</body>\n</html>\n'
    )


def fragment(report: Report) -> str:
    """Returns a part of another page, with a style that stays inside of it."""
    told = _trimmed(document(report))
    return (
        f'<div class="{style.ROOT}">\n<style>{style.FRAGMENT}</style>\n'
        f"{_body(told, 3)}</div>\n"
    )


def _trimmed(told: Document) -> Document:
    """Leaves rows of very long tables to the page: a notebook keeps what it shows."""
    sections = []
    for section in told.sections:
        blocks = (
            dataclasses.replace(block, rows=block.rows[: block.shown])
            if isinstance(block, Table) and len(block.rows) > _MOST_ROWS
            else block
            for block in section.blocks
        )
        sections.append(dataclasses.replace(section, blocks=tuple(blocks)))
    return dataclasses.replace(told, sections=tuple(sections))


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _body(told: Document, level: int) -> str:
    kind = _CLASSES[told.verdict]
    headline = told.headline[:1].upper() + told.headline[1:]
    head = (
        f'<header>\n<span class="badge {kind}">{_text(told.verdict.value)}</span>'
        f'<span class="call">{_text(told.call)}</span>\n'
        f'<h{level} class="title">{_text(headline)}</h{level}>\n</header>\n'
    )
    return head + "".join(_section(section, level + 1) for section in told.sections)


def _section(section: Section, level: int) -> str:
    heading = f'<h{level} class="heading">{_text(section.title)}</h{level}>'
    blocks = "".join(_block(block, section.title) for block in section.blocks)
    has_pictures = any(isinstance(block, Picture) for block in section.blocks)
    if section.is_detail and not has_pictures:
        folded = f"<details><summary>{heading}</summary>\n{blocks}</details>\n"
        return f'<section class="detail">\n{folded}</section>\n'
    return f"<section>\n{heading}\n{blocks}</section>\n"


def _block(block: Block, title: str) -> str:
    match block:
        case Sentence(says, label):
            return _sentence(says, "" if label == title else label)
        case Facts(pairs):
            return f"<dl>\n{''.join(_fact(*pair) for pair in pairs)}</dl>\n"
        case Numbers():
            return _numbers(block)
        case Guess():
            return _guess(block)
        case Table():
            return _whole_table(block)
        case Code():
            return _code(block)
        case Notes(items):
            lines = "".join(f"<li>{_text(item)}</li>\n" for item in items)
            return f"<ul>\n{lines}</ul>\n"
        case Picture(title, address):
            return (
                f'<figure>\n<img src="{_text(address)}" alt="{_text(title)}">\n'
                f"<figcaption>{_text(title)}</figcaption>\n</figure>\n"
            )


def _sentence(says: str, label: str) -> str:
    if label == "replay":
        return f'<pre class="wrapped"><code class="row">{_text(says)}</code></pre>\n'
    start = f'<span class="label">{_text(label)}:</span> ' if label else ""
    return f"<p>{start}{_text(says)}</p>\n"


def _fact(name: str, value: str) -> str:
    return f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n"


def _numbers(numbers: Numbers) -> str:
    tiles = []
    for kind, (label, value) in (("claimed", numbers.claimed), ("true", numbers.true)):
        if value:
            tiles.append(_tile(kind, label or "claimed", value))
    if numbers.allowed:
        under = f"allowed {numbers.allowed}"
        tiles.append(
            _tile("gap", numbers.gap[0], numbers.gap[1], numbers.strain, under)
        )
    at = f"at {numbers.place}" if numbers.place else ""
    under = "; ".join(part for part in (at, numbers.judge) if part)
    under = f'<p class="under">{_text(under)}</p>\n' if under else ""
    return f'<div class="numbers">\n{"".join(tiles)}</div>\n{under}'


def _tile(
    kind: str, label: str, value: str, strain: float | None = None, under: str = ""
) -> str:
    bar = _bar(strain) if strain is not None else ""
    under = f'<span class="label">{_text(under)}</span>' if under else ""
    return (
        f'<div class="tile {kind}"><span class="label">{_text(label)}</span>'
        f'<span class="number">{_text(value)}</span>{bar}{under}</div>\n'
    )


def _guess(guess: Guess) -> str:
    sure = guess.likelihood >= 1
    likely = (
        "" if sure else f'<span class="likely">{guess.likelihood:.0%} likely</span>'
    )
    less = " less" if guess.label == OTHER_CAUSE else ""
    return (
        f'<div class="guess{less}">{likely}\n'
        f"{_sentence(f'{guess.says}.', guess.label)}"
        f"{_sentence(f'{guess.remedy}.', 'Try')}</div>\n"
    )


def _code(code: Code) -> str:
    says = f' <span class="label">{_text(code.says)}</span>' if code.says else ""
    head = f"<figcaption><code>{_text(code.place)}</code>{says}</figcaption>\n"
    if not code.lines:
        return f'<figure class="source">\n{head}</figure>\n'
    width = len(str(code.first + len(code.lines)))
    rows = []
    for number, line in enumerate(code.lines, code.first):
        at = f'<span class="at">{number:{width}d}</span>'
        row = f'<span class="row">{at}{_text(line)}</span>'
        rows.append(f"<mark>{row}</mark>" if number == code.marked else row)
    lines = f'<pre tabindex="0"><code>{"".join(rows)}</code></pre>\n'
    return f'<figure class="source">\n{head}{lines}</figure>\n'


def _whole_table(table: Table) -> str:
    """Shows the first rows, and all others folded."""
    first = _table(table, table.rows[: table.shown])
    rest = table.rows[table.shown :]
    if not rest:
        return first + (f'<p class="rest">{_text(table.rest)}</p>\n' * bool(table.rest))
    summary = f"<summary>{_text(table.rest or f'and {len(rest):,} more')}</summary>"
    return f"{first}<details>{summary}\n{_table(table, rest)}</details>\n"


def _table(table: Table, rows: Sequence[Row]) -> str:
    says = _text(table.says)
    key = f'<p class="rest">{_KEY}</p>\n' if table.has_bars else ""
    heads = "".join(_heads(table))
    body = "".join(f"<tr>{''.join(_cells(table, row))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{says}" tabindex="0">\n'
        f"<table>\n<caption>{says}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n{key}"
    )


def _heads(table: Table) -> Iterator[str]:
    at_bar = _bar_column(table)
    for i, head in enumerate(table.heads):
        if i == at_bar:
            yield '<th scope="col">gap : allowed</th>'
        yield f'<th scope="col"{_number_class(table, i)}>{_text(head)}</th>'


def _cells(table: Table, row: Row) -> Iterator[str]:
    at_bar, named = _bar_column(table), _name_column(table)
    for i, cell in enumerate(row.cells):
        if i == at_bar:
            bar = "" if row.strain is None else _bar(row.strain)
            yield f"<td>{bar}</td>"
        if row.verdict is not None and cell == row.verdict.value:
            yield f'<td class="verdict {_CLASSES[row.verdict]}">{_text(cell)}</td>'
        elif i == named:
            yield f'<th scope="row">{_text(cell)}</th>'
        else:
            yield f"<td{_number_class(table, i)}>{_text(cell)}</td>"


def _number_class(table: Table, column: int) -> str:
    return ' class="number"' if column in table.numeric else ""


def _name_column(table: Table) -> int:
    """The column that names a row: the first that is no verdict."""
    return 1 if table.heads[0] == "verdict" else 0


def _bar_column(table: Table) -> int:
    """The column before which bars stand: the first of numbers; -1 without bars."""
    return min(table.numeric) if table.has_bars else -1


def _bar(strain: float) -> str:
    """Draws a gap and its allowance in powers of ten, beside the numbers."""
    over = " over" * (not strain <= 1)
    width = 100.0 if not math.isfinite(strain) else 0.0
    if math.isfinite(strain) and strain > 0:
        place = 0.5 + math.log10(strain) / (2 * _DECADES)
        width = 100 * min(max(place, 0.01), 1.0)
    filled = f'<i style="width:{width:.0f}%"></i>'
    return f'<span class="bar{over}" aria-hidden="true">{filled}</span>'
