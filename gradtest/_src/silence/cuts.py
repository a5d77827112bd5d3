"""The steps at which the gradient on its way to a leaf becomes zero."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.localise.steps import Constant, Step
from gradtest._src.silence.observed import Observed, Seen
from gradtest._src.silence.signals import Level

# The derivative of these is zero wherever there is one.
FLAT = frozenset({jaxprs.STOP_GRADIENT, "ceil", "floor", "round", "sign"})


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A step with a gradient at its results, and none at an operand.

    Attributes:
      level: The program that it stands in.
      number: The step's number there.
      operand: The place of the operand.
      entries: How many entries of its results the leaf takes part in.
      alive: How many entries of each operand are not zero where a gradient arrives.
      is_whole: Whether no other operand hands the leaf a gradient either.
    """

    level: Level
    number: int
    operand: int
    entries: int
    alive: dict[int, int]
    is_whole: bool

    @property
    def step(self) -> Step:
        """The step."""
        return self.level.steps.steps[self.number]

    @property
    def is_flat(self) -> bool:
        """Whether the step has no derivative anywhere."""
        return self.step.name in FLAT


@dataclasses.dataclass(frozen=True, eq=False)
class Cancelled:
    """A value whose uses hand it gradients that add up to exactly zero."""

    value: Seen


def cuts(observed: Observed) -> list[Cut]:
    """Returns the cuts that tell most, the nearest to the leaf first.

    A way that ends at a step by which another goes on (the branch of a `where` that
    guards against overflow) tells nothing where others end for good; nor does a
    `stop_gradient`, which softmax and norms have inside.
    """
    found = _all_cuts(observed)
    gates = [cut for cut in found if is_gate(observed, cut)]
    whole = [cut for cut in found if cut.is_whole and not cut.is_flat]
    if gates and all(_is_of_slope_zero(observed, cut) for cut in whole):
        return gates
    flat = [cut for cut in found if cut.is_whole]
    return whole or flat or found


def _is_dead(observed: Observed, cut: Cut) -> bool:
    """Whether a step is a ReLU with nothing above zero.

    At a tie `max` hands on one half where the rule of `relu` hands on nothing; dropout
    before it makes such ties.
    """
    if cut.step.name != "max" or len(cut.step.operands) != 2:
        return False
    other = Seen(cut.level, cut.step.operands[1 - cut.operand])
    _, high = observed.operand_range(cut.level, cut.number, cut.operand)
    return observed.constant(other) == 0 >= high


def cuts_all(observed: Observed, cut: Cut, leaf: int) -> bool:
    """Whether every way from a leaf to the loss goes through a cut operand.

    Args:
      observed: The program.
      cut: The cut.
      leaf: The number of the leaf among the program's inputs.
    """
    if cut.level is not observed.root:
        return False
    steps = observed.root.steps
    reached = {steps.inputs[leaf]}
    for i, step in enumerate(steps.steps):
        taken = [
            atom
            for k, atom in enumerate(step.operands)
            if not isinstance(atom, Constant) and (i, k) != (cut.number, cut.operand)
        ]
        if not reached.isdisjoint(taken):
            reached.update(slot for slot in step.results if steps.is_floating(slot))
    return all(
        isinstance(atom, Constant) or atom not in reached for atom in steps.outputs
    )


def _all_cuts(observed: Observed) -> list[Cut]:
    steps = observed.readings.steps
    dead: list[tuple[Any, Cut]] = []
    for path in sorted(steps):
        reading = steps[path]
        if not int(reading["arriving"]):
            continue
        level = observed.root.level_at(path[:-1])
        reaching = {k: int(n) for k, n in reading["reaching"].items() if int(n)}
        passed = {k: int(reading["passed"].get(k, 0)) for k in reaching}
        alive = {k: int(n) for k, n in reading["alive"].items()}
        whole = not any(passed.values())
        for k in reaching:
            cut = Cut(level, path[-1], k, int(reading["seen"]), alive, whole)
            if not passed[k] or _is_dead(observed, cut):
                dead.append((path, dataclasses.replace(
                    cut, is_whole=whole or bool(passed[k]))))  # fmt: skip
    return [
        cut for path, cut in dead
        if path[-1] not in cut.level.inner
        or not any(other[: len(path)] == path and other != path for other, _ in dead)
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """A condition on a value that is cut off, or that what is cut off is made of.

    Attributes:
      limit: The number that the value is compared with.
      low: The value's smallest entry.
      high: Its largest.
    """

    limit: float
    low: float
    high: float


def gate_of(observed: Observed, cut: Cut) -> Gate | None:
    """Returns the condition by which a step cuts its operand off, if that is known."""
    operands = observed.operands(cut.level, cut.step)
    if cut.step.name == "select_n" and cut.operand:
        mask = operands[0]
    elif cut.step.name == "mul":
        mask = operands[1 - cut.operand]
    else:
        return None
    own = operands[cut.operand]
    comparison = observed.comparison(mask)
    step = observed.maker(comparison) if comparison is not None else None
    if comparison is None or step is None:
        return None
    sides = observed.operands(comparison.level, step)
    for side, other in (sides, reversed(sides)):
        limit = observed.constant(other)
        if limit is None or not _made_of(observed, own, side):
            continue
        if observed.are_same(own, side):
            low, high = observed.operand_range(cut.level, cut.number, cut.operand)
        else:
            low, high = observed.range(side)
        return Gate(limit, low, high)
    return None


def _made_of(observed: Observed, made: Seen, value: Seen, depth: int = 3) -> bool:
    """Whether a value is another one, or computed of it in a few steps."""
    if observed.are_same(made, value):
        return True
    step = observed.maker(observed.settled(made))
    if step is None or not depth:
        return False
    level = observed.settled(made).level
    operands = observed.operands(level, step)
    return any(_made_of(observed, each, value, depth - 1) for each in operands)


def is_gate(observed: Observed, cut: Cut) -> bool:
    """Whether a cut is a `where` that asks for the sign of what it cuts off."""
    gate = gate_of(observed, cut) if cut.step.name == "select_n" else None
    return gate is not None and gate.limit == 0 >= gate.high


def _is_of_slope_zero(observed: Observed, cut: Cut) -> bool:
    """Whether a cut multiplies by a zero that is written into the program."""
    operands = observed.operands(cut.level, cut.step)
    return cut.step.name == "mul" and any(
        isinstance(observed.settled(each).atom, Constant) and observed.is_zero(each)
        for each in operands
    )


def cancellations(observed: Observed) -> list[Cancelled]:
    """Returns the values at which gradients cancel, the nearest to the loss first."""
    found = []
    for path in sorted(observed.readings.slots, reverse=True):
        noted = observed.readings.slots[path]
        if int(noted.get("given", 0)) and not int(noted["total"]):
            level = observed.root.level_at(path[:-1])
            found.append(Cancelled(Seen(level, path[-1])))
    return found


def amount(observed: Observed, cut: Cut) -> str:
    """Says how much is cut off: units, where the last axis has them."""
    shape = observed.shape(Seen(cut.level, cut.step.results[0]))
    size = math.prod(shape)
    if cut.entries == size and len(shape) >= 2 and shape[-1] > 1:
        return f"all {shape[-1]} units"
    if cut.entries < size and cut.level.path == ():
        return f"all {cut.entries} entries that it reaches"
    return "the only entry" if size == 1 else f"all {size} entries"
