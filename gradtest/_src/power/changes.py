"""The changes that mutations are made of: of leaves, and of the parts of a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src.power.seen import spread
from gradtest._src.power.staged import is_array

Leaves = list[Any]
# Takes all leaves, None for one that there is none of; returns them changed.
OfLeaves = Callable[[Leaves], Leaves]


def breaking_cotangents(
    function: Callable[..., Any], tree: Any, change: OfLeaves
) -> Callable[..., Any]:
    """Changes the cotangents that a `bwd` returns for the leaves of `tree`."""

    @functools.wraps(function)
    def bwd(*args: Any) -> Any:
        returned = function(*args)
        whole = tuple(returned) if isinstance(returned, list) else returned
        leaves = spread(whole, tree)
        if leaves is None:
            return returned
        return jax.tree_util.tree_unflatten(tree, change(leaves))

    return bwd


def breaking_tangents(
    function: Callable[..., Any], change: OfLeaves
) -> Callable[..., Any]:
    """Changes the tangents that a `jvp` returns."""

    @functools.wraps(function)
    def jvp(*args: Any) -> Any:
        result, moved = function(*args)
        leaves, tree = jax.tree_util.tree_flatten(moved)
        return result, jax.tree_util.tree_unflatten(tree, change(leaves))

    return jvp


def breaking_residuals(
    function: Callable[..., Any], change: OfLeaves
) -> Callable[..., Any]:
    """Changes the residuals that a `bwd` is given."""

    @functools.wraps(function)
    def bwd(*args: Any) -> Any:
        *static, residuals, cotangents = args
        leaves, tree = jax.tree_util.tree_flatten(residuals)
        broken = jax.tree_util.tree_unflatten(tree, change(leaves))
        return function(*static, broken, cotangents)

    return bwd


def breaking_given(
    function: Callable[..., Any], change: OfLeaves
) -> Callable[..., Any]:
    """Changes the primals and tangents of a `jvp`, for its derivative alone."""

    @functools.wraps(function)
    def jvp(*args: Any) -> Any:
        *static, primals, tangents = args
        leaves, tree = jax.tree_util.tree_flatten((primals, tangents))
        broken = jax.tree_util.tree_unflatten(tree, change(leaves))
        # The rule's value is right: the slip is in its derivative.
        return function(*static, primals, tangents)[0], function(*static, *broken)[1]

    return jvp


def keeping_output(
    function: Callable[..., Any], k: int, output: int
) -> Callable[..., Any]:
    """Lets a `fwd` keep one of its results in place of a residual."""

    @functools.wraps(function)
    def fwd(*args: Any) -> Any:
        result, residuals = function(*args)
        results = jax.tree_util.tree_leaves(result)
        leaves, tree = jax.tree_util.tree_flatten(residuals)
        fits = k < len(leaves) and output < len(results)
        if fits and jnp.shape(leaves[k]) == jnp.shape(results[output]):
            leaves[k] = results[output]
        return result, jax.tree_util.tree_unflatten(tree, leaves)

    return fwd


def at(k: int, change: Callable[[Any], Any]) -> OfLeaves:
    """Changes one leaf."""

    def changed(leaves: Leaves) -> Leaves:
        if k >= len(leaves) or not is_array(leaves[k]):
            return leaves
        old = jnp.asarray(leaves[k])
        return [*leaves[:k], change(old).astype(old.dtype), *leaves[k + 1 :]]

    return changed


def exchanged(i: int, k: int) -> OfLeaves:
    """Exchanges two leaves."""

    def changed(leaves: Leaves) -> Leaves:
        if k >= len(leaves) or not (is_array(leaves[i]) and is_array(leaves[k])):
            return leaves
        if jnp.shape(leaves[i]) != jnp.shape(leaves[k]):
            return leaves
        turned = list(leaves)
        turned[i], turned[k] = leaves[k], leaves[i]
        return turned

    return changed


def borrowed(k: int, other: int) -> OfLeaves:
    """Takes another leaf in one's place."""

    def changed(leaves: Leaves) -> Leaves:
        if max(k, other) >= len(leaves):
            return leaves
        if jnp.shape(leaves[k]) != jnp.shape(leaves[other]):
            return leaves
        return [*leaves[:k], leaves[other], *leaves[k + 1 :]]

    return changed


def boxed(
    shape: tuple[int, ...], box: Sequence[tuple[int, int]], factor: float
) -> Callable[[Any], Any]:
    """Returns a function that multiplies a box of entries by a factor."""

    def change(value: Any) -> Any:
        if value.shape != shape:
            return value
        inside: Any = True
        for axis, (first, last) in enumerate(box):
            if last - first < shape[axis]:
                place = lax.broadcasted_iota(jnp.int32, shape, axis)
                inside = inside & (place >= first) & (place < last)
        return jnp.where(inside, value * factor, value)

    return change


def times(factor: float) -> Callable[[Any], Any]:
    """Multiplies an array by a factor."""
    # So written, a factor near 1 is not rounded away in half precision.
    return lambda x: x + x * (factor - 1)


def half(rows: int, peak: int) -> tuple[int, int]:
    """Returns the half of the rows in which the peak is."""
    size = rows // 2
    return (0, size) if peak < size else (rows - size, rows)
