"""Whether a rule gives one derivative in every way that JAX may run it.

Each way is traced by itself, so that what a rule raises is told of that way alone;
then all of them are evaluated in float64 in one program and compared with the rule's
own derivative, example by example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import diagnose, execution, seeding
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.inputs import Point
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.program import Values

_EXAMPLES = 3
# Float64 rounds the same sums in another order.
_FLOOR = 1e-12
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


def judge_ways(
    case: Case,
    points: Sequence[Point],
    renew: Callable[[], None],
    *,
    only: str | None = None,
) -> tuple[list[Finding], list[str]]:
    """Compares every way to run a rule with its own derivative.

    Args:
      case: The rule as a program, its reverse-mode claim already judged.
      points: Values that reach the rule, the case's own first.
      renew: Prepares the rule for being differentiated in another way.
      only: The one check that is wanted; None for all.

    Returns:
      One finding for each check, and the ways that JAX does not offer here.
    """
    if case.program.closed_over:
        points = points[:1]  # what the rule closes over has its values there
    examples = _examples(case, points)
    ways, findings, unsupported = _trace_ways(case, examples, renew, only)
    raised = {finding.check for finding in findings}
    compared = _compare(case, examples, ways, only)
    findings += [finding for finding in compared if finding.check not in raised]
    return findings, unsupported


def _examples(case: Case, points: Sequence[Point]) -> Examples:
    """Stacks points; where there are too few, others near the first stand in."""
    moving, held, seeds = [], [], []
    for k in range(_EXAMPLES):
        point = points[k % len(points)]
        # Smaller, so that zeros and signs stay and no domain is left upwards.
        scale = 1 - k / 16 if k >= len(points) else 1
        moving.append([(widen(v) * scale).astype(v.dtype) for v in point.moving])
        held.append(list(case.program.held(point)))
        seeds.append(case.seed if k == 0 else _another_seed(case, k))
    return Examples(_stack(moving), _stack(held), _stack(seeds))


def _another_seed(case: Case, k: int) -> Values:
    return [
        seeding.normal(
            seeding.generator(case.key, "another way", k, i), value.shape, value.dtype
        )
        for i, value in enumerate(case.seed)
    ]


def _stack(rows: list[list[Any]]) -> list[Any]:
    columns = zip(*rows, strict=True)
    return [jnp.stack([jnp.asarray(value) for value in column]) for column in columns]


# --- the ways -----------------------------------------------------------------------


def _trace_ways(
    case: Case, examples: Examples, renew: Callable[[], None], only: str | None
) -> tuple[list[Way], list[Finding], list[str]]:
    ways: list[Way] = []
    findings: list[Finding] = []
    unsupported: list[str] = []
    arguments = (examples.moving, examples.held, examples.seed)
    for check, says, make, wanted in _WAYS:
        if only not in (None, check):
            continue
        if make is _linearized and case.bench.forward is None:
            continue
        try:
            with execution.user_code():
                for items, function, expected in _several(case, make, wanted):
                    renew()
                    jaxpr = jax.make_jaxpr(function)(*arguments)
                    ways.append(Way(check, says, items, jaxpr, expected))
        except NotImplementedError as error:
            unsupported.append(f"{check}: {_first_line(error)}")
        except Exception as error:  # whatever the rule raises
            findings.append(_raised(case, check, says, error))
    return ways, findings, unsupported


def _several(
    case: Case, make: Any, wanted: Any
) -> list[tuple[tuple[str, ...], Callable[..., Values], Wanted]]:
    """Returns what one entry of `_WAYS` stands for: names, function and truth."""
    names = tuple(leaf.name for leaf in case.leaves)
    values = tuple(output.name for output in case.program.outputs)
    if make is _alone:
        some = range(len(names) if 1 < len(names) <= _MOST_ALONE else 0)
        return [
            ((*values, names[i]), _alone(case, i), _wanted_leaf(case, i)) for i in some
        ]
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
        seeds = [examples.one(k)[2] for k in range(_EXAMPLES)]
        each = [claimed(xs, held, seed)[count:] for seed in seeds]
        return [jnp.stack(values) for values in zip(*each, strict=True)]

    return wanted


def _wanted_batch_of_leaf(case: Case, leaf: int) -> Wanted:
    count = len(case.program.outputs)

    def wanted(claimed: Claimed, examples: Examples) -> Values:
        xs, held, _ = examples.one(0)
        each = []
        for k in range(_EXAMPLES):
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


_WAYS: tuple[tuple[str, str, Any, Any], ...] = (
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
)
_LINEAR = (
    ("linear", "for 2.5 times one cotangent less another"),
    ("zero cotangent", "for a cotangent of zeros"),
)


def _linear(pulled: Claimed, examples: Examples) -> list[tuple[Values, Values]]:
    """Gradients for combined cotangents, and the same combinations of gradients."""
    xs, held, seed = examples.one(0)
    other = examples.one(1)[2]

    def combined(one: Values, another: Values) -> Values:
        return [2.5 * a - b for a, b in zip(one, another, strict=True)]

    one, another = pulled(xs, held, seed), pulled(xs, held, other)
    zero = pulled(xs, held, [0 * value for value in seed])
    return [
        (pulled(xs, held, combined(seed, other)), combined(one, another)),
        (zero, [0 * value for value in one]),
    ]


# --- the comparison -----------------------------------------------------------------


def _compare(
    case: Case, examples: Examples, ways: list[Way], only: str | None
) -> list[Finding]:
    count, claim = len(case.leaves), case.claim.jaxpr
    known = {
        tracer: widen(value)
        for tracer, value in case.program.closed_over_values(case.point).items()
    }
    # A declared product, such as a clipping, need not be linear.
    is_linear = case.program.as_functions is None and only is None

    def both(moving: Any, held: Any, seed: Any) -> Any:
        run, at = Evaluator(hoisted=known), Examples(moving, held, seed)

        def claimed(xs: Any, hs: Any, seeds: Any) -> Values:
            return run(claim, [*xs, *hs, *seeds])

        def pulled(xs: Any, hs: Any, seeds: Any) -> Values:
            return claimed(xs, hs, seeds)[-count:]

        pairs = [
            (run(way.jaxpr, [*moving, *held, *seed]), way.wanted(claimed, at))
            for way in ways
        ]
        return [*pairs, *(_linear(pulled, at) if is_linear else [])]

    parts = (examples.moving, examples.held, examples.seed)
    arguments = [[execution.at_home(widen(value)) for value in part] for part in parts]
    pairs = execution.to_host(execution.lifted(both, arguments)(*arguments))
    labels = [(way.check, way.says, way.names) for way in ways]
    names = tuple(leaf.name for leaf in case.leaves)
    labels += [(check, says, names) for check, says in _LINEAR if is_linear]
    found: dict[str, Finding] = {}
    for label, (results, wanted) in zip(labels, pairs, strict=True):
        finding = _judge(case, label, results, wanted)
        if finding.check not in found or finding.verdict is Verdict.FAIL:
            found[finding.check] = finding
    return list(found.values())


def _judge(
    case: Case, label: tuple[str, str, tuple[str, ...]], results: Values, wanted: Values
) -> Finding:
    check, says, leaves = label
    largest = max((norm(np.nan_to_num(w)) for w in wanted), default=0.0)
    for name, found, truth in zip(leaves, results, wanted, strict=True):
        alike = (found == truth) | (np.isnan(found) & np.isnan(truth))
        same = alike & ~np.isfinite(truth)
        found, truth = np.where(same, 0, found), np.where(same, 0, truth)
        gap = leaf_gap(found, truth, rtol=case.rtol, floor=_FLOOR * largest)
        if gap.is_exceeded or not np.isfinite(found - truth).all():
            return _finding(
                case,
                check,
                Verdict.FAIL,
                name=name,
                size=gap.size,
                allowed=gap.allowed,
                entry=gap.entry,
                cause=diagnose.departs(check, says),
            )
    return _finding(case, check, Verdict.PASS, allowed=case.rtol)


def _raised(case: Case, check: str, says: str, error: Exception) -> Finding:
    cause = Cause(
        f"raises under {check}",
        f"{says} it raises {type(error).__name__}: {_first_line(error)}",
        "write the rule for traced values of any batch: no Python branches on values, "
        "nothing kept between calls",
    )
    return _finding(case, check, Verdict.FAIL, cause=cause)


def _finding(case: Case, check: str, verdict: Verdict, **fields: Any) -> Finding:
    named = {"name": "all arguments", "judged_by": "the rule itself"} | fields
    return Finding(
        shape=(),
        dtype="",
        verdict=verdict,
        gap=Gap.AGREEMENT,
        mode=case.claim.mode,
        trial=case.trial,
        check=check,
        **named,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
