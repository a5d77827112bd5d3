"""One claim at one point: its readings, its directions, and slopes along them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import differences, seeding
from gradtest._src.claims import Claim
from gradtest._src.diagnosis.later import Later
from gradtest._src.differences import Slope
from gradtest._src.inputs import Leaf, Point
from gradtest._src.lifting import widen
from gradtest._src.program import Program, Values
from gradtest._src.truth import Bench, Jittered, Readings

# Leaves whose expected contributions lie within this factor share a direction.
_BUCKET_SPAN = 1e3
# Below this part of the largest contribution a gradient is float64 noise.
NOISE_FLOOR = 1e-11
# Below this part of the largest contribution, or of the value, differences are blind.
FAINT = 1e-9
_FLOAT64_EPS = float(np.finfo(np.float64).eps)
# Weights of outputs stay within what every dtype can hold.
MOST_BITS = 10
# How much of the rounding noise seen once is allowed.
NOISE_FACTOR = 64
# The same, where every operation was made to round otherwise.
_JITTERS, _JITTER_FACTOR = 4, 8


class Case:
    """A program, a claim about its derivative, and the point where it is judged.

    Attributes:
      program: The function under test (or, at order 2, its gradient).
      claim: The derivative under test.
      point: Values of the leaves.
      rtol: Allowed relative formula gap.
      key: The key of the check, and `trial` the trial's number: they fix every draw.
      later: What is still to be asked of the causes of its wrong leaves.
    """

    def __init__(
        self,
        program: Program,
        claim: Claim,
        point: Point,
        *,
        rtol: float,
        key: Any,
        trial: int,
        retrace: Callable[[], Case | None] = lambda: None,
        forward: Claim | None = None,
        works: bool = True,
    ):
        self.program = program
        self.claim = claim
        self.point = point
        self.key = key
        self.trial = trial
        self._retrace = retrace
        self.later: Later = {}
        self.seed = self._draw_seed()
        self.bench = Bench(
            program, claim, point, self.seed, forward=forward, works=works
        )
        if claim.mode == "rev" and len(program.outputs) > 1:
            self._balance_seed()
        self.rtol = max(rtol, 64 * self.noise) if self.bench.islands else rtol

    def _balance_seed(self) -> None:
        """Weighs outputs by their own size, so that none hides behind a larger one.

        The weights are powers of two, which round nothing.
        """
        tangents = self.tangents if self.bench.forward else ()
        values = self.bench.read(self.point, tangents=tangents).values
        for i, (seed, value) in enumerate(zip(self.seed, values, strict=True)):
            self.seed[i] = (seed * balance(value)).astype(seed.dtype)
        self.bench.reseed(self.seed)

    def at(self, point: Point) -> Case:
        """Returns this case at another point, with the same seed and programs."""
        moved = copy.copy(self)
        moved.point = point
        for name in ("readings", "sizes", "retraced", "_nudged", "_jittered"):
            moved.__dict__.pop(name, None)
        return moved

    def _draw_seed(self) -> Values:
        if self.claim.mode == "fwd":
            return [
                tangent.astype(leaf.dtype)
                for tangent, leaf in zip(self.tangents, self.leaves, strict=True)
            ]
        if self.program.is_scalar:
            return [np.ones((), dtype=self.program.outputs[0].dtype)]
        return [
            seeding.normal(
                seeding.generator(self.key, "cotangent", self.trial, i),
                out.shape,
                out.dtype,
            )
            for i, out in enumerate(self.program.outputs)
        ]

    @functools.cached_property
    def retraced(self) -> Case | None:
        """This case with the program traced anew in float64, where that can be done."""
        return self._retrace()

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves that move."""
        return self.program.inputs.moving

    @functools.cached_property
    def weights(self) -> Values:
        """Cotangents that weigh the outputs into one number, in float64."""
        if self.claim.mode == "rev":
            return [widen(value) for value in self.seed]
        return [
            widen(
                seeding.normal(
                    seeding.generator(self.key, "cotangent", self.trial, i),
                    out.shape,
                    out.dtype,
                )
            )
            for i, out in enumerate(self.program.outputs)
        ]

    @functools.cached_property
    def readings(self) -> Readings:
        """Claim, exact derivative and values at the point, in float64."""
        tangents = self.tangents if self.bench.forward else ()
        return self.bench.read(self.point, tangents=tangents)

    @functools.cached_property
    def tangents(self) -> Values:
        """A tangent of every leaf, of the leaf's own size."""
        return [self.direction(i, "tangent") for i in range(len(self.leaves))]

    @functools.cached_property
    def working_eps(self) -> float:
        """Spacing of the coarsest dtype among the leaves and the outputs."""
        dtypes = [leaf.dtype for leaf in self.leaves]
        dtypes += [out.dtype for out in self.program.outputs]
        return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

    @property
    def noise(self) -> float:
        """Relative noise of the values: float64's, or that of what was not lifted."""
        return self.working_eps if self.bench.islands else _FLOAT64_EPS

    @functools.cached_property
    def sizes(self) -> list[float]:
        """Root mean square of each leaf, 1 where it is all zero: its natural scale."""
        return [_root_mean_square(value) or 1.0 for value in self.point.moving]

    def contributions(self, gradient: Values) -> np.ndarray:
        """Returns how much each leaf adds to a slope along a direction of its size."""
        return np.array(
            [norm(g) * size for g, size in zip(gradient, self.sizes, strict=True)]
        )

    def is_faint(self, contributions: np.ndarray) -> np.ndarray:
        """Returns which contributions differences of values are blind to.

        They are so small, beside the largest or the value itself, that its rounding
        drowns what they do.
        """
        largest = float(np.max(self.contributions(self.readings.claimed), initial=0.0))
        size = differences.magnitude(self.readings.values, self.weights)
        return contributions < FAINT * max(largest, size)

    @functools.cached_property
    def _nudged(self) -> Readings:
        """The readings at a point a few units in the last place away."""
        return self.perturbed(4 * _FLOAT64_EPS, "rounding").readings

    def rounding_noise(self, leaf: int) -> float:
        """Returns how far rounding moves a leaf's claim and exact derivative: a norm.

        Measured: both are read again at a point a few units in the last place away. A
        gradient that is small by itself hardly moves; one that cancels to zero moves by
        as much as is left of it.
        """
        here, near = self.readings, self._nudged
        noise = norm(here.claimed[leaf] - near.claimed[leaf])
        if here.exact is not None and near.exact is not None:
            noise += norm(here.exact[leaf] - near.exact[leaf])
        return NOISE_FACTOR * noise

    @functools.cached_property
    def _jittered(self) -> list[Jittered]:
        generator = seeding.generator(self.key, "jitter", self.trial)
        shifts = _FLOAT64_EPS * generator.choice([-1.0, 1.0], (_JITTERS, 64))
        return [self.bench.read_jittered(self.point, row) for row in shifts]

    def evaluation_noise(self, leaf: int) -> float:
        """Returns how far the rounding inside moves claim and exact derivative: a norm.

        At a neighbouring point the same sums may round alike; here every operation of
        both is off by a unit in the last place.
        """
        return self._moved(leaf, "claimed", "exact")

    def exact_noise(self, leaf: int) -> float:
        """Returns how far the rounding inside moves the exact derivative: a norm."""
        return self._moved(leaf, "exact")

    def value_noise(self, output: int) -> float:
        """Returns how far the rounding inside moves a value and the claim's: a norm."""
        return self._moved(output, "claimed_values", "values")

    def _moved(self, k: int, *readings: str) -> float:
        """Returns how far jitter moves the k-th arrays of these readings together."""
        most = 0.0
        for jittered in self._jittered:
            noise = 0.0
            for name in readings:
                here, there = getattr(self.readings, name), getattr(jittered, name)
                if here is not None and there is not None:
                    noise += norm(here[k] - there[k])
            most = max(most, noise if np.isfinite(noise) else 0.0)
        return _JITTER_FACTOR * most

    def perturbed(self, eps: float, purpose: str) -> Case:
        """Returns this case at a point off by this relative amount, at random."""
        moving = []
        for i, value in enumerate(self.point.moving):
            nudge = eps * np.sign(self.direction(i, purpose))
            moving.append(widen(value) * (1 + nudge))
        return self.at(Point(tuple(moving), self.point.held))

    def direction(self, leaf: int, purpose: str) -> np.ndarray:
        """Draws a direction for one leaf, of the leaf's own size."""
        return self.sizes[leaf] * widen(self._normal(self.leaves[leaf], purpose))

    def symmetric(self, leaf: int, direction: np.ndarray) -> np.ndarray:
        """Returns the symmetric part of a direction, for a leaf that is symmetric.

        For any other leaf the direction itself.
        """
        value = widen(self.point.moving[leaf])
        if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
            return direction
        if not np.array_equal(value, np.conj(np.swapaxes(value, -1, -2))):
            return direction
        return (direction + np.conj(np.swapaxes(direction, -1, -2))) / 2

    def _normal(self, leaf: Leaf, purpose: str) -> np.ndarray:
        generator = seeding.generator(self.key, purpose, self.trial, leaf.name)
        return seeding.normal(generator, leaf.shape, leaf.dtype)

    def measure(
        self,
        directions: Mapping[int, np.ndarray],
        scale: float,
        *,
        overrun: int = 0,
        weights: Values | None = None,
    ) -> Slope:
        """Measures the slope along directions of some leaves, the others at rest.

        Args:
          directions: Tangents by leaf.
          scale: The size that the slope is expected to have.
          overrun: How many steps each `while` loop goes on after it has ended.
          weights: Cotangents of the outputs, in place of the case's own.
        """
        return differences.measure_slope(
            self.line(directions, overrun=overrun),
            self.weights if weights is None else weights,
            scale=scale,
            base=self.readings.values,
            is_noisy=bool(self.bench.islands),
        )

    def sides(
        self, directions: Mapping[int, np.ndarray], step: float
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns each output's slopes from -step to 0 and from 0 to step."""
        line, here = self.line(directions), self.readings.values
        ends = zip(line(-step), here, line(step), strict=True)
        return [((at - low) / step, (high - at) / step) for low, at, high in ends]

    def line(
        self, directions: Mapping[int, np.ndarray], *, overrun: int = 0
    ) -> differences.Line:
        """Returns the values along directions of some leaves, the others at rest."""
        along = [
            directions.get(i, np.zeros(leaf.shape, _wide(leaf.dtype)))
            for i, leaf in enumerate(self.leaves)
        ]
        return self.bench.line(self.point, self.readings.stops, along, overrun=overrun)

    def buckets(self, contributions: np.ndarray) -> list[list[int]]:
        """Groups leaves of like contribution; those that add nothing join the last."""
        largest = float(np.max(contributions, initial=0.0))
        silent = [i for i, c in enumerate(contributions) if c <= NOISE_FLOOR * largest]
        groups: list[list[int]] = []
        for i in np.argsort(-contributions, kind="stable").tolist():
            if i in silent:
                continue
            first = contributions[groups[-1][0]] if groups else 0.0
            if groups and contributions[i] * _BUCKET_SPAN >= first:
                groups[-1].append(i)
            else:
                groups.append([i])
        if silent:
            groups = [*groups[:-1], [*(groups[-1] if groups else []), *silent]]
        return groups

    def bucket_directions(
        self, bucket: Sequence[int], contributions: np.ndarray, purpose: str
    ) -> tuple[dict[int, np.ndarray], float]:
        """Draws a bucket's direction, weighted so that its leaves count alike.

        Returns:
          Directions by leaf, and the size of the slope to expect along them.
        """
        counted = [contributions[i] for i in bucket if contributions[i] > 0]
        smallest = min(counted, default=0.0)
        directions, total = {}, 0.0
        for i in bucket:
            weight = smallest / contributions[i] if contributions[i] > 0 else 1.0
            # A leaf that adds only noise must not set everybody's step.
            weight = max(weight, 1 / _BUCKET_SPAN)
            directions[i] = weight * self.direction(i, purpose)
            total += (weight * contributions[i]) ** 2
        return directions, float(np.sqrt(total))


def norm(array: np.ndarray) -> float:
    """Returns the Euclidean norm of an array of any shape.

    Not by BLAS, whose threads wait for each other where XLA's hold the cores.
    """
    flat = np.abs(array).ravel() if np.iscomplexobj(array) else array.ravel()
    return math.sqrt(float(np.einsum("i,i->", flat, flat)))


def balance(value: np.ndarray) -> float:
    """Returns the power of two that brings an array to a size of about 1."""
    size = _root_mean_square(value)
    if not size > 0 or not math.isfinite(size):
        return 1.0
    return 2.0 ** int(np.clip(-round(math.log2(size)), -MOST_BITS, MOST_BITS))


def pair(gradient: np.ndarray, direction: np.ndarray) -> float:
    """Returns the real pairing of a cotangent with a tangent, JAX's convention."""
    return float(np.sum((gradient * direction).real))


def pair_all(gradient: Values, directions: Mapping[int, np.ndarray]) -> float:
    """Returns the pairing summed over the leaves that move."""
    return sum(pair(gradient[i], v) for i, v in directions.items())


def _root_mean_square(value: Any) -> float:
    array = widen(value)
    return norm(array) / max(array.size, 1) ** 0.5


def _wide(dtype: Any) -> Any:
    return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
