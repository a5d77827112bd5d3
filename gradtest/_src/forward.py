"""Forward mode beside reverse mode: the tangents that a derivative pushes forward.

One identity says it all, `<w, J v> = <J^T w, v>`, and the differences of the outputs
say it again for each of them. `pushed` judges forward mode where it is alone.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm, pair
from gradtest._src.diagnosis.questions import Questions, forward_scene
from gradtest._src.differences import Slope, magnitude, weighted
from gradtest._src.findings import Cause, Finding, Verdict
from gradtest._src.gaps import SILENT_NOTE, leaf_gap
from gradtest._src.primal import value_trouble
from gradtest._src.program import Values
from gradtest._src.pushed import norm_all

# Both sides of the identity are sums of the same float64 terms.
_IDENTITY = 1e-9
_ROUNDING = 1e-14
_UNSURE = 1e-4
# Forward mode rounds other operations than those that the noise was measured of.
_NOISE_FACTOR = 4
# Terms of more leaves than these are not looked at one by one.
_MOST_LEAVES = 8


def judge_beside_reverse(case: Case) -> list[Finding]:
    """Judges the forward mode of a case whose reverse mode was judged already."""
    slopes = case.readings.slopes
    if slopes is None or value_trouble(case):
        return []
    for tangent in slopes:
        if not np.isfinite(tangent).all():
            cause = diagnose.not_finite(tangent)
            return [_finding(case, None, Verdict.FAIL, np.inf, case.rtol, cause)]
    pulled = [
        pair(g, v) for g, v in zip(case.readings.claimed, case.tangents, strict=True)
    ]
    pushed = weighted(slopes, case.weights)
    scale = max(
        float(np.max(case.contributions(case.readings.claimed), initial=0.0)),
        abs(pushed),
    )
    allowed = max(_IDENTITY, 64 * case.noise if case.bench.islands else 0.0)
    gap = abs(pushed - sum(pulled))
    # Where everything cancels, the terms' own rounding is left.
    margin = allowed * scale
    margin += _ROUNDING * magnitude(case.readings.values, case.weights)
    if not gap <= margin:
        margin = max(margin, _cancelled(case))
    size, allowed = (gap / scale, margin / scale) if scale else (0.0, allowed)
    if not gap <= margin:
        leaf, cause = _guilty_leaf(case), _which_mode(case)
        size = size if scale else np.inf
        return [_finding(case, leaf, Verdict.FAIL, size, allowed, cause)]
    if not case.program.is_scalar:
        found = _judge_tangents(case, slopes, case.tangents, scale)
        symmetric = [case.symmetric(i, t) for i, t in enumerate(case.tangents)]
        if found is not None and any(
            s is not t for s, t in zip(symmetric, case.tangents, strict=True)
        ):
            # What reads one triangle of a symmetric matrix is right for such tangents.
            slopes = case.bench.read(case.point, tangents=symmetric).slopes
            assert slopes is not None
            found = _judge_tangents(case, slopes, symmetric, scale)
        if found is not None:
            return [found]
    if allowed > 1:
        found = _finding(case, None, Verdict.PASS, 0.0, 1.0, None)
        return [_with(found, note=SILENT_NOTE)]
    return [_finding(case, None, Verdict.PASS, size, allowed, None)]


def _cancelled(case: Case) -> float:
    """Returns what rounding leaves of a slope that cancels inside of the program."""
    noise = [case.evaluation_noise(i) * norm(v) for i, v in enumerate(case.tangents)]
    return _NOISE_FACTOR * sum(noise)


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
    results = zip(
        case.program.outputs, claimed, slope.outputs, case.weights, strict=True
    )
    for output, c, m, weight in results:
        gap = leaf_gap(c, m, rtol=allowed, floor=max(1e-9 * scale, 3 * slope.error))
        if norm(c - m) > gap.allowed * max(norm(m), 1e-300) + 3 * slope.error:
            if norm(c - m) * norm(weight) <= _cancelled(case):
                continue
            cause = diagnose.at_first_sight([c], [m], 0, case.rtol)
            found = _finding(case, None, Verdict.FAIL, gap.size, gap.allowed, cause)
            closely = functools.partial(_causes, case, output.name, c, m)
            case.later[found.mode, found.name] = cause, closely
            note = f"seen in the tangent of {output.name}"
            return _with(found, note=note, entry=gap.entry)
    return None


def _causes(
    case: Case, output: str, claimed: np.ndarray, measured: np.ndarray
) -> tuple[Cause, ...]:
    """Names what is wrong with an output's tangent, or with one term of it."""
    return _term_causes(case, output) or diagnose.leaf_causes(
        [claimed], [measured], 0, case.rtol, scene=forward_scene(case)
    )


