"""Points near another one, at which a hunt asks whether what it saw is no accident."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradtest._src import seeding
from gradtest._src.domain import Domain
from gradtest._src.hunting import kinds
from gradtest._src.inputs import Leaf, Point


@dataclasses.dataclass(frozen=True)
class Moving:
    """A leaf that moves, and its domain at sizes in numbers; None where it has none."""

    leaf: Leaf
    domain: Domain | None


def near(moving: Sequence[Moving], point: Point, number: int, step: float) -> Point:
    """Returns a point near another one.

    Free entries go elsewhere, each by a part of its size; what lies in a convex domain
    goes towards another draw.

    Args:
      moving: The leaves that move.
      point: The other one.
      number: Of the point; free entries of an even one and of the one after it are on
        opposite sides.
      step: How far, relative to the entries.
    """
    pairs = zip(moving, point.moving, strict=True)
    return Point(
        tuple(_near(each, value, number, step) for each, value in pairs), point.held
    )


def with_one_of(point: Point, other: Point, leaf: int) -> Point:
    """Returns a point with one leaf that moves as it is in another."""
    moved = list(point.moving)
    moved[leaf] = other.moving[leaf]
    return Point(tuple(moved), point.held)


def _near(moving: Moving, value: Any, number: int, step: float) -> Any:
    leaf, domain = moving.leaf, moving.domain
    name = "" if domain is None else domain.name
    if domain is None or name not in kinds.MOVABLE | kinds.CONVEX:
        return value
    array = np.asarray(value)
    wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    generator = seeding.generator(0, "near", number // 2, leaf.name)
    if name in kinds.CONVEX:
        drawn = domain.draw(generator).astype(wide.dtype)
        return (wide + step * (drawn - wide)).astype(leaf.dtype)
    off = generator.uniform(0.3, 1.0, wide.shape)
    off *= generator.choice([-1.0, 1.0], wide.shape) * (-1) ** number
    size = np.where(wide == 0, 1.0, np.abs(wide))
    return (wide + step * off * size).astype(leaf.dtype)
