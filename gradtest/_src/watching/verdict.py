"""What the numbers of a screen say: a pass, or a reason to look closer."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src.case import NOISE_FLOOR
from gradtest._src.confirmation import relative
from gradtest._src.differences import SWAMPED
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.primal import DIRECT_RESIDUAL, ITERATIVE_RESIDUAL
from gradtest._src.rounding import allowance, floor
from gradtest._src.watching.programs import Numbers
from gradtest._src.watching.screen import Screen, broken_leaves

# A slope of all leaves is the gradient's where it is as near as this part of its size.
_SLOPE = 1e-5
# A gap may come to so many times what a whole check has explained, and the slope along
# a direction of all leaves to so many times the largest such gap.
_EXPLAINED, _EXPLAINED_SLOPE = 2.0, 4.0

# The reason that speaks of no leaf.
SLOPE = "the slope along one direction"
_APPROXIMATE = "a gap as a whole check has explained before"


@dataclasses.dataclass
class Explained:
    """What whole checks have found to be no mistake, leaf by leaf.

    Attributes:
      gaps: Relative formula gaps.
      rounding: Relative rounding gaps.
      kinks: Whether the leaf's gradient was at a kink.
    """

    gaps: np.ndarray
    rounding: np.ndarray
    kinks: np.ndarray

    @classmethod
    def nothing(cls, count: int) -> Explained:
        """Returns that nothing was explained of so many leaves."""
        return cls(np.zeros(count), np.zeros(count), np.zeros(count, bool))


@dataclasses.dataclass(frozen=True)
class Reading:
    """A screen's numbers, judged.

    Attributes:
      findings: One for each leaf, as of a pass.
      reasons: Why a closer look is needed, the leaf first; empty where none is.
      at_kink: Positions of the leaves whose gap a kink may explain, if that is all.
      trouble: Why nothing can be said at this point.
      notes: What else is to be known.
    """

    findings: list[Finding]
    reasons: list[str]
    at_kink: tuple[int, ...] = ()
    trouble: Finding | None = None
    notes: tuple[str, ...] = ()


def read(
    numbers: Numbers, screen: Screen, known: Explained, rounding_rtol: float | None
) -> Reading:
    """Judges the numbers of a screen.

    Args:
      numbers: As the screen returned them.
      screen: What they are of.
      known: What whole checks have explained.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
    """
    trouble = _trouble(numbers, screen)
    if trouble is not None:
        return Reading([], [], trouble=trouble)
    rounding = rounding_gaps(numbers, screen, rounding_rtol)
    reasons = _not_finite(numbers, screen)
    parted, notes = _formula(numbers, screen, known)
    slope_off, blind = _slope(numbers, known)
    kinks = tuple(i for i in parted if known.kinks[i])
    others = [i for i in parted if i not in kinks]
    names = [leaf.name for leaf in screen.leaves]
    reasons += [f"{names[i]}: the formula" for i in others]
    gaps, allowed = rounding
    for i in np.flatnonzero(~(gaps <= allowed)):
        if not gaps[i] <= _EXPLAINED * known.rounding[i]:
            reasons.append(f"{names[i]}: the rounding")
    if bool(numbers["values off"]):
        reasons.append("the value")
    if _residual_off(numbers):
        reasons.append("a linear solver")
    judges_alone = "gap" not in numbers and not screen.shares_exact
    judges_alone |= bool(numbers.get("open", np.zeros(1, bool)).any())
    if slope_off or (blind and judges_alone):
        reasons.append(SLOPE)
    if blind and not judges_alone and not slope_off:
        notes.append("the slope along this direction could not be measured")
    findings = _findings(numbers, screen, known, rounding)
    return Reading(findings, reasons, kinks, None, tuple(notes))


def _trouble(numbers: Numbers, screen: Screen) -> Finding | None:
    """Says so where a parameter, or the loss itself, is not finite."""
    broken = np.flatnonzero(~numbers["moving finite"])
    if broken.size:
        return broken_leaves([screen.leaves[i] for i in broken])
    lifted = all(np.isfinite(value).all() for value in numbers["values"])
    if lifted and bool(numbers["own values finite"]):
        return None
    where = "in its own precision" if lifted else "here, in float64 as well"
    cause = Cause(
        "not finite",
        f"the loss is NaN or infinite {where}, with finite parameters",
        "look at this batch, and at what overflows: a log, a division, an exp",
    )
    return Finding("its value", (), "", Verdict.INCONCLUSIVE, Gap.REACH, cause=cause)


def _not_finite(numbers: Numbers, screen: Screen) -> list[str]:
    whole = numbers["claimed finite"] & numbers["own finite"]
    return [f"{screen.leaves[i].name}: not finite" for i in np.flatnonzero(~whole)]


def _formula(
    numbers: Numbers, screen: Screen, known: Explained
) -> tuple[list[int], list[str]]:
    """Returns the leaves whose gap nothing explains, and notes on those explained."""
    if "gap" not in numbers:
        return [], []
    limits = _EXPLAINED * known.gaps
    exceeded = np.flatnonzero(numbers["exceeded"])
    parted = [int(i) for i in exceeded if not numbers["gap"][i] <= limits[i]]
    names = [screen.leaves[i].name for i in exceeded if i not in parted]
    if not names:
        return parted, []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return parted, [f"{', '.join(names[:3])}{more}: {_APPROXIMATE}"]


def _slope(numbers: Numbers, known: Explained) -> tuple[bool, bool]:
    """Returns whether a slope is not the gradient's, and whether it can't tell."""
    if "slope off" not in numbers:
        return False, False
    scale, error = float(numbers["slope scale"]), float(numbers["slope error"])
    off = float(numbers["slope off"])
    blind = not 3 * error <= SWAMPED * scale
    part = _SLOPE + _EXPLAINED_SLOPE * float(np.max(known.gaps, initial=0.0))
    return not blind and not off <= part * scale + 3 * error, blind


def _residual_off(numbers: Numbers) -> bool:
    residual = numbers["residual"]
    if residual is None:
        return False
    limits = [DIRECT_RESIDUAL, ITERATIVE_RESIDUAL]
    return not all(
        found <= limit
        for found, limit in zip(residual, [*limits, *limits], strict=True)
    )


def rounding_gaps(
    numbers: Numbers, screen: Screen, rounding_rtol: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each leaf loses in working precision, and what it may: relative."""
    count = len(screen.leaves)
    if screen.shares_exact:  # it rounds as the rule-free gradient does: it is that
        return np.zeros(count), np.ones(count)
    norms, sizes = numbers["norm"], numbers["size"]
    loss = np.where(np.isfinite(numbers["loss"]), numbers["loss"], np.inf)
    eps = screen.working_eps
    relative = rounding_rtol or floor(eps, screen.products)
    parts = norms * sizes
    largest = float(np.max(parts, initial=0.0))
    allowed = relative * norms
    cancels = parts < NOISE_FLOOR * largest
    allowed = allowed + np.where(cancels, 4 * eps * largest / sizes, 0.0)
    if screen.why_no_exact and rounding_rtol is None:
        allowed = np.maximum(allowed, eps**0.5 * norms)
    if numbers["plain loss"] is not None and rounding_rtol is None:
        allowed = np.maximum(allowed, _measured(numbers))
    units = np.where(cancels, largest / sizes, norms)
    units = np.where(units > 0, units, 1.0)
    return loss / units, allowed / units


