"""Whether a broken rule is wrong at all, and how far off its derivative is.

Some slips change nothing: a factor that is one, a residual that another one equals.
Such a mutant is equivalent. The derivative of the rule, broken and right, is compared
in float64 at fresh points around the values that reach it, and at the special points of
its operands; none of them is a point that the assertion used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, seeding
from gradtest._src.hazards import special_arguments
from gradtest._src.inputs import Inputs, Point, read_inputs
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.rule_call import RuleCall
from gradtest._src.rules import RuleUse

FRESH = 32
# The relative difference up to which two derivatives are one.
EQUAL = 1e-12
_MOST_SPECIAL = 200


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a broken derivative is from the right one.

    Attributes:
      first: The largest relative difference of the first derivative, over all points.
      second: That of the second derivative; NaN where it could not be compared.
      points: At how many points both were finite.
      at: The point of the largest difference.
      has_second: Whether the right rule has a second derivative.
    """

    first: float
    second: float
    points: int
    at: str = ""
    has_second: bool = True

    @property
    def is_equivalent(self) -> bool:
        """Whether there is none, of either order."""
        same = self.points > 0 and self.first <= EQUAL
        return same and (self.second <= EQUAL or not self.has_second)

    @property
    def is_of_second_order(self) -> bool:
        """Whether the second derivative alone differs."""
        return self.points > 0 and self.first <= EQUAL < self.second


def difference(
    right: Sequence[RuleUse], broken: Sequence[RuleUse], key: Any = 0
) -> Difference | None:
    """Compares the calls of a broken rule with the right ones.

    None where that can't be done.
    """
    try:
        found = [
            _Pair(one, other, key).difference()
            for one, other in zip(right, broken, strict=True)
        ]
    except Exception:  # whatever a broken rule makes JAX raise
        return None
    if not found:
        return None
    worst = max(found, key=lambda each: each.first)
    seconds = [each.second for each in found if not math.isnan(each.second)]
    return dataclasses.replace(
        worst,
        second=max(seconds, default=math.nan),
        points=sum(each.points for each in found),
        has_second=any(each.has_second for each in found),
    )


class _Pair:
    """The derivative of one rule, right and broken, as float64 programs."""

    def __init__(self, right: RuleUse, broken: RuleUse, key: Any):
        call, wrong = RuleCall(right), RuleCall(broken)
        wrong.arguments()  # which of its results are infinite is read before a trace
        self._call, self._key = call, key
        self.inputs: Inputs = read_inputs(
            call, call.arguments(), argnums=call.argnums(), names=call.names()
        )
        self.point = self.inputs.draw(key, 0)
        self._is_jvp = right.source.kind == "custom_jvp"
        self._first = [self._lifted(self._derivative(fn)) for fn in (call, wrong)]
        self._second: list[Callable[..., list[Any]]] = []
        with contextlib.suppress(Exception):  # where there is no second derivative
            for fn in (call, wrong):
                self._second.append(self._lifted(self._twice(self._derivative(fn))))

    def _derivative(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the rule's derivative, along fixed directions given last."""

        def derivative(moving: Any, held: Any, seeds: Any) -> Any:
            def call(*xs: Any) -> list[Any]:
                results = fn(*self.inputs.arguments(xs, held))
                return [r for r in results if jnp.issubdtype(r.dtype, jnp.inexact)]

            if self._is_jvp:
                return jax.jvp(call, tuple(moving), tuple(seeds[0]))[1]
            return jax.vjp(call, *moving)[1](list(seeds[1]))

        return derivative

    def _twice(self, derivative: Callable[..., Any]) -> Callable[..., Any]:
        def twice(moving: Any, held: Any, seeds: Any) -> Any:
            # By operands and by what the derivative is linear in: both may be lost.
            def weighed(xs: Any, own: Any) -> Any:
                results = derivative(xs, held, own)
                flat = zip(results, seeds[2], strict=True)
                return sum(jnp.sum(jnp.real(r * w)) for r, w in flat)

            return jax.grad(weighed)(list(moving), seeds)

        return twice

    def _seeds(self, number: int) -> tuple[Any, Any, Any]:
        random = seeding.generator(self._key, "fresh directions", number)
        results = [
            r
            for r in jax.eval_shape(self._call, *self._arguments())
            if jnp.issubdtype(r.dtype, jnp.inexact)
        ]

        def like(leaves: Sequence[Any]) -> list[Any]:
            return [seeding.normal(random, x.shape, x.dtype) for x in leaves]

        along, back = like(self.point.moving), like(results)
        return along, back, like(results if self._is_jvp else self.point.moving)

    def _arguments(self) -> tuple[Any, ...]:
        return self.inputs.arguments(self.point.moving, self.point.held)

    def _lifted(self, derivative: Callable[..., Any]) -> Callable[..., list[Any]]:
        at = (list(self.point.moving), list(self.point.held), self._seeds(0))
        with execution.user_code():
            program = jax.make_jaxpr(derivative)(*at)
        with execution.float64():
            compiled = jax.jit(lambda flat: Evaluator()(program, flat))

        def run(*given: Any) -> list[Any]:
            flat = [widen(leaf) for leaf in jax.tree_util.tree_leaves(given)]
            with execution.float64():
                return [np.asarray(value) for value in compiled(flat)]

        return run

    def difference(self) -> Difference:
        """Compares the two at all points."""
        first = second = 0.0
        count, where = 0, ""
        compares = len(self._second) == 2
        for number, (name, point) in enumerate(self._points()):
            given = list(point.moving), list(point.held), self._seeds(number + 1)
            size = _relative([run(*given) for run in self._first])
            if size is None:
                continue
            count += 1
            if size > max(first, EQUAL):
                first, where = size, name
            if compares and size <= EQUAL and number % 4 == 0:
                other = _relative([run(*given) for run in self._second])
                second = max(second, other or 0.0)
        seconds = second if compares else math.nan
        return Difference(first, seconds, count, where, bool(self._second))

    def _points(self) -> Iterator[tuple[str, Point]]:
        for number in range(FRESH):
            yield f"fresh point {number}", self._fresh(number)
        special = special_arguments(self.inputs, self.point)
        yield from itertools.islice(special, _MOST_SPECIAL)

    def _fresh(self, number: int) -> Point:
        """Draws a point like those that reach the rule: near, or of the same signs."""
        base = self.inputs.draw(self._key, number)
        random = seeding.generator(self._key, "fresh point", number)
        moving = []
        for value in map(np.asarray, base.moving):
            draw = seeding.normal(random, value.shape, np.dtype(np.float64))
            if number % 2:
                new = value * np.exp(0.5 * draw)
            else:
                wide = np.abs(value.astype(np.complex128))
                scale = float(np.sqrt(np.mean(wide**2))) or 1.0
                new = value + 0.5 * scale * draw
            moving.append(np.asarray(new).astype(value.dtype))
        return Point(tuple(moving), base.held)


def _relative(pair: Sequence[list[Any]]) -> float | None:
    """Returns the largest difference of any result, relative to its own norm.

    None where the right derivative is not finite.
    """
    right, wrong = pair
    worst = 0.0
    for one, other in zip(right, wrong, strict=True):
        if not np.isfinite(one).all():
            return None
        if not np.isfinite(other).all():
            return math.inf
        gap = float(np.linalg.norm(np.ravel(one - other)))
        if gap:
            size = float(np.linalg.norm(np.ravel(one)))
            worst = max(worst, gap / max(size, np.finfo(np.float64).tiny))
    return worst
