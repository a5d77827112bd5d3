"""Where an epsilon stands, read from updates at gradients of very different sizes."""

from __future__ import annotations

import numpy as np

from gradtest._src.findings import Cause

# How closely the entries must follow one of the two forms.
_FIT = 1e-3
_FEWEST = 3
_REMEDY = (
    "let the epsilon stand where the reference has it; if so small gradients are of no "
    "concern, hand over `scales=(1.0,)`"
)


def cause(claimed: np.ndarray, true: np.ndarray, gradient: np.ndarray) -> Cause:
    """Returns what the first updates of two scaled gradients say of their epsilons.

    Args:
      claimed: The first update under test.
      true: The reference's.
      gradient: The gradient that both scale.
    """
    with np.errstate(all="ignore"):
        own, wanted = _form(claimed, gradient), _form(true, gradient)
    if (
        own is None
        or wanted is None
        or (abs(own[1] / wanted[1] - 1) < _FIT and own[0] == wanted[0])
    ):
        return Cause(
            "epsilon",
            "at gradients of the user's size the two agree: an epsilon, a floor or a "
            "threshold for small numbers is another",
            _REMEDY,
            0.75,
        )
    if own[0] != wanted[0]:
        return Cause(
            "epsilon elsewhere",
            f"the epsilon ({own[1]:.1e}) stands {own[0]} the square root, the "
            f"reference's ({wanted[1]:.1e}) {wanted[0]} it",
            _REMEDY,
            0.97,
        )
    return Cause(
        "another epsilon",
        f"the epsilon is {own[1]:.3g}, the reference's {wanted[1]:.3g}, both {own[0]} "
        "the square root",
        _REMEDY,
        0.95,
    )


def _form(update: np.ndarray, gradient: np.ndarray) -> tuple[str, float] | None:
    """Returns where the epsilon of c g / (sqrt(g^2 + e) or |g| + e) is, and how large.

    The epsilon is relative to the factor of g^2 under the root: that of a moment
    without bias correction seems larger.
    """
    size, moved = np.abs(gradient).ravel(), np.abs(update).ravel()
    known = (size > 0) & (moved > 0) & np.isfinite(moved)
    if np.unique(size[known]).size < _FEWEST:
        return None
    size, quotient = size[known], size[known] / moved[known]
    best: tuple[float, str, float] | None = None
    for where, power in (("outside of", 1), ("inside of", 2)):
        found = _line(size**power, quotient**power)
        if found is not None and (best is None or found[0] < best[0]):
            best = (found[0], where, found[1])
    return None if best is None or best[0] > _FIT else best[1:]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Fits y = a (x + e) entry by entry; returns the relative rest, and e."""
    rows = np.stack([x, np.ones_like(x)], axis=1) / y[:, None]
    (slope, offset), *_ = np.linalg.lstsq(rows, np.ones_like(y), rcond=None)
    if not slope > 0 or not offset > 0:
        return None
    rest = np.abs(rows @ np.array([slope, offset]) - 1).max()
    return float(rest), float(offset / slope)
