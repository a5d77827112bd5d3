"""A custom rule as it looks at one of its calls: what can be broken of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import jaxprs
from gradtest._src.lifting import is_inexact
from gradtest._src.power.staged import Staged, inlined, type_of
from gradtest._src.power.staged import is_array as is_array

PyTree = Any
VJP, JVP = "custom_vjp", "custom_jvp"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array that a rule takes or gives.

    Attributes:
      name: What messages call it.
      shape: Its shape.
      dtype: Its dtype; None for what is no array of numbers.
      peak: Where it was largest when the rule was looked at; the middle if unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    peak: tuple[int, ...] = ()

    def is_like(self, other: Slot) -> bool:
        """Whether one array can stand in the other's place."""
        return self.shape == other.shape and self.dtype == other.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class SeenRule:
    """A rule's derivative at one call.

    Leaves are numbered as `jax.tree_util.tree_leaves` has them.

    Attributes:
      kind: "custom_vjp" or "custom_jvp".
      given: For a `custom_vjp` the residuals, then the cotangents of the results; for a
        `custom_jvp` the primals, then the tangents.
      count: How many of `given` are residuals, or primals.
      returned: By number, the cotangents of operands, or the tangents of results, that
        the rule computes; what it has no cotangent for is left out.
      tree: Structure of the tuple of operands, or of the tangents of the results.
      program: The derivative, from `given` to `returned`, inlined and pruned.
      outputs: For each residual, a result of the rule's `fwd` that is like it, if any,
        and is not that residual.
      fixed: The residuals on which nothing that moves has an influence.
      source: Where the rule was written, if known.
    """

    kind: str
    given: tuple[Slot, ...]
    count: int
    returned: dict[int, Slot]
    tree: Any
    program: Any
    outputs: dict[int, int] = dataclasses.field(default_factory=dict)
    fixed: frozenset[int] = frozenset()
    source: Any = None


def seen_vjp(
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    args: Sequence[PyTree],
    *,
    names: Sequence[str] = (),
    moving: Sequence[bool] = (),
    wrap: Callable[[Any], Any] = lambda leaf: leaf,
) -> SeenRule:
    """Looks at a `custom_vjp` rule at one call.

    Args:
      fwd: Takes `args`; returns the pair of result and residuals.
      bwd: Takes residuals and cotangents; returns one cotangent for each of `args`.
      args: The arguments, without those in `nondiff_argnums`: trees of arrays, traced
        ones or `jax.ShapeDtypeStruct`s. Of arrays with values it is known where the
        cotangents are largest.
      names: A name for each leaf of the arguments.
      moving: For each leaf, whether anything depends on its cotangent.
      wrap: Makes of a leaf what `fwd` wants (`symbolic_zeros=True`).

    Raises:
      Exception: Whatever the rule itself raises.
    """
    args = tuple(args)
    tree = jax.tree_util.tree_structure(args)
    forward = Staged(lambda *a: fwd(*jax.tree_util.tree_map(wrap, a)), args)
    result, residuals = forward.result
    backward = Staged(bwd, (residuals, _cotangents(result)))
    leaves = spread(_as_tuple(backward.result), tree)
    if leaves is None:
        raise TypeError("bwd returned another structure than that of the arguments")
    named = _named(names, len(leaves), "operand")
    flags = list(moving) or [True] * len(leaves)
    wanted = [
        k for k, leaf in enumerate(leaves) if _is_float(leaf) and flags[k] and leaf.size
    ]
    program = backward.program_of([leaves[k] for k in wanted])
    peaks = _peaks(forward, backward, args, [leaves[k] for k in wanted])
    count = len(jax.tree_util.tree_leaves(residuals))
    return SeenRule(
        kind=VJP,
        given=_slots(
            (residuals, _cotangents(result)), ("residual", "cotangent"), count
        ),
        count=count,
        returned={
            k: Slot(_derivative(named[k]), leaves[k].shape, leaves[k].dtype, peak)
            for k, peak in zip(wanted, peaks, strict=True)
        },
        tree=tree,
        program=program,
        outputs=_like_outputs(forward, result, residuals),
        fixed=_fixed(forward, residuals, flags),
    )


def seen_jvp(
    jvp: Callable[..., Any],
    primals: Sequence[PyTree],
    *,
    names: Sequence[str] = (),
) -> SeenRule:
    """Looks at a `custom_jvp` rule at one call.

    Args:
      jvp: Takes primals and tangents; returns the pair of results and their tangents.
      primals: The arguments, as for `seen_vjp`.
      names: A name for each leaf of the primals.

    Raises:
      Exception: Whatever the rule itself raises.
    """
    primals = tuple(primals)
    tangents = jax.tree_util.tree_map(_tangent, primals)
    forward = Staged(jvp, (primals, tangents))
    _, moved = forward.result
    leaves, tree = jax.tree_util.tree_flatten(moved)
    wanted = [k for k, leaf in enumerate(leaves) if _is_float(leaf) and leaf.size]
    peaks = _peaks(None, forward, primals, [leaves[k] for k in wanted])
    count = len(jax.tree_util.tree_leaves(primals))
    named = _named(names, count, "operand")
    given = _slots((primals, tangents), ("operand", "tangent"), count)
    given = tuple(
        dataclasses.replace(slot, name=name)
        for slot, name in zip(
            given, [*named, *(f"the tangent of {name}" for name in named)], strict=True
        )
    )
    names_out = ["result"] if len(leaves) == 1 else _named((), len(leaves), "result")
    return SeenRule(
        kind=JVP,
        given=given,
        count=count,
        returned={
            k: Slot(
                f"the tangent of {names_out[k]}", leaves[k].shape, leaves[k].dtype, peak
            )
            for k, peak in zip(wanted, peaks, strict=True)
        },
        tree=tree,
        program=forward.program_of([leaves[k] for k in wanted]),
    )


