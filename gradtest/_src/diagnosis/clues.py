"""All that a cause is read from: the gradients, and what is known around them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradtest._src.case import norm

if TYPE_CHECKING:
    from gradtest._src.diagnosis.questions import Questions

# How closely a gradient must fit a pattern before the pattern is named.
FIT = 1e-4
# So many entries are looked at before a pattern is tried on all of them.
_SAMPLE = 4096
# Numbers that agree to so many digits are taken for one.
_DIGITS = 9
# So many digits of a number are written at the least, and at the most.
_FEWEST_DIGITS, _MOST_DIGITS = 3, 6


@dataclasses.dataclass(frozen=True, eq=False)
class Named:
    """An array and what a message calls it."""

    name: str
    value: np.ndarray


class Effort:
    """How much is left of what may be spent on the causes of one check."""

    def __init__(self, leaves: int = 48, entries: float = 2e7):
        self._leaves, self._entries = leaves, entries

    def spend(self, entries: int) -> bool:
        """Whether one more leaf, of so many entries, may be looked at closely."""
        self._leaves -= 1
        self._entries -= entries
        return self._leaves >= 0 and self._entries >= 0


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What is known around a gradient; every part of it may be empty.

    Attributes:
      names: Names of the leaves, in the order of the gradients.
      arguments: Values of the function's arguments: the leaves first, then what is
        held, as float64, complex128, integers or bools.
      cotangents: What the outputs are weighed with.
      outputs: The values of the function.
      numbers: Numbers that the function has in it, without their signs.
      devices: How many devices take part.
      order: Order of the derivative.
      questions: Evaluates the true derivative elsewhere; None where it can't be asked.
      effort: What may still be spent.
    """

    names: tuple[str, ...] = ()
    arguments: tuple[Named, ...] = ()
    cotangents: tuple[Named, ...] = ()
    outputs: tuple[Named, ...] = ()
    numbers: tuple[float, ...] = ()
    devices: int = 1
    order: int = 1
    questions: Questions | None = None
    effort: Effort = dataclasses.field(default_factory=Effort)

    def name(self, leaf: int) -> str:
        """Names a leaf."""
        return self.names[leaf] if leaf < len(self.names) else "another leaf"


@dataclasses.dataclass(frozen=True, eq=False)
class Clues:
    """One wrong leaf, and everything that its causes are read from.

    Attributes:
      all_claimed: Claimed gradients of all leaves.
      all_true: True gradients of all leaves.
      leaf: Which one to explain.
      rtol: The relative gap that the check allows.
      wanted_fit: How closely a claim must fit a pattern; more than its own rounding.
      scene: What is known around the gradients.
    """

    all_claimed: Sequence[np.ndarray]
    all_true: Sequence[np.ndarray]
    leaf: int
    rtol: float
    wanted_fit: float = FIT
    scene: Scene = dataclasses.field(default_factory=Scene)

    @functools.cached_property
    def claimed(self) -> np.ndarray:
        """The claimed gradient of the leaf."""
        return np.asarray(self.all_claimed[self.leaf])

    @functools.cached_property
    def true(self) -> np.ndarray:
        """The true gradient of the leaf."""
        return np.asarray(self.all_true[self.leaf])

    @functools.cached_property
    def gap(self) -> np.ndarray:
        """Claimed less true."""
        return self.claimed - self.true

    @functools.cached_property
    def fit(self) -> float:
        """How closely a pattern must fit: it must explain most of the gap, too."""
        scale, gap = norm(self.true), norm(self.gap)
        return min(self.wanted_fit, gap / scale / 10) if scale else self.wanted_fit

    @property
    def name(self) -> str:
        """Names the leaf."""
        return self.scene.name(self.leaf)

    def fits(self, found: np.ndarray, pattern: np.ndarray) -> bool:
        """Whether an array is another one, as closely as numbers here can tell."""
        if found.shape != pattern.shape:
            return False
        scale = norm(pattern)
        if not scale > 0 or not np.isfinite(scale):
            return False
        if found.size > 2 * _SAMPLE:
            few, wanted = sample(found), sample(pattern)
            if norm(few - wanted) > 100 * self.fit * max(norm(wanted), scale / 100):
                return False
        return norm(found - pattern) <= self.fit * scale

    def closeness(self, term: np.ndarray) -> float:
        """Returns the part of the gap that a term leaves unexplained."""
        whole = norm(self.gap)
        return norm(self.gap - term) / whole if whole else np.inf

    def explains(self, term: np.ndarray) -> bool:
        """Whether claimed is true with this term added."""
        return norm(self.gap - term) <= self.fit * max(norm(self.true), norm(term))

    @functools.cached_property
    def wrong(self) -> np.ndarray:
        """Which entries are wrong, those aside that a like gap may be noise in."""
        scale = norm(self.true) / max(self.true.size, 1) ** 0.5
        difference = np.abs(self.gap)
        found = difference > 100 * self.rtol * np.abs(self.true) + self._noise * scale
        if not found.any():
            found = difference > difference.max(initial=0.0) / 100
        return found

    @functools.cached_property
    def telling(self) -> np.ndarray:
        """Which entries can tell right from wrong: small ones prove nothing."""
        scale = norm(self.true) / max(self.true.size, 1) ** 0.5
        both = np.maximum(np.abs(self.claimed), np.abs(self.true))
        least = min(100 * self._noise, 0.05) * scale
        return self.wrong | (both > max(least, 1e-9 * both.max(initial=0.0)))

    @property
    def _noise(self) -> float:
        """What may be noise in an entry, relative to the others."""
        return self.rtol if self.wanted_fit <= FIT else self.wanted_fit


