"""Residuals that a rule's backward pass takes for one another."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from gradtest._src import execution
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.localise.scene import relative_gap
from gradtest._src.localise.search import CLOSED
from gradtest._src.localise.steps import Atom, Constant, Slot
from gradtest._src.localise.target import Target

_MOST_PAIRS = 40


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Residuals that make the derivative right, taken for one another.

    Attributes:
      says: What is exchanged.
      slot: The value that is handed over wrongly; -1 where two are exchanged.
    """

    says: str
    slot: Slot


def taken_for_another(target: Target, backward: set[int]) -> Exchange | None:
    """Returns the exchange of residuals that makes a derivative right, if any does.

    Args:
      target: What is wrong.
      backward: The steps of the backward pass, which residuals are handed to.
    """
    for found, rewired in itertools.islice(_exchanges(target, backward), _MOST_PAIRS):
        if _gap(target, rewired) <= CLOSED:
            return found
    return None


def _exchanges(
    target: Target, backward: set[int]
) -> Iterator[tuple[Exchange, Callable[[int, Atom], Atom]]]:
    steps = target.steps
    made_within = {slot for i in backward for slot in steps.steps[i].results}
    seeds = set(steps.inputs[len(steps.inputs) - len(target.seed) :])
    handed = {
        atom
        for i in backward
        for atom in steps.steps[i].operands
        if not isinstance(atom, Constant) and atom not in made_within | seeds
    }
    made = {slot for step in steps.steps for slot in step.results} - made_within
    others = sorted(handed | (set(steps.inputs) - seeds)) + sorted(made - handed)

    def rewire(table: dict[Slot, Slot]) -> Callable[[int, Atom], Atom]:
        def rewired(number: int, atom: Atom) -> Atom:
            if number not in backward or isinstance(atom, Constant):
                return atom
            return table.get(atom, atom)

        return rewired

    def alike(one: Slot, other: Slot) -> bool:
        first, second = steps.types[one], steps.types[other]
        return first.shape == second.shape and first.dtype == second.dtype

    uses = collections.Counter(
        atom
        for i in backward
        for atom in steps.steps[i].operands
        if not isinstance(atom, Constant)
    )
    for one, other in itertools.combinations(sorted(handed), 2):
        # What is used once may as well be exchanged where it is used.
        if alike(one, other) and max(uses[one], uses[other]) > 1:
            both = rewire({one: other, other: one})
            yield Exchange("with two of its residuals exchanged", -1), both
    for one, other in itertools.product(sorted(handed), others):
        if one != other and alike(one, other):
            says = "with another value for this residual"
            yield Exchange(says, one), rewire({one: other})


def _gap(target: Target, rewired: Callable[[int, Atom], Atom]) -> float:
    case = target.case
    moving, held, _ = case.bench.lifted_arguments(target.point)
    assert target.truth is not None
    try:
        with execution.float64():
            found, _ = target.steps.run(
                Evaluator(hoisted=case.bench.lifted_constants(target.point)),
                [*moving, *held, *map(widen, target.seed)],
                rewired=rewired,
            )
            outputs = execution.to_host(found)
    except Exception:  # whatever one value does in another's place
        return float("inf")
    return relative_gap(outputs, target.truth, target.claimed)
