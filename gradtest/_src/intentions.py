"""Custom rules that differ from their functions on purpose, and what they claim.

A straight-through estimator or a gradient clipping is no mistake, and nothing to wave
through either: its author says what it stands in for, and that is checked.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src import jaxprs
from gradtest._src.execution import SlipError
from gradtest._src.jaxprs import Eqn, Jaxpr, RuleSource
from gradtest._src.stand_ins import StandIn

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Product:
    """A vector-Jacobian product that is no function's derivative; see `vjp`."""

    call: Callable[[tuple[PyTree, ...], PyTree], tuple[PyTree, ...]]


def vjp(product: Callable[[tuple[PyTree, ...], PyTree], tuple[PyTree, ...]]) -> Product:
    """Declares a vector-Jacobian product that belongs to no function.

    Gradient clipping is one: no function has it for a derivative.

    Args:
      product: `product(primals, cotangent)` takes the tuple of the rule's arguments
        (those in `nondiff_argnums` left out) and a cotangent like the rule's result;
        it returns one cotangent for each argument, or None for zero.

    Returns:
      A value for `expect_differs`.

    Raises:
      TypeError: `product` is not callable.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> @jax.custom_vjp
      ... def clipped(x):
      ...     return x
      >>> clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
      >>> clip = gradtest.vjp(lambda primals, g: (jnp.clip(g, -0.1, 0.1),))
      >>> report = gradtest.assert_autodiff_matches(
      ...     lambda x: jnp.sum(clipped(x) ** 2),
      ...     jnp.ones(3),
      ...     order=1,
      ...     expect_differs={"clipped": clip},
      ... )
      >>> report.verdict.value
      'PASS'
    """
    if not callable(product):
        raise TypeError(f"`product` must be callable, got {product!r}.")
    return Product(product)


Alternative = Callable[..., PyTree] | Product
Intentions = Mapping[Any, Alternative]


def check_intentions(expect_differs: Any) -> None:
    """Raises TypeError where `expect_differs` maps no rules to alternatives."""
    if expect_differs is None:
        return
    if not isinstance(expect_differs, Mapping):
        raise TypeError(
            "`expect_differs` must be a mapping {rule or name: alternative}, got "
            f"{expect_differs!r}."
        )
    for rule, alternative in expect_differs.items():
        if not isinstance(rule, str) and not callable(rule):
            raise TypeError(
                "`expect_differs` must name rules by their functions or names, got "
                f"{rule!r}."
            )
        if not isinstance(alternative, Product) and not callable(alternative):
            raise TypeError(
                f"`expect_differs` must give {describe_rule(rule)} a function whose "
                "derivative it should have, or gradtest.vjp(...), got "
                f"{alternative!r}."
            )


def describe_rule(rule: Any) -> str:
    """Returns the name of a rule that a user named by a string or its function."""
    return rule if isinstance(rule, str) else getattr(rule, "__name__", repr(rule))


def names(rule: Any, source: RuleSource) -> bool:
    """Whether a user's name or function means the rule of this source."""
    if isinstance(rule, str):
        return fnmatch.fnmatchcase(source.name, rule)
    return jaxprs.source_of(rule) == source.identity


def stand_ins(
    jaxpr: Jaxpr, intentions: Intentions, left: Sequence[RuleSource] = ()
) -> dict[int, StandIn]:
    """Returns what stands in for each declared rule's calls, by the call's `id`.

    Args:
      jaxpr: The program that calls the rules.
      intentions: The user's declarations.
      left: Rules whose calls are gone from the program: it differentiates them itself.

    Raises:
      SlipError: An alternative does not fit the rule, or names none of the program's.
    """
    found: dict[int, StandIn] = {}
    unused = [r for r in intentions if not any(names(r, source) for source in left)]
    seen = [source.name for source in left]
    for eqn in jaxprs.walk(jaxpr):
        if eqn.primitive.name not in jaxprs.CUSTOM_RULES:
            continue
        source = jaxprs.read_rule(eqn)
        seen.append(source.name)
        for rule, alternative in intentions.items():
            if names(rule, source):
                found[id(eqn)] = stand_in(eqn, source, alternative)
                unused = [other for other in unused if other is not rule]
    if unused:
        called = ", ".join(dict.fromkeys(seen)) or "none"
        raise SlipError(
            f"`expect_differs` names {describe_rule(unused[0])!r}, which is no custom "
            f"rule that the function calls: it calls {called}."
        )
    return found


def stand_in(eqn: Eqn, source: RuleSource, alternative: Alternative) -> StandIn:
    """Returns what stands in for a call of a declared rule."""
    is_product = isinstance(alternative, Product)
    flat = _Flat(eqn, source, alternative)
    avals = jaxprs.operand_types(eqn)
    if is_product:
        avals += jaxprs.result_types(eqn)
    try:
        program = jax.make_jaxpr(flat.product if is_product else flat.function)(*avals)
    except SlipError:
        raise
    except Exception as error:
        error.add_note(
            f"gradtest: raised by the alternative that `expect_differs` has for "
            f"{source.name!r}, while it was traced."
        )
        raise
    return StandIn(program, is_product)


