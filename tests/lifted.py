"""Lifts single programs, and compares them with themselves called in float64."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from gradtest._src import execution, kit
from gradtest._src.lifting import Evaluator, lifted_dtype, widen

# Importing it is what registers all primitives.
_REGISTERED = kit


@dataclasses.dataclass(frozen=True)
class Row:
    """A program, and what it should compute in float64 where that isn't itself."""

    name: str
    fn: Callable
    args: tuple
    reference: Callable | None = None


def _widened(leaf):
    wide = widen(leaf)
    if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.extended
    ):
        return jax.device_put(wide, leaf.sharding)
    return wide


def lift(fn, *args):
    """Returns the lifted results of `fn`, compiled, and what could not be lifted."""
    islands = set()
    jaxpr = jax.make_jaxpr(fn)(*args)
    with execution.float64():
        flat = [_widened(leaf) for leaf in jax.tree.leaves(args)]
        run = jax.jit(lambda leaves: Evaluator(islands=islands)(jaxpr, leaves))
        return jax.device_get(run(flat)), islands


def in_float64(fn, *args):
    """Returns the results of `fn` called on its arguments in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(widen, args)
        return jax.device_get(jax.tree.leaves(fn(*wide)))


def assert_lifted(row):
    found, islands = lift(row.fn, *row.args)
    wanted = in_float64(row.reference or row.fn, *row.args)
    assert not islands
    for result, truth in zip(found, wanted, strict=True):
        assert result.dtype == lifted_dtype(np.asarray(result).dtype)
        np.testing.assert_allclose(result, truth, rtol=1e-12, atol=1e-12)
