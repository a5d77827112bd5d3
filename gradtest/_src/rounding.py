"""The rounding gap: the claim in working precision against the lifted claim.

The yardstick is measured, not guessed: the rounding of the rule-free derivative in the
same dtype at the same point. It is only computed where a floor by dtype is exceeded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from gradtest._src import diagnose, execution, jaxprs
from gradtest._src.case import NOISE_FLOOR, Case, norm
from gradtest._src.devices import homes, matmuls
from gradtest._src.devices.matmuls import Format
from gradtest._src.differences import magnitude
from gradtest._src.findings import Cause, Finding, Gap, Verdict, worst
from gradtest._src.inputs import Point
from gradtest._src.program import Values

# The floor: units in the last place, and what they may come to in half precision.
_ULPS, _MOST_FLOOR = 128, 1 / 16
# The same for products of matrices that are coarser than their dtype: what a few of
# them in a row come to.
_PRODUCT_ULPS = 8
# How much worse than plain autodiff a rule may round.
FACTOR, LEAST_FACTOR, LARGE = 8, 2, 1 / 4
# Without a rule-free derivative: what an unstable formula must exceed, as a root.
_UNMEASURED_ROOT = 0.5
# So often the operands are moved at random.
_SHAKES = 4


def judge_rounding(
    case: Case,
    findings: list[Finding],
    rounding_rtol: float | None,
    *,
    yardstick: Callable[[], Case] | None = None,
) -> list[Finding]:
    """Completes the findings on leaves whose formula passed with their rounding gap.

    Args:
      case: What was judged, in reverse mode.
      findings: One for each leaf.
      rounding_rtol: Allowed relative gap; None measures what is to be allowed.
      yardstick: Makes the case whose program rounds as the claim may; None takes the
        program that was judged itself.
    """
    seen = _read(case, rounding_rtol, yardstick)
    if seen is None:
        return findings
    if seen.trouble is not None:
        return [_unjudged(finding, seen.trouble) for finding in findings]
    largest = float(np.max(case.contributions(seen.lifted), initial=0.0))
    units = [
        # The rounding of a gradient that cancels is told beside the other leaves.
        norm(c) if norm(c) * size > NOISE_FLOOR * largest else largest / size
        for c, size in zip(seen.lifted, case.sizes, strict=True)
    ]
    return [_judge(finding, seen, i, units[i]) for i, finding in enumerate(findings)]


def judge_pushed_rounding(
    case: Case, findings: list[Finding], rounding_rtol: float | None
) -> list[Finding]:
    """Completes the findings of a forward-mode claim, and adds those on its outputs.

    Only where every formula passed: the tangents of all leaves go together.
    """
    if worst(finding.verdict for finding in findings) is not Verdict.PASS:
        return findings
    seen = _read(case, rounding_rtol, None)
    if seen is None:
        return findings
    if seen.trouble is not None:
        return [_unjudged(finding, seen.trouble) for finding in findings]
    judged = [
        _judge(
            Finding(output.name, output.shape, np.dtype(output.dtype).name,
                    Verdict.PASS, mode="fwd", order=case.program.order,
                    trial=case.trial, judged_by="measured"),
            seen, i, norm(seen.lifted[i]),
        )
        for i, output in enumerate(case.program.outputs)
    ]  # fmt: skip
    wrong = [finding for finding in judged if finding.verdict is not Verdict.PASS]
    numbers = max((f.rounding or (0.0, 1.0) for f in judged), key=_part)
    return [dataclasses.replace(f, rounding=numbers) for f in findings] + wrong


def _part(numbers: tuple[float, float]) -> float:
    """Returns a gap as a part of what is allowed."""
    gap, allowed = numbers
    if not gap:
        return 0.0
    return gap / allowed if allowed else math.inf


def product_note(case: Case) -> str:
    """Says by what products of matrices round, where that is not their dtype."""
    found = _products(case)
    if found is None:
        return ""
    platform = homes.platform_of(case.bench.claim_device)
    return (
        f"precision: matrix products on {platform} round to {found.name} (eps "
        f"{found.eps:.1e}), and the rounding gap is judged by that"
    )


def _products(case: Case) -> Format | None:
    """Returns what products of the claim round to, where that is coarser than all."""
    found = matmuls.coarsest(case.claim.jaxpr, case.bench.claim_device)
    return found if found is not None and found.eps > case.working_eps else None


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A claim in working precision beside itself in float64, item by item."""

    worked: Values
    lifted: Values
    gaps: list[float]
    allowed: list[float]
    trouble: Cause | None = None
    is_narrower: bool = False


