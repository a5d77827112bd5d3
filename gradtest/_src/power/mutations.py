"""How a custom rule is broken: small slips, each a mutant of the rule.

One representation serves both uses. A `Mutation` is applied to a function: the `bwd` or
`fwd` of a `custom_vjp`, the `jvp` of a `custom_jvp`. That may be the author's function,
with trees (`nondiff_argnums` come first, as JAX hands them over), or JAX's flat form of
it with tuples for trees. What comes back has the same signature, and can be traced,
batched, differentiated and run as the original.

    seen = seen_vjp(rule.fwd, rule.bwd, args)      # or seen_jvp(rule.jvp, args)
    for mutation in mutations_of(seen):
        broken = mutation.applied(rule.bwd if mutation.part == "bwd" else rule.fwd)

A mutation that does not fit a call (other shapes, other structure) leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.lifting import is_inexact
from gradtest._src.power import terms
from gradtest._src.power.changes import (
    Leaves,
    OfLeaves,
    at,
    borrowed,
    boxed,
    breaking_cotangents,
    breaking_given,
    breaking_residuals,
    breaking_tangents,
    exchanged,
    half,
    keeping_output,
    times,
)
from gradtest._src.power.seen import JVP, VJP, SeenRule, Slot, spread
from gradtest._src.power.staged import Staged, is_array, simplified
from gradtest._src.structure import structure_key


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to break a rule.

    Attributes:
      name: The kind of slip: "scale 1.01", "sign flip", "drop a term", ...
      part: What is broken: "bwd", "fwd" or "jvp".
      which: The leaf, residual or line that it concerns.
      says: What is different, such as "dw zero in rows 0..31".
      second_order: Whether it can only be seen in derivatives of the derivative.
      breaks: Makes the broken part of the right one.
    """

    name: str
    part: str
    which: str
    says: str
    second_order: bool = False
    breaks: Breaks = dataclasses.field(
        default=lambda function: function, repr=False, compare=False
    )

    def applied(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a part of a rule, broken.

        Args:
          function: `bwd(*nondiff, residuals, cotangents)`, `fwd(*args)` or
            `jvp(*nondiff, primals, tangents)`, of trees or of tuples of arrays.

        Returns:
          A function with the same signature.
        """
        return self.breaks(function)


class Breaks(Protocol):
    """Makes the broken part of a rule of the right one."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the broken one."""


def mutations_of(seen: SeenRule, *, unequal: bool = True) -> list[Mutation]:
    """Returns every mutation of a rule, as it was seen at one call.

    Args:
      seen: The rule: see `seen_vjp` and `seen_jvp`.
      unequal: Whether to leave out what comes to the same program as the rule itself
        or as another mutation.
    """
    proposed = list(_proposed(seen))
    return list(_distinct(seen, proposed)) if unequal else proposed


def scaled(seen: SeenRule, factor: float) -> Mutation:
    """Returns the mutation that scales all derivatives of a rule by one factor."""
    each = [at(k, times(factor)) for k in seen.returned]

    def change(leaves: Leaves) -> Leaves:
        return functools.reduce(lambda so_far, one: one(so_far), each, leaves)

    says = f"its whole derivative times {factor:.10g}"
    return _returned(seen, f"scale {factor:.10g}", "all", says, change)


def _proposed(seen: SeenRule) -> Iterator[Mutation]:
    for k, slot in seen.returned.items():
        yield from _of_a_leaf(seen, k, slot)
    yield from _swaps(seen)
    yield from _edits(seen)
    yield from _of_what_is_given(seen)


# --- of what the rule returns ---------------------------------------------------------


def _of_a_leaf(seen: SeenRule, k: int, slot: Slot) -> Iterator[Mutation]:
    def of(name: str, says: str, change: Callable[[Any], Any]) -> Mutation:
        return _returned(seen, name, slot.name, f"{slot.name} {says}", at(k, change))

    yield _scaled(seen, k, 1.01)
    yield of("sign flip", "with the other sign", lambda x: -x)
    yield of("drop a leaf", "dropped (zero)", jnp.zeros_like)
    if np.prod(slot.shape) > 1:
        box = tuple((i, i + 1) for i in slot.peak)
        entry = f"[{', '.join(map(str, slot.peak))}]"
        zero, double = boxed(slot.shape, box, 0.0), boxed(slot.shape, box, 2.0)
        yield of("zero one entry", f"zero at {entry}", zero)
        yield of("scale one entry", f"times 2 at {entry}", double)
    if slot.shape and slot.shape[0] > 1:
        first, last = half(slot.shape[0], slot.peak[0])
        box = ((first, last), *((0, n) for n in slot.shape[1:]))
        rows = f"rows {first}..{last - 1}" if last - first > 1 else f"row {first}"
        zero = boxed(slot.shape, box, 0.0)
        yield of("zero a block of rows", f"zero in {rows}", zero)
    if len(slot.shape) == 2 and slot.shape[0] == slot.shape[1] > 1:
        yield of("transpose", "transposed", lambda x: x.T)


def _scaled(seen: SeenRule, k: int, factor: float) -> Mutation:
    slot = seen.returned[k]
    by = f"{factor:.10g}"
    return _returned(
        seen,
        f"scale {by}",
        slot.name,
        f"{slot.name} times {by}",
        at(k, times(factor)),
    )


def _swaps(seen: SeenRule) -> Iterator[Mutation]:
    for (i, one), (k, other) in itertools.combinations(seen.returned.items(), 2):
        if one.is_like(other):
            both = f"{one.name} and {other.name}"
            says = f"{both} in each other's place"
            yield _returned(seen, "swap two leaves", both, says, exchanged(i, k))


def _returned(
    seen: SeenRule, name: str, which: str, says: str, change: OfLeaves
) -> Mutation:
    """Makes a mutation of what a rule returns."""
    if seen.kind == VJP:
        breaks = functools.partial(breaking_cotangents, tree=seen.tree, change=change)
        return Mutation(name, "bwd", which, says, breaks=breaks)
    breaks = functools.partial(breaking_tangents, change=change)
    return Mutation(name, "jvp", which, says, breaks=breaks)


# --- of what the rule is given --------------------------------------------------------


def _of_what_is_given(seen: SeenRule) -> Iterator[Mutation]:
    floats = [
        k
        for k, slot in enumerate(seen.given)
        if slot.dtype is not None and is_inexact(slot.dtype) and np.prod(slot.shape)
    ]
    kept = [k for k in floats if k < seen.count]
    for k in kept:
        yield from _of_a_residual(seen, k, kept)
    for k in floats if seen.kind == JVP else ():
        if k >= seen.count:
            slot = seen.given[k]
            says = f"{slot.name} left out"
            yield _given(seen, "drop a leaf", slot.name, says, at(k, jnp.zeros_like))


def _of_a_residual(seen: SeenRule, k: int, kept: Sequence[int]) -> Iterator[Mutation]:
    slot = seen.given[k]
    if k not in seen.fixed and _has_slope(seen.program, seen.given, k):
        stopped = at(k, lax.stop_gradient)
        says = f"{slot.name} under stop_gradient"
        stop = _given(seen, "stop_gradient", slot.name, says, stopped)
        yield dataclasses.replace(stop, second_order=True)
    name = "wrong residual"
    zero = at(k, jnp.zeros_like)
    yield _given(seen, name, slot.name, f"zero in place of {slot.name}", zero)
    for other in kept:
        if other != k and seen.given[other].is_like(slot):
            says = f"{seen.given[other].name} in place of {slot.name}"
            yield _given(seen, name, slot.name, says, borrowed(k, other))
            break
    if k in seen.outputs:
        says = f"the result in place of {slot.name}"
        breaks = functools.partial(keeping_output, k=k, output=seen.outputs[k])
        yield Mutation(name, "fwd", slot.name, says, breaks=breaks)


def _has_slope(program: Any, given: Sequence[Slot], k: int) -> bool:
    """Whether the derivative depends smoothly on something that it is given."""
    types = [var.aval for var in jaxprs.open_body(program).invars]
    place = sum(_takes_part(slot) for slot in given[:k])
    arrays = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in types]
    evaluate = functools.partial(terms.edited, program, edit=terms.NO_EDIT)

    def slope(values: list[Any], tangent: Any) -> Any:
        def along(value: Any) -> Any:
            return evaluate(args=[*values[:place], value, *values[place + 1 :]])

        return jax.jvp(along, (values[place],), (tangent,))[1]

    try:
        moved = simplified(jax.make_jaxpr(slope)(arrays, arrays[place]))
    except Exception:  # it has no derivative in that direction that could be missed
        return False
    body = jaxprs.open_body(moved)
    reached = {id(body.invars[-1])}
    for eqn in body.eqns:
        if any(id(atom) in reached for atom in eqn.invars):
            reached |= {id(var) for var in eqn.outvars}
    return any(id(atom) in reached for atom in body.outvars)