def _term_causes(case: Case, output: str) -> tuple[Cause, ...]:
    """Names what is wrong with the one leaf's term that is; () where there are more."""
    places = [out.name for out in case.program.outputs]
    k, found = places.index(output), []
    if not 1 < len(case.leaves) <= _MOST_LEAVES:
        return ()
    for i, leaf in enumerate(case.leaves):
        claimed = _pushed_alone(case, i)[k]
        slope = case.measure({i: case.tangents[i]}, norm_all([claimed]))
        gap = norm(claimed - slope.outputs[k])
        if slope.is_kink or not np.isfinite(gap):
            return ()
        if gap > case.rtol * norm(slope.outputs[k]) + 3 * slope.error:
            found.append((leaf.name, claimed, slope.outputs[k]))
    if len(found) != 1:
        return ()
    ((name, claimed, measured),) = found
    causes = diagnose.leaf_causes(
        [claimed], [measured], 0, case.rtol, scene=forward_scene(case)
    )
    told = f"in what the tangent of {name} adds, "
    return tuple(dataclasses.replace(c, says=told + c.says) for c in causes)


def _which_mode(case: Case) -> Cause:
    """Names the mode that is wrong where the two are not each other's transposes."""
    for pulled in case.readings.claimed:
        if not np.isfinite(pulled).all():
            return diagnose.not_finite(pulled)
    try:
        is_right = Questions(case).is_right_forwards()
    except Exception:  # a diagnosis must never hide the failure that it explains
        is_right = False
    return _WRONG_IN_REVERSE if is_right else _MODES_DISAGREE


def _allowed(case: Case, slope: Slope) -> float:
    scale = norm_all(slope.outputs)
    return case.rtol + (3 * slope.error / scale if scale else 0.0)


def _guilty_leaf(case: Case) -> int | None:
    """Returns the leaf whose tangent alone breaks the identity most."""
    worst, guilty = 0.0, None
    for i in range(len(case.leaves)):
        gap = abs(
            weighted(_pushed_alone(case, i), case.weights)
            - pair(case.readings.claimed[i], case.tangents[i])
        )
        if not gap <= worst:
            worst, guilty = gap, i
    return guilty


def _pushed_alone(case: Case, i: int) -> Values:
    """Returns the outputs' tangents where one leaf moves and the others rest."""
    tangents = [np.zeros_like(t) for t in case.tangents]
    tangents[i] = case.tangents[i]
    slopes = case.bench.read(case.point, tangents=tangents).slopes
    assert slopes is not None
    return slopes


_WRONG_IN_REVERSE = Cause(
    "wrong in reverse mode",
    "forward mode gives what differences show, and reverse mode is not its transpose",
    "compare the transpose with the tangent: <w, J v> must equal <J^T w, v>",
)
_MODES_DISAGREE = Cause(
    "wrong in forward mode",
    "forward and reverse mode are not transposes of each other",
    "compare the rule's jvp with its transpose: <w, J v> must equal <J^T w, v>",
)


def _with(finding: Finding, *, note: str, entry: object = None) -> Finding:
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
