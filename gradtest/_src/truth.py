"""What a derivative is judged by: exact and measured, and the claim beside them.

`exact` is autodiff of the lifted program without its custom rules; `measured` comes
from differences of its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import dataflow, execution
from gradtest._src.claims import Claim
from gradtest._src.devices import homes
from gradtest._src.devices.copies import Copies, read_copies
from gradtest._src.differences import Line
from gradtest._src.inputs import Point
from gradtest._src.kit import (
    Arguments,
    Kit,
    constants_of,
    pushforward,
    shared_constants,
    shares_exact,
)
from gradtest._src.lifting import Evaluator, Jitter, Recorder, widen
from gradtest._src.program import Program, Values, derivative


@dataclasses.dataclass(frozen=True)
class Readings:
    """Everything that was evaluated in float64 at one point, as NumPy arrays.

    Attributes:
      values: Results of the rule-free program.
      claimed_values: Results that the claim returns beside its derivative, if any.
      claimed: The derivative under test, lifted.
      exact: The rule-free derivative; None where it does not exist.
      plain: The rule-free derivative with declared products left out, if there are
        any: what differences confirm in place of `exact`.
      slopes: Tangents of the outputs by the forward-mode derivative, where it is read.
      residual: Largest relative residuals by `solvers.SolveKind`.
      stops: The base point's stopped values, for `Bench.line`.
      copies: What each device holds of `claimed`.
    """

    values: Values
    claimed_values: Values | None
    claimed: Values
    exact: Values | None
    slopes: Values | None
    residual: np.ndarray
    stops: Any
    plain: Values | None = None
    copies: Sequence[Copies] = ()

    def exact_where_known(self) -> tuple[Values | None, set[int]]:
        """Returns the exact derivative, and which of its arrays have open entries.

        Open is where it is not finite, as at a kink: there the claim stands in for it,
        and differences judge alone. None where it is finite nowhere.
        """
        if self.exact is None:
            return None, set()
        known = [np.isfinite(exact) for exact in self.exact]
        if not any(each.any() for each in known):
            return None, set()
        parts = zip(known, self.exact, self.claimed, strict=True)
        filled = [np.where(each, exact, claimed) for each, exact, claimed in parts]
        return filled, {i for i, each in enumerate(known) if not each.all()}


class Jittered(NamedTuple):
    """What `Bench.read` returns, where every operation rounds otherwise."""

    claimed_values: Values | None
    claimed: Values
    values: Values | None
    exact: Values | None


class Bench:
    """Evaluates one claim about one program: lifted, moved, and in working precision.

    Compiled programs are shared by all claims of the same structure, so that another
    point, another trial or a fresh lambda of the same program compiles nothing.
    """

    def __init__(
        self,
        program: Program,
        claim: Claim,
        point: Point,
        seed: Values,
        *,
        forward: Claim | None = None,
        works: bool = True,
    ):
        """Compiles what is not compiled yet.

        Args:
          program: The function under test.
          claim: The derivative under test.
          point: A point; its shapes and dtypes matter here.
          seed: Cotangents of the outputs, or tangents of the leaves in forward mode.
          forward: The forward-mode derivative, to be read beside a reverse-mode claim.
          works: Whether the claim is also run in working precision.
        """
        works = works and not claim.variant and not claim.is_apart
        self.program = program
        self.claim = claim
        self.forward = forward
        self.seed = seed
        # What each device held of the claim when it last ran in working precision.
        self.worked: list[Copies] = []
        self._last: tuple[Point, Arguments] | None = None
        # Where the moving leaves lie; the truth of a claim apart is evaluated at home.
        self._shardings = [execution.spread_of(value) for value in point.moving]
        self._home = [None] * len(point.moving) if claim.is_apart else self._shardings
        arguments = self._arguments(point)
        self._key = (
            works,
            program.key,
            claim.key,
            forward and forward.key,
            shared_constants(program, claim, forward),
            tuple(map(_signature, arguments.flat())),
            homes.default_device(),
            jax.sharding.get_abstract_mesh(),
            claim.mesh,
            jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        )
        self._kit: Kit = execution.cached(
            self._key, lambda: Kit(program, claim, forward, arguments, works)
        )

    def reseed(self, seed: Values) -> None:
        """Takes another seed, of the same shapes and dtypes."""
        self.seed = seed
        self._last = None

    @property
    def islands(self) -> tuple[str, ...]:
        """Names of the primitives that could not be lifted."""
        return tuple(sorted(self._kit.islands))

    @property
    def claim_device(self) -> Any:
        """A device on which the claim runs in its own precision."""
        return self._kit.claim_devices[0]

    @property
    def devices(self) -> str:
        """Says where truth and claim ran; empty where all of it was on the CPU."""
        kit = self._kit
        return homes.describe(kit.truth_devices, kit.claim_devices, kit.why_there)

    @property
    def why_no_exact(self) -> str:
        """Why there is no rule-free derivative; empty where there is one."""
        return self._kit.why_no_exact

    def _arguments(self, point: Point) -> Arguments:
        if self._last is None or self._last[0] is not point:
            self._last = point, self._make_arguments(point)
        return self._last[1]

    def _make_arguments(self, point: Point) -> Arguments:
        held = [
            jnp.asarray(value) if _is_plain(value) else value
            for value in self.program.held(point)
        ]
        known = self.program.closed_over_values(point)
        consts = [
            known.get(id(const), const)
            for const in constants_of(self.program, self.claim, self.forward)
        ]
        moving = list(point.moving)
        wide = [[widen(value) for value in part] for part in (moving, held, self.seed)]
        wide_consts = [widen(value) for value in consts]
        placed = [
            _spread(wide[0], self._shardings),
            [
                execution.spread(execution.at_home(wider), execution.spread_of(value))
                for wider, value in zip(wide[1], held, strict=True)
            ],
        ]
        at_home = placed
        if self.claim.is_apart:
            at_home = [wide[0], [execution.at_home(value) for value in wide[1]]]
        return Arguments(
            at_home[0],
            at_home[1],
            wide[2],
            wide_consts,
            [moving, held, list(self.seed), consts],
            [*placed, wide[2], wide_consts],
        )

    def lifted_arguments(self, point: Point) -> tuple[Values, Values, Values]:
        """Returns the moving leaves, held values and seed in float64."""
        at = self._arguments(point)
        return at.moving, at.held, at.seed

    def lifted_constants(self, point: Point) -> dict[int, Any]:
        """Returns the array constants of all traces in float64, by `id`."""
        constants = constants_of(self.program, self.claim, self.forward)
        values = self._arguments(point).consts
        return dict(zip(map(id, constants), values, strict=True))

    def read(
        self, point: Point, *, seed: Values | None = None, tangents: Sequence[Any] = ()
    ) -> Readings:
        """Evaluates claim, exact derivative and values in float64.

        Args:
          point: The point.
          seed: Instead of the seed that the bench was made with.
          tangents: What the forward-mode derivative is taken along, if there is one.
        """
        at = self._arguments(point)
        seeds = at.seed if seed is None else [widen(value) for value in seed]
        along = list(map(widen, tangents))
        if along:
            along = _spread(along, self._home)
        results = self._kit.base(at.moving, at.held, seeds, along, at.consts)
        if self.claim.is_apart:
            placed_moving, placed_held, _, consts = at.claimed
            results |= self._kit.claimed(placed_moving, placed_held, seeds, consts)
        stops = results.pop("stops")  # on the device: only `line` needs them
        returned = self._copies(results.pop("claimed"))
        found = execution.to_host(results)
        exact = found["exact"]
        values, claimed = self._farthest(returned, found["values"], exact)
        if shares_exact(self.program, self.claim):
            exact = claimed
        slopes = found["slopes"] and found["slopes"][len(self.program.outputs) :]
        if slopes and self.forward and self.forward.devices:
            slopes = [
                read_copies(slope, has_device_axis=True).farthest(None)
                for slope in slopes
            ]
        residual = found["residual"]
        return Readings(
            found["values"],
            values,
            claimed,
            exact,
            slopes,
            np.zeros(4) if residual is None else residual,
            stops,
            found["plain"],
            returned[len(values or ()) :],
        )

    def _copies(self, results: Sequence[Any]) -> list[Copies]:
        has_axis = bool(self.claim.devices)
        return [read_copies(result, has_device_axis=has_axis) for result in results]

    def _farthest(
        self, returned: list[Copies], values: Values | None, exact: Values | None
    ) -> tuple[Values | None, Values]:
        """Returns the values, if any, and the derivative that are farthest off."""
        count = len(self.program.outputs) if self.claim.has_value else 0
        found = [
            copies.farthest(truth)
            for copies, truth in zip(
                returned,
                [
                    *(values or [None] * count)[:count],
                    *(exact or [None] * (len(returned) - count)),
                ],
                strict=True,
            )
        ]
        return (found[:count] if count else None), found[count:]

    def line(
        self,
        point: Point,
        stops: Any,
        direction: Sequence[np.ndarray],
        *,
        overrun: int = 0,
    ) -> Line:
        """Returns the values along a line through `point`, stopped values frozen.

        Args:
          point: Where t is 0.
          stops: The stopped values there, as `read` returns them.
          direction: One tangent for each moving leaf.
          overrun: How many steps each `while` loop goes on after it has ended.
        """
        at = self._arguments(point)
        moved = self._kit.overrunning(overrun)
        moving = execution.on_device(at.moving)
        along = execution.on_device(_spread(direction, self._home))
        spread = map(execution.spread_of, jax.tree_util.tree_leaves(stops))
        if any(self._home) or any(sharding is not None for sharding in spread):
            stops = execution.to_host(stops)

        def values(t: float) -> Values:
            return execution.to_host(
                moved(moving, at.held, along, np.float64(t), stops, at.consts)
            )

        return values

    def read_working(
        self, point: Point, reference: Values
    ) -> tuple[Values | None, Values]:
        """Returns values and derivative as the program computes them by itself.

        Under a variant the variant runs; of several devices' results the one farthest
        from `reference` (the lifted derivative) is returned.
        """
        moving, held, seed, consts = self._arguments(point).working
        if self.claim.is_apart:
            moving, held = execution.copied([moving, held])  # the user's may be donated
        if self.claim.variant or self.claim.is_apart:
            with execution.working_precision(), execution.on_mesh(self.claim.mesh):
                results = self.claim.call(moving, held, seed)
        else:
            results = self._kit.working(moving, held, seed, consts)
        returned = self._copies(results)
        self.worked = returned[-len(reference) :]
        return self._farthest(returned, None, reference)

    def read_jittered(self, point: Point, shifts: np.ndarray) -> Jittered:
        """Returns claim and exact derivative in float64, every operation a bit off.

        How far they move is what rounding may have done to them.

        Args:
          point: The point.
          shifts: Relative amounts that the operations' results are off by, in turn.
        """
        at = self._arguments(point)
        program, claim = self.program, self.claim
        constants = constants_of(program, claim, self.forward)
        solver_only = frozenset(dataflow.solver_only_stops(program.jaxpr))
        exactly = pushforward if claim.mode == "fwd" else _derivative

        def jittered(consts: Any, shifts: Any) -> Evaluator:
            return Evaluator(
                hoisted=dict(zip(map(id, constants), consts, strict=True)),
                solver_only=solver_only,
                jitter=Jitter(shifts),
            )

        def claimed(moving: Any, held: Any, seed: Any, consts: Any, by: Any) -> Values:
            return jittered(consts, by)(claim.jaxpr, [*moving, *held, *seed])

        def exact(moving: Any, held: Any, seed: Any, consts: Any, by: Any) -> Any:
            run = jittered(consts, by).fork(stops=Recorder())
            return exactly(program, run, moving, held, seed)

        def run(name: str, function: Any, arguments: list[Any], mesh: Any) -> Any:
            arguments = [*arguments, shifts]
            return execution.cached(
                ("jittered", name, self._key),
                lambda: execution.lifted(function, arguments, mesh=mesh),
            )(*arguments)

        returned = self._copies(run("claim", claimed, at.claimed, claim.mesh))
        found = self._farthest(returned, None, None)
        if self.why_no_exact:
            return Jittered(*found, None, None)
        at_home = [at.moving, at.held, at.seed, at.consts]
        return Jittered(*found, *execution.to_host(run("exact", exact, at_home, None)))

    def read_working_exact(self, point: Point) -> Values | None:
        """Returns the rule-free derivative in working precision, or None."""
        if self.why_no_exact:
            return None
        program, is_forward = self.program, self.claim.mode == "fwd"

        def exact(run: Evaluator, *at: Any) -> Values:
            if is_forward:
                return pushforward(program, run.fork(stops=Recorder()), *at)[1]
            return derivative(program.mathematics, run, *at)[1]

        return execution.to_host(self._in_working_precision("exact", exact, point))

    def read_optimised(self, point: Point, reference: Values) -> Values | None:
        """Returns the derivative of a program that XLA optimises as the user's own.

        In `read_working` it optimises as little as it can. What it fuses decides at
        times whether a difference of equal numbers is zero. None where that program
        runs as it is in any case.
        """
        if self.claim.variant or self.claim.is_apart:
            return None
        jaxpr = self.claim.jaxpr

        def claimed(run: Evaluator, moving: Any, held: Any, seed: Any) -> Values:
            return run(jaxpr, [*moving, *held, *seed])

        results = self._in_working_precision("claim", claimed, point, quickly=False)
        return self._farthest(self._copies(results), None, reference)[1]

    def _in_working_precision(
        self,
        name: str,
        evaluate: Callable[..., Values],
        point: Point,
        *,
        quickly: bool = True,
    ) -> Any:
        """Evaluates something of a point in working precision; compiled once."""
        arguments = self._arguments(point).working

        def lower() -> execution.Compiled:
            constants = constants_of(self.program, self.claim, self.forward)

            def function(moving: Any, held: Any, seed: Any, consts: Any) -> Values:
                hoisted = dict(zip(map(id, constants), consts, strict=True))
                run = Evaluator(wide=False, hoisted=hoisted)
                return evaluate(run, moving, held, seed)

            return execution.working(function, arguments, quickly=quickly)

        key = ("in working precision", name, self._key)
        return execution.cached(key, lower)(*arguments)


def _derivative(program: Program, run: Evaluator, *at: Any) -> Any:
    return derivative(program.mathematics, run, *at)


def _spread(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Lays arrays over devices, each as its sharding says."""
    pairs = zip(arrays, shardings, strict=True)
    return [execution.spread(array, sharding) for array, sharding in pairs]


def _is_plain(value: Any) -> bool:
    return not hasattr(value, "dtype")


def _signature(value: Any) -> tuple[Any, ...]:
    sharding = getattr(value, "sharding", None)
    if sharding is not None and sharding.device_set == {homes.default_device()}:
        sharding = None  # as NumPy arrays are placed
    return np.shape(value), str(jnp.result_type(value)), sharding
