"""Looks for the step of a wrong derivative whose change makes it right.

A change of one result moves the outputs by what cotangents, pulled back to that
result, say; so most edits are ruled out by a few sums. What is left is run, at the
failed point and at another one with another cotangent.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtest._src.inputs import Point
from gradtest._src.localise.affine import affine_steps
from gradtest._src.localise.borrowing import (
    added_term,
    added_terms,
    exchanged_operands,
    factors,
)
from gradtest._src.localise.edits import Edit, plain_edits, times
from gradtest._src.localise.scene import Scene, Stage, relative_gap
from gradtest._src.localise.steps import Atom, Slot

# A gap is closed where it falls to this, or to this part of itself.
CLOSED, CLOSED_PART = 3e-7, 1e-4
# How well sums must agree for an edit to be worth a run.
_AGREE = 1e-5
# Of how many values at hand each step is offered the latest, beside the arguments.
_AT_HAND = 40
# Factors that have a usual reason.
_USUAL = (-1.0, 2.0, 0.5, -2.0, -0.5, 3.0, 1 / 3, 4.0, 0.25, math.pi, 1 / math.pi)
# A suspect of this weight ends the search for less usual edits.
_ENOUGH = 0.4
# How much may be tried, in entries that are computed: one or two seconds of work. It
# is counted, not timed, so that every machine finds the same.
_MOST_WORK, _LEAST_RUN, _LEAST_EDIT = 1e8, 1e5, 3e3


@dataclasses.dataclass(frozen=True)
class Take:
    """A scene, and where it was taken."""

    scene: Scene
    point: Point
    seed: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A step that, changed, gives the right derivative.

    Attributes:
      number: The step's number.
      says: What the change is.
      weight: How usual such a slip is.
      factor: How many times too small the result was, if that is all.
      borrows: The operand that the change replaces, and the value taken for it.
    """

    number: int
    says: str
    weight: float
    factor: float | None = None
    borrows: tuple[Atom, Slot] | None = None


