"""Lines of source around one, where the file can still be read."""

from __future__ import annotations

import linecache
import textwrap

from gradtest._src.findings import Line
from gradtest._src.report import legible, wording
from gradtest._src.report.parts import Code

_AROUND = 3


def excerpt(line: Line) -> Code:
    """Returns the lines around a line of source, or as much of it as is known.

    Only a file that still has the line is shown: one that has changed since, or that a
    report from elsewhere names, is not.
    """
    code, at = line.code.strip(), line.number - 1
    lines = _lines(line.file) if code else []
    shown, first = [code] if code else [], line.number
    if 0 <= at < len(lines) and lines[at].strip() == code:
        first = max(0, at - _AROUND)
        around = "".join(lines[first : at + _AROUND + 1]).expandtabs(4)
        shown, first = textwrap.dedent(around).rstrip().split("\n"), first + 1
    return Code(
        tuple(map(legible.printable, shown)),
        first,
        line.number,
        wording.at_place(line),
        legible.one_line(line.says),
    )


def _lines(file: str) -> list[str]:
    """Returns the lines of a file, or of a notebook's cell; none if unreadable."""
    try:
        linecache.checkcache(file)
        return linecache.getlines(file)
    except Exception:  # a loader of the user's may raise whatever it likes
        return []
