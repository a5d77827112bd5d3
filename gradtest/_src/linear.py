"""Whether a function that must be linear is linear, judged by its values alone."""

from __future__ import annotations

import numpy as np

from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.gaps import LeafGap, leaf_gap
from gradtest._src.inputs import Point
from gradtest._src.lifting import widen
from gradtest._src.primal import value_trouble
from gradtest._src.program import Output, Values

# Neither 1 nor -1, and not a power of either.
FACTOR = -1.75
# Both sides of an identity are sums of the same float64 terms.
ROUNDING = 1e-12


def nonlinear_findings(case: Case) -> list[Finding]:
    """Returns a finding on each result of a function that is not linear.

    A function is taken for linear over the real numbers, as `jax.linear_transpose`
    takes `jnp.real` and `jnp.conj`.
    """
    if value_trouble(case):
        return []
    here = case.readings.values
    start = [widen(value) for value in case.point.moving]
    other = [case.direction(i, "another point") for i in range(len(start))]
    there = _values(case, other)
    mixed = _values(
        case, [FACTOR * x + y for x, y in zip(start, other, strict=True)]
    )  # fmt: skip
    at_zero = _values(case, [np.zeros_like(x) for x in start])
    found = []
    for i, output in enumerate(case.program.outputs):
        wanted = FACTOR * here[i] + there[i]
        floor = ROUNDING * (norm(here[i]) + norm(there[i]))
        zero = leaf_gap(wanted + at_zero[i], wanted, rtol=case.rtol, floor=floor)
        sums = leaf_gap(mixed[i], wanted, rtol=case.rtol, floor=floor)
        if zero.is_exceeded or not np.isfinite(at_zero[i]).all():
            found.append(_finding(case, output, zero, _AT_ZERO))
        elif sums.is_exceeded or not np.isfinite(mixed[i]).all():
            found.append(_finding(case, output, sums, _SUMS))
    return found


def _values(case: Case, moving: Values) -> Values:
    return case.at(Point(tuple(moving), case.point.held)).readings.values


def _finding(case: Case, output: Output, gap: LeafGap, cause: Cause) -> Finding:
    return Finding(
        output.name,
        output.shape,
        np.dtype(output.dtype).name,
        Verdict.FAIL,
        Gap.LINEAR,
        trial=case.trial,
        size=gap.size,
        allowed=gap.allowed,
        judged_by="linearity",
        cause=cause,
        check="linear",
    )


_REMEDY = (
    "hand over the linear part alone; a function that is not linear has a "
    "vector-Jacobian product: see assert_vjp_matches"
)
_AT_ZERO = Cause("not linear", "for x = 0 its result is not zero", _REMEDY)
_SUMS = Cause(
    "not linear",
    f"its result for {FACTOR:g} x + y is not {FACTOR:g} times that for x plus that "
    "for y",
    _REMEDY,
)
