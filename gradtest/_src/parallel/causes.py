"""What is wrong with a step over several devices: one small function for each cause.

A cause is named only where the numbers fit it: those of each device, those of the full
batch, and the gradients of the batch's parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm
from gradtest._src.devices.copies import Copies
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.parallel.axis_factors import (
    AxisPower,
    factor_between,
    power_of_axes,
    times,
)
from gradtest._src.parallel.layout import Layout
from gradtest._src.parallel.parts import Parts
from gradtest._src.program import Values

# How many devices are named one by one.
_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a wrong gradient, and all that its cause is read from.

    Attributes:
      index: Its place among the leaves that are checked.
      copies: What each device holds.
      truth: The full batch's gradient.
      layout: The devices.
      parts: The gradients of parts of the batch.
      fit: How closely numbers must fit a pattern.
    """

    index: int
    copies: Copies
    truth: np.ndarray
    layout: Layout
    parts: Parts
    fit: float

    def fits(self, found: np.ndarray, pattern: np.ndarray) -> bool:
        """Whether an array is another one, as closely as numbers here can tell."""
        return norm(found - pattern) <= self.fit * norm(pattern) > 0

    @functools.cached_property
    def by_device(self) -> list[np.ndarray]:
        """What each device holds, in the devices' order."""
        held: dict[int, np.ndarray] = {}
        for value, devices in zip(self.copies.values, self.copies.holders, strict=True):
            held |= dict.fromkeys(devices, value)
        return [held[device] for device in sorted(held)]

    @property
    def agrees(self) -> bool:
        """Whether all devices hold the same but for rounding."""
        first = self.by_device[0]
        return all(
            norm(value - first) <= 1e-9 * (norm(first) or 1.0)
            for value in self.copies.values
        )

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices disagree; empty where unknown."""
        names = self.layout.spanning(len(self.by_device))
        if not names:
            return ()
        sizes = [self.layout.axes[name] for name in names]
        rows = np.reshape(self.by_device, (*sizes, -1))
        scale = np.max(np.abs(rows)) or 1.0
        return tuple(
            name
            for axis, name in enumerate(names)
            if np.max(np.abs(rows - np.take(rows, [0], axis))) > 1e-9 * scale
        )

    def over(self) -> str:
        """Names those axes as an argument of a reduction."""
        return " and ".join(map(repr, self.axes)) or "the devices' axis"

    def partial(self, count: int) -> Values | None:
        """Returns this leaf's gradient on each of so many parts of the batch."""
        gradients = self.parts.gradients(count)
        return gradients and [gradient[self.index] for gradient in gradients]


def explain_step(
    case: Case, findings: list[Finding], layout: Layout, parts: Parts
) -> list[Finding]:
    """Names what is wrong with a step, where its numbers tell."""
    return [_explained(case, finding, layout, parts) for finding in findings]


def _explained(case: Case, finding: Finding, layout: Layout, parts: Parts) -> Finding:
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
    gap = norm(copies[index].farthest(truth) - truth)
    if norm(truth):  # a pattern must explain most of the gap to be its cause
        fit = min(fit, gap / norm(truth) / 10)
    if not all(np.isfinite(value).all() for value in copies[index].values):
        return finding
    leaf = Leaf(index, copies[index], truth, layout, parts, fit)
    recognisers = _DISAGREEING if not leaf.agrees else _AGREEING
    for recognise in recognisers:
        cause = recognise(leaf)
        if cause is not None:
            return dataclasses.replace(finding, cause=cause)
    return finding


# --- devices that disagree ----------------------------------------------------------