def sample(array: np.ndarray) -> np.ndarray:
    """Returns some entries of an array, from all over it, as a vector."""
    flat = array.ravel()
    return flat[:: max(1, flat.size // _SAMPLE)]


def independent(array: np.ndarray) -> int:
    """Returns how many different numbers an array holds, zeros and signs aside."""
    few = np.abs(sample(array))
    few = few[np.isfinite(few)]
    most = few.max(initial=0.0)
    if not most:
        return 0
    return int(np.unique(np.round(few[few > 0] / most, _DIGITS)).size)


def likelihood(closeness: float, entries: int, free: int, tries: float = 1.0) -> float:
    """Returns how unlikely it is that so good a fit is chance, from 0 to 1.

    Args:
      closeness: What the fit leaves unexplained, relative to what it explains.
      entries: How many independent numbers it explains.
      free: How many numbers were chosen to make it fit.
      tries: How many patterns were tried.
    """
    left = max(entries - free, 0)
    chance = tries * min(max(closeness, 1e-12), 1.0) ** left
    return float(np.clip(1 - chance, 0.0, 1.0))


def chance_of_set(count: int, told: int) -> float:
    """Returns the chance to draw one very set of `count` entries among `told`."""
    ways = (
        math.lgamma(told + 1) - math.lgamma(count + 1) - math.lgamma(told - count + 1)
    )
    return math.exp(-min(ways, 700.0))


def unexplained(found: np.ndarray, pattern: np.ndarray) -> float:
    """Returns what a pattern leaves of an array, relative to the pattern."""
    scale = norm(pattern)
    return norm(found - pattern) / scale if scale else np.inf


def written(number: float, rest: float) -> str:
    """Writes a number that was fitted, with no more digits than the fit bears.

    Args:
      number: The number.
      rest: What the fit leaves unexplained, relative to what it explains.
    """
    finest = 10.0**-_MOST_DIGITS
    digits = math.floor(-math.log10(max(rest, finest))) if rest < 1 else 0
    return f"{number:.{max(digits, _FEWEST_DIGITS)}g}"


def times(factor: float, rest: float) -> str:
    """Writes a factor like `written`, but never one that is off 1 as 1."""
    return written(factor, min(rest, abs(abs(factor) - 1) / 100))


def coefficient(found: np.ndarray, pattern: np.ndarray) -> float:
    """Returns the real factor of a pattern that fits an array best."""
    scale = float(np.sum(np.abs(pattern) ** 2))
    if not scale or not np.isfinite(scale):
        return 0.0
    return float(np.sum(found * np.conj(pattern)).real) / scale


def factor_between(found: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the real factor that fits two arrays best; None where there is none."""
    return coefficient(found, truth) or None


def all_entries(array: np.ndarray) -> str:
    """Names all entries of an array."""
    return "its one entry" if array.size == 1 else f"all {array.size} entries"


def spread_over(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns an argument's values at the entries of a leaf; None where none fit.

    Its axes are the leaf's own, or the leaf's first or last ones: one label for each
    row, one weight for each column.
    """
    if value.shape == shape:
        return value
    if value.ndim == 0 or value.size == 1 or value.ndim > len(shape):
        return None
    first = value.reshape(value.shape + (1,) * (len(shape) - value.ndim))
    for candidate in (first, value):
        try:
            return np.broadcast_to(candidate, shape)
        except ValueError:
            continue
    return None
