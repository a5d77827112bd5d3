"""The params and gradients of an optimiser, as flat arrays with names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import seeding
from gradtest._src.inputs import Inputs, Leaf, Role, read_inputs
from gradtest._src.lifting import is_inexact, widen

PyTree = Any
Values = list[Any]
# How far a gradient is moved from its root mean square, and from the tree's.
_OWN_SPREAD, _TREES_SPREAD = 0.1, 0.01


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree of the user's whose arrays are known by name.

    Attributes:
      leaves: Its leaves that are arrays.
      values: Their values, in the same order.
      floats: Which of them are float or complex.
    """

    leaves: tuple[Leaf, ...]
    values: tuple[Any, ...]
    _all: tuple[Leaf, ...]
    _treedef: Any

    @property
    def floats(self) -> tuple[int, ...]:
        """Places of the float and complex leaves among `leaves`."""
        return tuple(i for i, leaf in enumerate(self.leaves) if is_inexact(leaf.dtype))

    def build(self, values: Sequence[Any]) -> PyTree:
        """Returns the user's tree around other values."""
        given = iter(values)
        return jax.tree_util.tree_unflatten(
            self._treedef,
            [
                leaf.source if leaf.role is Role.STATIC else next(given)
                for leaf in self._all
            ],
        )

    def flatten(self, tree: PyTree, role: str) -> Values:
        """Returns the leaves of a tree of this structure, at the places of the arrays.

        Raises:
          TypeError: Its structure is another.
        """
        flat, treedef = jax.tree_util.tree_flatten(tree, is_leaf=lambda x: x is None)
        if treedef != self._treedef:
            raise TypeError(
                f"`{role}` must return a tree like `params`: wanted {self._treedef}, "
                f"got {treedef}."
            )
        return [
            value
            for leaf, value in zip(self._all, flat, strict=True)
            if leaf.role is not Role.STATIC
        ]

    def arrays(self, tree: PyTree, role: str) -> Values:
        """Returns the arrays of a tree that must be like this one, shapes included.

        Raises:
          TypeError: Its structure, or the shape of a leaf, is another.
        """
        found = self.flatten(tree, role)
        for leaf, value in zip(self.leaves, found, strict=True):
            if np.shape(value) != leaf.shape:
                raise TypeError(
                    f"`{role}` must return {leaf.name} with shape {list(leaf.shape)}, "
                    f"got {list(np.shape(value))}."
                )
        return found


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an optimiser begins.

    Attributes:
      params: The params.
      grads: The gradients that others are drawn around.
      unchecked: Names of params that are not compared.
    """

    params: Tree
    grads: Tree
    unchecked: tuple[str, ...] = ()

    @property
    def checked(self) -> tuple[int, ...]:
        """Places of the params that are compared."""
        return tuple(
            i
            for i in self.params.floats
            if self.params.leaves[i].name not in self.unchecked
            and np.prod(self.params.leaves[i].shape)
        )


def read_start(
    params: PyTree, grads: PyTree, key: Any, exclude: Sequence[str] = ()
) -> Start:
    """Reads params and gradients, and draws those that are no values yet.

    Raises:
      TypeError: The two are unlike trees, or hold traced values.
      ValueError: No leaf of the params is an array of floats, or is not finite.
    """
    if isinstance(exclude, str):
        exclude = (exclude,)
    _require_floats(params, grads)
    inputs = read_inputs(
        _nothing, (params, grads), exclude=exclude, names=("params", "grads")
    )
    of_params, of_grads = _trees(inputs, key)
    start = Start(of_params, of_grads, tuple(inputs.unchecked))
    _require_alike(inputs)
    if not start.checked:
        raise ValueError("`params` has no entry to check: every leaf is left out.")
    return start


def _nothing(params: PyTree, grads: PyTree) -> None:
    """Stands for the function whose arguments the two are."""


def _require_floats(params: PyTree, grads: PyTree) -> None:
    for name, tree in (("params", params), ("grads", grads)):
        if not jax.tree_util.tree_leaves(tree):
            raise ValueError(f"`{name}` must hold arrays, got an empty tree: {tree!r}.")
    leaves = jax.tree_util.tree_leaves(params)
    if all(_is_whole(leaf) for leaf in leaves):
        told = ", ".join(f"{jnp.result_type(x)}{list(np.shape(x))}" for x in leaves[:4])
        raise ValueError(
            f"`params` must hold at least one float or complex array, got {told}."
        )


def _is_whole(leaf: Any) -> bool:
    """Whether a leaf is an array, or number, of integers or booleans."""
    if isinstance(leaf, int):
        return True
    whole = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    return whole and not is_inexact(leaf.dtype)


def _trees(inputs: Inputs, key: Any) -> list[Tree]:
    point = inputs.draw(key, 0)
    drawn = {Role.MOVES: iter(point.moving), Role.HELD: iter(point.held)}
    by_argument: list[Values] = [[], []]
    for leaf in inputs.leaves:
        if leaf.role is not Role.STATIC:
            by_argument[leaf.argument].append(_as_array(next(drawn[leaf.role]), leaf))
    trees = []
    for argument, values in enumerate(by_argument):
        every = tuple(inputs.of_argument(argument))
        arrays = tuple(leaf for leaf in every if leaf.role is not Role.STATIC)
        treedef = inputs.argument_tree(argument)
        trees.append(Tree(arrays, tuple(values), every, treedef))
    return trees


def _as_array(value: Any, leaf: Leaf) -> Any:
    """Returns a Python number as an array; optimisers keep states of its shape."""
    if isinstance(value, float | complex | np.generic):
        return jnp.asarray(value, leaf.dtype)
    return value


def _require_alike(inputs: Inputs) -> None:
    """Raises where the gradients are no tree like the params."""
    wanted, found = (inputs.argument_tree(argument) for argument in (0, 1))
    if wanted != found:
        raise TypeError(
            f"`grads` must be a tree like `params`: wanted {wanted}, got {found}."
        )
    for one, other in zip(inputs.of_argument(0), inputs.of_argument(1), strict=True):
        both = is_inexact(one.dtype) and is_inexact(other.dtype)
        if both and one.shape != other.shape:
            raise TypeError(
                f"`{other.name}` must have the shape {list(one.shape)} of "
                f"`{one.name}`, got {list(other.shape)}."
            )


# --- gradients of several steps -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Gradients of several steps.

    Attributes:
      scale: How large they are beside the user's own.
      grads: The leaves' values, by step.
      says: What is special about them, for messages.
    """

    scale: float
    grads: tuple[Values, ...]
    says: str = ""


