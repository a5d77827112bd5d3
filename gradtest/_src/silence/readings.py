"""What is counted of a gradient on its way back from the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.silence.influence import Reach

# The numbers of steps and of the programs inside of them, outermost first.
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Readings:
    """What is counted; merged over the turns of a loop.

    Attributes:
      steps: For each step that the leaf reaches and the loss depends on, by its path:
        "arriving", how many of its results' entries have a gradient; "seen", how many
        there are; "passed", the same counted at each operand; "alive", how many
        entries of each operand are not zero where a gradient arrives.
      slots: For each value of numbers, by path: "nonzero", how many entries are not
        zero; "given", how many entries of gradient its uses hand it; "total", how many
        remain in their sum.
      lows: The smallest entry of each value, by its path; and of each operand that the
        leaf reaches, among the entries that it reaches, by the step's path and place.
      highs: The largest, likewise.
    """

    steps: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)
    slots: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)
    lows: dict[Path, Any] = dataclasses.field(default_factory=dict)
    highs: dict[Path, Any] = dataclasses.field(default_factory=dict)

    def update(self, other: Readings) -> None:
        """Adds the readings of other places."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).update(getattr(other, field.name))

    def merged(self, other: Readings) -> Readings:
        """Returns the readings of two runs of the same places."""
        tree_map = jax.tree_util.tree_map
        return Readings(
            tree_map(jnp.add, self.steps, other.steps),
            tree_map(jnp.add, self.slots, other.slots),
            tree_map(jnp.minimum, self.lows, other.lows),
            tree_map(jnp.maximum, self.highs, other.highs),
        )

    @staticmethod
    def blank(shapes: Readings) -> Readings:
        """Returns the readings of places that were not run."""

        def filled(tree: Any, value: float) -> Any:
            return jax.tree_util.tree_map(
                lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), tree
            )

        return Readings(
            filled(shapes.steps, 0),
            filled(shapes.slots, 0),
            filled(shapes.lows, np.inf),
            filled(shapes.highs, -np.inf),
        )


jax.tree_util.register_dataclass(
    Readings, data_fields=["steps", "slots", "lows", "highs"], meta_fields=[]
)


def is_numeric(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def as_number(value: Any) -> Any:
    return value.astype(jnp.float32) if value.dtype == bool else value.astype(float)


def count(cotangent: Any, reach: Reach) -> Any:
    """Counts the entries of a gradient that are not zero; NaN is not."""
    return jnp.count_nonzero((cotangent != 0) & reach)


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an operand has an entry for each of a result's, or one for an axis."""
    return len(shape) == len(whole) and all(
        own in (1, full) for own, full in zip(shape, whole, strict=True)
    )


def reading(
    operands: list[Any],
    seen: list[Reach],
    back: list[Any],
    arriving: list[Any],
    reach: list[Reach],
) -> dict[str, Any]:
    places = [
        (c, r)
        for c, r in zip(arriving, reach, strict=True)
        if c is not None and r is not None
    ]
    active = (places[0][0] != 0) & places[0][1] if places else None
    alive = {}
    for k, operand in enumerate(operands):
        if not is_numeric(operand):
            continue
        there = operand != 0
        if active is not None and _fits(jnp.shape(operand), active.shape):
            there = there & active
        alive[k] = jnp.count_nonzero(there)
    return {
        "arriving": sum((count(c, r) for c, r in places), jnp.asarray(0)),
        "seen": sum((jnp.count_nonzero(r) for _, r in places), jnp.asarray(0)),
        "passed": {
            k: count(cotangent, seen[k])
            for k, cotangent in enumerate(back)
            if cotangent is not None and seen[k] is not None
        },
        "reaching": {
            k: jnp.count_nonzero(each)
            for k, each in enumerate(seen)
            if each is not None
        },
        "alive": alive,
    }
