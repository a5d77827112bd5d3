"""What must hold beside the derivative: the value, and the solvers in the program."""

from __future__ import annotations

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm
from gradtest._src.findings import INNER, Finding, Gap, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.solvers import SolveKind

# A solver's residual: rounding explains this much for a direct one ...
DIRECT_RESIDUAL = 1e-6
# ... and this much, its square root in float32, is a usual tolerance to iterate to.
ITERATIVE_RESIDUAL = 3.5e-4


def value_trouble(case: Case) -> diagnose.Cause | None:
    """Says why nothing can be differenced, where a value is not finite."""
    for output, value in zip(case.program.outputs, case.readings.values, strict=True):
        if not np.isfinite(value).all():
            return diagnose.value_not_finite(output.name, value)
    return None


def value_findings(case: Case) -> list[Finding]:
    """Compares the value that the claim's forward pass returns with the function's."""
    readings = case.readings
    if readings.claimed_values is None or value_trouble(case):
        return []
    if case.program.order > 1:
        return []  # the value is the gradient, which the first order judged
    found = []
    pairs = zip(readings.claimed_values, readings.values, strict=True)
    for i, (output, (claimed, value)) in enumerate(
        zip(case.program.outputs, pairs, strict=True)
    ):
        gap = leaf_gap(claimed, value, rtol=case.rtol, floor=1e-13 * norm(value))
        if np.isfinite(claimed).all() and not (
            gap.is_exceeded and norm(claimed - value) > case.value_noise(i)
        ):
            continue
        found.append(
            Finding(
                output.name,
                output.shape,
                np.dtype(output.dtype).name,
                Verdict.FAIL,
                Gap.VALUE,
                case.claim.mode,
                case.program.order,
                case.trial,
                gap.size,
                gap.allowed,
                entry=gap.entry,
                cause=diagnose.INNER_VALUE
                if case.program.opened
                else diagnose.FORWARD_VALUE,
                check=INNER if case.program.opened else "value",
            )
        )
    return found


def solver_findings(case: Case) -> list[Finding]:
    """Judges the residuals that the program's linear solvers leave by themselves."""
    residual = case.readings.residual
    forward = max(residual[SolveKind.SOLVE_DIRECT], residual[SolveKind.SOLVE_ITERATIVE])
    found = []
    for kind in SolveKind:
        transposed = kind in (SolveKind.TRANSPOSE_DIRECT, SolveKind.TRANSPOSE_ITERATIVE)
        iterates = kind in (SolveKind.SOLVE_ITERATIVE, SolveKind.TRANSPOSE_ITERATIVE)
        allowed = ITERATIVE_RESIDUAL if iterates else DIRECT_RESIDUAL
        if transposed:
            allowed = max(allowed, 10 * forward)
        allowed = max(allowed, 64 * case.noise if case.bench.islands else 0.0)
        if not residual[kind] > allowed:
            continue
        # A loose tolerance and a wrong forward solver look alike.
        loose = kind is SolveKind.SOLVE_ITERATIVE
        found.append(
            Finding(
                "transpose_solve" if transposed else "solve",
                (),
                "",
                Verdict.INCONCLUSIVE if loose else Verdict.FAIL,
                Gap.SOLVER,
                case.claim.mode,
                case.program.order,
                case.trial,
                float(residual[kind]),
                float(allowed),
                judged_by="residual",
                cause=diagnose.solver_residual(transposed, loose),
                check="solver",
            )
        )
    return found
