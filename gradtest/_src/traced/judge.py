"""The verdict on a derivative inside of a trace, as conditions on traced numbers.

The claim is compared with the rule-free derivative, leaf by leaf and entry by entry.
Differences of values along fixed directions confirm that one, and decide where the two
part: the slope is measured along the very entries in dispute.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.case import NOISE_FACTOR
from gradtest._src.confirmation import LEAST_PART
from gradtest._src.differences import SETTLED_PART, SWAMPED
from gradtest._src.primal import DIRECT_RESIDUAL, ITERATIVE_RESIDUAL
from gradtest._src.solvers import SolveKind
from gradtest._src.traced.directions import COUNT, Directions
from gradtest._src.traced.gaps import (
    ALONG,
    Condition,
    TracedGap,
    all_finite,
    escaped,
    finite_part,
    traced_gap,
    where_defined,
)
from gradtest._src.traced.kinks import KinkSamples, nearby
from gradtest._src.traced.readings import Bench, Readings, Working, in_float64, norm
from gradtest._src.traced.readings import root_mean_square as size_of
from gradtest._src.traced.rounding import rounding_conditions
from gradtest._src.traced.slopes import inner

Values = list[Any]
# Points around: off by rounding in float64, and by that of the operands themselves.
_NUDGE, _SHAKES = 4 * float(np.finfo(np.float64).eps), 2
# What devices may round one gradient otherwise, relative to the largest part.
_SHARED_NOISE = 1e-12
_ALONG_SLOPE = "; its slope along one direction is {factor:.4g} times the measured one"
_SUMMED = ": the sum of what each device makes of it"


def reverse_conditions(
    bench: Bench, rtol: float, rounding_rtol: float | None, **settings: Any
) -> list[Condition]:
    """Returns all that must hold of a claim in reverse mode.

    Args:
      bench: The claim.
      rtol: Allowed relative formula gap of a leaf.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      **settings: See `_Judge`.
    """
    working = bench.run_itself()
    return in_float64(
        lambda: _Judge(bench, rtol, **settings).conditions(working, rounding_rtol)
    )


class _Judge:
    """Judges a reverse-mode claim at one point.

    Attributes:
      bench: The claim.
      rtol: Allowed relative gap of a leaf.
      what: What the messages call the derivative.
      excuse: Why a formula can't be refused here, where it can't.
    """

    def __init__(
        self,
        bench: Bench,
        rtol: float,
        *,
        what: str = "the gradient",
        excuse: str = "",
        judges_values: bool = True,
    ):
        self.bench, self.what, self.excuse = bench, what, excuse
        self.judges_values = judges_values
        spacing = bench.operand_spacing()
        self.sizes = [size_of(x) for x in bench.wide[0]]
        shaken = [bench.shaken(spacing, f"shaken {k}") for k in range(_SHAKES)]
        offsets = [bench.shaken(_NUDGE, "nudged"), *shaken]
        offsets += nearby(bench, self.sizes)
        around = bench.read_around([] if bench.is_exact else offsets)
        self.here: Readings = around[0]
        self.around = around[: 2 + _SHAKES]
        self.kink = KinkSamples.of(around[2 + _SHAKES :])
        eps = bench.noise_eps
        self.rtol = max(rtol, bench.half_spacing(), 64 * eps if eps else 0.0)
        self.directions = Directions(bench, self.here.values, self.sizes, self.rtol)
        self.loops = jaxprs.has_loop_on_floats(bench.program.jaxpr)

    def conditions(
        self, working: Working | None, rounding_rtol: float | None
    ) -> list[Condition]:
        """Returns all that must hold."""
        found = [*self._wholeness(), *self._values(), *self._sharing()]
        found += [*self._formula(), *self._solvers()]
        found += rounding_conditions(
            self.bench,
            working,
            [leaf.name for leaf in self.bench.leaves],
            self.sizes,
            [self.here, *self.around[2:]],
            rounding_rtol,
        )
        return where_defined(all_finite(self.here.values), found)

    def _wholeness(self) -> list[Condition]:
        """A NaN beside a finite value is never right."""
        return [
            Condition(
                f"{escaped(leaf.name)}: {self.what} is NaN or infinite",
                ~_finite(claimed),
            )
            for leaf, claimed in zip(self.bench.leaves, self.here.claimed, strict=True)
        ]

    def _values(self) -> list[Condition]:
        here, program = self.here, self.bench.program
        if here.claimed_values is None or not self.judges_values:
            return []
        found = []
        for output, claimed, value in zip(
            program.outputs, here.claimed_values, here.values, strict=True
        ):
            gap = traced_gap(
                claimed, value, rtol=self.rtol, floor=1e-13 * norm(finite_part(value))
            )
            found.append(
                Condition(
                    f"{escaped(output.name)}: the value computed for the derivative is "
                    "off the function's by {gap:.3g} of its norm, allowed are "
                    "{allowed:.3g}",
                    gap.exceeded,
                    numbers={"gap": gap.size, "allowed": gap.allowed},
                )
            )
        return found

    def _sharing(self) -> list[Condition]:
        """Devices that share a leaf must claim one gradient of it."""
        if self.here.apart is None:
            return []
        claimed, found = self.here.claimed, []
        contributions = self.directions.contributions(claimed)
        largest = jnp.maximum(jnp.max(contributions), self.directions.magnitude())
        for i, axes in enumerate(self.bench.unshared):
            if not axes:
                continue
            size = norm(finite_part(claimed[i]))
            unit = jnp.where(size > 0, size, 1.0)
            limit = self.rtol * size + _SHARED_NOISE * largest / self.sizes[i]
            says = f"{self.what} differs over {', '.join(map(repr, axes))}"
            found.append(
                Condition(
                    f"{escaped(self.bench.leaves[i].name)}: {escaped(says)}, "
                    "by {gap:.3g} of its mean's norm, allowed are {allowed:.3g}; but "
                    "the leaf is one for all devices there, and so its gradient is one"
                    + _SUMMED
                    * any(axis in self.bench.over.axes for axis in axes),
                    self.here.apart[i] > limit,
                    numbers={"gap": self.here.apart[i] / unit, "allowed": limit / unit},
                )
            )
        return found

    def _solvers(self) -> list[Condition]:
        residual = self.here.residual
        if residual is None:
            return []
        forward = jnp.maximum(
            residual[SolveKind.SOLVE_DIRECT], residual[SolveKind.SOLVE_ITERATIVE]
        )
        found = []
        for kind in SolveKind:
            transposed = kind >= SolveKind.TRANSPOSE_DIRECT
            iterates = kind in (
                SolveKind.SOLVE_ITERATIVE,
                SolveKind.TRANSPOSE_ITERATIVE,
            )
            limit: Any = ITERATIVE_RESIDUAL if iterates else DIRECT_RESIDUAL
            if transposed:
                limit = jnp.maximum(limit, 10 * forward)
            exceeds = ~(residual[kind] <= limit)
            loose = kind is SolveKind.SOLVE_ITERATIVE
            name = "transpose_solve" if transposed else "solve"
            found.append(
                Condition(
                    f"{name}: the residual is {{gap:.3g}}, allowed are {{allowed:.3g}}",
                    exceeds & (not loose),
                    exceeds & loose,
                    "a linear solver stops far from the solution: tighten it",
                    {"gap": residual[kind], "allowed": limit},
                )
            )
        return found

    # --- the formula --------------------------------------------------------------

    def _formula(self) -> list[Condition]:
        if self.bench.is_exact:
            found = self._uncontradicted()
        elif self.here.exact is None:
            found = self._by_differences()
        else:
            found = self._by_exact(self.here.exact)
        return [self._excused(condition) for condition in found]

    def _excused(self, condition: Condition) -> Condition:
        if not self.excuse:
            return condition
        return Condition(
            condition.text, False, condition.wrong | condition.open, self.excuse
        )

    def _uncontradicted(self) -> list[Condition]:
        """Asks of a derivative that no rule is in whether the values contradict it."""
        contributions = self.directions.contributions(self.here.claimed)
        faint = self.directions.faint(contributions)
        ways = self.directions.along_random(contributions, faint)
        slopes = self.directions.slopes(ways)
        contradicts = self.directions.contradicted(ways, slopes, self.here.claimed)
        way, slope, zero = ways[0], slopes[0], jnp.zeros(())
        predicted = self.directions.predicted(self.here.claimed, way)
        distance, factor = slope.distance(predicted), _ratio(predicted, slope.value)
        gap = TracedGap(
            distance / way.scale, zero + self.rtol, zero, contradicts, factor
        )
        found = []
        for i, claimed in enumerate(self.here.claimed):
            whole = _finite(claimed)
            wrong = contradicts & (not self.loops) & whole
            unsure = contradicts & self.loops & whole
            found.append(self._condition(i, gap, wrong, unsure, _ALONG_SLOPE))
        return found

    def _by_exact(self, exact: Values) -> list[Condition]:
        claimed = self.here.claimed
        is_whole = all_finite(exact)
        # Where it is not finite, as at a kink, differences judge alone.
        pairs = zip(exact, claimed, strict=True)
        exact = [jnp.where(jnp.isfinite(e), e, c) for e, c in pairs]
        contributions = jnp.maximum(
            self.directions.contributions(claimed), self.directions.contributions(exact)
        )
        largest = jnp.max(contributions)
        faint = self.directions.faint(contributions)
        gaps = [
            self._gap(i, claimed[i], exact[i], faint[i], largest)
            for i in range(len(claimed))
        ]
        parted = [
            gap.exceeded & ~self._fits_symmetric(i, claimed[i], exact[i])
            for i, gap in enumerate(gaps)
        ]
        if self.bench.program.as_functions is not None:
            # No difference can follow a declared product: autodiff alone speaks.
            return [
                self._condition(i, gaps[i], parted[i] & _finite(claimed[i]))
                for i in range(len(gaps))
            ]
        ways = [
            self.directions.along_dispute(gaps, parted, claimed, exact),
            *self.directions.along_random(contributions, faint),
        ]
        slopes = self.directions.slopes(ways)
        supported, resolved = self.directions.settle(ways[0], slopes[0], claimed)
        confirms = self.directions.all_agree(ways[1:], slopes[1:], exact)
        agrees = self.directions.all_agree(ways[1:], slopes[1:], claimed)
        contradicts = self.directions.contradicted(ways[1:], slopes[1:], claimed)
        decided = resolved | confirms
        departs = [
            parted[i]
            & ~(supported | self._at_kink(i, gap, claimed[i], exact[i]))
            & _finite(claimed[i])
            for i, gap in enumerate(gaps)
        ]
        wrong = [each & (decided | faint[i]) for i, each in enumerate(departs)]
        unexplained = contradicts & ~self._anywhere(wrong)
        found = []
        for i, gap in enumerate(gaps):
            whole = _finite(claimed[i])
            unsure = departs[i] & ~wrong[i]
            refuted = wrong[i] | (~parted[i] & unexplained & (not self.loops))
            unsure |= ~parted[i] & unexplained & self.loops
            # What the differences agree with at a kink, they don't contradict.
            alone = ~is_whole & ~parted[i]
            refuted = jnp.where(alone, ~agrees & unexplained, refuted)
            unsure = jnp.where(alone, ~agrees & ~contradicts, unsure)
            found.append(self._condition(i, gap, refuted & whole, unsure & whole))
        return found

    def _anywhere(self, flags: Values) -> Any:
        """Whether any flag is up, here or on a device that belongs together with it."""
        count = jnp.sum(jnp.stack(flags).astype(jnp.float64))
        return self.bench.over.total(count) > 0

    def _gap(
        self, i: int, claimed: Any, exact: Any, is_faint: Any, largest: Any
    ) -> TracedGap:
        """Compares one leaf; what rounding in float64 does to it is measured."""
        near = self.around[1]
        assert near.exact is not None
        noise = norm(claimed - near.claimed[i]) + norm(exact - near.exact[i])
        noise = jnp.where(jnp.isfinite(noise), noise, 0.0)
        floor = noise * jnp.where(is_faint, NOISE_FACTOR, NOISE_FACTOR / 8)
        if self.bench.noise_eps:
            island = self.bench.noise_eps * largest / self.sizes[i]
            floor = jnp.maximum(floor, island)
        return traced_gap(claimed, exact, rtol=self.rtol, floor=floor)

    def _at_kink(self, i: int, gap: TracedGap, claimed: Any, exact: Any) -> Any:
        """Whether a claim is one of the gradients nearby, or JAX's convention."""
        if self.kink is None:
            return jnp.zeros((), bool)
        is_near = self.kink.accepts(i, claimed, exact, gap.disputed)
        if self.bench.is_conventional:
            return is_near | self.kink.vary(i, gap.disputed)
        return is_near

    def _fits_symmetric(self, i: int, claimed: Any, exact: Any) -> Any:
        """Whether the gradient by a symmetric matrix is right for symmetric changes."""
        value = self.bench.wide[0][i]
        if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
            return jnp.zeros((), bool)
        own, part = _symmetric(claimed), _symmetric(exact)
        close = ~traced_gap(own, part, rtol=self.rtol, floor=0.0).exceeded
        itself = ~traced_gap(claimed, own, rtol=self.rtol, floor=0.0).exceeded
        return jnp.all(value == _transposed(value)) & close & itself

    def _by_differences(self) -> list[Condition]:
        """Judges each leaf by slopes along its own random directions."""
        claimed, count = self.here.claimed, len(self.sizes)
        contributions = self.directions.contributions(claimed)
        least = LEAST_PART * self.directions.magnitude()

        def outcome(place: Any) -> tuple[Any, ...]:
            leaf, k = place // COUNT, place % COUNT
            direction = []
            for i in range(count):
                drawn = jnp.stack(
                    [self.bench.draw(f"leaf {k}", i) for k in range(COUNT)]
                )
                direction.append(jnp.where(leaf == i, self.sizes[i] * drawn[k], 0))
            scale = jnp.maximum(contributions[leaf], least)
            slope = self.directions.slope(direction, scale)
            predicted = inner(
                list(map(finite_part, claimed)), direction, self.bench.over
            )
            distance = slope.distance(predicted)
            allowed = self.rtol * scale + 3 * slope.error
            off = distance > jnp.maximum(allowed, SETTLED_PART * slope.error)
            swamped = allowed > SWAMPED * scale
            factor = _ratio(predicted, slope.value)
            return off, swamped, distance / scale, allowed / scale, factor

        places = np.arange(count * COUNT)
        off, swamped, sizes, limits, factors = (
            part.reshape(count, COUNT) for part in lax.map(outcome, places)
        )
        found = []
        for i in range(count):
            blind = jnp.any(swamped[i]) | jnp.zeros((), bool)
            wrong = jnp.any(off[i] & ~swamped[i])
            wrong_or_loop = wrong & self.loops
            factor = factors[i][jnp.argmax(sizes[i])]
            gap = TracedGap(jnp.max(sizes[i]), jnp.max(limits[i]), None, wrong, factor)
            whole = _finite(claimed[i])
            found.append(
                self._condition(
                    i,
                    gap,
                    wrong & (not self.loops) & whole,
                    ((blind & ~wrong) | wrong_or_loop) & whole,
                    _ALONG_SLOPE,
                )
            )
        return found

    def _condition(
        self,
        i: int,
        gap: TracedGap,
        wrong: Any,
        unsure: Any = False,
        along: str = ALONG,
    ) -> Condition:
        leaf = self.bench.leaves[i]
        numbers = {"gap": gap.size, "allowed": gap.allowed, "factor": gap.factor}
        return Condition(
            f"{escaped(leaf.name)}: {self.what} is off by {{gap:.3g}} of its norm, "
            f"allowed are {{allowed:.3g}} (both in float64){along}",
            wrong,
            unsure,
            "differences of the values are too noisy here, or the program's loops stop "
            "too early, to tell",
            numbers,
        )


def _ratio(one: Any, other: Any) -> Any:
    return one / jnp.where(other == 0, 1.0, other)


def _finite(value: Any) -> Any:
    return jnp.all(jnp.isfinite(value))


def _transposed(value: Any) -> Any:
    return jnp.conj(jnp.swapaxes(value, -1, -2))


def _symmetric(value: Any) -> Any:
    return (value + _transposed(value)) / 2