def _measured(numbers: Numbers) -> np.ndarray:
    """Returns what the claim may lose where the rule-free gradient loses as much."""
    losses = np.where(np.isfinite(numbers["plain loss"]), numbers["plain loss"], 0.0)
    norms = numbers["plain norm"]
    parts = (losses / np.where(norms > 0, norms, 1.0))[norms > 0]
    usual = float(np.median(parts)) if parts.size else 0.0
    return np.array(
        [
            allowance(float(loss), usual, float(scale))
            for loss, scale in zip(losses, numbers["norm"], strict=True)
        ]
    )


def _findings(
    numbers: Numbers,
    screen: Screen,
    known: Explained,
    rounding: tuple[np.ndarray, np.ndarray],
) -> list[Finding]:
    found = []
    gaps, limits = rounding
    limits = np.maximum(limits, _EXPLAINED * known.rounding)
    for i, leaf in enumerate(screen.leaves):
        own = None
        if not screen.shares_exact:
            own = float(gaps[i]), float(limits[i])
        size, allowed = _formula_gap(numbers, i)
        allowed = max(allowed, float(_EXPLAINED * known.gaps[i]))
        found.append(
            Finding(
                leaf.name,
                leaf.shape,
                np.dtype(leaf.dtype).name,
                Verdict.PASS,
                size=size,
                allowed=allowed,
                rounding=own,
                judged_by="exact" if "gap" in numbers else "measured",
            )
        )
    return found


def _formula_gap(numbers: Numbers, i: int) -> tuple[float, float]:
    """Returns a leaf's gap and its allowance, of the exact gradient or of a slope."""
    if "gap" in numbers:
        return float(numbers["gap"][i]), float(numbers["allowed"][i])
    if "slope off" not in numbers:
        return 0.0, np.inf
    scale = float(numbers["slope scale"])
    allowed = _SLOPE * scale + 3 * float(numbers["slope error"])
    part = float(numbers["slope parts"][i])
    return relative(float(numbers["slope off"]), allowed, part, scale)
