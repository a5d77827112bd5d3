"""The verdict on a formula: by differences, or by autodiff where they can't follow."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from gradtest._src.case import Case
from gradtest._src.compare import FormulaJudge
from gradtest._src.findings import Finding, Verdict
from gradtest._src.gaps import leaf_gap


def judge_formula(case: Case) -> list[Finding]:
    """Returns the verdict on the formula of every leaf, in reverse mode."""
    if case.readings.plain is not None:
        return _judge_product(case, case.readings.plain)
    return FormulaJudge(case).findings()


def overrules_exact(case: Case, findings: list[Finding]) -> bool:
    """Whether differences found a claim right where rule-free autodiff is wrong.

    So it is at `where(x == 0, 0, x * log(y))`: a branch for one point has the value
    there and not the derivative. What is differentiated once more is wrong as well.
    """
    exact, claimed = case.readings.exact, case.readings.claimed
    if exact is None or case.readings.plain is not None:
        return False
    return any(
        f.verdict is Verdict.PASS
        and (f.judged_by, f.approximation, f.notes) == ("measured", None, ())
        and leaf_gap(c, e, rtol=case.rtol, floor=0.0).is_exceeded
        for f, c, e in zip(findings, claimed, exact, strict=True)
    )


def _judge_product(case: Case, plain: list[np.ndarray]) -> list[Finding]:
    """Judges a program with declared products, which no difference can follow.

    Differences confirm the rule-free derivative of the program's functions; with the
    products in their place the same autodiff then speaks for the claim.
    """
    shadow = copy.copy(case)
    readings = dataclasses.replace(
        case.readings, claimed=plain, exact=plain, plain=None
    )
    shadow.__dict__["readings"] = readings
    shadow.__dict__["_jittered"] = []  # which would be of the claim itself
    confirmed = FormulaJudge(shadow).findings()
    judge = FormulaJudge(case)
    return [
        judge.by_exact(i) if finding.verdict is Verdict.PASS else finding
        for i, finding in enumerate(confirmed)
    ]