def _reduced_too_little(leaf: Leaf) -> Cause | None:
    """Each device has its own part's gradient: nothing, or too little, was reduced."""
    total = np.sum(leaf.by_device, axis=0)
    count = len(leaf.by_device)
    mean = total / count
    says = f"the {count} devices disagree: each holds another gradient"
    for found, reduction in ((mean, "pmean"), (total, "psum")):
        if leaf.fits(found, leaf.truth):
            what = {"pmean": "mean", "psum": "sum"}[reduction]
            return Cause(
                "missing reduction",
                f"{says}, and their {what} is the full batch's",
                f"reduce over {leaf.over()}: lax.{reduction}(gradients, "
                f"{_axis_argument(leaf)})",
            )
    power = power_of_axes(mean, leaf.truth, leaf.layout, leaf.fit)
    if power is not None:
        return Cause(
            "missing reduction",
            f"{says}, and their mean is {times(power.factor)} ({power.words})",
            f"reduce over {leaf.over()} and multiply by {1 / power.factor:.6g}",
        )
    return None


def _own_parts(leaf: Leaf) -> Cause | None:
    """Each device has its own part's gradient, and parts do not count alike."""
    count = len(leaf.by_device)
    gradients = leaf.partial(count)
    if not gradients or not all(map(leaf.fits, leaf.by_device, gradients)):
        return None
    return Cause(
        "missing reduction",
        f"the {count} devices disagree: each holds the gradient of its own part of the "
        "batch, and the parts do not count alike: their mean is not the full batch's",
        f"reduce numerator and denominator over {leaf.over()}: lax.psum(gradients of "
        "the sum) / lax.psum(count of what is summed)",
    )


def _axis_argument(leaf: Leaf) -> str:
    if not leaf.axes:
        return "axis_name"
    if len(leaf.axes) == 1:
        return repr(leaf.axes[0])
    return repr(leaf.axes)


def _some_devices(leaf: Leaf) -> Cause | None:
    """Most devices are right."""
    wrong = [
        device
        for device, value in enumerate(leaf.by_device)
        if not leaf.fits(value, leaf.truth)
    ]
    count = len(leaf.by_device)
    if not 0 < len(wrong) < count:
        return None
    value = leaf.by_device[wrong[0]]
    ratio = factor_between(value, leaf.truth)
    how = ""
    if ratio is not None and leaf.fits(value, ratio * leaf.truth):
        how = f": there it is {times(ratio)}"
    named = ", ".join(map(str, wrong[:_NAMED])) + ", …" * (len(wrong) > _NAMED)
    word, verb = ("device", "is") if len(wrong) == 1 else ("devices", "are")
    return Cause(
        "wrong on some devices",
        f"{word} {named} of {count} (counted from 0) {verb} wrong, the others are "
        f"right{how}",
        "look for what depends on the device: axis_index, an uneven or empty part, a "
        "key or mask of its own",
    )


def _disagree(leaf: Leaf) -> Cause:
    count = len(leaf.by_device)
    first = leaf.by_device[0]
    most = max(norm(value - first) for value in leaf.by_device)
    unit = norm(leaf.truth) or norm(first) or 1.0
    return Cause(
        "devices disagree",
        f"the {count} devices hold gradients that differ by up to {most / unit:.3g} of "
        "the true one's norm, and neither their mean nor their sum is the full batch's",
        f"reduce every gradient over {leaf.over()}, once, and see that each row of the "
        "batch counts alike",
    )


# --- devices that agree -------------------------------------------------------------


def _one_part(leaf: Leaf) -> Cause | None:
    """The gradient of one device's part of the batch was returned for all."""
    for count in _counts(leaf):
        for k, gradient in enumerate(leaf.partial(count) or []):
            if leaf.fits(leaf.by_device[0], gradient):
                which = "first" if k == 0 else f"{k}th (counted from 0)"
                return Cause(
                    "missing reduction",
                    f"it is the gradient of the {which} of {count} parts of the batch "
                    "alone: what the other devices computed is lost",
                    f"reduce over {_named(leaf, count)} before one device's result is "
                    "taken for all (check_vma=False does not see that they differ)",
                )
    return None


