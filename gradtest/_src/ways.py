"""The ways in which JAX may run a rule, and what each of them should give.

Every way is a function of several examples, stacked along a leading axis, which returns
values and gradients; what it should give is put together from the rule's own, example
by example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src.case import Case
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.program import Values

EXAMPLES = 3
# The check of a rule's second derivative by its cotangent.
ALONG = "second order by the cotangent"
# The same by its operands, against differences of its own gradient: those are right
# where the gradient is, but for kinks.
BY_DIFFERENCES = "second order by differences"
_STEP = 1e-4
# So many leaves or outputs are tried alone.
_MOST_ALONE = 8
# So many leaves are batched alone: each compiles the rule four times.
_MOST_BATCHED = 4


@dataclasses.dataclass(frozen=True)
class Examples:
    """Several points of one rule, stacked along a leading axis."""

    moving: list[Any]
    held: list[Any]
    seed: list[Any]

    def first(self, count: int) -> Examples:
        """Returns the first examples, still stacked."""
        moving, held, seed = self._parts(slice(count))
        return Examples(moving, held, seed)

    def one(self, k: int) -> tuple[list[Any], list[Any], list[Any]]:
        """Returns one example: moving leaves, held values and seed."""
        return self._parts(k)

    def _parts(self, index: int | slice) -> tuple[list[Any], list[Any], list[Any]]:
        return (
            [value[index] for value in self.moving],
            [value[index] for value in self.held],
            [value[index] for value in self.seed],
        )


# Values, then gradients of the leaves, at one point: of leaves, held values and seed.
Claimed = Callable[..., Values]
Wanted = Callable[[Claimed, Examples], Values]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a rule.

    Attributes:
      check: Its name in the report.
      says: What differs, for the failure.
      names: Names of the outputs whose values it gives, and of the leaves whose
        gradients.
      jaxpr: Takes all examples' leaves, held values and seeds; returns both.
      wanted: The same as the rule gives them by itself.
    """

    check: str
    says: str
    names: tuple[str, ...]
    jaxpr: Jaxpr
    wanted: Wanted


def is_linearized(make: Any) -> bool:
    """Whether a way needs a forward mode."""
    return make is _linearized


def several(
    case: Case, make: Any, wanted: Any
) -> list[tuple[tuple[str, ...], Callable[..., Values], Wanted]]:
    """Returns what one entry of `WAYS` stands for: names, function and truth."""
    names = tuple(leaf.name for leaf in case.leaves)
    values = tuple(output.name for output in case.program.outputs)
    if make is _alone:
        some = range(len(names) if 1 < len(names) <= _MOST_ALONE else 0)
        return [
            ((*values, names[i]), _alone(case, i), _wanted_leaf(case, i)) for i in some
        ]
    if make is _along_operands:
        return [(names, _along_operands(case), _wanted_differences(case))]
    if make is _along_cotangent:
        return [(names, _along_cotangent(case), _wanted_along(case))]
    if make is _over_cotangents:
        return [(names, _over_cotangents(case), _wanted_cotangents(case))]
    if make is _batch_of_one_leaf:
        some = range(len(names) if 1 < len(names) <= _MOST_BATCHED else 0)
        return [
            (
                (*values, *names),
                _batch_of_one_leaf(case, i),
                _wanted_batch_of_leaf(case, i),
            )
            for i in some
        ]
    if make is _one_output:
        some = range(len(values) if 1 < len(values) <= _MOST_ALONE else 0)
        return [
            ((values[k], *names), _one_output(case, k), _wanted_output(case, k))
            for k in some
        ]
    return [((*values, *names), make(case), wanted)]


def _call_at(case: Case, held: Sequence[Any]) -> Callable[..., Values]:
    return lambda *moving: case.program.call(moving, held)


def _pull(function: Callable[..., Values], moving: Any, seed: Any) -> Values:
    """Returns the results of a function and its vector-Jacobian product."""
    values, pull = jax.vjp(function, *moving)
    return [*values, *pull(list(seed))]


def _as_it_is(function: Callable[..., Values]) -> Callable[..., Values]:
    return function


def _under(transform: Callable[..., Any]) -> Any:
    def make(case: Case) -> Any:
        def way(*examples: Any) -> Values:
            xs, held, seed = Examples(*examples).one(0)
            return _pull(transform(_call_at(case, held)), xs, seed)

        return way

    return make


