"""The approximation gap: a derivative that is right but for how its value is computed.

Two reasons make a right formula miss the truth in lifted arithmetic, and both are
measured here before they are believed:

* an algorithm that picks a shorter series for a narrower dtype: traced anew with
  float64 inputs the gap closes;
* constants that are rounded to half precision in the program itself: moving each by
  half a unit in its last place explains the gap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.case import Case, norm
from gradtest._src.findings import Approximation, Finding, Gap, Verdict
from gradtest._src.lifting import Evaluator
from gradtest._src.program import Values, derivative

_MOST_LITERALS = 256

Judge = Callable[[Case], list[Finding]]


def explain_gaps(case: Case, findings: list[Finding], judge: Judge) -> list[Finding]:
    """Turns failures that are approximations into passes that say so.

    Bounded: the lifted gap may not exceed the square root of the working dtype's
    spacing, and the gap of the program traced anew must close to the usual tolerance.

    Args:
      case: What was judged.
      findings: What `judge` found, one for each leaf or output.
      judge: Judges the case that was traced anew, in the same order.
    """
    bound = case.working_eps**0.5
    open_gaps = [
        i
        for i, f in enumerate(findings)
        if f.verdict is Verdict.FAIL and f.gap is Gap.FORMULA and f.size <= bound
    ]
    found = list(findings)
    if open_gaps and case.retraced is not None:
        judged = judge(case.retraced)
        for i in open_gaps:
            if judged[i].verdict is Verdict.PASS:
                found[i] = _passed(found[i], bound, judged[i].allowed,
                                   retraced=judged[i].size)  # fmt: skip
    still_open = [i for i in open_gaps if found[i].verdict is Verdict.FAIL]
    if still_open and case.claim.mode == "rev":
        reach = literal_reach(case) or [0.0]
        for i in still_open:
            # Along a tangent every leaf's constants play a part.
            part = reach[i] if found[i].mode == "rev" else max(reach)
            allowed = min(bound, 3 * part + case.rtol)
            if part and found[i].size <= allowed:
                found[i] = _passed(found[i], allowed, allowed, literals=part)
    return found


def _passed(
    finding: Finding, allowed: float, seen: float, **evidence: float
) -> Finding:
    return dataclasses.replace(
        finding,
        verdict=Verdict.PASS,
        allowed=allowed,
        cause=None,
        entry=None,
        approximation=Approximation(finding.size, seen, **evidence),
    )


def literal_reach(case: Case) -> list[float] | None:
    """Returns, for each leaf, what rounding half-precision literals can change.

    Each literal of the claim and of the program is moved by half a unit in its last
    place; the changes of claim and of exact derivative add up as independent errors.

    Returns:
      Changes relative to the norm of the claim; None where there is no such literal.
    """
    if case.claim.mode != "rev" or case.readings.exact is None:
        return None
    claim_literals = jaxprs.half_literals(case.claim.jaxpr)
    program_literals = jaxprs.half_literals(case.program.jaxpr)
    literals = [*claim_literals, *program_literals][:_MOST_LITERALS]
    if not literals:
        return None
    moved = _moved_literals(case, literals)
    total = np.zeros(len(case.leaves))
    start = moved(np.zeros(len(literals)))
    for shift in np.eye(len(literals)):
        change = [norm(m - s) for m, s in zip(moved(shift), start, strict=True)]
        total += np.square(change)
    scales = [norm(c) for c in case.readings.claimed]
    return [float(t**0.5 / s) if s else 0.0
            for t, s in zip(total, scales, strict=True)]  # fmt: skip


def _moved_literals(case: Case, literals: list[Any]) -> Any:
    """Returns the difference of claim and exact as a function of literal shifts."""
    ulps = [float(jnp.finfo(literal.aval.dtype).eps) / 2 for literal in literals]
    values = [np.float64(np.asarray(literal.val)) for literal in literals]

    def difference(moving: Any, held: Any, seed: Any, shifts: Any) -> Values:
        table = {
            id(literal): value * (1 + shifts[k] * ulp)
            for k, (literal, value, ulp) in enumerate(
                zip(literals, values, ulps, strict=True)
            )
        }
        claimed = Evaluator(literals=table)(case.claim.jaxpr, [*moving, *held, *seed])
        claimed = claimed[-len(moving) :]
        exact = derivative(
            case.program.mathematics, Evaluator(literals=table), moving, held, seed
        )[1]
        return [c - e for c, e in zip(claimed, exact, strict=True)]

    arguments = case.bench.lifted_arguments(case.point)
    compiled = execution.lifted(difference, [*arguments, np.zeros(len(literals))])
    return lambda shifts: execution.to_host(compiled(*arguments, shifts))
