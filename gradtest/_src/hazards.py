"""The special points of a check's arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gradtest import domains
from gradtest._src import execution
from gradtest._src.devices import spanning
from gradtest._src.inputs import Inputs, Leaf, Point, Role
from gradtest._src.special_points import special_points, special_values

# An argument of more leaves goes to each kind of special point as a whole.
_MOST_ALONE = 4


def special_arguments(inputs: Inputs, point: Point) -> Iterator[tuple[str, Point]]:
    """Yields special points of the leaves that move, and of indices and masks.

    Each is the ordinary point but for one leaf, or for the leaves of a large argument.

    Args:
      inputs: The arguments of the check.
      point: An ordinary point.

    Yields:
      What is special, as "x: all zero", and all leaves.
    """
    at = [*_placed(inputs, Role.MOVES, point), *_placed(inputs, Role.HELD, point)]
    for name, group in _groups(inputs, at):
        for kind, values in _kinds(at, group).items():
            yield f"{name}: {kind}", _with(point, values, len(inputs.moving))
    together = [k for k in range(len(inputs.moving)) if _is_plain(at[k][1])]
    if 1 < len(together) <= _MOST_ALONE:
        for kind, values in _kinds(at, together).items():
            if len(values) == len(together):
                name = f"all arguments: {kind}"
                yield name, _with(point, values, len(inputs.moving))
    for one, other in _alike(at):
        values = {other: np.asarray(at[one][1])}
        name = f"{at[other][0].name}: equal to {at[one][0].name}"
        yield name, _with(point, values, len(inputs.moving))


def _kinds(
    at: Sequence[tuple[Leaf, Any]], group: Sequence[int]
) -> dict[str, dict[int, np.ndarray]]:
    """Returns the special values of some leaves, by what is special about them."""
    kinds: dict[str, dict[int, np.ndarray]] = {}
    for k in group:
        for kind, value in _points(*at[k]).items():
            kinds.setdefault(kind, {})[k] = value
    return kinds


def _alike(at: Sequence[tuple[Leaf, Any]]) -> list[tuple[int, int]]:
    """Returns the pairs of leaves that may be equal, of few arguments."""
    plain = [
        k
        for k, (leaf, value) in enumerate(at)
        if leaf.role is Role.MOVES and _is_plain(value) and np.size(value)
    ]
    if len(plain) > _MOST_ALONE:
        return []
    return [
        (one, other)
        for one, other in itertools.combinations(plain, 2)
        if at[one][0].shape == at[other][0].shape
        and at[one][0].dtype == at[other][0].dtype
        and _domain_of(at[one][0]) == _domain_of(at[other][0])
    ]


def _domain_of(leaf: Leaf) -> str:
    return leaf.source.name if isinstance(leaf.source, domains.Domain) else ""


def _placed(inputs: Inputs, role: Role, point: Point) -> list[tuple[Leaf, Any]]:
    values = point.moving if role is Role.MOVES else point.held
    return list(zip(inputs.of_role(role), values, strict=True))


def _groups(
    inputs: Inputs, at: Sequence[tuple[Leaf, Any]]
) -> Iterator[tuple[str, list[int]]]:
    """Yields which leaves go to a special point together, and what they are called."""
    for number, name in enumerate(inputs.names):
        own = [
            k
            for k, (leaf, value) in enumerate(at)
            if leaf.argument == number and _is_plain(value)
        ]
        if len(own) > _MOST_ALONE:
            yield f"all of {name}", own
        else:
            yield from ((at[k][0].name, [k]) for k in own)


def _is_plain(value: Any) -> bool:
    """Whether a leaf has numbers, all of them here."""
    if isinstance(value, float | complex):
        return True
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, np.dtype) and not spanning.spans(value)


def _points(leaf: Leaf, value: Any) -> dict[str, np.ndarray]:
    array = np.asarray(value, leaf.dtype)
    if isinstance(leaf.source, domains.Domain):
        return special_points(leaf.source, array)
    return special_values(array)


def _with(point: Point, values: dict[int, np.ndarray], moving: int) -> Point:
    whole = [*point.moving, *point.held]
    for k, value in values.items():
        whole[k] = _like(whole[k], value)
    return Point(tuple(whole[:moving]), tuple(whole[moving:]))


def _like(given: Any, value: np.ndarray) -> Any:
    """Returns a value as the leaf came: a Python number, or laid over devices."""
    if not hasattr(given, "dtype"):
        return value.item()
    spread = execution.spread_of(given)
    return value if spread is None else jax.device_put(value, spread)