class Search:
    """The search for one wrong step in one claim."""

    def __init__(self, stage: Stage, takes: Sequence[Take]):
        self.stage, self.takes = stage, takes
        self.steps = stage.steps
        self.scene = takes[0].scene
        gap = relative_gap(self.scene.outputs, self.scene.truth, self.scene.outputs)
        self._closed = max(CLOSED, min(CLOSED_PART * gap, 1e-5))
        self._work = 0.0
        entries = sum(value.size for value in self.scene.values.values())
        handed_over = _LEAST_EDIT * len(stage.candidates)
        self._of_a_run = max(float(entries), handed_over, _LEAST_RUN)
        seeds = self.steps.inputs[len(self.steps.inputs) - len(takes[0].seed) :]
        # A derivative is linear in its cotangent, and in all that is made of it.
        self._linear = self.steps.reached_from(seeds) | affine_steps(self.steps)

    def suspects(self) -> list[Suspect]:
        """Returns the steps that an edit proves, the likeliest first, then the last."""
        linear = [n for n in self.stage.candidates if n in self._linear]
        others = [n for n in self.stage.candidates if n not in self._linear]
        found = [
            *self._proved(self._plain, linear),
            *self._proved(self._fitted, linear),
            *self._proved(self._plain, others),
        ]
        if not any(suspect.weight >= _ENOUGH for suspect in found):
            found += self._proved(self._borrowing, [*linear, *others])
        return sorted(found, key=lambda suspect: (-suspect.weight, -suspect.number))

    def _proved(
        self, propose: Callable[[int], Iterator[Edit]], numbers: Sequence[int]
    ) -> Iterator[Suspect]:
        for number in numbers:
            for edit in propose(number):
                size = self.scene.result(self.scene.step(number)).size
                self._work += max(size, _LEAST_EDIT)
                if self._work > _MOST_WORK:
                    return
                if self._is_proof(edit):
                    yield Suspect(
                        number, edit.says, edit.weight, edit.factor, edit.borrows
                    )

    def _is_proof(self, edit: Edit) -> bool:
        """Whether an edit closes the gap, made alone or wherever its expression is."""
        group = self._groups[edit.number]
        if edit.is_general and edit.number == group[0] and self._closes(edit, group):
            return True
        alone = [edit.number]
        return not (edit.is_general and group == alone) and self._closes(edit, alone)

    @functools.cached_property
    def _groups(self) -> dict[int, list[int]]:
        """The candidates that the same expression was traced to, by each of them.

        A function that is mapped over a tree makes one step for each leaf.
        """
        groups: dict[Any, list[int]] = {}
        for number in self.stage.candidates:
            step = self.steps.steps[number]
            groups.setdefault((step.place, step.name), []).append(number)
        return {number: group for group in groups.values() for number in group}

    # --- whether an edit closes the gap ------------------------------------------

    def _closes(self, edit: Edit, numbers: Sequence[int]) -> bool:
        """Whether an edit of some steps closes the gap wherever it was looked at."""
        for take in self.takes:
            shifts = _shifts(edit, numbers, take.scene)
            is_first = take is self.takes[0]
            if shifts is None or (is_first and not self._may_close(shifts)):
                return False
            self._work += self._of_a_run
            outputs = self.stage.outputs(take.point, list(take.seed), shifts)
            scene = take.scene
            if not relative_gap(outputs, scene.truth, scene.outputs) <= self._closed:
                return False
        return True

    def _may_close(self, shifts: Mapping[int, np.ndarray]) -> bool:
        """Whether the sums allow shifts; where the claim is not linear, anything."""
        if not self._linear.issuperset(shifts):
            return True
        for pulled, wanted in zip(self.scene.pulled, self.scene.wanted, strict=True):
            size, total = abs(wanted), 0.0
            for number, shift in shifts.items():
                terms = (pulled[number] * shift).real
                total += float(terms.sum())
                size += float(np.abs(terms).max(initial=0.0))
            if abs(total - wanted) > _AGREE * size:
                return False
        return True

    # --- what edits are proposed -------------------------------------------------

    def _plain(self, number: int) -> Iterator[Edit]:
        """Yields the edits that need nothing but what the step is given."""
        yield from plain_edits(self.scene, number)
        if number not in self._linear:
            yield from (times(number, factor, 0.4) for factor in _USUAL)

    def _fitted(self, number: int) -> Iterator[Edit]:
        """Yields the factor that the sums ask for."""
        group = self._groups[number]
        if number != group[0]:
            return
        results = {n: self.scene.result(self.scene.step(n)) for n in group}
        factor = self._coefficient(results)
        if factor is not None:
            weight = 0.6 if self._is_usual(1 + factor) else 0.35
            is_written = bool(self.scene.step(number).literals)
            yield times(number, 1 + factor, weight + 0.2 * is_written)

    def _borrowing(self, number: int) -> Iterator[Edit]:
        """Yields the edits that take another value of the program."""
        others = self._at_hand(number)
        yield from exchanged_operands(self.scene, number, others, self.stage.describe)
        yield from factors(self.scene, number, others, self.stage.describe)
        if number not in self._linear:
            return
        step = self.scene.step(number)
        for slot in others:
            value = self.scene.values.get(slot)
            if value is None or value.dtype.kind not in "fc" or slot in step.results:
                continue
            for place, added in added_terms(self.scene, step, value):
                coefficient = self._coefficient({number: added})
                if coefficient is not None:
                    weight = 0.5 if self._is_usual(coefficient) else 0.15
                    weight += 0.4 * (slot in self._unused)
                    yield added_term(
                        number,
                        slot,
                        place,
                        coefficient,
                        weight,
                        self.stage.describe(slot),
                    )

    def _coefficient(self, values: Mapping[int, np.ndarray]) -> float | None:
        """Returns how many times values must be added to steps for the gap to close."""
        sums = np.array(
            [
                sum(float(np.sum((pulled[n] * v).real)) for n, v in values.items())
                for pulled in self.scene.pulled
            ]
        )
        wanted = np.array(self.scene.wanted)
        if not np.isfinite(sums).all() or not sums.any():
            return None
        coefficient = float(sums @ wanted / (sums @ sums))
        rest = np.abs(coefficient * sums - wanted).max()
        return coefficient if rest <= _AGREE * np.abs(wanted).max() else None

    def _is_usual(self, factor: float) -> bool:
        """Whether a factor has a usual reason: small, or a size of the arguments'."""
        shapes = [self.steps.types[slot].shape for slot in self.steps.inputs]
        sizes = {n for shape in shapes for n in (*shape, math.prod(shape)) if n > 1}
        known = {1.0, *map(abs, _USUAL)}
        for size in sizes:
            known |= {size, 1 / size, size**0.5, size**-0.5}
        return any(abs(abs(factor) / each - 1) < 1e-5 for each in known)

    @functools.cached_property
    def _unused(self) -> set[Slot]:
        """What users' lines compute, and nothing that is returned depends on."""
        feeding = self.steps.feeding(self.steps.outputs)
        return {
            slot
            for i, step in enumerate(self.steps.steps)
            if i not in feeding and step.place is not None
            for slot in step.results
        }

    def _at_hand(self, number: int) -> list[Slot]:
        """Returns what could be used in a step: arguments, unused and latest values."""
        made = [
            slot
            for step in self.steps.steps[:number]
            for slot in step.results
            if step.place is not None
        ]
        unused = [slot for slot in made if slot in self._unused]
        return list(dict.fromkeys([*self.steps.inputs, *unused, *made[-_AT_HAND:]]))


def _shifts(
    edit: Edit, numbers: Sequence[int], scene: Scene
) -> dict[int, np.ndarray] | None:
    """Returns what an edit adds to each step's result; None where it can't."""
    shifts = {}
    for number in numbers:
        result = scene.result(scene.step(number))
        try:
            value = edit.value(scene, number)
        except (TypeError, ValueError, NotImplementedError, IndexError):
            return None
        if value is None or value.shape != result.shape:
            return None
        shifts[number] = value - result
    moves = any(shift.any() for shift in shifts.values())
    is_finite = all(np.isfinite(shift).all() for shift in shifts.values())
    return shifts if moves and is_finite else None