def _linearized(case: Case) -> Any:
    def way(*examples: Any) -> Values:
        xs, held, seed = Examples(*examples).one(0)
        values, push = jax.linearize(_call_at(case, held), *xs)
        return [*values, *jax.linear_transpose(push, *xs)(seed)]

    return way


def _batch_of(size: int) -> Any:
    def make(case: Case) -> Any:
        def way(*examples: Any) -> Values:
            few = Examples(*examples).first(size)

            def batch(*xs: Any) -> Values:
                return jax.vmap(case.program.call)(list(xs), few.held)

            return _pull(batch, few.moving, few.seed)

        return way

    return make


def _batched_gradient(case: Case) -> Any:
    def one(xs: Any, held: Any, seed: Any) -> Values:
        return _pull(_call_at(case, held), xs, seed)

    return jax.vmap(one)


def _over_cotangents(case: Case) -> Any:
    """Maps over cotangents at one point, as `jax.jacrev` does."""

    def way(moving: Any, held: Any, seed: Any) -> Values:
        xs, hs, _ = Examples(moving, held, seed).one(0)
        _, pull = jax.vjp(_call_at(case, hs), *xs)
        return list(jax.vmap(lambda s: pull(list(s)))(seed))

    return way


def _batch_of_one_leaf(case: Case, leaf: int) -> Any:
    """Maps over one leaf, the others shared by all examples."""

    def way(moving: Any, held: Any, seed: Any) -> Values:
        xs, hs, _ = Examples(moving, held, seed).one(0)
        xs[leaf] = moving[leaf]
        axes = [0 if i == leaf else None for i in range(len(xs))]

        def batch(*ys: Any) -> Values:
            return jax.vmap(_call_at(case, hs), in_axes=tuple(axes))(*ys)

        return _pull(batch, xs, seed)

    return way


def _in_scan(case: Case) -> Any:
    def way(moving: Any, held: Any, seed: Any) -> Values:
        def loop(*xs: Any) -> Values:
            def body(carry: Any, example: Any) -> Any:
                return carry, case.program.call(*example)

            return lax.scan(body, None, (list(xs), held))[1]

        return _pull(loop, moving, seed)

    return way


def _alone(case: Case, leaf: int) -> Any:
    """Differentiates one leaf; the rule may see that the others take no part."""

    def way(*examples: Any) -> Values:
        xs, held, seed = Examples(*examples).one(0)

        def function(x: Any) -> Values:
            return case.program.call([*xs[:leaf], x, *xs[leaf + 1 :]], held)

        return _pull(function, [xs[leaf]], seed)

    return way


def _along_cotangent(case: Case) -> Any:
    """Differentiates the gradient by its cotangent, as a gradient of a gradient does.

    The gradient is linear in the cotangent, so its derivative is itself. Of each leaf's
    it takes the product with fixed numbers, and pulls that back to the cotangent.
    """

    def way(*examples: Any) -> Values:
        xs, held, seed = Examples(*examples).one(0)
        _, _, along = Examples(*examples).one(1)
        _, pull = jax.vjp(_call_at(case, held), *xs)

        def products(cotangent: Values) -> Values:
            return _products(pull(list(cotangent)))

        return _derivatives(products, list(seed), along)

    return way


def _along_operands(case: Case) -> Any:
    """Differentiates the gradient by the operands, along fixed numbers."""

    def way(*examples: Any) -> Values:
        xs, held, seed = Examples(*examples).one(0)

        def products(operands: Values) -> Values:
            return _products(jax.vjp(_call_at(case, held), *operands)[1](list(seed)))

        return _derivatives(products, xs, list(map(_fixed, xs)))

    return way


def _products(gradients: Sequence[Any]) -> Values:
    """Returns each leaf's gradient times fixed numbers."""
    return [_product(gradient, _fixed(gradient)) for gradient in gradients]


def _derivatives(
    function: Callable[[Values], Values], at: Values, along: Sequence[Any]
) -> Values:
    """Returns the derivative of each of several numbers along a direction."""
    found, pull_back = jax.vjp(function, at)
    results = []
    for i in range(len(found)):
        one = [jnp.ones_like(f) if k == i else 0 * f for k, f in enumerate(found)]
        (pulled,) = pull_back(one)
        results.append(sum(map(_product, pulled, along)))
    return results


