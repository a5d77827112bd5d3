"""The devices that a step runs over: the axes of its meshes, and how it was mapped."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradtest._src import execution, jaxprs
from gradtest._src.jaxprs import Jaxpr


@dataclasses.dataclass(frozen=True)
class Layout:
    """The named axes of devices that a program uses.

    Attributes:
      axes: Sizes of the mesh axes, by name.
      checked: The axes of regions that are mapped with `check_vma=True`: there JAX
        itself sums the gradient of what is the same on all devices.
    """

    axes: Mapping[str, int]
    checked: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return ", ".join(
            f"{size} devices of axis {n!r}" for n, size in self.axes.items()
        )

    @property
    def size(self) -> int:
        """How many devices there are."""
        return math.prod(self.axes.values())

    def of_size(self, size: int) -> list[str]:
        """Returns the names of the axes that have this size."""
        return [name for name, found in self.axes.items() if found == size]

    def spanning(self, count: int) -> tuple[str, ...]:
        """Returns the axes, in order, that have so many devices together; or none."""
        for length in range(len(self.axes), 0, -1):
            for names in itertools.combinations(self.axes, length):
                if math.prod(self.axes[name] for name in names) == count:
                    return names
        return ()


def read_layout(jaxpr: Jaxpr, mesh: Any, values: Sequence[Any]) -> Layout:
    """Returns the axes of the regions in a program, of a mesh and of its arguments."""
    axes: dict[str, int] = {}
    checked: set[str] = set()
    for eqn in jaxprs.walk(jaxpr):
        if eqn.primitive.name == "shard_map":
            region = jaxprs.read_shard_map(eqn)
            names = {
                str(name): size
                for name, size in region.mesh.shape.items()
                if name in region.axis_names
            }
            axes |= names
            if region.check_vma:
                checked |= set(names)
        for name in ("sharding", "in_shardings", "out_shardings"):
            for sharding in _as_tuple(eqn.params.get(name)):
                axes |= _axes_of(sharding)
    for value in values:
        axes |= _axes_of(execution.spread_of(value))
    if mesh is not None:
        axes |= {str(name): size for name, size in mesh.shape.items()}
    return Layout({n: size for n, size in axes.items() if size > 1}, frozenset(checked))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _axes_of(sharding: Any) -> dict[str, int]:
    mesh = getattr(sharding, "mesh", None)
    return {} if mesh is None else {str(n): size for n, size in mesh.shape.items()}
