"""Slopes by differences of values, as traced operations: for checks inside of a trace.

What `differences` decides step by step on the host is computed here for a fixed ladder
of steps, and chosen from by its error estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs

Values = list[Any]
Line = Callable[[Any], Values]

_RUNGS = (3e-4, 3e-5, 3e-6, 3e-7, 3e-8)
# Values with the noise of a narrow dtype need steps that stand out of it.
_NOISY_RUNGS = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3)
_NOISY_UNITS = 8


@dataclasses.dataclass(frozen=True)
class Coupling:
    """The devices, or examples, whose values depend on each other's inputs.

    Where a program sums over an axis, a slope of one device's value is made of every
    device's gradient. So both sides of a comparison are summed over that axis. And so
    they are where JAX knows a leaf to be one value for all devices: its gradient is the
    sum of what each of them makes of it.

    Attributes:
      axes: Names of the axes that are summed over.
      typed: Those of them along which JAX tracks what varies (`check_vma`): there a
        value that does not vary is one value, and counts once.
    """

    axes: tuple[str, ...] = ()
    typed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, jaxpr: Any, moving: Sequence[Any]) -> Coupling:
        """Reads the axes that a program names, and those that a leaf is shared over."""
        named = jaxprs.free_axes(jaxpr)
        typed = frozenset(a for a in named if jaxprs.vma(lax.axis_index(a)))
        body = jaxprs.open_body(jaxpr)
        atoms = [*body.invars, *body.constvars, *body.outvars]
        varying = frozenset[str]().union(*map(jaxprs.vma, atoms))
        shared = varying - varying.intersection(*map(jaxprs.vma, moving))
        return cls(tuple(sorted({*named, *shared}, key=str)), typed | shared)

    def total(self, value: Any) -> Any:
        """Sums a value over the axes."""
        varying = jaxprs.vma(value)
        axes = tuple(a for a in self.axes if a not in self.typed or a in varying)
        return lax.psum(value, axes) if axes else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TracedSlope:
    """A directional derivative with its error estimate; see `differences.Slope`."""

    value: Any
    error: Any
    left: Any
    right: Any
    rungs: Any

    @property
    def is_kink(self) -> Any:
        """Whether the slope jumps at the base point."""
        return self.left != self.right

    def distance(self, slope: Any) -> Any:
        """Returns how far a claimed slope lies outside of [left, right], or 0."""
        low = jnp.minimum(self.left, self.right)
        high = jnp.maximum(self.left, self.right)
        return jnp.maximum(jnp.maximum(low - slope, slope - high), 0.0)


def inner(gradients: Sequence[Any], directions: Sequence[Any], over: Coupling) -> Any:
    """Returns the real pairing of gradients with directions, JAX's convention."""
    parts = [
        over.total(jnp.sum(jnp.real(g * v)))
        for g, v in zip(gradients, directions, strict=True)
    ]
    return sum(parts[1:], parts[0])


def magnitude(values: Values, weights: Values, over: Coupling) -> Any:
    """Returns the sum of absolute terms of weighted values."""
    sizes = [jnp.abs(value) for value in values]
    return inner(sizes, [jnp.abs(weight) for weight in weights], over)


def measure(
    line: Line,
    weights: Values,
    base: Values,
    *,
    scale: Any,
    over: Coupling,
    noise_eps: float | None = None,
    ladder: Sequence[float] = _RUNGS,
) -> TracedSlope:
    """Measures the slope of the weighted values along a line at t = 0.

    Args:
      line: Values along the line, in float64.
      weights: One cotangent for each output.
      base: The values at t = 0.
      scale: The size that the slope is expected to have.
      over: The devices that belong together.
      noise_eps: Relative noise of the values, where a part of the program could not
        be lifted.
      ladder: The steps, falling, where all of it was lifted.
    """
    rungs = np.array(ladder if noise_eps is None else _NOISY_RUNGS)
    eps = np.finfo(np.float64).eps
    units = 2 * eps if noise_eps is None else _NOISY_UNITS * noise_eps
    rounding = units * magnitude(base, weights, over) / rungs
    sides = lax.map(line, np.concatenate([-rungs, rungs]))
    low = [side[: len(rungs)] for side in sides]
    high = [side[len(rungs) :] for side in sides]
    left = _weighted([b[None] - m for m, b in zip(low, base, strict=True)], weights)
    right = _weighted([r - b[None] for b, r in zip(base, high, strict=True)], weights)
    middle = _weighted([r - m for m, r in zip(low, high, strict=True)], weights)
    left, right, middle = (_summed(parts, over) for parts in (left, right, middle))
    left, right, middle = left / rungs, right / rungs, middle / (2 * rungs)
    value, error, at = _best(middle, rounding, rungs)
    jump, coarser = jnp.abs(right - left)[at], jnp.abs(right - left)[at - 1]
    floor = jnp.maximum(8 * rounding[at], jnp.maximum(1e-6 * scale, 8 * error))
    ratio = rungs[0] / rungs[1]
    is_kink = (jump > floor) & (jump > 0.5 * coarser) & (jump * ratio > 2 * coarser)
    return TracedSlope(
        value,
        error,
        jnp.where(is_kink, left[at], value),
        jnp.where(is_kink, right[at], value),
        middle,
    )


def _weighted(differences: Values, weights: Values) -> Values:
    """Returns each output's weighted differences, one for each step."""
    return [
        jnp.sum(jnp.real(d * w[None]).reshape(len(d), -1), axis=1)
        for d, w in zip(differences, weights, strict=True)
    ]


def _summed(parts: Values, over: Coupling) -> Any:
    totals = [over.total(part) for part in parts]
    return sum(totals[1:], totals[0])


def _best(slopes: Any, rounding: Any, rungs: np.ndarray) -> tuple[Any, Any, Any]:
    """Picks the rung whose neighbours agree best, extrapolated or not.

    As in `differences`: a plateau must also agree with the finer rungs.
    """
    found = []
    for i in range(1, len(rungs)):
        plain = (slopes[i], jnp.abs(slopes[i] - slopes[i - 1]))
        candidates = [plain]
        if i > 1:
            newer, older = (
                _richardson(slopes[j - 1], slopes[j], float(rungs[j - 1] / rungs[j]))
                for j in (i, i - 1)
            )
            candidates.append((newer, jnp.abs(newer - older)))
        for value, error in candidates:
            for j in range(i + 1, len(rungs)):
                finer = jnp.abs(value - slopes[j]) - 4 * rounding[j]
                error = jnp.maximum(error, finer)
            found.append((value, error + rounding[i], i))
    values = jnp.stack([value for value, _, _ in found])
    errors = jnp.stack([error for _, error, _ in found])
    places = jnp.array([place for _, _, place in found])
    errors = jnp.where(jnp.isfinite(errors), errors, jnp.inf)
    best = jnp.argmin(errors)
    return values[best], errors[best], places[best]


def _richardson(coarse: Any, fine: Any, ratio: float) -> Any:
    """Combines central differences at steps `ratio` h and h: cancels the h^2 term."""
    return (ratio**2 * fine - coarse) / (ratio**2 - 1)
