"""Forward mode beside reverse mode: the tangents that a derivative pushes forward.

One identity says it all, `<w, J v> = <J^T w, v>`, and the differences of the outputs
say it again for each of them. `pushed` judges forward mode where it is alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm, pair
from gradtest._src.differences import Slope, magnitude, weighted
from gradtest._src.findings import Cause, Finding, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.primal import value_trouble
from gradtest._src.program import Values
from gradtest._src.pushed import norm_all

# Both sides of the identity are sums of the same float64 terms.
_IDENTITY = 1e-9
_ROUNDING = 1e-14
_UNSURE = 1e-4


def judge_beside_reverse(case: Case) -> list[Finding]:
    """Judges the forward mode of a case whose reverse mode was judged already."""
    slopes = case.readings.slopes
    if slopes is None or value_trouble(case):
        return []
    for tangent in slopes:
        if not np.isfinite(tangent).all():
            cause = diagnose.not_finite(tangent)
            return [_finding(case, None, Verdict.FAIL, np.inf, case.rtol, cause)]
    tangents = dict(enumerate(case.tangents))
    pulled = [
        pair(g, v)
        for g, v in zip(case.readings.claimed, tangents.values(), strict=True)
    ]
    pushed = weighted(slopes, case.weights)
    scale = max(
        float(np.max(case.contributions(case.readings.claimed), initial=0.0)),
        abs(pushed),
    )
    allowed = max(_IDENTITY, 64 * case.noise if case.bench.islands else 0.0)
    gap = abs(pushed - sum(pulled))
    # Where everything cancels, the terms' own rounding is left.
    rounding = _ROUNDING * magnitude(case.readings.values, case.weights)
    if not gap <= allowed * scale + rounding:
        leaf = _guilty_leaf(case)
        size = gap / scale if scale else np.inf
        return [_finding(case, leaf, Verdict.FAIL, size, allowed, _MODES_DISAGREE)]
    if not case.program.is_scalar:
        found = _judge_tangents(case, slopes, case.tangents, scale)
        symmetric = [case.symmetric(i, t) for i, t in tangents.items()]
        if found is not None and any(
            s is not t for s, t in zip(symmetric, case.tangents, strict=True)
        ):
            # What reads one triangle of a symmetric matrix is right for such tangents.
            slopes = case.bench.read(case.point, tangents=symmetric).slopes
            assert slopes is not None
            found = _judge_tangents(case, slopes, symmetric, scale)
        if found is not None:
            return [found]
    size = gap / scale if scale else 0.0
    return [_finding(case, None, Verdict.PASS, size, allowed, None)]


def _judge_tangents(
    case: Case, slopes: Values, tangents: Values, scale: float
) -> Finding | None:
    """Compares the outputs' tangents with differences; returns what is wrong."""
    slope = case.measure(dict(enumerate(tangents)), scale)
    # At a kink, or in noise, the identity with reverse mode is enough.
    if slope.is_kink or slope.error > _UNSURE * scale:
        return None
    return _judge_outputs(case, slopes, slope)


def _judge_outputs(case: Case, claimed: Values, slope: Slope) -> Finding | None:
    """Compares each output's tangent with its difference; returns what is wrong."""
    if slope.is_kink:
        inside = slope.distance(weighted(claimed, case.weights)) <= 3 * slope.error
        if inside:
            return None
        return _finding(
            case, None, Verdict.INCONCLUSIVE, np.inf, case.rtol, diagnose.KINK
        )
    allowed = _allowed(case, slope)
    scale = norm_all(slope.outputs)
    for output, c, m in zip(case.program.outputs, claimed, slope.outputs, strict=True):
        gap = leaf_gap(c, m, rtol=allowed, floor=max(1e-9 * scale, 3 * slope.error))
        if norm(c - m) > gap.allowed * max(norm(m), 1e-300) + 3 * slope.error:
            cause = diagnose.leaf_cause([c], [m], 0, case.rtol)
            found = _finding(case, None, Verdict.FAIL, gap.size, gap.allowed, cause)
            note = f"seen in the tangent of {output.name}"
            return _with(found, note=note, entry=gap.entry)
    return None


def _allowed(case: Case, slope: Slope) -> float:
    scale = norm_all(slope.outputs)
    return case.rtol + (3 * slope.error / scale if scale else 0.0)


def _guilty_leaf(case: Case) -> int | None:
    """Returns the leaf whose tangent alone breaks the identity most."""
    worst, guilty = 0.0, None
    for i in range(len(case.leaves)):
        tangents = [np.zeros_like(t) for t in case.tangents]
        tangents[i] = case.tangents[i]
        slopes = case.bench.read(case.point, tangents=tangents).slopes
        assert slopes is not None
        gap = abs(
            weighted(slopes, case.weights) - pair(case.readings.claimed[i], tangents[i])
        )
        if not gap <= worst:
            worst, guilty = gap, i
    return guilty


_MODES_DISAGREE = Cause(
    "wrong in forward mode",
    "forward and reverse mode are not transposes of each other",
    "compare the rule's jvp with its transpose: <w, J v> must equal <J^T w, v>",
)


def _with(finding: Finding, *, note: str, entry: object) -> Finding:
    return dataclasses.replace(
        finding,
        notes=(*finding.notes, note),
        entry=entry,  # type: ignore[arg-type]
    )


def _finding(
    case: Case,
    leaf: int | None,
    verdict: Verdict,
    size: float,
    allowed: float,
    cause: Cause | None,
) -> Finding:
    outputs = case.program.outputs
    item = outputs[0] if leaf is None else case.leaves[leaf]
    return Finding(
        item.name,
        item.shape,
        np.dtype(item.dtype).name,
        verdict,
        mode="fwd",
        order=case.program.order,
        trial=case.trial,
        size=float(size),
        allowed=float(allowed),
        judged_by="measured",
        cause=cause,
    )
