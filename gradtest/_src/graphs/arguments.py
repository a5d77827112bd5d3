"""The arguments of a function to draw: named leaves, ready to be traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes

from gradtest import domains
from gradtest._src.inputs import argument_names
from gradtest._src.lifting import is_inexact

PyTree = Any
_DRAWN = (domains.Domain, jax.ShapeDtypeStruct)
_ARRAYS = (float, complex, np.generic, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class NamedLeaf:
    """A leaf of a tree, and the sub-trees that it is in.

    Attributes:
      name: Its path in the user's names.
      trees: The names of the trees around it, outermost first.
      value: An array, a number or a `jax.ShapeDtypeStruct`.
      argument: Position of the argument that it belongs to.
    """

    name: str
    trees: tuple[str, ...]
    value: Any
    argument: int = 0

    @property
    def is_floating(self) -> bool:
        """Whether it can be differentiated."""
        dtype = getattr(self.value, "dtype", None)
        if dtype is None:
            return isinstance(self.value, float | complex)
        return not dtypes.issubdtype(dtype, dtypes.extended) and is_inexact(dtype)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The leaves that are traced; the others stay as they came."""

    leaves: tuple[NamedLeaf, ...]
    rebuild: Callable[[Sequence[Any]], tuple[PyTree, ...]]

    @property
    def values(self) -> list[Any]:
        """What the leaves are traced with."""
        return [leaf.value for leaf in self.leaves]


def read_arguments(fn: Callable[..., Any], args: tuple[PyTree, ...]) -> Arguments:
    """Reads the leaves of the arguments that a function is traced with.

    Raises:
      TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable, got {type(fn).__name__}: {fn!r}.")
    names = argument_names(fn, len(args))
    flat, treedef = jax.tree_util.tree_flatten_with_path(args, is_leaf=_is_leaf)
    leaves, places = [], []
    for place, (path, value) in enumerate(flat):
        if isinstance(value, (*_DRAWN, *_ARRAYS)):
            number = path[0].idx
            name, trees = leaf_name(names[number], path[1:])
            leaves.append(NamedLeaf(name, trees, _traceable(value), number))
            places.append(place)
    fixed = [value for _, value in flat]

    def rebuild(values: Sequence[Any]) -> tuple[PyTree, ...]:
        whole = list(fixed)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        return jax.tree_util.tree_unflatten(treedef, whole)

    return Arguments(tuple(leaves), rebuild)


def leaf_name(root: str, path: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    """Returns the name of a leaf, and those of the trees that it is in."""
    names = [root + jax.tree_util.keystr(path[:i]) for i in range(len(path) + 1)]
    return names[-1], tuple(names[:-1])


def named_results(tree: PyTree, root: str = "result") -> list[NamedLeaf]:
    """Returns the leaves of what a function returns, by name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [NamedLeaf(*leaf_name(root, path), value) for path, value in flat]


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, _DRAWN)


def _traceable(value: Any) -> Any:
    if isinstance(value, domains.Domain):
        dtype = dtypes.canonicalize_dtype(value.dtype)
        return jax.ShapeDtypeStruct(value.sized_shape(), dtype)
    return value
