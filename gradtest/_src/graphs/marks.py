"""What a report found wrong, to be found again in a program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.findings import Line, Report, Rule, Verdict
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.jaxprs.lines import users_place
from gradtest._src.jaxprs.scopes import call_place
from gradtest._src.localise.source import function_lines
from gradtest._src.rules import shorten


class Marks:
    """Tells which equations of a program a report found wrong."""

    def __init__(self, report: Report | None = None, primal: Jaxpr | None = None):
        """Reads the failures of a report.

        Args:
          report: What a check found; None marks nothing.
          primal: Where the program is a gradient: that of the function itself, which
            still has its rules as calls.
        """
        failed = [] if report is None else report.findings
        failed = [found for found in failed if found.verdict is Verdict.FAIL]
        lines = [found.line for found in failed if found.line is not None]
        self.rules = list(dict.fromkeys(found.rule for found in failed if found.rule))
        self.lines = {(line.file, line.number) for line in lines}
        self.says = _summary(self.rules, lines)
        self.parts: list[tuple[str, range]] = []
        self.calls: set[Any] = set()
        self.is_found = False
        if primal is not None:
            self.parts = [part for rule in self.rules for part in _backward_parts(rule)]
            wrong = [eqn for eqn in jaxprs.walk(primal) if self.marks_rule(eqn)]
            self.calls = {call_place(eqn) for eqn in wrong} - {None}
            self.is_found = False  # seen in the function, not yet in the gradient

    def marks_rule(self, eqn: Eqn) -> bool:
        """Whether an equation calls a rule that was found wrong."""
        if not self.says or eqn.primitive.name not in jaxprs.CUSTOM_RULES:
            return False
        source = jaxprs.read_rule(eqn)
        where = tuple(map(shorten, source.where))
        found = any(
            (rule.name, rule.kind, rule.where) == (source.name, source.kind, where)
            for rule in self.rules
        ) or any(self._holds_wrong_line(text) for text in where[1:])
        self.is_found |= found
        return found

    def marks_operation(self, eqn: Eqn, is_backward: bool) -> bool:
        """Whether an equation comes from a line, or a rule's part, found wrong."""
        found = is_backward and bool(self.calls) and call_place(eqn) in self.calls
        place = users_place(eqn) if self.lines or self.parts else None
        if place is not None:
            found |= any(
                place.number == number and _same_file(place.file, file)
                for file, number in self.lines
            ) or any(
                place.number in lines and _same_file(place.file, file)
                for file, lines in self.parts
            )
        self.is_found |= found
        return found

    def _holds_wrong_line(self, part: str) -> bool:
        """Whether a line that was found wrong stands in a rule's hand-written part."""
        return any(
            number in lines and _same_file(file, other)
            for file, lines in _lines_of_part(part)
            for other, number in self.lines
        )

    def legend(self) -> str:
        """Says what was found wrong, and whether it is in the picture."""
        if not self.says or self.is_found:
            return self.says
        return f"{self.says} (not in this graph)"


def _summary(rules: list[Rule], lines: list[Line]) -> str:
    names = [f"{rule.kind} {rule.name}" for rule in rules]
    places = [f"{shorten(line.file)}:{line.number}" for line in lines]
    return ", ".join(dict.fromkeys(names + places))


def _backward_parts(rule: Rule) -> Iterator[tuple[str, range]]:
    """Yields the file and the lines of a rule's hand-written derivatives."""
    for part in rule.where[1:]:
        if not part.startswith("fwd "):
            yield from _lines_of_part(part)


def _lines_of_part(part: str) -> Iterator[tuple[str, range]]:
    """Yields the file and the lines of a part that stands at "part at file:line"."""
    file, _, number = part.rpartition(" at ")[2].rpartition(":")
    if number.isdigit():
        first = int(number)
        yield file, function_lines(file, first) or range(first, first + 1)


def _same_file(one: str, other: str) -> bool:
    return shorten(os.path.abspath(one)) == shorten(os.path.abspath(other))