def _axis_factor(leaf: Leaf) -> Cause | None:
    """A factor that is the size of a mesh axis, or its square."""
    power = power_of_axes(leaf.by_device[0], leaf.truth, leaf.layout, leaf.fit)
    if power is None:
        return None
    is_summed = power.factor > 1 and leaf.layout.checked.intersection(power.names)
    reason = (
        "; under check_vma=True the gradient of a replicated input is already summed "
        "over the axis"
    )
    return Cause(
        "factor of a mesh axis",
        f"it is {times(power.factor)} in {diagnose.all_entries(leaf.truth)}: "
        f"{power.words}" + (reason if is_summed else ""),
        _remedy(power, bool(is_summed)),
    )


def _remedy(power: AxisPower, is_summed: bool) -> str:
    axis = repr(power.names[0] if len(power.names) == 1 else power.names)
    if power.factor < 1:
        return (
            "divide once only: take lax.psum of gradients that are divided already, or "
            f"multiply by {1 / power.factor:.6g}"
        )
    if is_summed:
        return (
            f"drop the pmean or psum of the gradient and divide by {power.size}; or "
            f"differentiate lax.pmean(loss, {axis}) and reduce nothing after"
        )
    return f"take lax.pmean(gradients, {axis}) once, or divide by {power.factor:.6g}"


def _mean_of_parts(leaf: Leaf) -> Cause | None:
    """Parts that weigh differently were averaged as if they weighed alike."""
    for count in _counts(leaf):
        gradients = leaf.partial(count)
        if not gradients:
            continue
        mean = np.mean(gradients, axis=0)
        if leaf.fits(mean, leaf.truth):
            continue  # then this is not what is wrong
        if leaf.fits(leaf.by_device[0], mean):
            return _unequal(leaf, count, "the mean")
        if leaf.fits(leaf.by_device[0], count * mean):
            return _unequal(leaf, count, "the sum")
    return None


def _unequal(leaf: Leaf, count: int, what: str) -> Cause:
    return Cause(
        "mean of unequal means",
        f"it is {what} of the gradients of {count} parts of the batch, which do not "
        "count alike: each part is divided by its own number of rows or of unmasked "
        "entries, or normalised by its own statistics",
        "use the whole batch's: lax.psum(sum, axis) / lax.psum(count, axis) over "
        f"{_named(leaf, count)}, and give a batch normalisation its axis_name",
    )


def _dropped_rows(leaf: Leaf) -> Cause | None:
    """The rows that do not divide were left out."""
    rows = leaf.parts.rows
    for count in _counts(leaf):
        kept = rows - rows % count
        gradient = leaf.parts.first(kept) if kept < rows else None
        if gradient and leaf.fits(leaf.by_device[0], gradient[leaf.index]):
            return Cause(
                "rows dropped",
                f"it is the gradient of the first {kept} of {rows} rows: the batch "
                f"does not divide by {count}, and the rest is left out",
                "pad the batch and mask the padding, or drop the same rows from the "
                "loss",
            )
    return None


# --- what they share ----------------------------------------------------------------


def _counts(leaf: Leaf) -> list[int]:
    """Into how many parts a batch may have been cut."""
    sizes = list(leaf.layout.axes.values())
    return list(dict.fromkeys([*sizes, leaf.layout.size, len(leaf.by_device)]))


def _named(leaf: Leaf, count: int) -> str:
    names = leaf.layout.of_size(count) or list(leaf.layout.spanning(count))
    return " or ".join(map(repr, names)) or "the devices' axis"


_Recogniser = Callable[[Leaf], Cause | None]
_DISAGREEING: tuple[_Recogniser, ...] = (
    _reduced_too_little,
    _own_parts,
    _some_devices,
    _disagree,
)
_AGREEING: tuple[_Recogniser, ...] = (
    _axis_factor,
    _one_part,
    _mean_of_parts,
    _dropped_rows,
)
