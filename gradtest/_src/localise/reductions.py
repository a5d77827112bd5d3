"""Sums over devices, and the lines that they stand on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.findings import Line
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.localise.naming import BY_STRUCTURE, line_at


def collectives(eqn: Eqn | None) -> Iterator[tuple[Eqn, int]]:
    """Yields the sums over devices inside of a region, with the devices' number."""
    if eqn is None or eqn.primitive.name != "shard_map":
        return
    region = jaxprs.read_shard_map(eqn)
    for inner in jaxprs.walk(region.body):
        if inner.primitive.name.startswith(("psum", "all_reduce")):
            axes = inner.params.get("axes", ())
            sizes = [dict(region.mesh.shape).get(axis, 1) for axis in axes]
            yield inner, int(np.prod(sizes, dtype=int))


def only_reduction(jaxpr: Jaxpr) -> Line | None:
    """Returns the only line on which a step sums over devices, if there is one."""
    sums = [
        jaxprs.users_place(inner)
        for eqn in jaxprs.walk(jaxpr)
        for inner, _ in collectives(eqn)
    ]
    lines = {(place.file, place.number): place for place in sums if place}
    if len(lines) != 1:
        return None
    says = "the one line on which devices are summed over"
    return line_at(next(iter(lines.values())), says, BY_STRUCTURE)
