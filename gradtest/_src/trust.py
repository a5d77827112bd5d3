"""Which rules a function under test may use where it differentiates itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from gradtest._src.inputs import Inputs, Point
from gradtest._src.options import Options
from gradtest._src.program import Program
from gradtest._src.rule_call import TracedAnew

if TYPE_CHECKING:
    from gradtest._src.alone import Alone


class Trust:
    """The rules of one function that were found right, each by itself.

    The truth opens every rule of what a function differentiates itself. But the
    function that a rule has, say a loop that bisects, need not have the derivative of
    what it computes: then the rule is the derivative, if it is right.

    Attributes:
      rules: Identities of the rules that are left in place.
    """

    def __init__(
        self,
        options: Options,
        inputs: Inputs,
        trace: Callable[[Inputs, Point], Program],
    ):
        self.rules: frozenset[str] = frozenset()
        self._options = dataclasses.replace(
            options, exclude=(), variant=None, has_aux=False, trials=1
        )
        self._inputs = inputs
        self._trace = trace
        self._audits: dict[int, Alone] = {}

    def audits(self, program: Program, point: Point, order: int) -> Alone:
        """Audits the rules of the function, each by itself."""
        from gradtest._src import alone  # an audit is a check itself

        if order not in self._audits:
            options = dataclasses.replace(self._options, order=order)
            anew = TracedAnew(self._trace, self._inputs, point)
            self._audits[order] = alone.audited(program, point, options, anew)
        return self._audits[order]

    def grows(self, program: Program, point: Point) -> bool:
        """Whether rules that the program does without turn out to be right."""
        opened = frozenset(rule.identity for rule in program.opened)
        if self.rules or not opened:
            return False
        from gradtest._src import alone

        self.rules = opened & alone.right(self.audits(program, point, order=2))
        return bool(self.rules)

    def notes(self, program: Program) -> list[str]:
        """Says which rules were left in place because they are right."""
        kept = {r.name for r in program.left if r.identity in self.rules}
        if not kept:
            return []
        return [
            "right by themselves, at second order as well, are these rules of what the "
            f"function differentiates itself: {', '.join(sorted(kept))}"
        ]

    def unchecked(self, program: Program) -> list[str]:
        """Says which rules were left in place without being looked at."""
        lines = []
        if program.not_opened:
            why = program.not_opened.strip().splitlines()[0]
            lines.append(f"custom rules of what the function differentiates: {why}")
        return lines + [
            f"{rule.kind} {rule.name}: the function differentiates it itself, and by "
            "that rule alone; audit it with assert_custom_rules_match"
            for rule in program.left
            if rule.identity not in self.rules
        ]
