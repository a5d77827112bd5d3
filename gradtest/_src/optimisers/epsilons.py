"""Where an epsilon stands, read from updates at gradients of very different sizes."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src.case import norm
from gradtest._src.findings import Cause

# How closely the entries must follow one of the two forms.
_FIT = 1e-3
_FEWEST = 3
# An epsilon is below this part of the usual gradients.
_FAR = 1e-2
# How much of a gap two epsilons may leave unexplained.
_MOST_LEFT = 0.05
_OUTSIDE, _INSIDE = "outside of", "inside of"
_REMEDY = (
    "let the epsilon stand where the reference has it; if so small gradients are of no "
    "concern, hand over `scales=(1.0,)`"
)


def cause(
    claimed: np.ndarray, true: np.ndarray, gradient: np.ndarray, usual: float
) -> Cause:
    """Returns what the first updates of two scaled gradients say of their epsilons.

    Args:
      claimed: The first update under test.
      true: The reference's.
      gradient: The gradient that both scale.
      usual: How large the user's own gradients are.
    """
    with np.errstate(all="ignore"):
        own, wanted = _form(claimed, gradient), _form(true, gradient)
        if own is None or wanted is None:
            known = False
        else:
            known = _explains(own, wanted, claimed - true, gradient, usual)
    if not known or own is None or wanted is None:
        return Cause(
            "epsilon",
            "at gradients of the user's size the two agree: an epsilon, a floor or a "
            "threshold for small numbers is another",
            _REMEDY,
            0.75,
        )
    if own.where != wanted.where:
        return Cause(
            "epsilon elsewhere",
            f"the epsilon ({own.epsilon:.1e}) stands {own.where} the square root, the "
            f"reference's ({wanted.epsilon:.1e}) {wanted.where} it",
            _REMEDY,
            0.97,
        )
    return Cause(
        "another epsilon",
        f"the epsilon is {own.epsilon:.3g}, the reference's {wanted.epsilon:.3g}, both "
        f"{own.where} the square root",
        _REMEDY,
        0.95,
    )


@dataclasses.dataclass(frozen=True)
class _Form:
    """The update rate * g / (|g| + e), or rate * g / sqrt(g^2 + e).

    The epsilon is relative to the factor of g^2 under the root: that of a moment
    without bias correction seems larger.
    """

    where: str
    epsilon: float
    rate: float

    def update(self, gradient: np.ndarray) -> np.ndarray:
        """Returns the size of the update."""
        size = np.abs(gradient)
        if self.where == _OUTSIDE:
            return np.asarray(self.rate * size / (size + self.epsilon))
        return np.asarray(self.rate * size / np.sqrt(size**2 + self.epsilon))

    def is_small(self, usual: float) -> bool:
        """Whether the epsilon is far below usual gradients."""
        reach = self.epsilon if self.where == _OUTSIDE else self.epsilon**0.5
        return reach < _FAR * usual


def _explains(
    own: _Form, wanted: _Form, gap: np.ndarray, gradient: np.ndarray, usual: float
) -> bool:
    """Whether two forms of one rate, and small epsilons, make the gap."""
    if abs(own.rate / wanted.rate - 1) > _FIT:
        return False
    if not own.is_small(usual) or not wanted.is_small(usual):
        return False
    made = dataclasses.replace(own, rate=wanted.rate).update(gradient)
    rest = np.abs(made - wanted.update(gradient)) - np.abs(gap)
    return bool(norm(rest) <= _MOST_LEFT * norm(gap))


def _form(update: np.ndarray, gradient: np.ndarray) -> _Form | None:
    """Returns the form that an update has; None where it has neither."""
    size, moved = np.abs(gradient).ravel(), np.abs(update).ravel()
    known = (size > 0) & (moved > 0) & np.isfinite(moved)
    if np.unique(size[known]).size < _FEWEST:
        return None
    size, quotient = size[known], size[known] / moved[known]
    best: tuple[float, _Form] | None = None
    for where, power in ((_OUTSIDE, 1), (_INSIDE, 2)):
        found = _line(size**power, quotient**power)
        if found is not None and (best is None or found[0] < best[0]):
            rest, slope, epsilon = found
            best = rest, _Form(where, epsilon, slope ** (-1 / power))
    return None if best is None or best[0] > _FIT else best[1]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    """Fits y = a (x + e) entry by entry; returns the relative rest, a and e."""
    rows = np.stack([x, np.ones_like(x)], axis=1) / y[:, None]
    unit = np.abs(rows).max(axis=0)
    (slope, offset), *_ = np.linalg.lstsq(rows / unit, np.ones_like(y), rcond=None)
    slope, offset = slope / unit[0], offset / unit[1]
    if not slope > 0 or not offset > 0:
        return None
    rest = np.abs(rows @ np.array([slope, offset]) - 1).max()
    return float(rest), float(slope), float(offset / slope)
