"""Which params are frozen, as the user says it: a mask, a function, or names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src.optimisers.trees import PyTree, Start, Values

Frozen = PyTree | Callable[[PyTree], PyTree] | Sequence[str]


def read_frozen(frozen: Frozen, start: Start, params: Values) -> tuple[int, ...]:
    """Returns the places of the frozen leaves among the params.

    Raises:
      TypeError: `frozen` is no mask, and no names.
      ValueError: It freezes nothing, or names no leaf.
    """
    tree = start.params.build(params)
    if callable(frozen):
        frozen = frozen(tree)
    if _are_names(frozen):
        marked = _by_name(frozen, start)
    else:
        marked = _by_mask(frozen, start, tree)
    places = tuple(i for i in start.checked if i in marked)
    if not places:
        raise ValueError(
            "`frozen` freezes no leaf: it must be True where a leaf is frozen, got "
            f"{frozen!r}."
        )
    return places


def _are_names(frozen: Any) -> bool:
    if isinstance(frozen, str):
        return True
    is_row = isinstance(frozen, list | tuple | set | frozenset) and len(frozen) > 0
    return is_row and all(isinstance(name, str) for name in frozen)


def _by_name(frozen: Any, start: Start) -> set[int]:
    names = [frozen] if isinstance(frozen, str) else list(frozen)
    marked: set[int] = set()
    for name in names:
        whole = name if name.startswith("params") else None
        keys = "".join(f"[{key!r}]" for key in name.split("/"))
        starts = [whole] if whole else [f"params{keys}", f"params.{name}"]
        hit = {
            i
            for i, leaf in enumerate(start.params.leaves)
            for begin in starts
            if leaf.name == begin or leaf.name.startswith((f"{begin}[", f"{begin}."))
        }
        if not hit:
            there = ", ".join(leaf.name for leaf in start.params.leaves[:8])
            raise ValueError(
                f"`frozen` names {name!r}, which is no leaf: there are {there}."
            )
        marked |= hit
    return marked


def _by_mask(frozen: Any, start: Start, tree: PyTree) -> set[int]:
    try:
        spread = jax.tree_util.tree_map(
            lambda mark, part: jax.tree_util.tree_map(lambda _: mark, part),
            frozen,
            tree,
        )
        marks = start.params.flatten(spread, "frozen")
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`frozen` must be a tree of bools like `params` or a prefix of it, a "
            f"function that returns one, or names of leaves, got {frozen!r}."
        ) from error
    for mark in marks:
        if getattr(mark, "dtype", np.result_type(type(mark))) != np.dtype(bool):
            raise TypeError(f"`frozen` must hold bools, got {mark!r} in {frozen!r}.")
    return {i for i, mark in enumerate(marks) if bool(mark)}
