"""Gradients as they come, inside of a trace: finite, present, close to others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import closeness, execution
from gradtest._src.backward import IS_LOSS
from gradtest._src.flow import routes_to_inputs
from gradtest._src.inputs import Leaf
from gradtest._src.options import Options
from gradtest._src.program import Program
from gradtest._src.traced.claims import reverse_claim
from gradtest._src.traced.gaps import (
    Condition,
    all_finite,
    escaped,
    finite_part,
    traced_gap,
)
from gradtest._src.traced.readings import in_float64, norm, widened
from gradtest._src.traced.trials import trials

Args = tuple[Any, ...]
Values = list[Any]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One trial's values and gradient, in the function's own precision."""

    program: Program
    values: Values
    gradient: Values

    def leaves(self) -> Iterator[tuple[Leaf, Any]]:
        """Yields each leaf that has entries, with its gradient."""
        for leaf, gradient in zip(
            self.program.inputs.moving, self.gradient, strict=True
        ):
            if gradient.size:
                yield leaf, gradient


def _runs(fn: Callable[..., Any], args: Args, options: Options) -> Iterator[_Run]:
    for at in trials(fn, args, options):
        seed = at.cotangents(plain=True)
        bench = at.bench(reverse_claim(at.program, at.point, seed), seed)
        with execution.working_precision():
            yield _Run(at.program, *bench.read_working())


def finite(fn: Callable[..., Any], args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_grads_finite`."""
    found: list[Condition] = []
    for run in _runs(fn, args, options):
        defined = all_finite(run.values)
        for leaf, gradient in run.leaves():
            bad = jnp.sum(~jnp.isfinite(gradient))
            found.append(
                Condition(
                    f"{escaped(leaf.name)}: {{bad:.0f}} of {gradient.size} entries of "
                    "the gradient are NaN or infinite",
                    (bad > 0) & defined,
                    ~defined,
                    "the value itself is not finite",
                    {"bad": bad},
                )
            )
    return found


def flow(fn: Callable[..., Any], args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_grads_flow`.

    Raises:
      TypeError: The function returns something else than one real number.
    """
    seen: dict[str, Any] = {}
    usable: dict[str, Any] = {}
    says: dict[str, str] = {}
    for run in _runs(fn, args, options):
        run.program.require_loss(IS_LOSS)
        routes = routes_to_inputs(run.program.jaxpr)
        names = [leaf.name for leaf in run.program.inputs.moving]
        defined = all_finite(run.values)
        for leaf, gradient in run.leaves():
            moves = jnp.any(gradient != 0)
            seen[leaf.name] = seen.get(leaf.name, False) | moves
            good = moves & defined & all_finite([gradient])
            usable[leaf.name] = usable.get(leaf.name, False) | good
            says[leaf.name] = _silence(routes[names.index(leaf.name)])
    return [
        Condition(
            f"{escaped(name)}: it has no gradient: {escaped(says[name])}",
            ~seen[name],
            seen[name] & ~usable[name],
            "a gradient or the value is not finite in any trial",
        )
        for name in seen
    ]


def _silence(route: Any) -> str:
    if route.is_none:
        return "the loss does not depend on it"
    if not route.smooth:
        return f"the loss depends on it only through {', '.join(sorted(route.blocks))}"
    return "it is zero in every entry and trial"


def close(claimed: Any, reference: Any, rtol: float | None) -> list[Condition]:
    """Conditions of `assert_grads_close`.

    Raises:
      ValueError: No leaf of either tree holds a gradient.
    """
    alike = closeness.pair_leaves(claimed, reference)
    found = [
        Condition(
            f"{escaped(finding.name)}: "
            f"{escaped(finding.cause.says if finding.cause else 'they differ')}",
            jnp.ones((), bool),
        )
        for finding in alike.findings
    ]
    if not alike.pairs:
        return found
    one = [jax.lax.stop_gradient(jnp.asarray(c.value)) for c, _ in alike.pairs]
    other = [jax.lax.stop_gradient(jnp.asarray(r.value)) for _, r in alike.pairs]

    def conditions() -> list[Condition]:
        ours, theirs = list(map(widened, one)), list(map(widened, other))
        sizes = [norm(finite_part(r)) / max(r.size, 1) ** 0.5 for r in theirs]
        largest = jnp.max(jnp.stack(sizes))
        return [
            _close_leaf(*pair, ours[i], theirs[i], rtol, largest)
            for i, pair in enumerate(alike.pairs)
        ]

    return found + in_float64(conditions)


def _close_leaf(
    leaf: closeness.Leaf,
    theirs: closeness.Leaf,
    claimed: Any,
    reference: Any,
    rtol: float | None,
    largest: Any,
) -> Condition:
    eps = max(float(jnp.finfo(each.dtype).eps) for each in (leaf, theirs))
    usual, noise, noise_beside_zero = closeness.allowances(eps)
    part = jnp.where(jnp.any(reference != 0), noise, noise_beside_zero)
    floor = part * largest * float(np.prod(leaf.shape)) ** 0.5
    gap = traced_gap(claimed, reference, rtol=rtol or usual, floor=floor)
    sound = all_finite([reference])
    return Condition(
        f"{escaped(leaf.name)}: it differs from the reference by {{gap:.3g}} of its "
        "norm, allowed are {allowed:.3g}",
        (gap.exceeded & sound) | ~all_finite([claimed]),
        ~sound,
        "the reference is not finite",
        {"gap": gap.size, "allowed": gap.allowed},
    )
