"""What a derivative is judged by: exact and measured, and the claim beside them.

`exact` is autodiff of the lifted program without its custom rules; `measured` comes
from differences of its values. One compiled program returns the lifted claim, the
lifted exact derivative and the values; a second one returns the values at a moved
point; a third runs the claim in working precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import control_flow as _control_flow  # noqa: F401  registers
from gradtest._src import execution, jaxprs, solvers
from gradtest._src.differences import Line
from gradtest._src.inputs import Point
from gradtest._src.lifting import Evaluator, Recorder, Replayer, widen
from gradtest._src.program import Claim, Program, Values, derivative


@dataclasses.dataclass(frozen=True)
class Readings:
    """Everything that was evaluated in float64 at one point, as NumPy arrays.

    Attributes:
      values: Results of the rule-free program.
      claimed_values: Results that the claim returns beside its derivative, if any.
      claimed: The derivative under test, lifted.
      exact: The rule-free derivative; None where it does not exist.
      slopes: Tangents of the outputs by the forward-mode derivative, where it is read.
      residual: Largest relative residuals by `solvers.SolveKind`.
      stops: The base point's stopped values, for `Bench.line`.
    """

    values: Values
    claimed_values: Values | None
    claimed: Values
    exact: Values | None
    slopes: Values | None
    residual: np.ndarray
    stops: Any


def shares_exact(program: Program, claim: Claim) -> bool:
    """Whether the claim is itself the rule-free derivative: nothing is hand-written.

    Not where its constants are rounded to half precision, which exact's are not.
    """
    narrow = any(
        jnp.finfo(item.dtype).bits < 32
        for item in (*program.inputs.moving, *program.outputs)
    )
    return (
        claim.is_autodiff
        and not program.has_rules
        and not narrow
        and not jaxprs.half_literals(claim.jaxpr)
    )


class _Kit:
    """The compiled programs of one structure; independent of values and constants."""

    def __init__(
        self,
        program: Program,
        claim: Claim,
        forward: Claim | None,
        arguments: _Arguments,
        works: bool,
    ):
        self.islands: set[str] = set()
        self.why_no_exact = ""
        base, moved, working = self._functions(program, claim, forward)
        at = arguments
        tangents = at.moving if forward else []
        self.base = execution.lifted(
            base, [at.moving, at.held, at.seed, tangents, at.consts]
        )
        stops = self.base.out_shapes()["stops"]
        self.moved = execution.lifted(
            moved, [at.moving, at.held, at.moving, np.float64(0), stops, at.consts]
        )
        programs = [self.base, self.moved]
        if works:
            self.working = execution.working(working, at.working)
            programs.append(self.working)
        execution.compile_together(programs)

    def _functions(
        self, program: Program, claim: Claim, forward: Claim | None
    ) -> tuple[Any, Any, Any]:
        shares = shares_exact(program, claim)
        solver_only = frozenset(jaxprs.solver_only_stops(program.jaxpr))
        audit = None
        if jaxprs.LINEAR_SOLVE in jaxprs.primitives(claim.jaxpr):
            audit = solvers.classify(solvers.forward_solvers(program.jaxpr))
        constants = _constants(program, claim, forward)

        def evaluator(values: Sequence[Any], **settings: Any) -> Evaluator:
            hoisted = {
                id(const): value for const, value in zip(constants, values, strict=True)
            }
            return Evaluator(hoisted=hoisted, solver_only=solver_only, **settings)

        def base(
            moving: Any, held: Any, seed: Any, tangents: Any, consts: Any
        ) -> dict[str, Any]:
            claimed_run = evaluator(consts, solver_audit=audit, islands=self.islands)
            claimed = claimed_run(claim.jaxpr, [*moving, *held, *seed])
            values, exact, stops = self._exact(
                program,
                None if shares else claim.mode,
                lambda stops: evaluator(consts, stops=stops, islands=self.islands),
                (moving, held, seed),
            )
            slopes = None
            if forward:
                run = evaluator(consts, islands=self.islands)
                slopes = run(forward.jaxpr, [*moving, *held, *tangents])
            return {
                "values": values,
                "slopes": slopes,
                "claimed": claimed,
                "exact": exact,
                "residual": claimed_run.residual,
                "stops": stops,
            }

        def moved(
            moving: Any, held: Any, direction: Any, t: Any, stops: Any, consts: Any
        ) -> Values:
            run = evaluator(consts, stops=Replayer(stops), islands=self.islands)
            at = [x + t * v for x, v in zip(moving, direction, strict=True)]
            return program.mathematics(run, at, held)

        def working(moving: Any, held: Any, seed: Any, consts: Any) -> Values:
            run = evaluator(consts, wide=False)
            return run(claim.jaxpr, [*moving, *held, *seed])

        return base, moved, working

    def _exact(
        self, program: Program, mode: str | None, evaluator: Any, at: Any
    ) -> tuple[Values, Values | None, list[Any]]:
        """Returns values, rule-free derivative or None, and the stopped values."""
        moving, held, seed = at
        recorder = Recorder()
        if mode is None:
            values = program.mathematics(evaluator(recorder), moving, held)
            return values, None, recorder.values
        try:
            run = evaluator(recorder)
            if mode == "fwd":
                values, exact = _pushforward(program, run, moving, held, seed)
            else:
                values, exact = derivative(program.mathematics, run, moving, held, seed)
            return values, exact, recorder.values
        except Exception as error:  # whatever differentiating a program may raise
            self.why_no_exact = str(error).strip().splitlines()[0]
        recorder = Recorder()
        values = program.mathematics(evaluator(recorder), moving, held)
        return values, None, recorder.values


def _pushforward(
    program: Program, run: Evaluator, moving: Any, held: Any, tangents: Any
) -> tuple[Values, Values]:
    """Returns the results and the rule-free Jacobian-vector product."""

    def results(*xs: Any) -> tuple[Values, list[Any]]:
        recorder = Recorder()
        return program.mathematics(run.fork(stops=recorder), xs, held), recorder.values

    values, slopes, kept = jax.jvp(
        results, tuple(moving), tuple(tangents), has_aux=True
    )
    for value in kept:
        run.stops.keep(value)  # type: ignore[union-attr]
    return values, slopes


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """The arguments of the compiled programs at one point."""

    moving: list[Any]
    held: list[Any]
    seed: list[Any]
    consts: list[Any]
    working: list[Any]

    def flat(self) -> list[Any]:
        """Returns every array in one list."""
        parts = (self.moving, self.held, self.seed, self.consts, self.working)
        return jax.tree_util.tree_leaves(parts)


def _constants(
    program: Program, claim: Claim, forward: Claim | None = None
) -> list[Any]:
    """Returns the array constants of all traces, program's first, each once."""
    found = {
        id(const): const
        for jaxpr in _traces(program, claim, forward)
        for const in jaxprs.nested_consts(jaxpr)
        if hasattr(const, "dtype") and hasattr(const, "shape")
    }
    return list(found.values())