def spread(out: PyTree, tree: Any) -> list[Any] | None:
    """Returns what a tree of cotangents has for each leaf of `tree`: None for none.

    None altogether where it does not fit.
    """
    leaves: list[Any] = []
    template = jax.tree_util.tree_unflatten(tree, [0] * tree.num_leaves)

    def note(cotangent: Any, below: Any) -> None:
        leaves.extend([cotangent] * len(jax.tree_util.tree_leaves(below)))

    try:
        jax.tree_util.tree_map(note, out, template, is_leaf=lambda leaf: leaf is None)
    except (ValueError, TypeError):
        return None
    return leaves if len(leaves) == tree.num_leaves else None


def _as_tuple(out: Any) -> Any:
    return tuple(out) if isinstance(out, list) else out


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and is_inexact(leaf.dtype)


def _tangent(leaf: Any) -> Any:
    leaf = type_of(leaf)
    if is_inexact(leaf.dtype):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _cotangents(result: PyTree) -> PyTree:
    return jax.tree_util.tree_map(_tangent, result)


def _slots(
    given: tuple[PyTree, PyTree], words: tuple[str, str], count: int
) -> tuple[Slot, ...]:
    slots = []
    for tree, word in zip(given, words, strict=True):
        leaves = jax.tree_util.tree_leaves(tree)
        slots += [
            Slot(
                word if len(leaves) == 1 else f"{word} {k}",
                tuple(jnp.shape(leaf)) if is_array(leaf) else (),
                jnp.result_type(leaf) if is_array(leaf) else None,
            )
            for k, leaf in enumerate(leaves)
        ]
    return tuple(slots)


def _named(names: Sequence[str], count: int, word: str) -> list[str]:
    fits = len(names) == count
    return list(names) if fits else [f"{word} {k}" for k in range(count)]


def _derivative(name: str) -> str:
    return f"d{name}" if name.isidentifier() else f"the cotangent of {name}"


def _like_outputs(forward: Staged, result: Any, residuals: Any) -> dict[int, int]:
    """Returns, for residuals, a result that is like each one and is not the same."""
    outs = jaxprs.open_body(forward.program).outvars
    found: dict[int, int] = {}
    results = jax.tree_util.tree_leaves(result)
    for r, residual in enumerate(jax.tree_util.tree_leaves(residuals)):
        if not _is_float(residual):
            continue
        for k, out in enumerate(results):
            alike = _is_float(out) and (out.shape, out.dtype) == (
                residual.shape,
                residual.dtype,
            )
            if (
                alike
                and outs[forward.place_of(out)]
                is not (outs[forward.place_of(residual)])
            ):
                found.setdefault(r, k)
    return found


def _fixed(forward: Staged, residuals: Any, moving: Sequence[bool]) -> frozenset[int]:
    """Returns the residuals that do not depend on an operand that moves."""
    body = jaxprs.open_body(forward.program)
    reached = {
        id(var)
        for var, place in zip(body.invars, forward.places, strict=True)
        if moving[place] and jaxprs.is_floating(var)
    }
    for eqn in body.eqns:
        if any(id(atom) in reached for atom in eqn.invars):
            reached |= {id(var) for var in eqn.outvars if jaxprs.is_floating(var)}
    return frozenset(
        k
        for k, leaf in enumerate(jax.tree_util.tree_leaves(residuals))
        if is_array(leaf) and id(body.outvars[forward.place_of(leaf)]) not in reached
    )


def _peaks(
    forward: Staged | None, derivative: Staged, args: Any, wanted: Sequence[Any]
) -> list[tuple[int, ...]]:
    """Returns where each wanted result is largest, or its middle."""
    try:
        values = _values(forward, derivative, args)
    except Exception:  # traced, or malformed: where it is largest matters little
        values = None
    found = []
    for one in wanted:
        size = tuple(n // 2 for n in one.shape)
        if values is not None:
            array = np.abs(np.asarray(values[derivative.place_of(one)]))
            array = np.where(np.isfinite(array), array, 0)
            size = tuple(map(int, np.unravel_index(np.argmax(array), array.shape)))
        found.append(size)
    return found


def _values(forward: Staged | None, derivative: Staged, args: Any) -> Any:
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(args) if is_array(leaf)]
    if not leaves or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return None
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    if forward is not None:
        _, residuals = forward.rebuilt(_run(forward.program, leaves))
        leaves = [x for x in jax.tree_util.tree_leaves(residuals) if is_array(x)]
    given = [derivative.leaves[i] for i in derivative.places][len(leaves) :]
    random = np.random.default_rng(0)
    seeds = [_drawn(random, leaf) for leaf in given]
    return _run(derivative.program, [*leaves, *seeds])


def _run(program: Any, args: Sequence[Any]) -> list[Any]:
    consts = jaxprs.open_body(program).consts
    if any(isinstance(const, jax.core.Tracer) for const in consts):
        raise TypeError("the rule closes over a traced value")
    with jaxprs.outside_of_traces():
        return inlined(program, args)


def _drawn(random: np.random.Generator, leaf: Any) -> Any:
    if not is_inexact(leaf.dtype):
        return np.zeros(leaf.shape, leaf.dtype)
    return np.asarray(random.uniform(0.5, 1.5, leaf.shape)).astype(leaf.dtype)
