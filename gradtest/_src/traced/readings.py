"""What a claim is judged by inside of a trace: all of it as traced operations.

The program, the claim and the rule-free derivative are evaluated in float64 and in
their own precision where the assertion stands. Everything is under `stop_gradient`, so
a derivative of the program around the assertion does not see it. Nothing is cached: a
cache would keep traced values alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from gradtest._src import control_flow as _control_flow  # noqa: F401  registers
from gradtest._src import dataflow, execution, jaxprs, seeding, solvers
from gradtest._src import pallas as _pallas  # noqa: F401  registers
from gradtest._src import primitives as _primitives  # noqa: F401  registers
from gradtest._src.claims import Claim
from gradtest._src.conventions import has_users_rules
from gradtest._src.inputs import Leaf, Point
from gradtest._src.kit import pushforward, shares_exact
from gradtest._src.lifting import Evaluator, Recorder, Replayer, lifted_dtype
from gradtest._src.program import Program, derivative
from gradtest._src.traced.slopes import Coupling, Line, TracedSlope, measure

Values = list[Any]
_MOST_CONSTANTS = 256
_FLOAT64_EPS = float(np.finfo(np.float64).eps)
_FLOAT32_EPS = float(np.finfo(np.float32).eps)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Settings for lifted operations in the midst of the user's own."""
    with (
        execution.working_precision(),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def in_float64(function: Callable[[], Any]) -> Any:
    """Returns what a function of traced values comes to in float64."""
    return jaxprs.wide_call(function, (), float64)


def settled_values(values: Sequence[Any]) -> Values:
    """Returns values as arrays that no derivative goes through."""
    return [
        value
        if dtypes.issubdtype(getattr(value, "dtype", np.int32), dtypes.extended)
        else lax.stop_gradient(jnp.asarray(value))
        for value in values
    ]


def widened(value: Any) -> Any:
    """Returns a value in the dtype that it has where it is lifted."""
    if dtypes.issubdtype(value.dtype, dtypes.extended):
        return value
    dtype = lifted_dtype(value.dtype)
    return value if dtype == value.dtype else lax.convert_element_type(value, dtype)


def norm(array: Any) -> Any:
    """Returns the Euclidean norm of an array of any shape."""
    return jnp.sqrt(jnp.sum(jnp.real(array * jnp.conj(array))))


def root_mean_square(array: Any) -> Any:
    """Returns an array's natural scale: 1 where it is all zero."""
    size = norm(array) / max(array.size, 1) ** 0.5
    return jnp.where(size > 0, size, 1.0)


def as_varying(value: Any, like: Any) -> Any:
    """Gives a constant the device axes over which another value varies."""
    axes = tuple(sorted(jaxprs.vma(like) - jaxprs.vma(value), key=str))
    return lax.pcast(value, axes, to="varying") if axes else value


def draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Draws random numbers with a variance of 1, large arrays of them in the program.

    As constants of the program those would fill the compiler's memory.

    Source: C. Wellons, "Prospecting for hash functions" (2018), `lowbias32`.
    """
    if math.prod(shape) <= _MOST_CONSTANTS:
        return seeding.normal(generator, shape, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = jnp.finfo(dtype).dtype
        parts = [draw(generator, shape, real) for _ in range(2)]
        return lax.complex(*parts)
    bits = lax.iota(np.uint32, math.prod(shape)) + np.uint32(generator.integers(2**32))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    bits = bits ^ (bits >> 16)
    uniform = bits.astype(jnp.float32) / 2.0**31 - 1
    return (uniform * 3**0.5).astype(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Readings:
    """Values, claim and exact derivative at one point, in float64.

    Attributes:
      exact: None where there is none.
      yardstick: The exact derivative of what rounds as the claim may.
      apart: How far each leaf's claim is from that of the other devices, where they
        share the leaf but not the claim; None elsewhere.
    """

    values: Values
    claimed_values: Values | None
    claimed: Values
    exact: Values | None
    yardstick: Values | None
    residual: Any
    apart: Values | None = None


@dataclasses.dataclass(frozen=True)
class Working:
    """A claim in its own precision: values, derivative, rule-free derivative."""

    values: Values
    claimed: Values
    exact: Values | None


class Bench:
    """Evaluates one claim about one program, at values of the trace around.

    Attributes:
      program: The function under test.
      claim: The derivative under test.
      own: The program that rounds as the claim may: mostly `program` itself.
      seed: Cotangents of the outputs, or tangents of the leaves.
    """

    def __init__(
        self,
        program: Program,
        claim: Claim,
        point: Point,
        seed: Values,
        *,
        key: Any,
        trial: int,
        own: Program | None = None,
    ):
        self.program, self.claim, self.key, self.trial = program, claim, key, trial
        self.own = own or program
        self.moving = settled_values(point.moving)
        self.held = settled_values(program.held(point))
        self.seed = settled_values(seed)
        self.islands: set[str] = set()
        self.over = Coupling.of(program.jaxpr, self.moving)
        traced = [program.jaxpr, claim.jaxpr, self.own.jaxpr]
        self._hoisted = {
            id(const): lax.stop_gradient(const)
            for jaxpr in traced
            for const in jaxprs.stray_values(jaxpr)
            if not dtypes.issubdtype(const.dtype, dtypes.extended)
        }
        self._solver_only = frozenset(
            stop
            for each in (program, self.own)
            for stop in dataflow.solver_only_stops(each.jaxpr)
        )
        self._audit = None
        if jaxprs.LINEAR_SOLVE in jaxprs.primitives(claim.jaxpr):
            self._audit = solvers.classify(solvers.forward_solvers(program.jaxpr))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves that move."""
        return self.program.inputs.moving

    @functools.cached_property
    def working_eps(self) -> float:
        """Spacing of the coarsest dtype among the leaves and the outputs."""
        found = [leaf.dtype for leaf in self.leaves]
        found += [out.dtype for out in self.program.outputs]
        return max(float(jnp.finfo(dtype).eps) for dtype in found)

    @functools.cached_property
    def is_exact(self) -> bool:
        """Whether the claim is the rule-free derivative itself: JAX's, and no rule."""
        return shares_exact(self.program, self.claim)

    @functools.cached_property
    def is_conventional(self) -> bool:
        """Whether the claim is JAX's own derivative, and no rule of a user's in it."""
        program = self.program
        is_own = self.claim.is_autodiff and not program.declared
        return is_own and not has_users_rules(program)

    @property
    def noise_eps(self) -> float | None:
        """Relative noise of what could not be lifted; None where all was."""
        moving = [True] * len(self.moving)
        held = [False] * (len(self.program.jaxpr.in_avals) - len(moving))
        reached = dataflow.reached_primitives(self.program.jaxpr, moving + held)
        return self.working_eps if self.islands & reached else None

    def draw(self, purpose: str, i: int) -> Any:
        """Draws random numbers of a leaf's shape, with a variance of 1."""
        leaf = self.leaves[i]
        generator = seeding.generator(self.key, purpose, self.trial, leaf.name)
        return draw(generator, leaf.shape, lifted_dtype(leaf.dtype))

    def _run(self, **settings: Any) -> Evaluator:
        return Evaluator(
            hoisted=self._hoisted, solver_only=self._solver_only, **settings
        )

    # --- in the claim's own precision -----------------------------------------------

    def run_itself(self) -> Working | None:
        """Runs the claim as the program runs it; None where that is float64."""
        is_widest = self.working_eps <= _FLOAT64_EPS
        if is_widest and not jaxprs.narrows(self.claim.jaxpr):
            return None
        exact = None if self.is_exact else self._working_exact()
        return Working(*self.read_working(), exact)

    def read_working(self) -> tuple[Values, Values]:
        """Returns values, where the claim has them, and derivative as it runs."""
        run = self._run(wide=False)
        with execution.working_precision():
            found = run(self.claim.jaxpr, [*self.moving, *self.held, *self.seed])
        return self._split(found)

    def _working_exact(self) -> Values | None:
        """Returns the rule-free derivative in working precision, or None."""
        try:
            with execution.working_precision():
                return self._exact(
                    self.own, self._run(wide=False), self.moving, self.seed, self.held
                )[1]
        except Exception:  # whatever differentiating a program may raise
            return None

    # --- in float64 -----------------------------------------------------------------

    def _split(self, found: Sequence[Any]) -> tuple[Values, Values]:
        count = len(self.program.outputs) if self.claim.has_value else 0
        return list(found[:count]), list(found[count:])

    def _exact(
        self, program: Program, run: Evaluator, moving: Any, seed: Any, held: Any
    ) -> tuple[Values, Values]:
        run = run.fork(stops=Recorder())
        if self.claim.mode == "fwd":
            return pushforward(program, run, moving, held, seed)
        return derivative(program.mathematics, run, moving, held, seed)

    @property
    def wide(self) -> tuple[Values, Values, Values]:
        """Moving leaves, held values and seed in float64; kept beyond no trace."""
        moving, held, seed = (
            list(map(widened, part)) for part in (self.moving, self.held, self.seed)
        )
        return moving, held, seed

    def read(self, moving: Values, seed: Values) -> Readings:
        """Evaluates claim, exact derivative and values."""
        held = self.wide[1]
        claimed_run = self._run(solver_audit=self._audit, islands=self.islands)
        claimed = claimed_run(self.claim.jaxpr, [*moving, *held, *seed])
        claimed_values, claimed = self._split(claimed)
        claimed, apart = self._shared(claimed)
        if self.is_exact:
            residual = claimed_run.residual
            values = self.values(moving)
            return Readings(values, claimed_values, claimed, claimed, claimed, residual)
        exact = yardstick = None
        try:
            run = self._run()
            values, exact = self._exact(self.program, run, moving, seed, held)
            yardstick = exact
            if self.own is not self.program:
                yardstick = self._exact(self.own, run, moving, seed, held)[1]
        except Exception:  # whatever differentiating a program may raise
            values = self.values(moving)
        return Readings(
            values,
            claimed_values if self.claim.has_value else None,
            claimed,
            exact,
            yardstick,
            claimed_run.residual,
            apart,
        )

    def _shared(self, claimed: Values) -> tuple[Values, Values | None]:
        """Takes the mean of the devices' claims about a leaf that they share."""
        if self.claim.mode == "fwd" or not any(self.unshared):
            return claimed, None
        means = [
            lax.pmean(value, axes) if axes else value
            for value, axes in zip(claimed, self.unshared, strict=True)
        ]
        return means, [norm(c - m) for c, m in zip(claimed, means, strict=True)]

    @functools.cached_property
    def unshared(self) -> list[tuple[str, ...]]:
        """The axes over which a claimed gradient varies, and its leaf does not."""
        derived = jaxprs.open_body(self.claim.jaxpr).outvars[-len(self.moving) :]
        return [
            tuple(sorted(jaxprs.vma(g) - jaxprs.vma(x), key=str))
            for g, x in zip(derived, self.moving, strict=True)
        ]

    def values(self, moving: Values, program: Program | None = None) -> Values:
        """Returns the rule-free values."""
        run = self._run(islands=self.islands)
        of = program or self.program
        return of.mathematics(run, moving, self.wide[1])

    def read_around(self, offsets: Sequence[Values] = ()) -> list[Readings]:
        """Returns the readings here, and at points off by these amounts."""
        moving, _, seed = self.wide
        zeros = list(map(jnp.zeros_like, moving))
        points = [
            jnp.stack([x + offset for offset in each])
            for x, *each in zip(moving, zeros, *offsets, strict=True)
        ]

        def read(point: Values) -> dict[str, Any]:
            return dict(vars(self.read(point, seed)))

        found = lax.map(read, points)
        return [
            Readings(**jax.tree_util.tree_map(lambda part, k=k: part[k], found))
            for k in range(len(offsets) + 1)
        ]

    def shaken(self, size: float, purpose: str) -> Values:
        """Returns what each leaf is off by where it is rounded otherwise, at random."""
        return [
            size * x * jnp.sign(self.draw(purpose, i))
            for i, x in enumerate(self.wide[0])
        ]

    def line(self, direction: Values, stops: Any) -> Line:
        """Returns the values along a line, stopped values frozen."""
        moving, held, _ = self.wide
        program = self.program

        def line(t: Any) -> Values:
            at = [x + t * v for x, v in zip(moving, direction, strict=True)]
            run = self._run(stops=Replayer(stops), islands=self.islands)
            return program.mathematics(run, at, held)

        return line

    def measure(
        self,
        direction: Values,
        base: Values,
        weights: Values,
        *,
        scale: Any,
        stops: Any,
    ) -> TracedSlope:
        """Measures the slope of the values along a direction."""
        return measure(
            self.line(direction, stops),
            weights,
            base,
            scale=scale,
            over=self.over,
            noise_eps=self.noise_eps,
        )

    def stops(self) -> list[Any]:
        """Returns the stopped values at the point, for `measure`."""
        recorder = Recorder()
        moving, held, _ = self.wide
        self.program.mathematics(self._run(stops=recorder), moving, held)
        return recorder.values

    def half_spacing(self) -> float:
        """Spacing of the half-precision constants of claim and program, or 0."""
        literals = [
            literal
            for jaxpr in (self.claim.jaxpr, self.program.jaxpr, self.own.jaxpr)
            for literal in jaxprs.half_literals(jaxpr)
        ]
        return max(
            (float(jnp.finfo(literal.aval.dtype).eps) for literal in literals),
            default=0.0,
        )

    def operand_spacing(self) -> float:
        """How far operands may be off: in half precision no more than in float32."""
        return min(self.working_eps, _FLOAT32_EPS)
