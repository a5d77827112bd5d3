"""The rounding gap: the claim in working precision against the lifted claim.

The yardstick is measured, not guessed: the rounding of the rule-free derivative in the
same dtype at the same point. It is only computed where a floor by dtype is exceeded.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src import diagnose, jaxprs
from gradtest._src.case import NOISE_FLOOR, Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.program import Values

# The floor: units in the last place, and what they may come to in half precision.
_ULPS, _MOST_FLOOR = 128, 1 / 16
# How much worse than plain autodiff a rule may round.
_FACTOR, _LEAST_FACTOR, _LARGE = 8, 2, 1 / 4
# Without a rule-free derivative: what an unstable formula must exceed, as a root.
_UNMEASURED_ROOT = 0.5


def judge_rounding(
    case: Case, findings: list[Finding], rounding_rtol: float | None
) -> list[Finding]:
    """Completes the findings on leaves whose formula passed with their rounding gap."""
    is_widest = case.working_eps <= float(np.finfo(np.float64).eps)
    if is_widest and not jaxprs.narrows(case.claim.jaxpr):
        return findings  # it is what the lifted claim is: nothing to compare with
    if is_widest and rounding_rtol is None:
        rounding_rtol = case.rtol
    lifted = case.readings.claimed
    values, worked = case.bench.read_working(case.point, lifted)
    for output, value in zip(case.program.outputs, values or [], strict=False):
        if not np.isfinite(value).all():
            cause = diagnose.value_overflows(output.name, value)
            return [_unjudged(finding, cause) for finding in findings]
    gaps = [_gap(w, c) for w, c in zip(worked, lifted, strict=True)]
    allowed = _floors(case, lifted, rounding_rtol)
    if any(gap > limit for gap, limit in zip(gaps, allowed, strict=True)):
        allowed = _measured_allowance(case, lifted, allowed)
    largest = float(np.max(case.contributions(lifted), initial=0.0))
    units = [
        # The rounding of a gradient that cancels is told beside the other leaves.
        norm(c) if norm(c) * size > NOISE_FLOOR * largest else largest / size
        for c, size in zip(lifted, case.sizes, strict=True)
    ]
    return [
        _judge(finding, worked[i], units[i], gaps[i], allowed[i])
        for i, finding in enumerate(findings)
    ]


def _gap(worked: np.ndarray, lifted: np.ndarray) -> float:
    """Norm of the difference; infinite where working precision is not finite."""
    gap = norm(worked - lifted)
    return gap if np.isfinite(gap) else np.inf


def _floors(case: Case, lifted: Values, rounding_rtol: float | None) -> list[float]:
    relative = rounding_rtol
    if relative is None:
        relative = min(_ULPS * case.working_eps, _MOST_FLOOR)
    largest = float(np.max(case.contributions(lifted), initial=0.0))
    # A gradient that is zero by cancellation keeps the rounding of its terms.
    cancelled = 4 * case.working_eps * largest
    return [
        relative * norm(c)
        + (cancelled / size if norm(c) * size < NOISE_FLOOR * largest else 0.0)
        for c, size in zip(lifted, case.sizes, strict=True)
    ]


def _measured_allowance(case: Case, lifted: Values, floors: list[float]) -> list[float]:
    """Widens the floors by what the rule-free derivative itself loses."""
    plain = case.bench.read_working_exact(case.point)
    exact = case.readings.exact
    if plain is None or exact is None:
        relative = case.working_eps**_UNMEASURED_ROOT
        return [max(f, relative * norm(c)) for f, c in zip(floors, lifted, strict=True)]
    losses = [norm(p - e) for p, e in zip(plain, exact, strict=True)]
    # One leaf may round well by luck: the usual leaf counts as well.
    parts = [
        loss / norm(e)
        for loss, e in zip(losses, exact, strict=True)
        if norm(e) and np.isfinite(loss)
    ]
    usual = float(np.median(parts)) if parts else 0.0
    return [
        max(floor, _allowance(loss if np.isfinite(loss) else 0.0, usual, norm(c)))
        for floor, loss, c in zip(floors, losses, lifted, strict=True)
    ]


def _allowance(loss: float, usual: float, scale: float) -> float:
    """Returns what a rule may lose where plain autodiff loses `loss`.

    A multiple of it; a smaller one where that would come to a part of the gradient
    that leaves nothing to check.
    """
    loss = max(loss, usual * scale)
    return min(_FACTOR * loss, max(_LEAST_FACTOR * loss, _LARGE * scale))


def _judge(
    finding: Finding, worked: np.ndarray, scale: float, gap: float, allowed: float
) -> Finding:
    if finding.verdict is not Verdict.PASS:
        return finding
    unit = scale or 1.0
    numbers = (gap / unit, allowed / unit)
    finding = dataclasses.replace(finding, rounding=numbers)
    if gap <= allowed:
        return finding
    return dataclasses.replace(
        finding,
        verdict=Verdict.FAIL,
        gap=Gap.ROUNDING,
        size=numbers[0],
        allowed=numbers[1],
        cause=diagnose.unstable(worked),
        notes=(*finding.notes, f"formula gap {finding.size:.1e}: the formula is right"),
    )


def _unjudged(finding: Finding, cause: Cause) -> Finding:
    if finding.verdict is not Verdict.PASS:
        return finding
    return dataclasses.replace(
        finding, verdict=Verdict.INCONCLUSIVE, gap=Gap.ROUNDING, size=0.0, cause=cause
    )
