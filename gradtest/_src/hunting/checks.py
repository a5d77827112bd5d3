"""The checks of a hunt: made once for one set of sizes, asked at many points."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gradtest._src import execution
from gradtest._src.blame import AutodiffCheck
from gradtest._src.check import Check
from gradtest._src.claiming import autodiff_claims
from gradtest._src.findings import Finding, Hazard, Verdict
from gradtest._src.inputs import Point
from gradtest._src.lifting import Evaluator, Recorder
from gradtest._src.options import Options
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rule_check import RuleCheck
from gradtest._src.rules import RuleUse, find_rules
from gradtest._src.solvers import is_iterative

# What one more step of an iteration changes that has converged: a part, and at least.
_SETTLED, _ROUNDING = 1e-6, 1e-12


class _AtOnePoint(Check):
    """A check that may be told to look at one point alone.

    Attributes:
      hunted: That point, and what is special about it.
    """

    hunted: tuple[str, Point] | None = None

    def findings(self) -> list[Finding]:
        """Runs every trial, or judges the one point."""
        if self.hunted is None:
            return super().findings()
        self.troubled.clear()
        _, found = self.at_point(*self.hunted)
        return found


class HuntedCheck(_AtOnePoint, AutodiffCheck):
    """The check of a program, to second order where the program has one.

    Attributes:
      lacks: Why there is no second order; empty where there is, or none is wanted.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        options: Options,
        *,
        may_lack: bool,
    ):
        self._may_lack = may_lack
        self.lacks = ""
        super().__init__(fn, args, autodiff_claims(options), options)

    def _run_trial(self, point: Point, trial: int) -> list[Finding]:
        try:
            return super()._run_trial(point, trial)
        except _NoSecondOrder as error:
            del self._programs[1:], self._claims[1:]
            self.options = dataclasses.replace(self.options, order=1)
            self.lacks = str(error)
            return super()._run_trial(point, trial)

    def add_second_order(self, point: Point) -> None:
        """Traces the second derivative, where the program has one."""
        if not self._may_lack:
            return super().add_second_order(point)
        try:
            super().add_second_order(point)
        except Exception as error:  # whatever a rule raises when differentiated
            lines = str(error).strip().splitlines()
            raise _NoSecondOrder(lines[0] if lines else type(error).__name__) from error

    def rules(self) -> list[tuple[RuleUse, TracedAnew]]:
        """Returns the custom rules that the program calls, with values."""
        program = self.program
        if not program.has_rules:
            return []
        anew = TracedAnew(self._trace, self.inputs, self.first)
        return [(use, anew) for use in find_rules(program, self.first)]


class _NoSecondOrder(Exception):
    """The program has no second derivative."""


class HuntedRule(_AtOnePoint, RuleCheck):
    """The check of one custom rule as a function of its own operands."""

    def __init__(self, use: RuleUse, options: Options, anew: TracedAnew):
        plain = dataclasses.replace(options, exclude=(), variant=None, has_aux=False)
        super().__init__(use, plain, anew)


class Judge:
    """Judges points of one check.

    Attributes:
      check: The check.
    """

    def __init__(self, check: Check):
        self.check = check

    def ordinary(self) -> list[Finding]:
        """Returns the findings of the check at its own point."""
        with np.errstate(all="ignore"):
            return self.check.findings()

    def at(self, name: str, point: Point) -> tuple[Hazard, list[Finding]]:
        """Returns what came of a point, and what is wrong there."""
        self.check.troubled.clear()
        try:
            with np.errstate(all="ignore"):
                return self.check.at_point(name, point)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            says = f"it can't be judged: {type(error).__name__}: {lines[0]}"
            return Hazard(name, Verdict.INCONCLUSIVE, says), []

    @functools.cached_property
    def usual(self) -> dict[str, float]:
        """The largest entry of each leaf's gradient at the check's own point."""
        check = self.check
        case = check.case_at(check.first)
        sizes = [float(np.max(np.abs(g), initial=0.0)) for g in case.readings.claimed]
        names = [leaf.name for leaf in check.inputs.moving]
        if case.claim.mode == "fwd" or len(sizes) != len(names):
            return {}
        return {n: s for n, s in zip(names, sizes, strict=True) if np.isfinite(s)}

    @functools.cached_property
    def has_backward_rules(self) -> bool:
        """Whether the program has a rule for reverse mode alone."""
        uses = find_rules(self.check.program, self.check.first)
        return any(use.source.kind == "custom_vjp" for use in uses)

    def exact(self, order: int, leaf: str, point: Point) -> np.ndarray | None:
        """Returns a leaf's rule-free derivative; None where there is none."""
        check = self.check
        if check.orders < order:
            return None
        level = order - 1
        case = check.case_at(point, level)
        with np.errstate(all="ignore"):
            exact = case.readings.exact
        names = [each.name for each in case.leaves]
        if exact is None or leaf not in names or len(exact) != len(names):
            return None
        return exact[names.index(leaf)]

    def values(self, point: Point) -> list[np.ndarray]:
        """Returns the function's values at a point, in float64."""
        check = self.check
        case = check.case_at(point)
        with np.errstate(all="ignore"):
            return list(case.readings.values)

    def is_finite(self, point: Point) -> bool:
        """Whether the function has a value at a point."""
        return all(np.isfinite(value).all() for value in self.values(point))

    def settles(self, point: Point) -> bool:
        """Whether one more step of every loop leaves the values as they are."""
        check = self.check
        if not is_iterative(check.program.jaxpr):
            return True
        case = check.case_at(point)
        moving, held, _ = case.bench.lifted_arguments(point)
        run = Evaluator(overrun=1, overruns_scans=True, stops=Recorder())
        with np.errstate(all="ignore"), execution.float64():
            further = check.program.mathematics(run, moving, held)
        return all(
            np.allclose(here, there, rtol=_SETTLED, atol=_ROUNDING)
            for here, there in zip(case.readings.values, further, strict=True)
        )
