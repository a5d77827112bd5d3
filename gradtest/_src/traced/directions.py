"""Slopes along directions of all leaves inside of a trace, and what they speak for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src.case import FAINT
from gradtest._src.confirmation import LEAST_PART
from gradtest._src.differences import SETTLED_PART, SWAMPED
from gradtest._src.traced.gaps import TracedGap, finite_part
from gradtest._src.traced.readings import Bench, norm
from gradtest._src.traced.slopes import TracedSlope, inner, magnitude

Values = list[Any]
# How many random directions there are.
COUNT = 2
# A slope is a claim's where it is as near as this part of what sets two claims apart.
AGREES = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Way:
    """A direction of all leaves, and the size of the slope that is looked for."""

    direction: Values
    scale: Any


class Directions:
    """Directions of all leaves, and the slopes of a program's values along them.

    Args:
      bench: The program and the claim.
      values: The values at the point.
      sizes: Each leaf's natural scale.
      rtol: Allowed relative gap.
    """

    def __init__(self, bench: Bench, values: Values, sizes: Values, rtol: float):
        self.bench, self.values = bench, values
        self.sizes, self.rtol = sizes, rtol
        self.stops = bench.stops()

    def contributions(self, gradient: Values) -> Any:
        """Returns how much each leaf adds to a slope along a direction of its size."""
        return jnp.stack(
            [
                self.bench.over.total(norm(finite_part(g)) * size)
                for g, size in zip(gradient, self.sizes, strict=True)
            ]
        )

    def faint(self, contributions: Any) -> Any:
        """Returns which contributions differences of the values are blind to."""
        largest = jnp.maximum(jnp.max(contributions), self.magnitude())
        return contributions < FAINT * largest

    def magnitude(self) -> Any:
        """Returns the size of the values that slopes are differences of."""
        values = list(map(finite_part, self.values))
        return magnitude(values, self.bench.wide[2], self.bench.over)

    def slope(self, direction: Values, scale: Any) -> TracedSlope:
        """Measures the slope along a direction, expected to have this size."""
        return self.bench.measure(
            direction,
            self.values,
            self.bench.wide[2],
            scale=scale,
            stops=self.stops,
        )

    def along_dispute(
        self, gaps: list[TracedGap], parted: Values, claimed: Values, exact: Values
    ) -> Way:
        """Returns the way along the entries in dispute, of all leaves together.

        Its scale is how far it sets claim and exact derivative apart.
        """
        direction = []
        differences = [finite_part(c - e) for c, e in zip(claimed, exact, strict=True)]
        for i, (difference, gap) in enumerate(zip(differences, gaps, strict=True)):
            uneven = 0.5 + jnp.abs(self.bench.draw("dispute", i)) % 1
            sign = jnp.conj(difference) / jnp.where(
                difference == 0, 1, jnp.abs(difference)
            )
            part = self.sizes[i] * uneven * sign * (gap.disputed & parted[i])
            direction.append(part)
        return Way(direction, inner(differences, direction, self.bench.over))

    def along_random(self, contributions: Any, faint: Any) -> list[Way]:
        """Returns random ways, on which the leaves are weighed to count alike."""
        counted = jnp.where(faint | (contributions <= 0), jnp.inf, contributions)
        ratios = jnp.min(counted) / jnp.where(contributions > 0, contributions, 1.0)
        ratios = jnp.where(jnp.isfinite(ratios), ratios, 1.0)
        ratios = jnp.clip(ratios, 1e-3, 1.0)
        expected = jnp.sqrt(jnp.sum((ratios * contributions) ** 2))
        scale = jnp.maximum(expected, LEAST_PART * self.magnitude())
        return [
            Way(
                [
                    ratios[i] * self.sizes[i] * self.bench.draw(f"direction {k}", i)
                    for i in range(len(self.sizes))
                ],
                scale,
            )
            for k in range(COUNT)
        ]

    def slopes(self, ways: list[Way]) -> list[TracedSlope]:
        """Measures along each way; the program is compiled once for all of them."""
        stacked = jax.tree_util.tree_map(lambda *parts: jnp.stack(parts), *ways)
        slopes = lax.map(lambda way: self.slope(way.direction, way.scale), stacked)
        return [
            jax.tree_util.tree_map(lambda part, k=k: part[k], slopes)
            for k in range(len(ways))
        ]

    def settle(self, way: Way, slope: TracedSlope, claimed: Values) -> tuple[Any, Any]:
        """Says whether a slope is the claim's, and whether it tells the two apart."""
        tolerance = 3 * slope.error + SWAMPED * way.scale
        resolved = tolerance <= way.scale / 2
        predicted = self.predicted(claimed, way)
        near = 3 * slope.error + AGREES * way.scale + self.rtol * jnp.abs(predicted)
        return resolved & (slope.distance(predicted) <= near), resolved

    def predicted(self, gradient: Values, way: Way) -> Any:
        """Returns the slope that a gradient has along a way."""
        finite = list(map(finite_part, gradient))
        return inner(finite, way.direction, self.bench.over)

    def all_agree(
        self, ways: list[Way], slopes: list[TracedSlope], gradient: Values
    ) -> Any:
        """Whether every slope is the gradient's."""
        agrees = jnp.ones((), bool)
        for way, slope in zip(ways, slopes, strict=True):
            allowed = self.rtol * way.scale + 3 * slope.error
            distance = slope.distance(self.predicted(gradient, way))
            agrees &= (distance <= allowed) & (allowed <= SWAMPED * way.scale)
        return agrees

    def contradicted(
        self, ways: list[Way], slopes: list[TracedSlope], gradient: Values
    ) -> Any:
        """Whether every slope is settled and far from the gradient's, at no kink."""
        contradicts = jnp.ones((), bool)
        for way, slope in zip(ways, slopes, strict=True):
            predicted = self.predicted(gradient, way)
            distance = slope.distance(predicted)
            nearest = jnp.min(jnp.abs(slope.rungs - predicted))
            contradicts &= (
                (distance > SETTLED_PART * way.scale)
                & (slope.error <= SETTLED_PART * distance)
                & (nearest >= distance / 4)
                & ~slope.is_kink
            )
        return contradicts
