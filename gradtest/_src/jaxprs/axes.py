"""Named axes and devices: what a program reduces over, and what it keeps of them."""

from __future__ import annotations

import math
from typing import Any

from gradtest._src.jaxprs.holders import read_shard_map
from gradtest._src.jaxprs.programs import (
    CALLS,
    Eqn,
    Jaxpr,
    entered,
    is_literal,
    open_body,
)


def free_axes(jaxpr: Jaxpr) -> tuple[str, ...]:
    """Returns the axes of `pmap`, `vmap` or `shard_map` around that a program names."""
    found = {
        effect.name
        for effect in jaxpr.effects
        if type(effect).__name__ == "NamedAxisEffect"
    }
    return tuple(sorted(found, key=str))


def devices_cut_to_one(jaxpr: Jaxpr) -> int:
    """Returns of how many devices' results a program keeps the first alone, or 0.

    So do Chex's pmap variants: `reduce_fn` takes the first row of the mapped result.
    """
    return _search(jaxpr)[0]


def _search(jaxpr: Jaxpr) -> tuple[int, list[int]]:
    """Returns that number, and over how many devices each result is laid out."""
    body = open_body(jaxpr)
    spread: dict[Any, int] = {}
    users: dict[Any, list[Eqn]] = {}
    most = 0
    for eqn in body.eqns:
        for atom in eqn.invars:
            if not is_literal(atom):
                users.setdefault(atom, []).append(eqn)
        for inner in entered(eqn):
            found, results = _search(inner)
            most = max(most, found)
            if eqn.primitive.name == "shard_map":
                results = [_device_count(eqn)] * len(eqn.outvars)
            elif eqn.primitive.name not in CALLS:
                continue
            spread.update(zip(eqn.outvars, results, strict=True))
    for var, count in spread.items():
        rows = users.get(var, []) if count > 1 else []
        if rows and all(_is_first_row(eqn, count) for eqn in rows):
            most = max(most, count)
    results = [0 if is_literal(atom) else spread.get(atom, 0) for atom in body.outvars]
    return most, results


def _device_count(eqn: Eqn) -> int:
    region = read_shard_map(eqn)
    return math.prod(region.mesh.shape[axis] for axis in region.axis_names)


def _is_first_row(eqn: Eqn, count: int) -> bool:
    """Whether an equation takes the first of so many rows."""
    if eqn.primitive.name != "slice":
        return False
    aval: Any = eqn.invars[0].aval
    shape = aval.shape
    limits = tuple(eqn.params["limit_indices"])
    starts = tuple(eqn.params["start_indices"])
    is_from_start = not any(starts)
    return is_from_start and shape[:1] == (count,) and limits == (1, *shape[1:])