def _takes_part(slot: Slot) -> bool:
    return slot.dtype is not None


def _given(
    seen: SeenRule, name: str, which: str, says: str, change: OfLeaves
) -> Mutation:
    """Makes a mutation of residuals, or of primals and tangents."""
    if seen.kind == VJP:
        breaks = functools.partial(breaking_residuals, change=change)
        return Mutation(name, "bwd", which, says, breaks=breaks)
    breaks = functools.partial(breaking_given, change=change)
    return Mutation(name, "jvp", which, says, breaks=breaks)


# --- inside of the rule ---------------------------------------------------------------


def _edits(seen: SeenRule) -> Iterator[Mutation]:
    linear = seen.given[seen.count :] if seen.kind == JVP else ()
    for edit in terms.edits_of(seen.program, sum(map(_takes_part, linear))):
        name = "skip a reduction" if "sum" in edit.primitive else "drop a term"
        says = f"{edit.place or edit.primitive}: {edit.says}"
        part = "bwd" if seen.kind == VJP else "jvp"
        breaks = functools.partial(_edited, edit=edit, seen=seen)
        yield Mutation(name, part, edit.place, says, breaks=breaks)


def _edited(
    function: Callable[..., Any], edit: terms.Edit, seen: SeenRule
) -> Callable[..., Any]:
    @functools.wraps(function)
    def broken(*args: Any) -> Any:
        *static, first, second = args
        right = Staged(functools.partial(function, *static), (first, second))
        kept = _derivative_places(right, seen)
        if kept is None:
            return function(*args)
        program = simplified(right.program, kept)
        arrays = [right.leaves[i] for i in right.places]
        wrong = iter(terms.edited(program, arrays, edit))
        whole: Leaves = [None] * right.count
        if len(kept) < right.count:
            whole = right.arrays_of(function(*args))
        for place in kept:
            whole[place] = next(wrong)
        return right.rebuilt(whole)

    return broken


