"""What a program's steps were seen to do, and how they are called."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradtest._src.findings import Line
from gradtest._src.inputs import Leaf
from gradtest._src.localise.source import code_at, expression
from gradtest._src.localise.steps import Atom, Constant, Step
from gradtest._src.silence.influence import moves_entries
from gradtest._src.silence.readings import Path, Readings
from gradtest._src.silence.signals import Level

# They keep a value zero where it is zero, and nowhere else.
_KEEPING = frozenset(
    [
        "abs",
        "cbrt",
        "convert_element_type",
        "copy",
        "integer_pow",
        "neg",
        "optimization_barrier",
        "real",
        "reduce_max",
        "reduce_min",
        "reduce_precision",
        "reduce_sum",
        "reduce_window_max",
        "reduce_window_sum",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "tan",
        "tanh",
    ]
)
_COMPARISONS = frozenset({"gt", "ge", "lt", "le"})


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """An operand or a result, inside of one program.

    Attributes:
      level: The program.
      atom: The value.
    """

    level: Level
    atom: Atom

    @property
    def path(self) -> Path:
        """Where its counts are kept."""
        assert not isinstance(self.atom, Constant)
        return (*self.level.path, self.atom)


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """A program at a point, as one leaf sees it.

    Attributes:
      root: The program.
      readings: What was counted.
      leaves: The arguments, in the order of the program's inputs.
    """

    root: Level
    readings: Readings
    leaves: Sequence[Leaf]

    def range(self, seen: Seen) -> tuple[float, float]:
        """Returns the smallest and the largest entry of a value."""
        if isinstance(seen.atom, Constant):
            value = np.asarray(seen.atom.value)
            return float(np.min(value)), float(np.max(value))
        path = seen.path
        low, high = self.readings.lows.get(path), self.readings.highs.get(path)
        return float(np.nan if low is None else low), float(
            np.nan if high is None else high
        )

    def operand_range(self, level: Level, number: int, k: int) -> tuple[float, float]:
        """Returns the range of a step's operand, where the leaf takes part in it."""
        path = (*level.path, number, k)
        if path in self.readings.lows:
            low = float(self.readings.lows[path])
            high = float(self.readings.highs[path])
            if low <= high:
                return low, high
        return self.range(Seen(level, level.steps.steps[number].operands[k]))

    def is_zero(self, seen: Seen) -> bool:
        """Whether every entry of a value is zero."""
        if isinstance(seen.atom, Constant):
            return not np.any(np.asarray(seen.atom.value))
        noted = self.readings.slots.get(seen.path)
        return noted is not None and int(noted["nonzero"]) == 0

    def shape(self, seen: Seen) -> tuple[int, ...]:
        """Returns the shape of a value."""
        if isinstance(seen.atom, Constant):
            return tuple(np.shape(seen.atom.value))
        return tuple(seen.level.steps.types[seen.atom].shape)

    def operands(self, level: Level, step: Step) -> list[Seen]:
        """Returns what a step takes."""
        return [Seen(level, atom) for atom in step.operands]

    def maker(self, seen: Seen) -> Step | None:
        """Returns the step that a value comes from; None of arguments, constants."""
        if isinstance(seen.atom, Constant):
            return None
        return _makers(seen.level).get(seen.atom)

    def outside(self, seen: Seen) -> Seen | None:
        """Returns what a loop or branch was handed for a value that it begins with."""
        level = seen.level
        if len(level.path) < 2 or isinstance(seen.atom, Constant):
            return None
        around = self.root.level_at(level.path[:-2])
        step = around.steps.steps[level.path[-2]]
        position = level.steps.inputs.index(seen.atom) + (step.name == "cond")
        return Seen(around, step.operands[position])

    def leaf(self, seen: Seen) -> Leaf | None:
        """Returns the leaf of the arguments that a value is, if it is one."""
        while seen.level.path:
            is_input = seen.atom in seen.level.steps.inputs
            outside = self.outside(seen) if is_input else None
            if outside is None:
                return None
            seen = outside
        inputs: list[Any] = seen.level.steps.inputs
        return self.leaves[inputs.index(seen.atom)] if seen.atom in inputs else None

    def settled(self, seen: Seen) -> Seen:
        """Returns the value before it was cast, reshaped, broadcast or moved."""
        while True:
            step = self.maker(seen)
            if step is None:
                outside = None
                if seen.atom in seen.level.steps.inputs:
                    outside = self.outside(seen)
                if outside is None:
                    return seen
                seen = outside
            elif step.name in ("convert_element_type", "copy") or (
                moves_entries(step) and step.name != "concatenate" and step.operands
            ):
                seen = Seen(seen.level, step.operands[0])
            else:
                return seen

    def zero_before(self, seen: Seen) -> Seen:
        """Goes back from a value that is zero to the first one that makes it so."""
        while True:
            seen = self.settled(seen)
            step = self.maker(seen)
            if step is None:
                return seen
            operands = self.operands(seen.level, step)
            if step.name in _KEEPING:
                zero = [each for each in operands[:1] if self.is_zero(each)]
            elif step.name in ("mul", "dot_general", "conv_general_dilated"):
                zero = [each for each in operands[:2] if self.is_zero(each)]
            elif step.name == "max":
                zero = [each for each in operands if self.is_zero(each)]
                zero = [z for z in zero if not isinstance(z.atom, Constant)]
            elif step.name in ("div", "gather", "dynamic_slice"):
                zero = [each for each in operands[:1] if self.is_zero(each)]
            elif step.name in ("add", "sub", "add_any"):
                zero = operands if all(map(self.is_zero, operands)) else []
                zero = [z for z in zero if not isinstance(z.atom, Constant)]
            else:
                zero = []
            if not zero:
                return seen
            seen = zero[0]

    def constant(self, seen: Seen) -> float | None:
        """Returns the one number that a value holds, where the program says it."""
        low, high = self.range(seen)
        is_one = isinstance(self.settled(seen).atom, Constant) and low == high
        return low if is_one else None

    def are_same(self, one: Seen, other: Seen, depth: int = 6) -> bool:
        """Whether two values are computed in the same way from the same values."""
        one, other = self.settled(one), self.settled(other)
        if isinstance(one.atom, Constant) or isinstance(other.atom, Constant):
            numbers = self.constant(one), self.constant(other)
            return numbers[0] is not None and numbers[0] == numbers[1]
        if one.level is not other.level:
            return False
        if one.atom == other.atom:
            return True
        makers = self.maker(one), self.maker(other)
        if makers[0] is None or makers[1] is None or not depth:
            return False
        if makers[0].name != makers[1].name or makers[0].eqn is None:
            return False
        if str(makers[0].params) != str(makers[1].params):
            return False
        pairs = zip(makers[0].operands, makers[1].operands, strict=True)
        return all(
            self.are_same(Seen(one.level, a), Seen(other.level, b), depth - 1)
            for a, b in pairs
        )

    def comparison(self, seen: Seen) -> Seen | None:
        """Returns the comparison that a condition or a mask was made by."""
        seen = self.settled(seen)
        step = self.maker(seen)
        return seen if step is not None and step.name in _COMPARISONS else None


@functools.lru_cache(maxsize=64)
def _makers(level: Level) -> dict[int, Step]:
    return {slot: step for step in level.steps.steps for slot in step.results}


def called(step: Step) -> str:
    """Names a step as its source has it, and the module that it stands in."""
    text = f"`{step.name}`"
    if step.place is not None:
        written = expression(step.place)
        short = written.startswith("`")
        text = written if short else f"{text} in line {step.place.number}"
    modules = "/".join(name for name in step.scope if _is_module(name))
    return f"{text} in {modules}" if modules else text


def _is_module(name: str) -> bool:
    return name.isprintable() and not name.startswith(("jit(", "<"))


def line_of(step: Step | None) -> Line | None:
    """Returns the user's line that a step was traced from."""
    if step is None or step.place is None:
        return None
    place = step.place
    if not os.path.exists(place.file) and not code_at(place.file, place.number):
        return None
    return Line(
        place.file, place.number, place.function, code_at(place.file, place.number)
    )
