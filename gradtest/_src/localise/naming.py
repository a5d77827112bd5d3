"""Lines of source as a report tells them."""

from __future__ import annotations

from gradtest._src.findings import Line
from gradtest._src.jaxprs import Place, RuleSource
from gradtest._src.localise import source as sources
from gradtest._src.localise.steps import Step

# A line that no number speaks for, but the program's structure does.
BY_STRUCTURE = 0.4
# How the evidence ends where a change of the line was tried out and mends all.
_MENDS = ", the derivative is right"


def mended(change: str) -> str:
    """Says that a change of a line makes the derivative right."""
    return f"{change}{_MENDS}"


def is_proved(line: Line) -> bool:
    """Whether a change of the line was tried out and makes the derivative right."""
    return line.says.endswith(_MENDS)


def line_of(step: Step | None, says: str, likelihood: float) -> Line | None:
    """Returns the line of a step, if there is one."""
    return line_at(step.place, says, likelihood) if step else None


def line_at(place: Place | None, says: str, likelihood: float) -> Line | None:
    """Returns a place as a line with its code and the evidence."""
    if place is None:
        return None
    code = sources.code_at(place.file, place.number)
    return Line(place.file, place.number, place.function, code, says, likelihood)


def return_line(
    source: RuleSource | None, in_value: bool = False, says: str = ""
) -> Line | None:
    """Returns the line on which a rule returns its derivative, or its value.

    Args:
      source: Where the rule was written; None where nothing is known of it.
      in_value: Whether the value is wrong, which `fwd` returns, not the derivative.
      says: The evidence; by default that the line is the only one there is.
    """
    known = sources.parts(source) if source else {}
    for part in ("fwd", "jvp") if in_value else ("bwd", "jvp", "transpose"):
        for path, number in known.get(part, ()):
            found = sources.return_line(path, number)
            if found is not None:
                alone = f"what {part} returns here is computed on no line of its own"
                place = Place(path, found, function=part)
                return line_at(place, says or alone, 0.8 if says else BY_STRUCTURE)
    return None
