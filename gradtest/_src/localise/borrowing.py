"""What could be changed in one step by taking another value of the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradtest._src.localise.edits import Edit, evaluated
from gradtest._src.localise.scene import Scene
from gradtest._src.localise.steps import Constant, Slot, Step

Array = np.ndarray


# What a value of the program is, in words.
Describe = Callable[[Slot], str]


def exchanged_operands(
    scene: Scene, number: int, others: Sequence[Slot], describe: Describe
) -> Iterator[Edit]:
    """Yields the edits that take another value of the program for an operand."""
    step = scene.step(number)
    for place, atom in enumerate(step.operands):
        if isinstance(atom, Constant) and not atom.value.shape:
            continue
        there = scene.read(atom)
        for slot in others:
            value = scene.values.get(slot)
            if slot == atom or value is None or value.shape != there.shape:
                continue
            if value.dtype != there.dtype or np.array_equal(value, there):
                continue
            words = "one of its operands"
            if not isinstance(atom, Constant):
                words = describe(atom)
            yield dataclasses.replace(
                _exchanged(number, place, slot),
                says=f"with {describe(slot)} in place of {words}",
                borrows=(atom, slot),
            )


def _exchanged(number: int, place: int, slot: Slot) -> Edit:
    def value(scene: Scene, number: int) -> Array:
        return evaluated(scene, scene.step(number), place, scene.values[slot])

    return Edit(number, "", 0.5, value, is_general=False)


def factors(
    scene: Scene, number: int, others: Sequence[Slot], describe: Describe
) -> Iterator[Edit]:
    """Yields the edits that multiply or divide by another value of the program."""
    step = scene.step(number)
    shape = scene.result(step).shape
    for slot in others:
        value = scene.values.get(slot)
        if value is None or not value.size or slot in step.results:
            continue
        if value.dtype == bool and _broadcasts(value.shape, shape):
            yield _multiplied(number, slot, f"masked by {describe(slot)}", 1, 0.55)
        elif value.dtype.kind in "fc" and _broadcasts(value.shape, shape):
            yield _multiplied(number, slot, f"times {describe(slot)}", 1, 0.45)
            yield _multiplied(number, slot, f"divided by {describe(slot)}", -1, 0.4)


def _multiplied(number: int, slot: Slot, says: str, power: int, weight: float) -> Edit:
    def value(scene: Scene, number: int) -> Array:
        factor, result = scene.values[slot], scene.result(scene.step(number))
        return result * factor if power == 1 else result / factor

    return Edit(number, says, weight, value, is_general=False)


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    """Whether an array of one shape multiplies one of another as it is."""
    try:
        return np.broadcast_shapes(shape, onto) == onto
    except ValueError:
        return False


# Linear in each of these operands, the others at rest.
_LINEAR_IN = {
    "mul": (0, 1), "div": (0,), "dot_general": (0, 1), "reduce_sum": (0,),
    "transpose": (0,), "reshape": (0,), "broadcast_in_dim": (0,), "neg": (0,),
}  # fmt: skip


def added_terms(
    scene: Scene, step: Step, value: Array
) -> Iterator[tuple[int | None, Array]]:
    """Yields what a value adds to a step's result, once added to it or to an operand.

    With each comes the operand's place; None for the result itself.
    """
    if value.shape == scene.result(step).shape:
        yield None, value
    for place in _LINEAR_IN.get(step.name, ()):
        operand = scene.read(step.operands[place])
        if operand.shape == value.shape and operand.dtype == value.dtype:
            yield place, evaluated(scene, step, place, value)


def added_term(
    number: int,
    slot: Slot,
    place: int | None,
    coefficient: float,
    weight: float,
    what: str,
) -> Edit:
    """Makes the edit that adds so many times another value of the program."""

    def value(scene: Scene, number: int) -> Array:
        step, added = scene.step(number), scene.values[slot]
        if place is not None:
            added = evaluated(scene, step, place, added)
        return scene.result(step) + coefficient * added

    says = f"with {coefficient:.6g} times {what} added"
    if abs(abs(coefficient) - 1) < 1e-6:
        says = f"with {what} {'added' if coefficient > 0 else 'subtracted'}"
    says += "" if place is None else " in what it takes"
    return Edit(number, says, weight, value, is_general=False)
