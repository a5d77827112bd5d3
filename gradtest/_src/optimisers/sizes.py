"""Causes that show as the gradients get smaller: clippings, thresholds and norms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradtest._src.findings import Cause
from gradtest._src.lifting import widen
from gradtest._src.optimisers.training import Trajectory
from gradtest._src.optimisers.wrong import FIT, Wrong, agrees, ratio_of

_SMALLER = 2.0**-10
_REMEDY = (
    "compare the threshold, whether the norm is of a leaf or of the whole tree, and "
    "what is clipped: the gradient or the update"
)


def by_size(wrong: Wrong) -> Iterator[Cause]:
    """What goes away, or changes its factor, at smaller gradients."""
    if not varies(wrong):
        return
    if _agree(wrong):
        yield Cause(
            "threshold",
            "with gradients 1000 times smaller the two agree at every step: what "
            "differs goes with the gradient's size, as a clipping does",
            _REMEDY,
            0.895,
        )
        return
    own, small = (
        _ratios(wrong.claimed, wrong.true, wrong),
        _ratios(*_small(wrong), wrong),
    )
    yield Cause(
        "factor by size",
        f"it is {_words(own)}, ... times the reference's, and {_words(small)}, ... "
        "times with gradients 1000 times smaller: the factor goes with the gradient's "
        "size, as a clipping or a norm makes it",
        _REMEDY,
        0.895,
    )


def varies(wrong: Wrong) -> bool:
    """Whether a gap at the user's own gradients is another at smaller ones."""
    if wrong.is_elsewhere:
        return False
    if _agree(wrong):
        return True
    if wrong.true[0][wrong.place].size < 2:
        return False  # any factor fits one entry
    k = wrong.step
    own = _ratios(wrong.claimed, wrong.true, wrong)[k]
    small = _ratios(*_small(wrong), wrong)[k]
    return own is not None and small is not None and abs(own / small - 1) > 1e-3


def _agree(wrong: Wrong) -> bool:
    claimed, true = _small(wrong)
    i = wrong.place
    moved = any(step[i].any() for step in true)
    pairs = zip(claimed, true, strict=True)
    return moved and all(agrees(c[i], t[i], min(FIT, wrong.fit)) for c, t in pairs)


def _small(wrong: Wrong) -> tuple[Trajectory, Trajectory]:
    def ask() -> tuple[Trajectory, Trajectory]:
        start, floats = wrong.both.start, set(wrong.both.start.grads.floats)
        grads = [
            [widen(g) * _SMALLER if i in floats else g for i, g in enumerate(step)]
            for step in wrong.run.grads
        ]
        params = start.params.values
        return wrong.ask("claimed", params, grads), wrong.ask("true", params, grads)

    found: tuple[Trajectory, Trajectory] = wrong.remember("small", ask)
    return found


def _ratios(claimed: Trajectory, true: Trajectory, wrong: Wrong) -> list[float | None]:
    i = wrong.place
    with np.errstate(all="ignore"):
        pairs = zip(claimed, true, strict=True)
        return [ratio_of(c[i], t[i], 1e-4) for c, t in pairs]


def _words(ratios: list[float | None]) -> str:
    return ", ".join("?" if r is None else f"{r:.4g}" for r in ratios)