def draw_runs(
    grads: Tree, steps: int, scales: Sequence[float], key: Any
) -> tuple[Run, ...]:
    """Draws gradients around the given ones, others at each step, for each scale.

    At a scale below 1 the entries of a leaf have sizes from 1 to that scale, so that an
    epsilon shows; a scale above 1 takes all of them larger, so that a threshold does.
    Where the given gradients have zeros, one more run keeps these.
    """
    around = _drawn(grads, steps, key)
    runs = [_scaled(grads, around, float(scale), key) for scale in scales]
    zeros = [np.asarray(widen(grads.values[i])) == 0 for i in grads.floats]
    if any(zero.any() for zero in zeros) and not all(zero.all() for zero in zeros):
        kept = [
            _with_floats(
                grads,
                [
                    np.where(zero, 0, step[i]).astype(grads.leaves[i].dtype)
                    for i, zero in zip(grads.floats, zeros, strict=True)
                ],
            )
            for step in around
        ]
        runs.append(Run(1.0, tuple(kept), "with the zeros of `grads`"))
    return tuple(runs)


def _drawn(grads: Tree, steps: int, key: Any) -> list[Values]:
    given = [np.asarray(widen(grads.values[i])) for i in grads.floats]
    sizes = [_size(value) for value in given]
    entries = max(sum(value.size for value in given), 1)
    whole = sum(value.size * s**2 for value, s in zip(given, sizes, strict=True))
    tree = float(np.sqrt(whole / entries)) or 1.0
    drawn = []
    for step in range(steps):
        values = []
        for i, value, size in zip(grads.floats, given, sizes, strict=True):
            leaf = grads.leaves[i]
            wide = value.dtype
            draws = seeding.generator(key, "gradient", step, leaf.name)
            factor, term = (seeding.normal(draws, leaf.shape, wide) for _ in range(2))
            spread = max(_OWN_SPREAD * size, _TREES_SPREAD * tree)
            moved = value * (1 + factor) + spread * term
            values.append(moved.astype(leaf.dtype))
        drawn.append(_with_floats(grads, values))
    return drawn


def _with_floats(tree: Tree, values: Values) -> Values:
    full = list(tree.values)
    for i, value in zip(tree.floats, values, strict=True):
        full[i] = value
    return full


def _size(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.abs(value) ** 2))) if value.size else 0.0


def _scaled(grads: Tree, around: list[Values], scale: float, key: Any) -> Run:
    if scale == 1:
        return Run(1.0, tuple(around))
    factors = {}
    for i in grads.floats:
        leaf = grads.leaves[i]
        count = int(np.prod(leaf.shape))
        order = seeding.generator(key, "scale", leaf.name).permutation(count)
        part = (order + 1) / max(count, 1) if scale < 1 else np.ones(count)
        factors[i] = (scale**part).reshape(leaf.shape)
    steps = tuple(
        _with_floats(grads, [widen(step[i]) * factors[i] for i in grads.floats])
        for step in around
    )
    if scale > 1:
        return Run(scale, steps, f"at gradients {scale:g} times as large")
    return Run(scale, steps, f"at gradients down to {scale:g} times as large")


def describe(tx: Any) -> str:
    """Names a transformation by the function that made it, where that tells."""
    update = getattr(tx, "update", None)
    made_by = getattr(update, "__qualname__", "").partition(".<locals>")[0]
    if "." in made_by or made_by in ("", "chain", "named_chain", "init_empty_state"):
        return "tx"
    return made_by if made_by.isidentifier() else "tx"


def require_transformation(tx: Any, role: str = "tx") -> None:
    """Raises TypeError where an argument is no transformation."""
    if not callable(getattr(tx, "init", None)) or not callable(
        getattr(tx, "update", None)
    ):
        raise TypeError(
            f"`{role}` must be an optax.GradientTransformation (with `init` and "
            f"`update`), got {tx!r}."
        )


def named(name: str) -> Callable[..., Any]:
    """Returns something that a report calls by this name."""

    def subject() -> None:
        """Stands for a transformation, which is no function."""

    subject.__name__ = name
    return subject


def paths(tree: PyTree, name: str) -> dict[str, Any]:
    """Returns the leaves of any tree by their paths; None counts as none."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in flat}