def _read(
    case: Case, rounding_rtol: float | None, yardstick: Callable[[], Case] | None
) -> _Seen | None:
    """Returns what working precision makes of the claim; None where it is float64."""
    is_widest = case.working_eps <= float(np.finfo(np.float64).eps)
    runs_alike = not case.claim.is_apart and not jaxprs.narrows(case.claim.jaxpr)
    if is_widest and runs_alike:
        return None  # it is what the lifted claim is: nothing to compare with
    lifted = case.readings.claimed
    values, worked = case.bench.read_working(case.point, lifted)
    for output, value in zip(case.program.outputs, values or [], strict=False):
        if not np.isfinite(value).all():
            cause = diagnose.value_overflows(output.name, value)
            return _Seen([], [], [], [], cause)
    gaps = [_gap(w, c) for w, c in zip(worked, lifted, strict=True)]
    products = _products(case)
    allowed = _floors(case, lifted, rounding_rtol, products)
    if any(gap > limit for gap, limit in zip(gaps, allowed, strict=True)):
        worked = _with_what_is_not_finite(case, worked)
        gaps = [_gap(w, c) for w, c in zip(worked, lifted, strict=True)]
        measure = case if yardstick is None else yardstick()
        allowed = _measured_allowance(measure, lifted, allowed, _spacing(products))
        lost = [i for i, c in enumerate(lifted) if gaps[i] > max(allowed[i], norm(c))]
        losses = _losses_nearby(measure) if lost else {}
        for i in lost:
            nearby = allowance(losses.get(i, 0.0), 0.0, norm(lifted[i]))
            allowed[i] = max(allowed[i], nearby, _loss_of_silence(measure, i))
    return _Seen(worked, lifted, gaps, allowed, is_narrower=_is_narrower(case))


def _with_what_is_not_finite(case: Case, worked: Values) -> Values:
    """Returns a derivative with what is NaN or infinite where XLA optimises fully."""
    optimised = case.bench.read_optimised(case.point, case.readings.claimed)
    pairs = zip(worked, optimised or worked, strict=True)
    return [w if np.isfinite(o).all() else o for w, o in pairs]


def _is_narrower(case: Case) -> bool:
    """Whether a claim rounds to half precision where its program does not."""
    claim, program = case.claim.jaxpr, case.program.jaxpr
    return jaxprs.computes_in_half(claim) and not jaxprs.computes_in_half(program)


def _scales(case: Case) -> list[float]:
    """Returns what makes norms of a derivative's items comparable with each other."""
    if case.claim.mode == "rev":
        return case.sizes
    return [
        value.size**0.5 / norm(value) if value.any() else 1.0
        for value in case.readings.values
    ]


def _gap(worked: np.ndarray, lifted: np.ndarray) -> float:
    """Norm of the difference; infinite where working precision is not finite."""
    gap = norm(worked - lifted)
    return gap if np.isfinite(gap) else np.inf


def _spacing(products: Format | None) -> float:
    return 0.0 if products is None else products.eps


def floor(working_eps: float, products: Format | None) -> float:
    """Returns what may be lost without being measured, relative to a norm.

    Args:
      working_eps: Spacing of the working dtype.
      products: What products of matrices round to, where that is coarser.
    """
    own = min(_ULPS * working_eps, _MOST_FLOOR)
    return max(own, _PRODUCT_ULPS * _spacing(products))


def _floors(
    case: Case, lifted: Values, rounding_rtol: float | None, products: Format | None
) -> list[float]:
    eps = max(case.working_eps, _spacing(products))
    relative = rounding_rtol
    if relative is None:
        relative = floor(case.working_eps, products)
    scales = _scales(case)
    parts = [norm(c) * scale for c, scale in zip(lifted, scales, strict=True)]
    largest = max(parts, default=0.0)
    # A gradient that is zero by cancellation keeps the rounding of its terms.
    cancelled = 4 * eps * largest
    # A second derivative may be so small that the first one's own rounding hides it.
    hidden = 0.0
    if case.program.order > 1 and case.claim.mode == "rev":
        hidden = eps * magnitude(case.readings.values, case.weights)
    return [
        relative * norm(c)
        + (cancelled / scale if part < NOISE_FLOOR * largest else 0.0)
        + hidden / scale
        for c, scale, part in zip(lifted, scales, parts, strict=True)
    ]


