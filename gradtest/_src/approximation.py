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
from gradtest._src.diagnosis.later import explain_leaves
from gradtest._src.findings import Approximation, Finding, Gap, Verdict, worst
from gradtest._src.kit import pushforward
from gradtest._src.lifting import Evaluator, Recorder
from gradtest._src.program import Values, derivative

_MOST_CONSTANTS = 64
_RETRACED = "traced in float64"

Judge = Callable[[Case], list[Finding]]


def explain_gaps(
    case: Case, findings: list[Finding], judge: Judge, *, eps: float | None = None
) -> list[Finding]:
    """Turns failures that are approximations into passes that say so.

    Bounded: the lifted gap may not exceed the square root of the working dtype's
    spacing, and the gap of the program traced anew must close to the usual tolerance.

    Args:
      case: What was judged.
      findings: What `judge` found, one for each leaf or output.
      judge: Judges the case that was traced anew, in the same order.
      eps: The spacing of the working dtype, where it is not the case's own.
    """
    bound = (case.working_eps if eps is None else eps) ** 0.5
    # A module may compute in half precision between leaves that are wider.
    widest = max(bound, _literal_spacing(case) ** 0.5)
    suspects = [
        i
        for i, f in enumerate(findings)
        if f.verdict is Verdict.FAIL and f.gap is Gap.FORMULA and f.size <= widest
    ]
    open_gaps = [i for i in suspects if findings[i].size <= bound]
    found = list(findings)
    if open_gaps and case.retraced is not None:
        judged = judge(case.retraced)
        for i in open_gaps:
            if judged[i].verdict is Verdict.PASS:
                found[i] = _passed(
                    found[i], bound, judged[i].allowed, retraced=judged[i].size
                )
            elif judged[i].verdict is Verdict.FAIL:
                found[i] = _traced_anew(found[i], judged[i])
    still_open = [i for i in suspects if found[i].verdict is Verdict.FAIL]
    if still_open:
        # Constants that a float64 trace does not round are no excuse.
        reach = literal_reach(case.retraced or case) or [0.0] * len(findings)
        for i in still_open:
            # Along a tangent every leaf's constants play a part.
            part = reach[i] if found[i].mode == "rev" else max(reach)
            allowed = min(widest, 3 * part + case.rtol)
            if part and found[i].size <= allowed:
                found[i] = _passed(found[i], allowed, allowed, literals=part)
    return _explained(case, found)


def _explained(case: Case, findings: list[Finding]) -> list[Finding]:
    """Looks closely at what stays wrong, as it was judged last."""
    if worst(finding.verdict for finding in findings) is not Verdict.FAIL:
        return findings
    found = explain_leaves(case.later, findings)
    again = [k for k, f in enumerate(findings) if _RETRACED in f.notes]
    if again and case.retraced is not None:
        closely = explain_leaves(case.retraced.later, findings)
        for k in again:
            found[k] = closely[k]
    return found


def _literal_spacing(case: Case) -> float:
    """Returns the spacing of the half-precision constants of claim and program."""
    literals = [
        *jaxprs.half_literals(case.claim.jaxpr),
        *jaxprs.half_literals(case.program.jaxpr),
    ]
    spacings = [float(jnp.finfo(literal.aval.dtype).eps) for literal in literals]
    return max(spacings, default=0.0)


def _traced_anew(finding: Finding, judged: Finding) -> Finding:
    """Tells a failure by the numbers without the rounding of constants in them."""
    note = f"as computed for {finding.dtype} the gap is {finding.size:.3g}"
    return dataclasses.replace(
        judged, dtype=finding.dtype, notes=(*judged.notes, _RETRACED, note)
    )


def _passed(
    finding: Finding, allowed: float, seen: float, **evidence: float
) -> Finding:
    return dataclasses.replace(
        finding,
        verdict=Verdict.PASS,
        allowed=allowed,
        cause=None,
        other_causes=(),
        entry=None,
        approximation=Approximation(finding.size, seen, **evidence),
    )


def literal_reach(case: Case, *, values: bool = False) -> list[float] | None:
    """Returns what rounding half-precision literals can change of each item.

    Each value that such literals of claim and program have is moved by half a unit in
    its last place, wherever it stands: it is one constant, rounded once. The changes of
    the gap between claim and truth add up as independent errors.

    Args:
      case: The claim and the program.
      values: Whether the items are the function's values, not those of its derivative.

    Returns:
      Changes relative to the norm of what is claimed; None where there is no literal
      that could change it.
    """
    if case.readings.exact is None:
        return None
    claim_literals = jaxprs.half_literals(case.claim.jaxpr)
    program_literals = jaxprs.half_literals(case.program.jaxpr)
    literals = [*claim_literals, *program_literals]
    constants = sorted({_constant(literal) for literal in literals})[:_MOST_CONSTANTS]
    if not constants:
        return None
    moved = _moved_constants(case, literals, constants, values=values)
    claimed = case.readings.claimed_values if values else case.readings.claimed
    assert claimed is not None
    total = np.zeros(len(claimed))
    start = moved(np.zeros(len(constants)))
    for shift in np.eye(len(constants)):
        change = [norm(m - s) for m, s in zip(moved(shift), start, strict=True)]
        total += np.square(change)
    scales = [norm(c) for c in claimed]
    return [float(t**0.5 / s) if s else 0.0 for t, s in zip(total, scales, strict=True)]


def _constant(literal: Any) -> tuple[float, str]:
    """Returns a literal's value and dtype: equal ones are one constant."""
    return float(np.asarray(literal.val)), str(literal.aval.dtype)


def _moved_constants(
    case: Case,
    literals: list[Any],
    constants: list[tuple[float, str]],
    *,
    values: bool,
) -> Any:
    """Returns the difference of claim and truth as a function of constants' shifts."""
    places = {constant: k for k, constant in enumerate(constants)}

    def difference(moving: Any, held: Any, seed: Any, shifts: Any) -> Values:
        table = {}
        for literal in literals:
            value, dtype = _constant(literal)
            place = places.get((value, dtype))
            if place is not None:
                half_ulp = float(jnp.finfo(dtype).eps) / 2
                table[id(literal)] = value * (1 + shifts[place] * half_ulp)
        claimed = Evaluator(literals=table)(case.claim.jaxpr, [*moving, *held, *seed])
        run, program = Evaluator(literals=table), case.program
        if values:
            claimed, truth = (
                claimed[: len(seed)],
                program.mathematics(run, moving, held),
            )
        elif case.claim.mode == "fwd":
            run = run.fork(stops=Recorder())
            truth = pushforward(program, run, moving, held, seed)[1]
        else:
            truth = derivative(program.mathematics, run, moving, held, seed)[1]
        claimed = claimed[-len(truth) :]
        return [c - t for c, t in zip(claimed, truth, strict=True)]

    arguments = case.bench.lifted_arguments(case.point)
    shifts = np.zeros(len(constants))
    compiled = execution.lifted(difference, [*arguments, shifts])
    return lambda shifts: execution.to_host(compiled(*arguments, shifts))