def _product(one: Any, other: Any) -> Any:
    """Returns the inner product that JAX's transposes keep, of real parts."""
    return jnp.real(jnp.sum(one * other))


def _fixed(like: Any) -> Any:
    """Returns numbers of both signs, of an array's shape and dtype."""
    numbers = jnp.cos(1.0 + jnp.arange(like.size)).reshape(like.shape)
    return numbers.astype(like.dtype)


def _one_output(case: Case, output: int) -> Any:
    """Pulls one output back; the rule may see that the others are not used."""

    def way(*examples: Any) -> Values:
        xs, held, seed = Examples(*examples).one(0)

        def function(*ys: Any) -> Values:
            return [case.program.call(ys, held)[output]]

        return _pull(function, xs, [seed[output]])

    return way


# --- what each way should give ------------------------------------------------------


def _wanted_first(claimed: Claimed, examples: Examples) -> Values:
    return claimed(*examples.one(0))


def _wanted_batch(size: int) -> Wanted:
    def wanted(claimed: Claimed, examples: Examples) -> Values:
        each = [claimed(*examples.one(k)) for k in range(size)]
        return [jnp.stack(values) for values in zip(*each, strict=True)]

    return wanted


def _wanted_cotangents(case: Case) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, _ = examples.one(0)
        seeds = [examples.one(k)[2] for k in range(EXAMPLES)]
        each = [claimed(xs, held, seed)[count:] for seed in seeds]
        return [jnp.stack(values) for values in zip(*each, strict=True)]

    return wanted


def _wanted_along(case: Case) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, _ = examples.one(0)
        _, _, along = examples.one(1)
        return _products(claimed(xs, held, along)[count:])

    return wanted


def _wanted_differences(case: Case) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, seed = examples.one(0)

        def moved(step: float) -> Values:
            there = [x + step * _fixed(x) for x in xs]
            return _products(claimed(there, held, seed)[count:])

        ends = zip(moved(_STEP), moved(-_STEP), strict=True)
        return [(high - low) / (2 * _STEP) for high, low in ends]

    return wanted


def _wanted_batch_of_leaf(case: Case, leaf: int) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, _ = examples.one(0)
        each = []
        for k in range(EXAMPLES):
            there, _, seed = examples.one(k)
            each.append(claimed([*xs[:leaf], there[leaf], *xs[leaf + 1 :]], held, seed))
        stacked = [jnp.stack(values) for values in zip(*each, strict=True)]
        # What all examples share, all add to.
        return [
            value if i < count or i == count + leaf else value.sum(axis=0)
            for i, value in enumerate(stacked)
        ]

    return wanted


def _wanted_leaf(case: Case, leaf: int) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        found = claimed(*examples.one(0))
        return [*found[:count], found[count + leaf]]

    return wanted


def _wanted_output(case: Case, output: int) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, seed = examples.one(0)
        alone = [s if k == output else 0 * s for k, s in enumerate(seed)]
        found = claimed(xs, held, alone)
        return [found[output], *found[count:]]

    return wanted


WAYS: tuple[tuple[str, str, Any, Any], ...] = (
    ("repeat", "traced a second time", _under(_as_it_is), _wanted_first),
    ("jit", "under jax.jit", _under(jax.jit), _wanted_first),
    ("remat", "under jax.checkpoint", _under(jax.checkpoint), _wanted_first),
    ("linearize", "by jax.linearize and its transpose", _linearized, _wanted_first),
    ("vmap", "under jax.vmap over one example", _batch_of(1), _wanted_batch(1)),
    ("vmap", "under jax.vmap over three examples", _batch_of(3), _wanted_batch(3)),
    ("vmap", "as jax.vmap of its gradient", _batched_gradient, _wanted_batch(3)),
    ("vmap", "under jax.vmap over cotangents alone", _over_cotangents, None),
    ("vmap", "under jax.vmap over one argument alone", _batch_of_one_leaf, None),
    ("scan", "inside of jax.lax.scan", _in_scan, _wanted_batch(3)),
    ("symbolic zeros", "where this argument alone is differentiated", _alone, None),
    ("symbolic zeros", "where one result alone is used", _one_output, None),
    (
        ALONG,
        "differentiated once more, by the cotangent that it takes,",
        _along_cotangent,
        None,
    ),
    (BY_DIFFERENCES, "differentiated once more", _along_operands, None),
)
