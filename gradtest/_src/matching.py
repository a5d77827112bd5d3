"""What hand-written functions return, matched against what it must be shaped like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from gradtest._src.execution import SlipError
from gradtest._src.inputs import Inputs, Leaf, Role
from gradtest._src.lifting import is_inexact
from gradtest._src.program import Program, PyTree, Values, describe


@dataclasses.dataclass(frozen=True)
class Returned:
    """A tree that the user's function returned, and how messages speak of it.

    Attributes:
      tree: The tree.
      role: The argument of the assertion that the function came as.
      label: The place of the tree in what the function returned.
      strict: Whether integers, keys and their like must have no gradient: None or
        float0, as JAX has it.
    """

    tree: PyTree
    role: str
    label: str
    strict: bool = True

    def like_argument(self, inputs: Inputs, argument: int) -> Values:
        """Returns the leaves that belong to the moving leaves of one argument.

        Raises:
          SlipError: The tree, a shape or a dtype is not the argument's.
        """
        leaves = inputs.of_argument(argument)
        flat, found = _flatten(self.tree)
        if found != inputs.argument_tree(argument):
            name = inputs.names[argument]
            names = [name + jax.tree_util.keystr(path) for path, _ in flat]
            raise SlipError(
                f"`{self.role}` must return a tree like `{name}`, the argument it "
                f"differentiates: {_difference([leaf.name for leaf in leaves], names)} "
                f"(in {self.label})."
            )
        values = []
        for leaf, (_, value) in zip(leaves, flat, strict=True):
            if leaf.role is Role.MOVES:
                values.append(self._array(value, leaf, "argument"))
            elif self.strict and leaf.role is Role.HELD and not is_inexact(leaf.dtype):
                self._check_empty(value, leaf)
        return values

    def like_result(self, program: Program) -> Values:
        """Returns the leaves that belong to the program's differentiable results.

        Raises:
          SlipError: The tree, a shape or a dtype is not the result's.
        """
        wanted, _ = jax.tree_util.tree_flatten_with_path(program.result)
        treedef: Any = jax.tree_util.tree_structure(program.result)
        leaves = [
            Leaf("result" + jax.tree_util.keystr(path), 0, Role.MOVES, None, leaf.shape,
                 leaf.dtype)
            for path, leaf in wanted
        ]  # fmt: skip
        try:
            parts = treedef.flatten_up_to(self.tree)
        except ValueError:
            flat, _ = _flatten(self.tree)
            names = ["result" + jax.tree_util.keystr(path) for path, _ in flat]
            raise SlipError(
                f"`{self.role}` must return a tree like the result of `fn`, the "
                "tangent alone: "
                f"{_difference([leaf.name for leaf in leaves], names)}."
            ) from None
        values = []
        for leaf, value in zip(leaves, parts, strict=True):
            if is_inexact(leaf.dtype):
                values.append(self._array(value, leaf, "result"))
            else:
                self._check_empty(value, leaf)
        return values

    def _array(self, value: Any, leaf: Leaf, kind: str) -> Any:
        """Returns one leaf as an array of the shape and dtype that it must have."""
        is_array = hasattr(value, "dtype") or isinstance(value, float | complex)
        if value is not None and not is_array:
            raise SlipError(
                f"`{self.role}` must return arrays: wanted {leaf.dtype}"
                f"{list(leaf.shape)} for {leaf.name}, got {describe(value)} in "
                f"{self.label}."
            )
        shape = None if value is None else jnp.shape(value)
        if shape != leaf.shape:
            raise SlipError(
                f"`{self.role}` must return the shape of the {kind}: wanted "
                f"{list(leaf.shape)} for {leaf.name}, got "
                f"{'None' if shape is None else list(shape)} in {self.label}."
            )
        if jnp.result_type(value) != leaf.dtype:
            raise SlipError(
                f"`{self.role}` must return the dtype of the {kind}: wanted "
                f"{leaf.dtype} for {leaf.name}, got {jnp.result_type(value)} in "
                f"{self.label}."
            )
        return jnp.asarray(value)

    def _check_empty(self, value: Any, leaf: Leaf) -> None:
        """Raises where something is claimed of what holds no gradient."""
        if value is None or getattr(value, "dtype", None) == dtypes.float0:
            return
        raise SlipError(
            f"`{self.role}` must return None or float0 for {leaf}, which holds no "
            f"gradient, got {describe(value)} in {self.label}."
        )


def match_cotangents(
    inputs: Inputs, returned: PyTree, role: str, label: str
) -> list[Values]:
    """Returns the moving leaves of each differentiated argument, in argnums' order.

    One argument's tree may come bare; a tuple may have a place for each differentiated
    argument, or for every argument: what stands at the others' is not looked at.

    Raises:
      SlipError: It is none of these.
    """
    wanted = inputs.argnums
    if len(wanted) == 1 and _flatten(returned)[1] == inputs.argument_tree(wanted[0]):
        tree = Returned(returned, role, label)
        return [tree.like_argument(inputs, wanted[0])]
    places: Sequence[int] | None = None
    if type(returned) is tuple:
        if len(returned) == len(wanted):
            places = range(len(wanted))
        elif len(returned) == len(inputs.names):
            places = wanted
    if places is None and len(wanted) == 1:
        tree = Returned(returned, role, label)
        return [tree.like_argument(inputs, wanted[0])]
    if places is None:
        names = ", ".join(inputs.names[argument] for argument in wanted)
        raise SlipError(
            f"`{role}` must return a tuple with one tree for each of {names}, got "
            f"{describe(returned)}."
        )
    return [
        Returned(returned[place], role, f"{label}[{place}]").like_argument(
            inputs, argument
        )
        for place, argument in zip(places, wanted, strict=True)
    ]


def moving_order(inputs: Inputs) -> list[int]:
    """Where each moving leaf stands when arguments are visited in argnums' order."""
    visited = [
        leaf.name
        for argument in inputs.argnums
        for leaf in inputs.of_argument(argument)
        if leaf.role is Role.MOVES
    ]
    return [visited.index(leaf.name) for leaf in inputs.moving]


