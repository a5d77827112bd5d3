"""The points at which cells run: the user's first, and others near it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import seeding
from gradtest._src.case import balance
from gradtest._src.cells.reference import Reference
from gradtest._src.cells.ways import BATCH, Examples
from gradtest._src.inputs import Inputs, Point, Role
from gradtest._src.lifting import is_inexact
from gradtest._src.options import Options
from gradtest._src.program import Program, Values

# So many points are taken for as many devices.
_MOST_POINTS = 8


class Points:
    """Draws the points of each trial, and cotangents of the results at each."""

    def __init__(self, inputs: Inputs, program: Program, options: Options):
        self._inputs = inputs
        self._program = program
        self._options = options
        self._count = max(BATCH, min(jax.local_device_count(), _MOST_POINTS))

    def examples(self, trial: int) -> Examples:
        """Returns the points of one trial, the first as it was given."""
        points, seeds = [], []
        for k in range(self._count):
            number = trial + k * self._options.trials
            point = self._inputs.draw(self._options.key, number)
            points.append(_scaled(self._inputs, point, 1 - k / 16) if k else point)
            items = range(len(self._program.outputs))
            seeds.append([self._seed(item, trial, k) for item in items])
        return Examples(points, seeds)

    def _seed(self, item: int, trial: int, k: int) -> Any:
        output = self._program.outputs[item]
        if self._program.is_scalar:
            return np.ones((), dtype=output.dtype)
        generator = seeding.generator(self._options.key, "cotangent", trial, k, item)
        return seeding.normal(generator, output.shape, output.dtype)

    def settle(self, examples: Examples, reference: Reference) -> list[str]:
        """Moves the reference to these points; returns what is to be told of them.

        Results weigh alike, and the first point stands in for those without a finite
        gradient.
        """
        reference.move(examples)
        here = reference.lifted(examples.row(0))
        scales = [1.0] if self._program.is_scalar else list(map(balance, here))
        seeds = [
            [(s * f).astype(s.dtype) for s, f in zip(own, scales, strict=False)]
            for own in examples.seeds
        ]
        points = list(examples.points)
        lost = [
            k
            for k in range(1, len(points))
            if not is_finite(reference.lifted(examples.row(k)))
        ]
        for k in lost:
            points[k] = points[0]
        reference.move(Examples(points, seeds))
        if not lost:
            return []
        return [
            f"{len(lost)} of the {len(points)} points have no finite gradient: the "
            "first one stands in for them"
        ]


def _scaled(inputs: Inputs, point: Point, scale: float) -> Point:
    """Returns a point nearby; what was drawn is another one already.

    Smaller, so that zeros and signs stay and no domain is left upwards.
    """

    def near(role: Role, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            jax.numpy.asarray(value) * scale
            if value is leaf.source and is_inexact(leaf.dtype)
            else value
            for leaf, value in zip(inputs.of_role(role), values, strict=True)
        )

    return Point(near(Role.MOVES, point.moving), near(Role.HELD, point.held))


def is_finite(values: Values) -> bool:
    """Whether every entry of every array is finite."""
    return all(np.isfinite(value).all() for value in values)