def _measured_allowance(
    case: Case, lifted: Values, floors: list[float], product_eps: float
) -> list[float]:
    """Widens the floors by what the rule-free derivative itself loses."""
    plain = case.bench.read_working_exact(case.point)
    exact = case.readings.exact
    if plain is None or exact is None:
        relative = max(case.working_eps, product_eps) ** _UNMEASURED_ROOT
        return [max(f, relative * norm(c)) for f, c in zip(floors, lifted, strict=True)]
    losses = [norm(p - e) for p, e in zip(plain, exact, strict=True)]
    shaken = losses_of_operands(case)
    # One leaf may round well by luck: the usual leaf counts as well. One that is all
    # rounding tells no more than that.
    parts = [
        min(loss / norm(e), 1.0)
        for loss, e in zip(losses, exact, strict=True)
        if norm(e) and np.isfinite(loss)
    ]
    usual = float(np.median(parts)) if parts else 0.0
    least = map(max, floors, shaken)
    return [
        max(floor, allowance(loss if np.isfinite(loss) else 0.0, usual, norm(c)))
        for floor, loss, c in zip(least, losses, lifted, strict=True)
    ]


def _losses_nearby(case: Case) -> dict[int, float]:
    """Returns the most that plain autodiff loses at points next to this one, by item.

    Where it loses all of its accuracy, one run may be right by luck.
    """
    most: dict[int, float] = {}
    for k in range(_SHAKES):
        near = case.perturbed(2 * case.working_eps, f"nearby {k}")
        moving = [
            execution.spread(np.asarray(value).astype(leaf.dtype), sharding)
            for value, leaf, sharding in zip(
                near.point.moving,
                case.leaves,
                map(execution.spread_of, case.point.moving),
                strict=True,
            )
        ]
        near = case.at(Point(tuple(moving), case.point.held))
        plain, exact = near.bench.read_working_exact(near.point), near.readings.exact
        for i, (p, e) in enumerate(zip(plain or [], exact or [], strict=False)):
            loss = norm(p - e)
            most[i] = max(most.get(i, 0.0), loss if np.isfinite(loss) else 0.0)
    return most


def _loss_of_silence(case: Case, i: int) -> float:
    """Returns what working precision makes of a derivative that is zero by cancelling.

    One run of the rule-free derivative may round to zero by luck: it is what rounding
    of every operation moves it by in float64, at the spacing of the working dtype. 0
    where the derivative is more than that.
    """
    exact, noise = case.readings.exact, case.exact_noise(i)
    if exact is None or norm(exact[i]) > noise:
        return 0.0
    return noise * case.working_eps / float(np.finfo(np.float64).eps)


def losses_of_operands(case: Case) -> list[float]:
    """Returns how far the exact derivative moves where operands are off by an ulp.

    A claim that is right for operands so near can't be asked for more: they were
    rounded themselves. Half-precision operands are off by float32's, in which what is
    ill-conditioned can be computed: the rule-free derivative shows what becomes of it.
    """
    here = case.readings.exact
    assert here is not None
    spacing = min(case.working_eps, float(np.finfo(np.float32).eps))
    most = [0.0] * len(here)
    for k in range(_SHAKES):
        there = case.perturbed(spacing, f"shaken {k}").readings.exact
        moved = [norm(a - b) for a, b in zip(there or here, here, strict=True)]
        most = [
            max(m, n if np.isfinite(n) else 0.0)
            for m, n in zip(most, moved, strict=True)
        ]
    return most


def allowance(loss: float, usual: float, scale: float) -> float:
    """Returns what a rule may lose where plain autodiff loses `loss`.

    A multiple of it; a smaller one where that would come to a part of the gradient
    that leaves nothing to check.
    """
    loss = max(loss, usual * scale)
    return min(FACTOR * loss, max(LEAST_FACTOR * loss, LARGE * scale))


def _judge(finding: Finding, seen: _Seen, i: int, scale: float) -> Finding:
    if finding.verdict is not Verdict.PASS:
        return finding
    worked, lifted = seen.worked[i], seen.lifted[i]
    gap, allowed = seen.gaps[i], seen.allowed[i]
    unit = scale or 1.0
    numbers = (gap / unit, allowed / unit)
    finding = dataclasses.replace(finding, rounding=numbers)
    if gap <= allowed:
        return finding
    cause, *others = diagnose.unstable(
        worked, lifted, is_narrower=seen.is_narrower, dtype=finding.dtype
    )
    return dataclasses.replace(
        finding,
        verdict=Verdict.FAIL,
        gap=Gap.ROUNDING,
        size=numbers[0],
        allowed=numbers[1],
        cause=cause,
        other_causes=tuple(others),
        notes=(*finding.notes, f"formula gap {finding.size:.1e}: the formula is right"),
    )


def _unjudged(finding: Finding, cause: Cause) -> Finding:
    if finding.verdict is not Verdict.PASS:
        return finding
    return dataclasses.replace(
        finding, verdict=Verdict.INCONCLUSIVE, gap=Gap.ROUNDING, size=0.0, cause=cause
    )
