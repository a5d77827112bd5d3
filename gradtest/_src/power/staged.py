"""Functions of trees as programs that can be taken apart: inlined and pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import jaxprs

PyTree = Any
# What JAX hands to rules that want to know what takes no part.
_ZEROS = ("SymbolicZero", "Zero")


class Staged:
    """A function traced at some arguments, with the tree of its results.

    Attributes:
      program: The traced function, of the arrays among the leaves of its arguments.
      result: Its results: arrays are shapes and dtypes, all else is as it came.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]):
        self.leaves, tree = jax.tree_util.tree_flatten(args)
        self.places = [i for i, leaf in enumerate(self.leaves) if is_array(leaf)]
        returned: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            whole = list(self.leaves)
            for place, array in zip(self.places, arrays, strict=True):
                whole[place] = array
            leaves, out_tree = jax.tree_util.tree_flatten(
                function(*jax.tree_util.tree_unflatten(tree, whole)),
                is_leaf=lambda leaf: leaf is None,
            )
            returned[:] = [leaves, out_tree]
            return [jnp.asarray(leaf) for leaf in leaves if is_array(leaf)]

        arrays = [self.leaves[i] for i in self.places]
        self.program = jax.make_jaxpr(flat)(*arrays)
        leaves, self._out_tree = returned
        self._out = [type_of(leaf) if is_array(leaf) else leaf for leaf in leaves]

    @property
    def result(self) -> PyTree:
        """The results, with types in place of arrays."""
        return jax.tree_util.tree_unflatten(self._out_tree, self._out)

    @property
    def count(self) -> int:
        """How many arrays are among the results."""
        return sum(map(is_array, self._out))

    def arrays_of(self, returned: PyTree) -> list[Any]:
        """Returns the arrays among results of the same structure."""
        leaves = jax.tree_util.tree_leaves(returned, is_leaf=lambda leaf: leaf is None)
        return [leaf for leaf in leaves if is_array(leaf)]

    def rebuilt(self, arrays: Sequence[Any]) -> PyTree:
        """Returns the results with these arrays in place of the traced ones."""
        rest = iter(arrays)
        return jax.tree_util.tree_unflatten(
            self._out_tree,
            [next(rest) if is_array(leaf) else leaf for leaf in self._out],
        )

    def program_of(self, wanted: Sequence[Any]) -> Any:
        """Returns the simplified program of some results, given by their types."""
        arrays = [leaf for leaf in self._out if is_array(leaf)]
        places = [
            next(i for i, leaf in enumerate(arrays) if leaf is one) for one in wanted
        ]
        return simplified(self.program, places)

    def place_of(self, wanted: Any) -> int:
        """Returns which of the program's results has this type."""
        arrays = [leaf for leaf in self._out if is_array(leaf)]
        return next(i for i, leaf in enumerate(arrays) if leaf is wanted)


def simplified(program: Any, places: Sequence[int] | None = None) -> Any:
    """Returns a program with its calls inlined and without what no result needs."""
    whole = jax.make_jaxpr(lambda *args: inlined(program, args))(*_types(program))
    body = jaxprs.open_body(whole)
    chosen = range(len(body.outvars)) if places is None else places

    def needed(*args: Any) -> list[Any]:
        results = inlined(whole, args, _live(whole, chosen), chosen)
        return [results[k] for k in range(len(chosen))]

    return jax.make_jaxpr(needed)(*_types(program))


def _types(program: Any) -> list[Any]:
    return [type_of(var) for var in jaxprs.open_body(program).invars]


def inlined(
    program: Any,
    args: Sequence[Any],
    live: frozenset[int] | None = None,
    places: Sequence[int] | None = None,
) -> list[Any]:
    """Evaluates a program, calls and all; only the live equations where given."""
    body = jaxprs.open_body(program)
    env = dict(zip(body.constvars, body.consts, strict=True))
    env |= zip(body.invars, args, strict=True)

    def read(atom: Any) -> Any:
        if jaxprs.is_literal(atom):
            return np.asarray(atom.val, atom.aval.dtype) if _plain(atom) else atom.val
        return env[atom]

    for i, eqn in enumerate(body.eqns):
        if live is not None and i not in live:
            continue
        operands = [read(atom) for atom in eqn.invars]
        with jaxprs.in_the_name_of(eqn):
            if eqn.primitive.name in jaxprs.CALLS:
                (inner,) = jaxprs.subprograms(eqn)
                results = inlined(inner, operands)
            else:
                results = jaxprs.bind(eqn, operands, eqn.params)
        env.update(zip(eqn.outvars, results, strict=True))
    wanted = body.outvars if places is None else [body.outvars[k] for k in places]
    return [read(atom) for atom in wanted]


def _plain(atom: Any) -> bool:
    return isinstance(getattr(atom.aval, "dtype", None), np.dtype)


def _live(program: Any, places: Sequence[int]) -> frozenset[int]:
    body = jaxprs.open_body(program)
    wanted = {id(body.outvars[k]) for k in places}
    live = set()
    for i, eqn in reversed(list(enumerate(body.eqns))):
        effects = jaxprs.has_side_effects(eqn)
        if effects or any(id(var) in wanted for var in eqn.outvars):
            live.add(i)
            wanted |= {id(atom) for atom in eqn.invars}
    return frozenset(live)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, traced or not, or the type of one."""
    if isinstance(leaf, bool | int | float | complex):
        return True
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    is_zero = dtype == jax.dtypes.float0 or type(leaf).__name__ in _ZEROS
    return dtype is not None and shape is not None and not is_zero


def type_of(leaf: Any) -> Any:
    """Returns the shape and dtype of an array, of any kind that JAX takes."""
    aval = getattr(leaf, "aval", leaf)
    dtype = getattr(aval, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return jax.ShapeDtypeStruct(aval.shape, dtype)
    if hasattr(aval, "shape"):
        leaf = aval
    weak = getattr(aval, "weak_type", False)
    manual = getattr(aval, "manual_axis_type", None)
    axes = frozenset(getattr(manual, "varying", ()))
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf),
        jnp.result_type(leaf),
        weak_type=bool(weak),
        **({"vma": axes} if axes else {}),
    )