def _shared_constants(
    program: Program, claim: Claim, forward: Claim | None
) -> tuple[int, ...]:
    """Returns which constants of the traces are one array, as places in the list."""
    places = {id(c): i for i, c in enumerate(_constants(program, claim, forward))}
    return tuple(
        places.get(id(const), -1)
        for jaxpr in _traces(program, claim, forward)
        for const in jaxprs.nested_consts(jaxpr)
    )


def _traces(program: Program, claim: Claim, forward: Claim | None) -> list[Any]:
    return [part.jaxpr for part in (program, claim, forward) if part is not None]


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
        works = works and not claim.variant
        self.program = program
        self.claim = claim
        self.forward = forward
        self.seed = seed
        self._last: tuple[Point, _Arguments] | None = None
        arguments = self._arguments(point)
        self._key = (
            works,
            program.key,
            claim.key,
            forward and forward.key,
            _shared_constants(program, claim, forward),
            tuple(map(_signature, arguments.flat())),
            jax.default_backend(),
            jax.config.jax_default_matmul_precision,
        )
        self._kit: _Kit = execution.cached(
            self._key, lambda: _Kit(program, claim, forward, arguments, works)
        )

    @property
    def islands(self) -> tuple[str, ...]:
        """Names of the primitives that could not be lifted."""
        return tuple(sorted(self._kit.islands))

    @property
    def why_no_exact(self) -> str:
        """Why there is no rule-free derivative; empty where there is one."""
        return self._kit.why_no_exact

    def _arguments(self, point: Point) -> _Arguments:
        if self._last is None or self._last[0] is not point:
            self._last = point, self._make_arguments(point)
        return self._last[1]

    def _make_arguments(self, point: Point) -> _Arguments:
        held = [jnp.asarray(value) if _is_plain(value) else value
                for value in self.program.held(point)]  # fmt: skip
        consts = _constants(self.program, self.claim, self.forward)
        moving = list(point.moving)
        return _Arguments(
            [widen(value) for value in moving],
            [widen(value) for value in held],
            [widen(value) for value in self.seed],
            [widen(value) for value in consts],
            [moving, held, list(self.seed), consts],
        )

    def lifted_arguments(self, point: Point) -> tuple[Values, Values, Values]:
        """Returns the moving leaves, held values and seed in float64."""
        at = self._arguments(point)
        return at.moving, at.held, at.seed

    def read(
        self, point: Point, *, seed: Values | None = None, tangents: Values = ()
    ) -> Readings:
        """Evaluates claim, exact derivative and values in float64.

        Args:
          point: The point.
          seed: Instead of the seed that the bench was made with.
          tangents: What the forward-mode derivative is taken along, if there is one.
        """
        at = self._arguments(point)
        seeds = at.seed if seed is None else [widen(value) for value in seed]
        along = [widen(value) for value in tangents]
        results = self._kit.base(at.moving, at.held, seeds, along, at.consts)
        stops = results.pop("stops")  # on the device: only `line` needs them
        found = execution.to_host(results)
        count = len(self.program.outputs) if self.claim.has_value else 0
        values, claimed = found["claimed"][:count], found["claimed"][count:]
        if self.claim.devices:
            values = _farthest(values, found["values"])
            claimed = _farthest(claimed, found["exact"])
        exact = found["exact"]
        if shares_exact(self.program, self.claim):
            exact = claimed
        slopes = found["slopes"] and found["slopes"][len(self.program.outputs) :]
        if slopes and self.forward and self.forward.devices:
            slopes = _farthest(slopes, None)
        residual = found["residual"]
        return Readings(
            found["values"],
            values if self.claim.has_value else None,
            claimed,
            exact,
            slopes,
            np.zeros(4) if residual is None else residual,
            stops,
        )

    def line(self, point: Point, stops: Any, direction: Sequence[np.ndarray]) -> Line:
        """Returns the values along a line through `point`, stopped values frozen."""
        at = self._arguments(point)
        moving, along = execution.on_device(at.moving), execution.on_device(direction)

        def values(t: float) -> Values:
            return execution.to_host(
                self._kit.moved(moving, at.held, along, np.float64(t), stops, at.consts)
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
        if self.claim.variant:
            with execution.working_precision():
                results = execution.to_host(self.claim.call(moving, held, seed))
        else:
            results = execution.to_host(self._kit.working(moving, held, seed, consts))
        count = len(self.program.outputs) if self.claim.has_value else 0
        values, found = results[:count], results[count:]
        if self.claim.devices:
            values = [value[0] for value in values]
            found = _farthest(found, reference)
        return (values if self.claim.has_value else None), found

    def read_working_exact(self, point: Point) -> Values | None:
        """Returns the rule-free derivative in working precision, or None."""
        if self.why_no_exact:
            return None
        arguments = self._arguments(point).working

        def lower() -> execution.Compiled:
            constants = _constants(self.program, self.claim, self.forward)
            program, mode = self.program, self.claim.mode

            def function(moving: Any, held: Any, seed: Any, consts: Any) -> Values:
                run = Evaluator(
                    wide=False, hoisted=dict(zip(map(id, constants), consts))
                )
                if mode == "fwd":
                    run = run.fork(stops=Recorder())
                    return _pushforward(program, run, moving, held, seed)[1]
                return derivative(program.mathematics, run, moving, held, seed)[1]

            return execution.working(function, arguments)

        key = ("working exact", self._key)
        return execution.to_host(execution.cached(key, lower)(*arguments))


def _farthest(by_device: Values, reference: Values | None) -> Values:
    """Returns each array's row that lies farthest from the reference.

    Without a reference, the row that lies farthest from the first device's.
    """
    picked = []
    for i, rows in enumerate(by_device):
        truth = rows[0] if reference is None else reference[i]
        gaps = np.abs(rows - truth).reshape(len(rows), -1).sum(axis=1)
        picked.append(rows[int(np.argmax(np.where(np.isnan(gaps), np.inf, gaps)))])
    return picked


def _is_plain(value: Any) -> bool:
    return not hasattr(value, "dtype")


def _signature(value: Any) -> tuple[Any, ...]:
    return jnp.shape(value), str(jnp.result_type(value))
