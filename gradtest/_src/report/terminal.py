"""Reports in a terminal, by rich: the text in colours, its tables as wide as fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradtest._src.findings import Report, Verdict
from gradtest._src.report import text
from gradtest._src.report.document import document
from gradtest._src.report.parts import (
    OTHER_CAUSE,
    Block,
    Code,
    Document,
    Facts,
    Notes,
    Sentence,
    Table,
)

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.NOT_CHECKED: "bright_black",
}
_LABELS = {"Likely cause": "bold yellow", "Possible cause": "bold yellow"}


def rendered(report: Report, console: Any) -> Iterator[Any]:
    """Yields what rich prints of a report: where there are no colours, its text."""
    from rich.padding import Padding
    from rich.text import Text

    if not (console.is_terminal or console.is_jupyter):
        yield Text(text.full(report), overflow="fold")
        return
    told = document(report)
    yield from _head(told)
    for section in told.sections:
        for block in section.blocks:
            if text.is_told(section, block):
                yield Padding(_block(block), (0, 0, 0, 2))


def _head(told: Document) -> Iterator[Any]:
    from rich.padding import Padding
    from rich.text import Text

    colour = _COLOURS[told.verdict]
    badge = (f" {told.verdict.value} ", f"bold reverse {colour}")
    yield Text.assemble(badge, " ", (told.call, "bold"))
    yield Padding(Text(told.headline, style=colour), (0, 0, 0, 2))
    for sentence in told.summary:
        if sentence.label != OTHER_CAUSE:
            yield Padding(_sentence(sentence), (0, 0, 0, 2))
    if told.summary:
        yield Text()


def _block(block: Block) -> Any:
    from rich.text import Text

    match block:
        case Table():
            return _table(block)
        case Sentence():
            return _sentence(block)
        case Code():
            return _code(block)
        case Facts(is_minor=False) | Notes():
            lines = [line.partition(": ") for line in text.block_lines(block)]
            labelled = [
                Text.assemble((f"{label}{colon}", "dim"), says)
                for label, colon, says in lines
            ]
            return Text("\n").join(labelled)
    return Text("\n".join(text.block_lines(block)), style="dim")


def _sentence(sentence: Sentence) -> Any:
    from rich.text import Text

    if not sentence.label:
        return Text(sentence.says)
    style = _LABELS.get(sentence.label, "bold")
    return Text.assemble((f"{sentence.label}: ", style), sentence.says)


def _code(code: Code) -> Any:
    from rich.text import Text

    told = Text()
    for number, line in enumerate(text.code_lines(code), code.first):
        told.append(f"{line}\n", "bold yellow" if number == code.marked else "dim")
    told.right_crop(1)
    return told


def _table(table: Table) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, head in enumerate(table.heads):
        is_fixed = i in table.numeric or head == "verdict"
        grid.add_column(
            head,
            justify="right" if i in table.numeric else "left",
            no_wrap=is_fixed,
            overflow="fold",
        )
    for row in table.rows[: table.shown]:
        cells = [Text(cell) for cell in row.cells]
        for text_cell, cell in zip(cells, row.cells, strict=True):
            if row.verdict is not None and cell == row.verdict.value:
                text_cell.stylize(f"bold {_COLOURS[row.verdict]}")
        grid.add_row(*cells)
    return Group(grid, Text(table.rest, style="dim")) if table.rest else grid
