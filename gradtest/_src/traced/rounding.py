"""The rounding gap inside of a trace; see `rounding` for the reasons of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradtest._src.case import NOISE_FLOOR
from gradtest._src.devices import homes, matmuls
from gradtest._src.rounding import FACTOR, LARGE, LEAST_FACTOR, floor
from gradtest._src.traced.gaps import Condition, all_finite, escaped, finite_part
from gradtest._src.traced.readings import Bench, Readings, Working, norm, widened

Values = list[Any]
_OVERFLOWS = "the value itself is not finite in its own precision"


def rounding_conditions(
    bench: Bench,
    working: Working | None,
    names: Sequence[str],
    scales: Sequence[Any],
    around: Sequence[Readings],
    rounding_rtol: float | None,
) -> list[Condition]:
    """Compares the claim in its own precision with itself in float64.

    Args:
      bench: The claim.
      working: What it comes to in its own precision; None where that is float64.
      names: Of the items of the derivative.
      scales: What makes norms of the items comparable with each other.
      around: The readings at the point, and at points whose operands are off by as
        much as they were rounded themselves.
      rounding_rtol: Allowed relative gap, in place of a floor by dtype.
    """
    if working is None:
        return []
    here = around[0]
    overflows = ~all_finite(working.values)
    if bench.is_exact:  # what rounds as the rule-free derivative does is no mistake
        return [
            Condition(
                f"{escaped(name)}: in its own precision the derivative is NaN or "
                "infinite",
                ~all_finite([worked]) & ~overflows,
                ~all_finite([worked]) & overflows,
                _OVERFLOWS,
            )
            for name, worked in zip(names, working.claimed, strict=True)
        ]
    worked = list(map(widened, working.claimed))
    gaps = [norm(w - c) for w, c in zip(worked, here.claimed, strict=True)]
    gaps = [jnp.where(jnp.isfinite(gap), gap, jnp.inf) for gap in gaps]
    allowed = _allowed(bench, scales, around, working.exact, rounding_rtol)
    found = []
    for name, gap, limit, lifted in zip(
        names, gaps, allowed, here.claimed, strict=True
    ):
        size = norm(lifted)
        unit = jnp.where(size > 0, size, 1.0)
        found.append(
            Condition(
                f"{escaped(name)}: in its own precision the derivative is off itself "
                "in float64 by {gap:.3g} of its norm, allowed are {allowed:.3g}",
                ~(gap <= limit) & ~overflows,
                ~(gap <= limit) & overflows,
                _OVERFLOWS,
                {"gap": gap / unit, "allowed": limit / unit},
            )
        )
    return found


def _allowed(
    bench: Bench,
    scales: Sequence[Any],
    around: Sequence[Readings],
    plain: Values | None,
    rounding_rtol: float | None,
) -> Values:
    here = around[0]
    products = matmuls.coarsest(bench.claim.jaxpr, homes.default_device())
    relative = rounding_rtol or floor(bench.working_eps, products)
    sizes = [norm(finite_part(c)) for c in here.claimed]
    parts = [size * scale for size, scale in zip(sizes, scales, strict=True)]
    largest = jnp.max(jnp.stack(parts))
    floors = [
        relative * size
        + jnp.where(
            part < NOISE_FLOOR * largest, 4 * bench.working_eps * largest / scale, 0.0
        )
        for size, part, scale in zip(sizes, parts, scales, strict=True)
    ]
    if plain is None or here.yardstick is None:
        root = bench.working_eps**0.5
        return [
            jnp.maximum(least, root * size)
            for least, size in zip(floors, sizes, strict=True)
        ]
    losses = [norm(widened(p) - e) for p, e in zip(plain, here.yardstick, strict=True)]
    losses = [jnp.where(jnp.isfinite(loss), loss, 0.0) for loss in losses]
    norms = [norm(finite_part(e)) for e in here.yardstick]
    usual = jnp.median(
        jnp.stack(
            [
                jnp.where(size > 0, loss / jnp.where(size > 0, size, 1.0), 0.0)
                for loss, size in zip(losses, norms, strict=True)
            ]
        )
    )
    found = []
    for i, (least, loss, size) in enumerate(zip(floors, losses, sizes, strict=True)):
        loss = jnp.maximum(loss, usual * size)
        limit = jnp.minimum(
            FACTOR * loss, jnp.maximum(LEAST_FACTOR * loss, LARGE * size)
        )
        limit = jnp.maximum(least, limit)
        for there in around[1:]:
            assert there.yardstick is not None
            moved = norm(there.yardstick[i] - here.yardstick[i])
            limit = jnp.maximum(limit, jnp.where(jnp.isfinite(moved), moved, 0.0))
        found.append(limit)
    return found
