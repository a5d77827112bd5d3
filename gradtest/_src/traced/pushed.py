"""The verdict on a forward-mode derivative inside of a trace: tangents of the results.

The tangents of all leaves go together and, for a hand-written product, each leaf's goes
alone as well. Where claim and rule-free derivative part, or there is none, differences
of the values decide.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.confirmation import LEAST_PART
from gradtest._src.differences import SWAMPED
from gradtest._src.traced.directions import AGREES
from gradtest._src.traced.gaps import (
    ALONG,
    Condition,
    all_finite,
    escaped,
    finite_part,
    traced_gap,
    where_defined,
)
from gradtest._src.traced.readings import Bench, in_float64, norm
from gradtest._src.traced.rounding import rounding_conditions
from gradtest._src.traced.slopes import inner, magnitude

Values = list[Any]
_COARSE, _FINE, _KINK_TOLERANCE = 3e-5, 3e-6, 1e-4


def pushed_conditions(
    bench: Bench,
    rtol: float,
    rounding_rtol: float | None,
    *,
    each_leaf: bool,
    excuse: str = "",
) -> list[Condition]:
    """Returns all that must hold of a claim in forward mode.

    Args:
      bench: The claim; its seed is a tangent of every leaf.
      rtol: Allowed relative gap of a result's tangent.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      each_leaf: Whether each leaf's tangent is looked at alone as well.
      excuse: Why a formula can't be refused here, where it can't.
    """
    working = bench.run_itself()

    def conditions() -> list[Condition]:
        shaken = bench.shaken(bench.operand_spacing(), "shaken 0")
        around = bench.read_around([] if bench.is_exact else [shaken])
        found = []
        if not bench.is_exact:
            found = _Pushed(bench, rtol).formula(around[0].values, each_leaf, excuse)
        scales = [1 / jnp.maximum(norm(v), 1e-300) for v in around[0].values]
        names = [output.name for output in bench.program.outputs]
        found += rounding_conditions(
            bench, working, names, scales, around, rounding_rtol
        )
        return where_defined(all_finite(around[0].values), found)

    return in_float64(conditions)


class _Pushed:
    def __init__(self, bench: Bench, rtol: float):
        self.bench, self._rtol = bench, rtol

    def formula(self, values: Values, each_leaf: bool, excuse: str) -> list[Condition]:
        """Judges the tangents of the results, for each tangent of the leaves."""
        bench, count = self.bench, len(self.bench.leaves)
        self.values, self.stops = values, bench.stops()
        eps = bench.noise_eps
        self.rtol = max(self._rtol, bench.half_spacing(), 64 * eps if eps else 0.0)
        places = np.arange(count + 1 if each_leaf and count > 1 else 1)
        found = lax.map(self._judge_tangent, places)
        loops = jaxprs.has_loop_on_floats(bench.program.jaxpr)
        conditions = []
        for k, output in enumerate(bench.program.outputs):
            for place in places:
                wrong, unsure, gap, allowed, factor = (part[place] for part in found[k])
                along = "" if place == 0 else f" along {bench.leaves[place - 1].name}"
                if excuse or loops:
                    wrong, unsure = jnp.zeros((), bool), wrong | unsure
                conditions.append(
                    Condition(
                        f"{escaped(output.name + along)}: the tangent is off by "
                        "{gap:.3g} of its norm, allowed are {allowed:.3g} (both in "
                        f"float64){ALONG}",
                        wrong,
                        unsure,
                        excuse
                        or "differences of the values are too noisy here, or the "
                        "program's loops stop too early, to tell",
                        {"gap": gap, "allowed": allowed, "factor": factor},
                    )
                )
        return conditions

    def _judge_tangent(self, place: Any) -> list[tuple[Any, ...]]:
        bench = self.bench
        moving, _, seed = bench.wide
        tangents = [
            jnp.where((place == 0) | (place == i + 1), t, 0) for i, t in enumerate(seed)
        ]
        readings = bench.read(moving, tangents)
        sides = self._sides(tangents)
        claimed, exact = readings.claimed, readings.exact
        found = []
        for k in range(len(bench.program.outputs)):
            floor = 1e-14 * norm(finite_part(self.values[k]))
            if bench.noise_eps:
                floor = jnp.maximum(floor, bench.noise_eps * norm(claimed[k]))
            broken = ~all_finite([claimed[k]])
            if exact is None:
                wrong, unsure, *numbers = self._by_differences(k, claimed[k], tangents)
            else:
                seen = traced_gap(claimed[k], exact[k], rtol=self.rtol, floor=floor)
                known = jnp.where(jnp.isfinite(exact[k]), exact[k], claimed[k])
                told = traced_gap(claimed[k], known, rtol=self.rtol, floor=floor)
                numbers = [told.size, told.allowed, told.factor]
                supported, resolved = self._dispute(
                    k, claimed[k], exact[k], seen.disputed, tangents
                )
                at_kink = self._at_kink(
                    claimed[k], exact[k], seen.disputed, [side[k] for side in sides]
                )
                wrong = seen.exceeded & ~supported & ~at_kink
                unsure = wrong & ~resolved & ~all_finite([exact[k]])
                wrong &= ~unsure
            found.append((wrong | broken, unsure & ~broken, *numbers))
        return found

    def _sides(self, tangents: Values) -> list[Values]:
        """Returns the one-sided slopes of every entry, at a coarse and a fine step."""
        line = self.bench.line(tangents, self.stops)
        steps = np.array([_COARSE, _FINE])
        moved = lax.map(line, np.concatenate([-steps, steps]))
        found = []
        for k, step in enumerate(steps):
            ends = [(part[k], part[k + 2]) for part in moved]
            here = zip(self.values, ends, strict=True)
            pairs = [((v - low) / step, (high - v) / step) for v, (low, high) in here]
            found += [[low for low, _ in pairs], [high for _, high in pairs]]
        return found

    def _at_kink(
        self, claimed: Any, exact: Any, disputed: Any, sides: list[Any]
    ) -> Any:
        """Whether a claim lies between the slopes of a kink wherever it departs."""
        accepted = jnp.ones((), bool)
        for part in (jnp.real, jnp.imag) if jnp.iscomplexobj(claimed) else (jnp.real,):
            coarse_low, coarse_high, low, high = map(part, sides)
            jump, coarse = jnp.abs(high - low), jnp.abs(coarse_high - coarse_low)
            slack = _KINK_TOLERANCE * jnp.maximum(jnp.abs(low), jnp.abs(high))
            value = part(claimed)
            between = (value >= jnp.minimum(low, high) - slack) & (
                value <= jnp.maximum(low, high) + slack
            )
            is_kink = (jump > slack) & (jump > coarse / 2)
            same = jnp.abs(part(claimed - exact)) <= slack
            accepted &= jnp.all(~disputed | same | (between & is_kink))
        return accepted

    def _weights(self, k: int, weight: Any) -> Values:
        return [
            weight if i == k else jnp.zeros_like(value)
            for i, value in enumerate(self.values)
        ]

    def _dispute(
        self, k: int, claimed: Any, exact: Any, disputed: Any, tangents: Values
    ) -> tuple[Any, Any]:
        """Weighs the entries in dispute, so that their slope tells claim from exact."""
        difference = finite_part(claimed - exact)
        sign = jnp.conj(difference) / jnp.where(difference == 0, 1, jnp.abs(difference))
        weight, over = sign * disputed, self.bench.over
        separation = inner([difference], [weight], over)
        slope = self.bench.measure(
            tangents,
            self.values,
            self._weights(k, weight),
            scale=separation,
            stops=self.stops,
        )
        resolved = 3 * slope.error + SWAMPED * separation <= separation / 2
        predicted = inner([finite_part(claimed)], [weight], over)
        near = 3 * slope.error + AGREES * separation + self.rtol * jnp.abs(predicted)
        return resolved & (slope.distance(predicted) <= near), resolved

    def _by_differences(
        self, k: int, claimed: Any, tangents: Values
    ) -> tuple[Any, ...]:
        bench, over = self.bench, self.bench.over
        drawn = np.random.Generator(np.random.Philox(k)).standard_normal(claimed.shape)
        weights = self._weights(k, jnp.asarray(drawn, claimed.dtype))
        least = LEAST_PART * magnitude(self.values, weights, over)
        scale = jnp.maximum(over.total(norm(finite_part(claimed))), least)
        slope = bench.measure(
            tangents, self.values, weights, scale=scale, stops=self.stops
        )
        predicted = inner([finite_part(claimed)], [weights[k]], over)
        allowed = self.rtol * scale + 3 * slope.error
        distance = slope.distance(predicted)
        swamped = allowed > SWAMPED * scale
        off = distance > allowed
        factor = predicted / jnp.where(slope.value == 0, 1.0, slope.value)
        return off & ~swamped, swamped, distance / scale, allowed / scale, factor
