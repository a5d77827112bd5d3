"""The programs that screen a gradient: as it runs, and in float64.

A whole check traces the loss anew and looks closely. A screen is compiled once and
returns a few numbers for each leaf, which tell whether a closer look is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src import dataflow, jaxprs, solvers
from gradtest._src.case import FAINT
from gradtest._src.claims import Claim
from gradtest._src.confirmation import LEAST_PART
from gradtest._src.kit import constants_of, shares_exact
from gradtest._src.lifting import Evaluator, Recorder, Replayer
from gradtest._src.program import Program, derivative
from gradtest._src.traced.gaps import all_finite, finite_part, traced_gap
from gradtest._src.traced.readings import norm, root_mean_square, widened
from gradtest._src.traced.slopes import Coupling, magnitude, measure

Values = list[Any]
Numbers = dict[str, Any]
# Two steps along one direction: fine enough to cross few kinks of a wide network.
_RUNGS = (3e-6, 3e-7)
# What float64 itself may round of a leaf, as a part of the largest leaf's contribution.
_NOISE = 1e-12
# How far entries of a direction may be weighed down for a leaf that adds much.
_LEAST_RATIO = 1e-3
_LARGEST_UINT32 = 2.0**31


@dataclasses.dataclass(frozen=True)
class Traced:
    """A loss and its gradient, traced.

    Attributes:
      program: The loss.
      claim: What JAX makes its gradient to be.
    """

    program: Program
    claim: Claim

    @property
    def shares(self) -> bool:
        """Whether no rule is in it: the claim is the rule-free gradient itself."""
        return shares_exact(self.program, self.claim)

    def constants(self) -> Values:
        """Returns the arrays that the loss closes over."""
        return constants_of(self.program, self.claim)

    def split(self, found: Sequence[Any]) -> tuple[Values, Values]:
        """Parts what the claim returns into values and derivative."""
        count = len(self.program.outputs) if self.claim.has_value else 0
        return list(found[:count]), list(found[count:])

    def rows(self, value: Any) -> Any:
        """Returns a claimed array with a leading axis of devices, of one if need be."""
        return value if self.claim.devices else value[None]


def own_program(traced: Traced) -> Callable[..., Any]:
    """Returns values and gradient in the loss's own precision, and the yardstick.

    That is the rule-free gradient in the same precision: the claim may lose as much.
    """
    constants = traced.constants()
    is_run_by_variant = traced.claim.variant

    def run(moving: Values, held: Values, seed: Values, consts: Values) -> Numbers:
        hoisted = dict(zip(map(id, constants), consts, strict=True))
        found: Numbers = {"plain": None}
        if not is_run_by_variant:
            evaluator = Evaluator(wide=False, hoisted=hoisted)
            results = evaluator(traced.claim.jaxpr, [*moving, *held, *seed])
            found["values"], found["claimed"] = traced.split(results)
        if not traced.shares:
            evaluator = Evaluator(wide=False, hoisted=hoisted)
            of = traced.program.mathematics
            with contextlib.suppress(Exception):  # where it has no reverse mode
                found["plain"] = derivative(of, evaluator, moving, held, seed)[1]
        return found

    return run


class LiftedProgram:
    """Compares the gradient with the rule-free one and with slopes, in float64.

    Attributes:
      islands: Names of the primitives that could not be lifted, once it is traced.
      why_no_exact: Why there is no rule-free gradient, once it is traced.
    """

    def __init__(self, traced: Traced, rtol: float, working_eps: float):
        self._traced = traced
        self._rtol = rtol
        self._working_eps = working_eps
        self._constants = traced.constants()
        jaxpr = traced.program.jaxpr
        self._solver_only = frozenset(dataflow.solver_only_stops(jaxpr))
        self._audit = None
        if jaxprs.LINEAR_SOLVE in jaxprs.primitives(traced.claim.jaxpr):
            self._audit = solvers.classify(solvers.forward_solvers(jaxpr))
        self.islands: set[str] = set()
        self.why_no_exact = ""

    def __call__(
        self,
        moving: Values,
        held: Values,
        seed: Values,
        consts: Values,
        own: Numbers,
        draws: Any,
        nudge: Any,
        moves: Any,
    ) -> Numbers:
        """Returns the numbers of a screen.

        Args:
          moving: The leaves that are differentiated, in any dtype.
          held: All other arrays.
          seed: The cotangents of the loss.
          consts: The arrays that the loss closes over.
          own: What the loss's own precision gave.
          draws: One integer for each leaf and purpose, uint32[2, leaves].
          nudge: How far off the point itself to look, relative to each leaf's size.
          moves: Which leaves the slope is measured along: 1.0, or 0.0 for at rest.
        """
        raw = moving
        moving, held, seed, consts = (
            [widened(value) for value in part] for part in (moving, held, seed, consts)
        )
        self._hoisted = dict(zip(map(id, self._constants), consts, strict=True))
        sizes = [root_mean_square(finite_part(x)) for x in moving]
        moving = [
            x + nudge * size * _drawn(draws[1, i], x)
            for i, (x, size) in enumerate(zip(moving, sizes, strict=True))
        ]
        run = self._evaluator(solver_audit=self._audit)
        claimed_values, claimed = self._traced.split(
            run(self._traced.claim.jaxpr, [*moving, *held, *seed])
        )
        values, exact, stops = self._exact(moving, held, seed)
        found = {
            "values": values,
            "values off": self._values_off(values, claimed_values),
            "moving finite": jnp.stack([all_finite([x]) for x in raw]),
            "size": jnp.stack(sizes),
            "claimed finite": jnp.stack([all_finite([c]) for c in claimed]),
            "residual": run.residual,
        }
        truth = None if self._traced.shares else exact
        found |= self._gaps(claimed, truth, sizes)
        found |= self._rounding(claimed, truth, own)
        if self._traced.program.as_functions is None:
            lines = self._lines(moving, held, stops)
            found |= self._slope(lines, values, claimed, sizes, seed, draws[0], moves)
        return found

    def _evaluator(self, **settings: Any) -> Evaluator:
        return Evaluator(
            hoisted=self._hoisted,
            solver_only=self._solver_only,
            islands=self.islands,
            **settings,
        )

    def _exact(
        self, moving: Values, held: Values, seed: Values
    ) -> tuple[Values, Values | None, Any]:
        """Returns values, rule-free gradient or None, and the stopped values."""
        program = self._traced.program
        if not self._traced.shares:
            try:
                run = self._evaluator(stops=Recorder())
                values, exact = derivative(program.mathematics, run, moving, held, seed)
                return values, exact, run.stops.values  # type: ignore[union-attr]
            except Exception as error:  # whatever differentiating a program may raise
                self.why_no_exact = str(error).strip().splitlines()[0]
        recorder = Recorder()
        run = self._evaluator(stops=recorder)
        return program.mathematics(run, moving, held), None, recorder.values

    def _lines(self, moving: Values, held: Values, stops: Any) -> Callable[..., Any]:
        """Returns a function of a direction: the values along it."""

        def along(direction: Values) -> Callable[[Any], Values]:
            def line(t: Any) -> Values:
                at = [x + t * v for x, v in zip(moving, direction, strict=True)]
                run = self._evaluator(stops=Replayer(stops))
                return self._traced.program.mathematics(run, at, held)

            return line

        return along

    def _values_off(self, values: Values, claimed: Values) -> Any:
        """Returns whether the value under differentiation is another."""
        off = jnp.zeros((), bool)
        for value, rows in zip(values, map(self._traced.rows, claimed), strict=False):
            gaps = jax.vmap(norm)(rows - value[None])
            limit = self._tolerance * norm(value) + 1e-13 * norm(value)
            off |= jnp.any(~(gaps <= limit))
        return off

    @property
    def _tolerance(self) -> float:
        if not self.islands:
            return self._rtol
        return max(self._rtol, 64 * self._working_eps)

    def _gaps(self, claimed: Values, exact: Values | None, sizes: Values) -> Numbers:
        """Compares the gradient with the rule-free one, leaf by leaf."""
        if exact is None:
            return {}
        contributions = [
            norm(finite_part(e)) * size for e, size in zip(exact, sizes, strict=True)
        ]
        largest = jnp.max(jnp.stack(contributions))
        noise = max(_NOISE, self._working_eps if self.islands else 0.0)
        sizes_allowed = []
        for c, e, size in zip(claimed, exact, sizes, strict=True):
            floor = noise * largest / size

            def compared(row: Any, e: Any = e, floor: Any = floor) -> tuple[Any, ...]:
                # Where the exact one is not finite, differences judge alone.
                truth = jnp.where(jnp.isfinite(e), e, row)
                gap = traced_gap(row, truth, rtol=self._tolerance, floor=floor)
                return gap.size, gap.allowed, gap.exceeded

            found = jax.vmap(compared)(self._traced.rows(c))
            sizes_allowed.append([jnp.max(part) for part in found])
        size, allowed, exceeded = map(jnp.stack, zip(*sizes_allowed, strict=True))
        return {
            "gap": size,
            "allowed": allowed,
            "exceeded": exceeded,
            "open": jnp.stack([~all_finite([e]) for e in exact]),
        }

    def _rounding(self, claimed: Values, exact: Values | None, own: Numbers) -> Numbers:
        """Returns what working precision loses, of the claim and of the yardstick."""
        losses, finite = [], []
        for c, w in zip(claimed, map(widened, own["claimed"]), strict=True):
            losses.append(norm(self._traced.rows(w) - self._traced.rows(c)))
            finite.append(all_finite([w]))
        found = {
            "own finite": jnp.stack(finite),
            "own values finite": all_finite(own["values"]),
            "loss": jnp.stack(losses),
            "norm": jnp.stack([norm(finite_part(c)) for c in claimed]),
            "plain loss": None,
        }
        if own["plain"] is not None and exact is not None:
            pairs = zip(map(widened, own["plain"]), exact, strict=True)
            found["plain loss"] = jnp.stack([norm(p - e) for p, e in pairs])
            found["plain norm"] = jnp.stack([norm(finite_part(e)) for e in exact])
        return found

    def _slope(
        self,
        lines: Callable[..., Any],
        values: Values,
        claimed: Values,
        sizes: Values,
        seed: Values,
        draws: Any,
        moves: Any,
    ) -> Numbers:
        """Measures one slope along which all leaves count alike."""
        rows = [finite_part(self._traced.rows(c)) for c in claimed]
        contributions = jnp.stack(
            [norm(row) * size for row, size in zip(rows, sizes, strict=True)]
        )
        contributions = contributions * moves
        is_faint = contributions <= FAINT * jnp.max(contributions)
        counted = jnp.where(is_faint, jnp.inf, contributions)
        ratios = jnp.min(counted) / jnp.where(contributions > 0, contributions, 1.0)
        ratios = jnp.clip(jnp.where(jnp.isfinite(ratios), ratios, 1.0), _LEAST_RATIO, 1)
        ratios = ratios * moves
        direction = [
            ratios[i] * size * _drawn(draws[i], row[0])
            for i, (row, size) in enumerate(zip(rows, sizes, strict=True))
        ]
        expected = jnp.sqrt(jnp.sum((ratios * contributions) ** 2))
        least = LEAST_PART * magnitude(list(map(finite_part, values)), seed, Coupling())
        scale = jnp.maximum(expected, least)
        slope = measure(
            lines(direction),
            seed,
            values,
            scale=scale,
            over=Coupling(),
            noise_eps=self._working_eps if self.islands else None,
            ladder=_RUNGS,
        )
        parts = jnp.stack(
            [
                jnp.sum(jnp.real(row * v[None]).reshape(len(row), -1), axis=1)
                for row, v in zip(rows, direction, strict=True)
            ]
        )
        return {
            "slope parts": jnp.max(jnp.abs(parts), axis=1),
            "slope off": jnp.max(jax.vmap(slope.distance)(jnp.sum(parts, axis=0))),
            "slope error": slope.error,
            "slope scale": scale,
        }


def _drawn(seed: Any, like: Any) -> Any:
    """Draws numbers with a variance of 1, in the program, of an array's shape.

    Source: C. Wellons, "Prospecting for hash functions" (2018), `lowbias32`.
    """
    if jnp.iscomplexobj(like):
        real = jnp.real(like)
        return lax.complex(
            _drawn(seed, real), _drawn(seed ^ jnp.uint32(0x9E3779B9), real)
        )
    bits = lax.iota(jnp.uint32, like.size) * jnp.uint32(0x9E3779B9) + seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
    uniform = bits.astype(jnp.float64) / _LARGEST_UINT32 - 1
    return (uniform * 3**0.5).reshape(like.shape)
