"""Pictures of slopes along one direction, at many steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradtest._src.findings import Exhibit
from gradtest._src.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEP_LABEL = "step h along the direction, in units of the leaf's size"


def taylor(ax: Axes, exhibit: Exhibit, *, named: bool = True) -> None:
    """Draws the Taylor remainders of the claimed and the true slope."""
    ladder = exhibit.ladder
    assert ladder is not None
    steps = ladder.steps
    claimed, true = (
        drawing.positive(ladder.remainders),
        drawing.positive(ladder.true_remainders),
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    floor = drawing.positive(ladder.noise * steps)
    _noise(ax, steps, floor)
    for series, power, style, label in (
        (claimed, 1, ":", "∝ h, as of a wrong slope"),
        (true, 2, "-.", "∝ h², as of the right one"),
    ):
        guide = _guide(steps, series, floor, power)
        if guide is not None:
            ax.plot(steps, guide, style, color="#777777", lw=1, label=label)
    if not math.isnan(ladder.true):
        label = "true slope, as measured" if ladder.measured else "true slope"
        ax.plot(steps, true, "o-", color=drawing.TRUE, ms=5, label=label)
    ax.plot(
        steps,
        claimed,
        "s--",
        color=drawing.CLAIMED,
        ms=5,
        mfc="white",
        label="claimed slope",
    )
    ends = [series[np.isfinite(series)] for series in (claimed, true, floor)]
    shown = np.concatenate(ends)
    _frame(ax, steps, shown)
    ax.set_xlabel(_STEP_LABEL)
    ax.set_ylabel("|f(x + hv) − f(x) − h · slope|", **drawing.PLAIN)
    drawing.title(ax, "Taylor remainder", exhibit if named else None)
    drawing.legend(ax, loc="lower right")


def _noise(ax: Axes, steps: np.ndarray, floor: np.ndarray) -> None:
    """Shades what rounding may have made of the values."""
    if not np.isfinite(floor).any():
        return
    low = np.full_like(floor, np.nanmin(floor) * 1e-30)
    ax.fill_between(steps, low, floor, color="#E4E4E4", lw=0, label="rounding noise")


def _frame(ax: Axes, steps: np.ndarray, shown: np.ndarray) -> None:
    """Sets limits with room around what is shown, if anything is."""
    ax.set_xlim(steps.min() / 2, steps.max() * 2)
    if shown.size:
        ax.set_ylim(shown.min() / 10, shown.max() * 10)
    else:
        ax.text(0.5, 0.5, "nothing but zeros", ha="center", transform=ax.transAxes)


def _guide(
    steps: np.ndarray, series: np.ndarray, floor: np.ndarray, power: int
) -> np.ndarray | None:
    """Returns a power of the step beside a series, where that is clear of noise."""
    clear = np.flatnonzero(np.isfinite(series) & ~(series < 10 * floor))
    if not clear.size:
        return None
    i = int(clear[clear.size // 2])
    return 3 * series[i] * (steps / steps[i]) ** power


def steps(ax: Axes, exhibit: Exhibit, *, named: bool = True) -> None:
    """Draws how far central differences are off at each step: the V."""
    ladder = exhibit.ladder
    assert ladder is not None
    known = not math.isnan(ladder.true)
    reference = ladder.true if known else ladder.claimed
    off = drawing.positive(np.abs(ladder.slopes - reference))
    ax.set_xscale("log")
    ax.set_yscale("log")
    noise = drawing.positive(ladder.noise)
    _noise(ax, ladder.steps, noise)
    name = "true" if known else "claimed"
    # A slope that was itself taken for the true one has no place on the axis.
    drawn = np.isfinite(off)
    ax.plot(
        ladder.steps[drawn],
        off[drawn],
        "o-",
        color=drawing.TRUE,
        ms=5,
        label=f"differences − {name} slope",
    )
    gap = abs(ladder.claimed - ladder.true)
    has_gap = gap > 0 and math.isfinite(gap)
    if has_gap:
        ax.axhline(gap, color=drawing.CLAIMED, ls="--", label="claimed − true slope")
    shown = np.concatenate([off[np.isfinite(off)], noise[np.isfinite(noise)]])
    if has_gap:
        shown = np.append(shown, gap)
    _frame(ax, ladder.steps, shown)
    ax.set_xlabel(_STEP_LABEL)
    ax.set_ylabel(f"|slope − {name} slope|", **drawing.PLAIN)
    numbers = f"claimed {ladder.claimed:.6g}"
    if known:
        judge = "measured" if ladder.measured else "true"
        numbers += f", {judge} {ladder.true:.6g}"
    drawing.title(
        ax, f"Differences at each step: {numbers}", exhibit if named else None
    )
    drawing.legend(ax, loc="lower left")
