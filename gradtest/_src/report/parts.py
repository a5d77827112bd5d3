"""The parts of a neutral document, which every renderer shows in its own way."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from gradtest._src.findings import Verdict

# The label of a cause that is not the likeliest.
OTHER_CAUSE = "Or"


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One line of prose.

    Attributes:
      says: The line.
      label: What stands before it, such as "Likely cause".
    """

    says: str
    label: str = ""

    def __str__(self) -> str:
        return f"{self.label}: {self.says}" if self.label else self.says


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values.

    Attributes:
      pairs: Each name and its value.
      is_minor: Whether they are given on one line where room is short.
    """

    pairs: tuple[tuple[str, str], ...]
    is_minor: bool = False


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers that a verdict rests on; each is empty where there is none.

    Attributes:
      place: The entry that is farthest off.
      claimed: What is claimed there, after its label.
      true: What is true there, after its label.
      gap: The gap of the whole leaf, after what it is called.
      allowed: What was allowed.
      judge: What it was compared with.
      strain: The gap as a part of what was allowed; None where none was measured.
    """

    place: str = ""
    claimed: tuple[str, str] = ("", "")
    true: tuple[str, str] = ("", "")
    gap: tuple[str, str] = ("", "")
    allowed: str = ""
    judge: str = ""
    strain: float | None = None


@dataclasses.dataclass(frozen=True)
class Guess:
    """A cause, how likely it is, and what to do about it."""

    label: str
    says: str
    remedy: str
    likelihood: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      cells: One for each head.
      verdict: What colours the row.
      strain: A gap as a part of what was allowed; None where none was measured.
    """

    cells: tuple[str, ...]
    verdict: Verdict | None = None
    strain: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under heads.

    Attributes:
      heads: What the columns are.
      rows: All rows.
      says: What the table is, for those who can't see it.
      numeric: The columns of numbers.
      shown: How many rows are shown where room is short.
      rest: What is said of the others there.
    """

    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    says: str
    numeric: frozenset[int] = frozenset()
    shown: int = 1 << 60
    rest: str = ""

    @property
    def has_bars(self) -> bool:
        """Whether rows have a gap to be drawn beside what was allowed."""
        return any(row.strain is not None for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines of source.

    Attributes:
      lines: The lines.
      first: The number of the first; 0 where they have none.
      marked: The number of the line that is meant; 0 where none is.
      place: The file, the line's number, and the function.
      says: Why it is that line.
    """

    lines: tuple[str, ...] = ()
    first: int = 0
    marked: int = 0
    place: str = ""
    says: str = ""


@dataclasses.dataclass(frozen=True)
class Notes:
    """Lines of equal rank, each under the same label."""

    items: tuple[str, ...]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
      title: What it shows.
      address: The picture itself as a data URI.
    """

    title: str
    address: str


Block: TypeAlias = Sentence | Facts | Numbers | Guess | Table | Code | Notes | Picture


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a title.

    Attributes:
      title: The title.
      blocks: The blocks.
      is_summed_up: Whether the summary says the same in fewer words.
      is_detail: Whether only those want it who look closely.
    """

    title: str
    blocks: tuple[Block, ...]
    is_summed_up: bool = False
    is_detail: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A report, ready to be shown.

    Attributes:
      verdict: The verdict.
      call: The assertion and the function under test, as a call.
      headline: What is wrong and where, in one sentence.
      summary: The other lines of a message: numbers, cause, what to do, replay.
      sections: Everything, in the order of its worth.
    """

    verdict: Verdict
    call: str
    headline: str
    summary: tuple[Sentence, ...]
    sections: tuple[Section, ...]
