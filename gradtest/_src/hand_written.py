"""What hand-written rules and products must be: linear in cotangents and tangents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gradtest._src import diagnose, seeding
from gradtest._src.blocks import explain_blocks
from gradtest._src.case import Case, norm
from gradtest._src.findings import Finding, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.inputs import Leaf
from gradtest._src.lifting import widen
from gradtest._src.primal import value_trouble
from gradtest._src.program import Output, Values

# A cotangent that is no power of its own: neither 1 nor -1, and exact in any dtype.
COTANGENT = -1.75


def hand_written_findings(case: Case, found: list[Finding]) -> list[Finding]:
    """Completes the findings on a claim with what only hand-written ones get wrong.

    What is not linear is said to be that alone; what is linear and wrong, which term
    of it is.
    """
    is_wrong = any(finding.verdict is Verdict.FAIL for finding in found)
    broken = linearity_findings(case, is_wrong=is_wrong)
    names = {finding.name for finding in broken}
    linear = [finding for finding in found if finding.name not in names]
    if case.claim.mode == "fwd" and broken:  # the outputs are: what came of it is not
        linear = [_of_no_linearity(finding, broken[0]) for finding in linear]
    return explain_blocks(case, linear) + broken


def _of_no_linearity(finding: Finding, broken: Finding) -> Finding:
    """Gives what a tangent that is not linear did to a leaf its reason."""
    if finding.verdict is not Verdict.FAIL or finding.cause is None:
        return finding
    others = (finding.cause, *finding.other_causes)[:3]
    return dataclasses.replace(finding, cause=broken.cause, other_causes=others)


def linearity_findings(case: Case, *, is_wrong: bool) -> list[Finding]:
    """Asks whether what is hand-written is linear in the cotangent, or the tangent.

    A rule that forgets its cotangent, or squares it, is right where that is 1, as for
    scalar values. JAX's derivative of other functions is judged with random cotangents
    anyway, and all of it is linear but for rules: it is asked where it is wrong, for
    the reason. A hand-written product need not be linear.
    """
    claim, claimed = case.claim, case.readings.claimed
    is_scalar = claim.mode == "rev" and case.program.is_scalar
    asked = not claim.is_autodiff or is_wrong or is_scalar
    if case.readings.plain is not None:
        return []  # a declared product, such as a clipping, need not be linear
    if not (asked and claim.by_hand) or value_trouble(case):
        return []
    if not all(np.isfinite(c).all() for c in claimed):
        return []  # a finding of its own
    probes = [_scaled(case)]
    if not claim.is_autodiff:
        probes += [_added(case), _zero(case)]
    found: dict[str, Finding] = {}
    for results, wanted, cause in probes:
        for finding in _unlike(case, results, wanted, cause):
            found.setdefault(finding.name, finding)
    return list(found.values())


# Claims, what they should be, and what is wrong where they are not.
_Probe = tuple[Values, Values, diagnose.Cause]


def _scaled(case: Case) -> _Probe:
    seed = [COTANGENT * widen(value) for value in case.seed]
    wanted = [COTANGENT * c for c in case.readings.claimed]
    if case.claim.is_autodiff and case.claim.mode == "rev":
        return _claimed(case, seed), wanted, diagnose.not_linear(COTANGENT)
    cause = _not_linear(
        case,
        f"with the {{seed}} {COTANGENT:g} times as large the result is not "
        f"{COTANGENT:g} times as large",
    )
    return _claimed(case, seed), wanted, cause


def _added(case: Case) -> _Probe:
    """A second seed, of the first one's size, added to the first."""
    other = []
    for i, value in enumerate(map(widen, case.seed)):
        generator = seeding.generator(case.key, "another seed", case.trial, i)
        drawn = widen(seeding.normal(generator, value.shape, case.seed[i].dtype))
        size = norm(value) / max(value.size, 1) ** 0.5
        other.append(size * drawn)
    both = [widen(a) + b for a, b in zip(case.seed, other, strict=True)]
    pairs = zip(case.readings.claimed, _claimed(case, other), strict=True)
    cause = _not_linear(
        case, "for the sum of two {seed}s the result is not the sum of their results"
    )
    return _claimed(case, both), [a + b for a, b in pairs], cause


def _zero(case: Case) -> _Probe:
    zeros = [0 * widen(value) for value in case.seed]
    cause = _not_linear(case, "for a {seed} of zeros the result is not zero")
    wanted = [np.zeros_like(c) for c in case.readings.claimed]
    return _claimed(case, zeros), wanted, cause


def _not_linear(case: Case, says: str) -> diagnose.Cause:
    name, seed = case.claim.by_hand, case.claim.seed_name
    return diagnose.Cause(
        f"not linear in the {seed}",
        says.format(seed=seed),
        f"multiply every term that {name} returns by its {seed}, once",
    )


def _claimed(case: Case, seed: Values) -> Values:
    tangents = case.tangents if case.bench.forward else ()
    return case.bench.read(case.point, seed=seed, tangents=tangents).claimed


def _unlike(
    case: Case, results: Values, wanted: Values, cause: diagnose.Cause
) -> list[Finding]:
    """Returns a finding on each result that is not what linearity makes of it."""
    is_reverse = case.claim.mode == "rev"
    items: Sequence[Leaf | Output] = case.leaves if is_reverse else case.program.outputs
    sizes = case.sizes if is_reverse else [1.0] * len(items)
    claimed = case.readings.claimed
    largest = max(norm(c) * size for c, size in zip(claimed, sizes, strict=True))
    found = []
    for i, (item, size) in enumerate(zip(items, sizes, strict=True)):
        floor = max(1e-12 * largest / size, 1e-9 * norm(claimed[i]))
        gap = leaf_gap(results[i], wanted[i], rtol=case.rtol, floor=floor)
        if not gap.is_exceeded and np.isfinite(results[i]).all():
            continue
        found.append(
            Finding(
                item.name,
                item.shape,
                np.dtype(item.dtype).name,
                Verdict.FAIL,
                mode=case.claim.mode,
                order=case.program.order,
                trial=case.trial,
                size=gap.size,
                allowed=gap.allowed,
                judged_by="linearity",
                entry=gap.entry,
                cause=cause,
                check="linear",
            )
        )
    return found