def cotangent_tree(program: Program, seed: Sequence[Any]) -> PyTree:
    """Returns cotangents shaped like the result, as `jax.vjp` takes them."""
    drawn = iter(seed)
    return jax.tree_util.tree_map(
        lambda leaf: next(drawn) if is_inexact(leaf.dtype) else _no_tangent(leaf.shape),
        program.result,
    )


def tangent_trees(inputs: Inputs, seed: Sequence[Any]) -> tuple[PyTree, ...]:
    """Returns tangents shaped like the arguments; zeros for floats that are held."""
    drawn = iter(seed)
    tangents = [_tangent(leaf, drawn) for leaf in inputs.leaves]
    return jax.tree_util.tree_unflatten(inputs.treedef, tangents)


def _tangent(leaf: Leaf, drawn: Any) -> Any:
    if leaf.role is Role.MOVES:
        return next(drawn)
    if is_inexact(leaf.dtype):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if leaf.role is Role.STATIC and leaf.source is None:
        return None
    return _no_tangent(leaf.shape)


def _no_tangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtypes.float0)


def _flatten(tree: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)


def match_results(own: Program, reference: Program) -> None:
    """Compares what two implementations return: trees, shapes, real or complex.

    Raises:
      SlipError: They are not alike.
    """
    ours, _ = jax.tree_util.tree_flatten_with_path(own.result)
    theirs, _ = jax.tree_util.tree_flatten_with_path(reference.result)
    trees = map(jax.tree_util.tree_structure, (own.result, reference.result))
    if len(set(trees)) > 1:
        names = [
            ["result" + jax.tree_util.keystr(path) for path, _ in flat]
            for flat in (theirs, ours)
        ]
        raise SlipError(
            "`fn` must return a tree like that of `reference`: "
            f"{_difference(names[0], names[1])}."
        )
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        if one.shape != other.shape or _kind(one.dtype) != _kind(other.dtype):
            raise SlipError(
                "`fn` must return the shapes and kinds of numbers of `reference`: "
                f"wanted {describe(other)} for result{jax.tree_util.keystr(path)}, got "
                f"{describe(one)}."
            )


def _kind(dtype: Any) -> str:
    if not is_inexact(dtype):
        return "none"
    return "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "real"


def _difference(wanted: list[str], found: list[str]) -> str:
    """Says how two lists of leaf names differ."""
    lacking = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    parts = [f"it lacks {', '.join(lacking[:4])}"] if lacking else []
    parts += [f"it has {', '.join(extra[:4])}"] if extra else []
    return " and ".join(parts) or "its containers are of other types"
