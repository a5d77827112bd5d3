"""One leaf that an update moves otherwise than its reference, and what to ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import coefficient
from gradtest._src.lifting import widen
from gradtest._src.optimisers.training import Both, Trajectory, increments
from gradtest._src.optimisers.trees import Run

# How closely a supposition must meet the numbers, relative to them.
FIT = 1e-5
# Decays of moments that are often used, beside those found in the two programs.
USUAL_DECAYS = (0.9, 0.99, 0.999, 0.95, 0.98, 0.8)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One leaf at its first wrong step, and all that its cause is read from.

    Attributes:
      both: The transformation and its reference.
      usual: The run with gradients of their own size.
      run: The run that is told of.
      claimed: By how much the transformation moves each leaf in each step.
      true: The same of the reference.
      place: The leaf's place among those that are checked.
      step: The wrong step, from 0.
      known: What was found out for other leaves of the check.
    """

    both: Both
    usual: Run
    run: Run
    claimed: Trajectory
    true: Trajectory
    place: int
    step: int
    known: dict[Any, Any]

    @property
    def is_elsewhere(self) -> bool:
        """Whether it shows at gradients of another size than the user's alone."""
        return self.run is not self.usual

    def gradient(self, step: int) -> np.ndarray:
        """Returns the leaf's gradient at a step."""
        return np.asarray(
            widen(self.run.grads[step][self.both.start.checked[self.place]])
        )

    def usual_size(self) -> float:
        """Returns how large the leaf's gradients are at the user's own size."""
        place = self.both.start.checked[self.place]
        first = np.abs(np.asarray(widen(self.usual.grads[0][place])))
        return float(first.max()) if first.size else 0.0

    @property
    def fit(self) -> float:
        """How closely a supposition must meet the reference to explain the gap."""
        true = self.true[self.step][self.place]
        gap = norm(self.claimed[self.step][self.place] - true)
        return min(FIT, gap / norm(true) / 10) if norm(true) else FIT

    def param(self) -> np.ndarray:
        """Returns where the leaf begins."""
        place = self.both.start.checked[self.place]
        return np.asarray(widen(self.both.start.params.values[place]))

    def ask(self, what: str, params: Sequence[Any], grads: Sequence[Any]) -> Trajectory:
        """Returns the steps that `what` ("claimed" or "true") makes elsewhere."""
        found = getattr(self.both, what)(params, grads)
        return increments([params[i] for i in self.both.start.checked], found)

    def remember(self, key: Any, find: Callable[[], Any]) -> Any:
        """Returns what was found out before, or finds it."""
        if (id(self.run), key) not in self.known:
            self.known[id(self.run), key] = find()
        return self.known[id(self.run), key]


def ratio_of(claimed: np.ndarray, true: np.ndarray, fit: float = FIT) -> float | None:
    """Returns the one factor between two arrays; None where there is none."""
    ratio = coefficient(claimed, true)
    if not ratio or norm(claimed - ratio * true) > fit * norm(claimed):
        return None
    return ratio


def agrees(one: np.ndarray, other: np.ndarray, fit: float = FIT) -> bool:
    """Whether two arrays are one, so far as `fit` tells."""
    return norm(one - other) <= fit * norm(other)


def decays_of(wrong: Wrong) -> list[float]:
    """Returns the numbers of both programs that may be a moment's decay."""
    numbers = [
        float(f"{abs(number):.7g}") for some in wrong.both.numbers for number in some
    ]
    return [n for n in dict.fromkeys(numbers) if 0.3 < n < 1]
