"""A check at the special points of its arguments, after the ordinary ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradtest._src import progress
from gradtest._src.case import Case
from gradtest._src.findings import Finding, Hazard, Verdict
from gradtest._src.hazards import special_arguments
from gradtest._src.inputs import Point
from gradtest._src.special_verdict import Usual, is_ordinary, judge_special

if TYPE_CHECKING:
    from gradtest._src.check import Check


class SpecialPoints:
    """Tries the special points of a check's arguments.

    Attributes:
      hazards: What came of each that was asked for by `findings`.
    """

    def __init__(self, check: Check):
        self._check = check
        self.hazards: list[Hazard] = []
        self._usual: dict[int, Usual] = {}
        self._has_no_second_order = False

    def findings(self) -> list[Finding]:
        """Tries all of them; returns what is wrong at the first that fails."""
        check = self._check
        wrong: list[Finding] = []
        points = list(special_arguments(check.inputs, check.first))
        for name, point in progress.following(points, "special points"):
            tried, found = check.at_point(name, point)
            self.hazards.append(tried)
            wrong = wrong or found
        return wrong

    def at_point(self, name: str, point: Point) -> tuple[Hazard, list[Finding]]:
        """Tries one point, in every order that is checked.

        Second derivatives are tried where numbers are of an ordinary size alone.

        Args:
          name: What is special about the point.
          point: Values of the leaves, in the order of the check's inputs.

        Returns:
          What came of it, and the findings of a claim that is wrong there.
        """
        tried = Hazard(name, Verdict.PASS)
        with self._check.off_branch_apart():
            for level in range(self._check.options.order if is_ordinary(point) else 1):
                if not self._has(level):
                    break
                tried, found = self._at(name, point, level)
                if tried.verdict is not Verdict.PASS:
                    return tried, found
        return tried, []

    def _has(self, level: int) -> bool:
        """Whether there are programs of this order; of the second they are made."""
        if level == 0 or self._has_no_second_order:
            return level == 0
        try:
            if self._check.orders == 1:
                self._usual_gradient(0)  # whose cotangents serve the second order
                self._check.add_second_order(self._check.first)
            self._usual_gradient(level)
        except Exception:  # whatever the second differentiation raises
            self._has_no_second_order = True
        return not self._has_no_second_order

    def _at(self, name: str, point: Point, level: int) -> tuple[Hazard, list[Finding]]:
        usual = self._usual_gradient(level)
        case = self._check.case_at(point, level)

        def judge(judged: Case) -> list[Finding]:
            return self._check.judge_at(level, judged)

        tried, found = judge_special(name, case, usual, judge)
        if found and level == 1 and self._check.has_other_second_order:
            # Whether fwd calls its own rule decides what its second derivative is.
            otherwise = self._at(name, point, 2)
            if not otherwise[1]:
                return otherwise
        if found:
            self._check.troubled.setdefault(case.program.order, case)
        return tried, found

    def _usual_gradient(self, level: int) -> Usual:
        """Returns what the gradient is like at the first point."""
        if level not in self._usual:
            case = self._check.case_at(self._check.first, level)
            self._check.surroundings.add(case)
            self._usual[level] = Usual.of(case)
        return self._usual[level]
