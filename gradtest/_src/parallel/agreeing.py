"""Causes where all devices hold one gradient, and it is wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradtest._src import diagnose
from gradtest._src.findings import Cause
from gradtest._src.parallel.axis_factors import AxisPower, power_of_axes, times
from gradtest._src.parallel.leaf import Leaf


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
        _remedy(power, bool(is_summed), len(leaf.by_device) > 1),
    )


def _remedy(power: AxisPower, is_summed: bool, is_replicated: bool) -> str:
    if power.factor < 1:
        return (
            "divide once only: take lax.psum of gradients that are divided already, or "
            f"multiply by {1 / power.factor:.6g}"
        )
    if is_summed:
        return (
            f"drop the pmean or psum of the gradient and divide by {power.size}; or "
            f"differentiate lax.pmean(loss, {power.argument}) and reduce nothing after"
        )
    if is_replicated:
        return (
            f"take lax.pmean(gradients, {power.argument}) once, or divide by "
            f"{power.factor:.6g}"
        )
    return (
        f"divide by {power.factor:.6g}: look for a sum where a mean is, and for a "
        "lax.psum that is differentiated under check_vma=False, where its transpose "
        "is a psum again"
    )


def _mean_of_parts(leaf: Leaf) -> Cause | None:
    """Parts that weigh differently were averaged as if they weighed alike."""
    for count in _counts(leaf):
        gradients = leaf.partial(count)
        if not gradients:
            continue
        # A part with nothing in it divides by zero, and a step guards against that.
        mean = np.mean(np.nan_to_num(gradients), axis=0)
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
        "count alike: each part has its own number of rows or of unmasked entries, its "
        "own statistics, or its own draw of a random key",
        "use the whole batch's: lax.psum(sum, axis) / lax.psum(count, axis) over "
        f"{_named(leaf, count)}; give a batch normalisation its axis_name; draw what "
        "is random for the whole batch",
    )


def _lost_part(leaf: Leaf) -> Cause | None:
    """One part of the batch is missing from the sum."""
    for count in _counts(leaf):
        gradients = leaf.partial(count)
        if not gradients or count < 3:
            continue
        total = np.sum(gradients, axis=0)
        for k, gradient in enumerate(gradients):
            rest = total - gradient
            scales = (1.0, 1 / count, 1 / (count - 1))
            if any(leaf.fits(leaf.by_device[0], scale * rest) for scale in scales):
                return Cause(
                    "part left out",
                    f"it is the gradient of all parts of the batch but number {k} of "
                    f"{count} (counted from 0)",
                    "look for a mask, a condition or a device that drops this part "
                    "before the reduction",
                )
    return None


def _dropped_rows(leaf: Leaf) -> Cause | None:
    """The rows that do not divide were left out."""
    if leaf.parts is None:
        return None
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


def _counts(leaf: Leaf) -> list[int]:
    """Into how many parts a batch may have been cut."""
    sizes = list(leaf.layout.axes.values())
    return list(dict.fromkeys([*sizes, leaf.layout.size, len(leaf.by_device)]))


def _named(leaf: Leaf, count: int) -> str:
    names = leaf.layout.of_size(count) or list(leaf.layout.spanning(count))
    return " or ".join(map(repr, names)) or "the devices' axis"


AGREEING: tuple[Callable[[Leaf], Cause | None], ...] = (
    _axis_factor,
    _one_part,
    _mean_of_parts,
    _lost_part,
    _dropped_rows,
)