def _derivative_places(right: Staged, seen: SeenRule) -> list[int] | None:
    """Returns which arrays of a part's results are the derivatives that were seen."""
    if seen.kind == VJP:
        whole = right.result
        leaves = spread(tuple(whole) if isinstance(whole, list) else whole, seen.tree)
    else:
        leaves = jax.tree_util.tree_leaves(right.result[1])
    if leaves is None or max(seen.returned, default=0) >= len(leaves):
        return None
    wanted = [leaves[k] for k in seen.returned]
    if not all(map(is_array, wanted)):
        return None
    return [right.place_of(leaf) for leaf in wanted]


# --- which of them differ -------------------------------------------------------------


def _distinct(seen: SeenRule, proposed: Sequence[Mutation]) -> Iterator[Mutation]:
    """Yields the mutations that come to programs of their own."""
    known = {structure_key(seen.program)}
    for mutation in proposed:
        if mutation.part == "fwd" or mutation.second_order:
            yield mutation
            continue
        try:
            key = structure_key(_broken_program(seen, mutation))
        except Exception:  # it is told of when it is run
            yield mutation
            continue
        if key not in known:
            known.add(key)
            yield mutation


def _broken_program(seen: SeenRule, mutation: Mutation) -> Any:
    """Traces the program of the broken derivative."""
    types = [var.aval for var in jaxprs.open_body(seen.program).invars]
    arrays = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in types]
    places = [k for k, slot in enumerate(seen.given) if _takes_part(slot)]

    def right(first: tuple[Any, ...], second: tuple[Any, ...]) -> Any:
        whole = [*first, *second]
        results = terms.edited(seen.program, [whole[k] for k in places], terms.NO_EDIT)
        if seen.kind == JVP:
            return (), _placed(results, seen)
        return jax.tree_util.tree_unflatten(seen.tree, _placed(results, seen))

    def flat(*values: Any) -> list[Any]:
        whole: list[Any] = [None] * len(seen.given)
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        pair = tuple(whole[: seen.count]), tuple(whole[seen.count :])
        returned = mutation.applied(right)(*pair)
        leaves = returned[1] if seen.kind == JVP else spread(returned, seen.tree)
        assert leaves is not None
        return [leaves[k] for k in seen.returned]

    return simplified(jax.make_jaxpr(flat)(*arrays))


def _placed(results: Sequence[Any], seen: SeenRule) -> list[Any]:
    nothing = None if seen.kind == VJP else np.zeros((), jax.dtypes.float0)
    leaves: list[Any] = [nothing] * seen.tree.num_leaves
    for k, result in zip(seen.returned, results, strict=True):
        leaves[k] = result
    return leaves
