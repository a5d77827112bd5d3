"""What is wrong with a gradient over several devices.

A cause is named only where the numbers fit it: those of each device, those of the full
batch, and the gradients of the batch's parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gradtest._src import diagnose, jaxprs
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.parallel.agreeing import AGREEING
from gradtest._src.parallel.disagreeing import DISAGREEING, differ, some_devices
from gradtest._src.parallel.layout import Layout
from gradtest._src.parallel.leaf import Leaf
from gradtest._src.parallel.parts import Parts

_Recogniser = Callable[[Leaf], Cause | None]


def explain_step(
    case: Case, findings: list[Finding], layout: Layout, parts: Parts
) -> list[Finding]:
    """Names what is wrong with a step, where its numbers tell."""
    return [
        _explained(case, finding, layout, parts, (DISAGREEING, AGREEING))
        for finding in findings
    ]


def explain_devices(case: Case, findings: list[Finding]) -> list[Finding]:
    """Names the devices that are wrong, where others are right."""
    only = ((some_devices, differ), ())
    return [_explained(case, finding, Layout({}), None, only) for finding in findings]


def _explained(
    case: Case,
    finding: Finding,
    layout: Layout,
    parts: Parts | None,
    recognisers: tuple[Sequence[_Recogniser], Sequence[_Recogniser]],
) -> Finding:
    """Names a finding's cause by those for devices that disagree, or that agree."""
    names = [leaf.name for leaf in case.leaves]
    if finding.verdict is not Verdict.FAIL or finding.name not in names:
        return finding
    index = names.index(finding.name)
    readings = case.readings
    if finding.gap is Gap.FORMULA and readings.exact is not None:
        copies, truth, fit = readings.copies, readings.exact[index], diagnose.FIT
    elif finding.gap is Gap.ROUNDING and case.bench.worked:
        copies, truth = case.bench.worked, readings.claimed[index]
        fit = max(diagnose.FIT, 128 * case.working_eps)
    else:
        return finding
    if finding.gap is Gap.ROUNDING and _is_narrower(case):
        finding = dataclasses.replace(finding, cause=_NARROWER, other_causes=())
    if not all(np.isfinite(value).all() for value in copies[index].values):
        return finding
    gap = norm(copies[index].farthest(truth) - truth)
    if norm(truth):  # a pattern must explain most of the gap to be its cause
        fit = min(fit, gap / norm(truth) / 10)
    leaf = Leaf(index, copies[index], truth, layout, parts, fit)
    for recognise in recognisers[1 if leaf.agrees else 0]:
        cause = recognise(leaf)
        if cause is not None:
            return dataclasses.replace(finding, cause=cause, other_causes=())
    return finding


def _is_narrower(case: Case) -> bool:
    """Whether a claim rounds to half precision where its program does not."""
    claim, program = case.claim.jaxpr, case.program.jaxpr
    return jaxprs.computes_in_half(claim) and not jaxprs.computes_in_half(program)


_NARROWER = Cause(
    "computes in half precision",
    "the formula is right, but the step computes in half precision what the loss "
    "computes in full",
    "where that is meant, cast alike in the loss that it is compared with, or allow it "
    "with rounding_rtol",
)