class _Flat:
    """An alternative as a function of the flat, batched operands of a rule's call."""

    def __init__(self, eqn: Eqn, source: RuleSource, alternative: Any):
        self.eqn, self.name = eqn, source.name
        self.alternative = alternative
        self.first = source.num_consts
        layout = jaxprs.rule_layout(eqn)
        count = len(eqn.invars) - self.first
        self.tree: Any = layout.tree
        if self.tree is None or self.tree.num_leaves != count:
            self.tree = jax.tree_util.tree_structure((0,) * count)
        self.batches = [
            (batch.operands[-count:], batch.results)
            for batch in layout.batches
            if any(dim is not None for dim in batch.operands[-count:])
        ]
        self.out_avals = jaxprs.result_types(eqn)

    def function(self, *operands: Any) -> list[Any]:
        """Returns the alternative's results, one for each of the call's."""

        def call(*flat: Any) -> list[Any]:
            returned = self.alternative(*jax.tree_util.tree_unflatten(self.tree, flat))
            return jax.tree_util.tree_leaves(returned)

        for dims, out_dims in reversed(self.batches):
            call = jax.vmap(call, in_axes=dims, out_axes=list(out_dims) or 0)
        results = call(*operands[self.first :])
        found = [jnp.shape(result) for result in results]
        wanted = [aval.shape for aval in self.out_avals]
        if found != wanted:
            raise SlipError(
                f"`expect_differs` must give {self.name!r} a function with results "
                f"like the rule's: wanted shapes {wanted}, got {found}."
            )
        return [
            jnp.asarray(result).astype(aval.dtype)
            for result, aval in zip(results, self.out_avals, strict=True)
        ]

    def product(self, *values: Any) -> list[Any]:
        """Returns the declared cotangents, one for each of the call's operands."""
        count = len(self.eqn.invars)
        operands, cotangents = values[self.first : count], values[count:]
        call = self._pull
        for dims, out_dims in reversed(self.batches):
            call = _batched(call, dims, out_dims or (0,) * len(cotangents))
        pulled = call(*operands, *cotangents)
        consts = [jnp.zeros(jnp.shape(value)) for value in values[: self.first]]
        return [*consts, *pulled]

    def _pull(self, *values: Any) -> list[Any]:
        count = self.tree.num_leaves
        operands, cotangents = values[:count], values[count:]
        primals = jax.tree_util.tree_unflatten(self.tree, operands)
        out_tree = jaxprs.rule_out_tree(self.eqn)
        cotangent = jax.tree_util.tree_unflatten(out_tree, cotangents)
        returned = self.alternative.call(primals, cotangent)
        if not isinstance(returned, tuple | list) or len(returned) != len(primals):
            raise SlipError(
                f"`expect_differs` must give {self.name!r} a gradtest.vjp that returns "
                f"a tuple with one cotangent for each of its {len(primals)} arguments, "
                f"got {returned!r}."
            )
        pulled: list[Any] = []
        for primal, part in zip(primals, returned, strict=True):
            leaves = jax.tree_util.tree_leaves(primal)
            if part is None:
                pulled += [jnp.zeros(jnp.shape(leaf)) for leaf in leaves]
                continue
            parts = _leaves_like(primal, part)
            pulled += [
                jnp.zeros(jnp.shape(x)) if p is None else _shaped(p, x, self.name)
                for p, x in zip(parts, leaves, strict=True)
            ]
        return pulled


def _leaves_like(primal: PyTree, part: PyTree) -> list[Any]:
    """Returns what a cotangent's tree has at each leaf of an argument's."""
    found: list[Any] = []
    jax.tree_util.tree_map(lambda _, c: found.append(c), primal, part)
    return found


def _shaped(cotangent: Any, primal: Any, name: str) -> Any:
    if jnp.shape(cotangent) != jnp.shape(primal):
        raise SlipError(
            f"`expect_differs` must give {name!r} a gradtest.vjp whose cotangents have "
            f"the shapes of the arguments: wanted {list(jnp.shape(primal))}, got "
            f"{list(jnp.shape(cotangent))}."
        )
    if cotangent.dtype == jax.dtypes.float0:
        return jnp.zeros(jnp.shape(primal))
    return jnp.asarray(cotangent)


def _batched(
    call: Callable[..., list[Any]],
    dims: Sequence[int | None],
    out_dims: Sequence[int | None],
) -> Callable[..., list[Any]]:
    """Maps a product over one batch axis; what is not batched sums its cotangents."""
    mapped = jax.vmap(call, in_axes=(*dims, *out_dims))

    def pull(*values: Any) -> list[Any]:
        return [
            value.sum(axis=0) if dim is None else jnp.moveaxis(value, 0, dim)
            for value, dim in zip(mapped(*values), dims, strict=True)
        ]

    return pull
