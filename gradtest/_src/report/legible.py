"""Strings that can be shown anywhere: short, on one line, no control characters."""

from __future__ import annotations

import os
from collections.abc import Sequence

# The longest that a name may be in a sentence, and a sentence in a message.
NAME, SENTENCE = 100, 500
# So many names does a sentence list.
OTHERS = 4


def one_line(text: object) -> str:
    """Returns a text on one line, with what can't be printed escaped."""
    lines = (line.strip() for line in str(text).replace("\t", " ").splitlines())
    return printable(" ".join(line for line in lines if line))


def printable(text: str) -> str:
    """Escapes what can't be printed: a terminal's commands, half of a character."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(shown)


def shortened(text: str, width: int = NAME) -> str:
    """Cuts a long text in its middle: its start and its end tell the most."""
    if len(text) <= width:
        return text
    kept = width - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def name(text: object) -> str:
    """Returns a name as it stands in a sentence."""
    return shortened(one_line(text))


def path(file: str) -> str:
    """Returns a path from the working directory on, where it lies below that."""
    try:
        relative = os.path.relpath(file)
    except (OSError, ValueError):  # no such directory any more; another drive
        return one_line(file)
    outside = relative.startswith(os.pardir) or not os.path.isabs(file)
    return one_line(file if outside else relative)


def scale(size: float) -> str:
    """Returns a gap to two digits; an exact zero as such."""
    return "0" if size == 0 else f"{size:.1e}"


def allowance(size: float) -> str:
    """Returns what is allowed of a gap, to one digit."""
    return "0" if size == 0 else f"{size:.0e}"


def index(place: tuple[int, ...]) -> str:
    """Returns an index as it is written in Python; of a scalar nothing."""
    return f"[{', '.join(map(str, place))}]" if place else ""


def listed(names: Sequence[str], most: int = OTHERS) -> str:
    """Returns the first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, what: str, plural: str = "") -> str:
    """Returns a number with the word that it counts: 1 leaf, 1,200 leaves."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"
