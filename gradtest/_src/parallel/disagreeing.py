"""Causes where devices hold different gradients: one small function for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnose import factor_between
from gradtest._src.findings import Cause
from gradtest._src.parallel.axis_factors import power_of_axes, times
from gradtest._src.parallel.leaf import Leaf

# How many devices are named one by one.
_NAMED = 4


def _reduced_too_little(leaf: Leaf) -> Cause | None:
    """Each device has its own part's gradient: nothing, or too little, was reduced."""
    mean, size = _reduced(leaf)
    says = f"the {len(leaf.by_device)} devices disagree: each holds another gradient"
    for found, reduction, what in (
        (mean, "pmean", "mean"),
        (size * mean, "psum", "sum"),
    ):
        if leaf.fits(found, leaf.truth):
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


def _reduced(leaf: Leaf) -> tuple[np.ndarray, int]:
    """Returns the mean over the axes that disagree, and how many devices these have."""
    rows = np.asarray(leaf.by_device)
    names = leaf.layout.spanning(len(rows))
    if not leaf.axes:
        return rows.mean(axis=0), len(rows)
    sizes = [leaf.layout.axes[name] for name in names]
    grid = rows.reshape(*sizes, *leaf.truth.shape)
    over = tuple(names.index(name) for name in leaf.axes)
    mean = grid.mean(axis=over)
    for _ in range(len(sizes) - len(over)):
        mean = mean[0]  # alike along the axes that are left
    return mean, math.prod(sizes[axis] for axis in over)


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


def some_devices(leaf: Leaf) -> Cause | None:
    """Some devices are right, others are not."""
    is_right = [leaf.fits(value, leaf.truth) for value in leaf.by_device]
    wrong = [device for device, right in enumerate(is_right) if not right]
    count = len(is_right)
    if not 0 < len(wrong) < count:
        return None
    value = leaf.by_device[wrong[0]]
    ratio = factor_between(value, leaf.truth)
    how = ""
    if ratio is not None and leaf.fits(value, ratio * leaf.truth):
        where = "there" if len(wrong) == 1 else f"on device {wrong[0]}"
        how = f": {where} it is {times(ratio)}"
    if len(wrong) <= count // 2:
        says = f"{_devices(wrong)} of {count} (counted from 0) "
        says += f"{'is' if len(wrong) == 1 else 'are'} wrong, the others are right"
    else:
        right = [device for device, fits in enumerate(is_right) if fits]
        says = f"{_devices(right)} of {count} (counted from 0) alone "
        says += f"{'is' if len(right) == 1 else 'are'} right, the others are wrong"
    return Cause(
        "wrong on some devices",
        says + how,
        "look for what depends on the device: axis_index, an uneven or empty part, a "
        "key or mask of its own",
    )


def _devices(places: Sequence[int]) -> str:
    named = ", ".join(map(str, places[:_NAMED]))
    if len(places) == 1:
        return f"device {named}"
    more = f" and {len(places) - _NAMED} more" * (len(places) > _NAMED)
    return f"devices {named}{more}"


def _disagree(leaf: Leaf) -> Cause:
    return Cause(
        "devices disagree",
        f"the {len(leaf.by_device)} devices hold gradients that differ by up to "
        f"{_spread(leaf):.3g} of the true one's norm, and neither their mean nor their "
        "sum is the full batch's",
        f"reduce every gradient over {leaf.over()}, once, and see that each row of the "
        "batch counts alike",
    )


def differ(leaf: Leaf) -> Cause:
    return Cause(
        "devices disagree",
        f"the {len(leaf.by_device)} devices hold gradients that differ by up to "
        f"{_spread(leaf):.3g} of the true one's norm",
        "look for what depends on the device: axis_index, a key or a part of its own",
    )


def _spread(leaf: Leaf) -> float:
    """Returns how far devices are apart, relative to the truth."""
    first = leaf.by_device[0]
    most = max(norm(value - first) for value in leaf.by_device)
    return most / (norm(leaf.truth) or norm(first) or 1.0)


DISAGREEING: tuple[Callable[[Leaf], Cause | None], ...] = (
    _reduced_too_little,
    _own_parts,
    some_devices,
    _disagree,
)
