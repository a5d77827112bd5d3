"""The compiled programs that evaluate one claim: lifted, moved, in working precision.

One program returns the lifted claim, the lifted exact derivative and the values; a
second one the values at a moved point; a third runs the claim in its own precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import control_flow as _control_flow  # noqa: F401  registers
from gradtest._src import dataflow, execution, jaxprs, solvers
from gradtest._src import pallas as _pallas  # noqa: F401  registers
from gradtest._src import primitives as _primitives  # noqa: F401  registers
from gradtest._src.claims import Claim
from gradtest._src.devices import homes
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.lifting import Evaluator, Recorder, Replayer
from gradtest._src.program import Program, Values, derivative


def shares_exact(program: Program, claim: Claim) -> bool:
    """Whether the claim is itself the rule-free derivative: nothing is hand-written.

    Not where its constants are rounded to half precision, which exact's are not.
    """
    dtypes = [leaf.dtype for leaf in program.inputs.moving]
    dtypes += [output.dtype for output in program.outputs]
    narrow = any(jnp.finfo(dtype).bits < 32 for dtype in dtypes)
    return (
        claim.is_autodiff
        and not program.has_rules
        and not narrow
        and not jaxprs.half_literals(claim.jaxpr)
    )


class Kit:
    """The compiled programs of one structure; independent of values and constants."""

    def __init__(
        self,
        program: Program,
        claim: Claim,
        forward: Claim | None,
        arguments: Arguments,
        works: bool,
    ):
        self.islands: set[str] = set()
        self.why_no_exact = ""
        claimed, base, moved_by, working = self._functions(program, claim, forward)
        # Kept for loops alone: it holds the traced program and its constants.
        loops = "while" in jaxprs.primitives(program.jaxpr)
        self._moved_by = moved_by if loops else None
        at = arguments
        tangents = at.moving if forward else []
        programs = []
        if claim.is_apart:
            self.claimed = execution.lifted(claimed, at.claimed, mesh=claim.mesh)
            programs.append(self.claimed)
        self.base = execution.lifted(
            base, [at.moving, at.held, at.seed, tangents, at.consts]
        )
        stops = self.base.out_shapes()["stops"]
        self._moved_shapes = execution.shapes_of(
            [at.moving, at.held, at.moving, np.float64(0), stops, at.consts]
        )
        self.moved = execution.lifted(moved_by(0), self._moved_shapes)
        self._overrunning = {0: self.moved}
        programs += [self.base, self.moved]
        if works:
            self.working = execution.working(working, at.working)
            programs.append(self.working)
        execution.compile_together(programs)
        in_float64 = self.claimed if claim.is_apart else self.base
        self.truth_devices, self.why_there = in_float64.devices, in_float64.why
        if works:
            self.claim_devices = self.working.devices
        else:
            arrays = [*at.working[0], *at.working[1]]
            self.claim_devices = jaxprs.mesh_devices(
                claim.jaxpr
            ) or homes.claim_devices(arrays)
        # What only constants pass through is exact: a draw, a table.
        self.islands &= _reached(program, claim, len(at.moving), len(at.seed))

    def overrunning(self, steps: int) -> execution.Compiled:
        """Returns the moved program whose `while` loops go on for so many steps."""
        if steps not in self._overrunning:
            assert self._moved_by is not None
            self._overrunning[steps] = execution.lifted(
                self._moved_by(steps), self._moved_shapes
            )
        return self._overrunning[steps]

    def _functions(
        self, program: Program, claim: Claim, forward: Claim | None
    ) -> tuple[Any, Any, Any, Any]:
        shares = shares_exact(program, claim)
        solver_only = frozenset(dataflow.solver_only_stops(program.jaxpr))
        audit = None
        if jaxprs.LINEAR_SOLVE in jaxprs.primitives(claim.jaxpr):
            audit = solvers.classify(solvers.forward_solvers(program.jaxpr))
        constants = constants_of(program, claim, forward)
        # The program itself holds the user's arrays: what is kept must not.
        mathematics = program.mathematics
        as_functions = program.as_functions if claim.mode == "rev" else None

        def evaluator(values: Sequence[Any], **settings: Any) -> Evaluator:
            hoisted = {
                id(const): value for const, value in zip(constants, values, strict=True)
            }
            return Evaluator(hoisted=hoisted, solver_only=solver_only, **settings)

        def claimed(moving: Any, held: Any, seed: Any, consts: Any) -> dict[str, Any]:
            run = evaluator(consts, solver_audit=audit, islands=self.islands)
            found = run(claim.jaxpr, [*moving, *held, *seed])
            return {"claimed": found, "residual": run.residual}

        def base(
            moving: Any, held: Any, seed: Any, tangents: Any, consts: Any
        ) -> dict[str, Any]:
            under_test = {}
            if not claim.is_apart:
                under_test = claimed(moving, held, seed, consts)
            values, exact, stops = self._exact(
                program,
                None if shares else claim.mode,
                lambda stops: evaluator(consts, stops=stops),
                (moving, held, seed),
            )
            plain = None
            if exact is not None and as_functions is not None:
                run = evaluator(consts, stops=Recorder())
                plain = derivative(as_functions, run, moving, held, seed)[1]
            slopes = None
            if forward:
                run = evaluator(consts, islands=self.islands)
                slopes = run(forward.jaxpr, [*moving, *held, *tangents])
            return {
                "values": values,
                "slopes": slopes,
                "exact": exact,
                "plain": plain,
                "stops": stops,
                **under_test,
            }

        def moved_by(overrun: int) -> Any:
            def moved(
                moving: Any, held: Any, direction: Any, t: Any, stops: Any, consts: Any
            ) -> Values:
                run = evaluator(consts, stops=Replayer(stops), islands=self.islands)
                at = [x + t * v for x, v in zip(moving, direction, strict=True)]
                return mathematics(run.fork(overrun=overrun), at, held)

            return moved

        def working(moving: Any, held: Any, seed: Any, consts: Any) -> Values:
            run = evaluator(consts, wide=False)
            return run(claim.jaxpr, [*moving, *held, *seed])

        return claimed, base, moved_by, working

    def _exact(
        self, program: Program, mode: str | None, evaluator: Any, at: Any
    ) -> tuple[Values, Values | None, list[Any]]:
        """Returns values, rule-free derivative or None, and the stopped values."""
        moving, held, seed = at
        self.why_no_exact = ""
        recorder = Recorder()
        if mode is None:
            values = program.mathematics(evaluator(recorder), moving, held)
            return values, None, recorder.values
        try:
            run = evaluator(recorder)
            if mode == "fwd":
                values, exact = pushforward(program, run, moving, held, seed)
            else:
                values, exact = derivative(program.mathematics, run, moving, held, seed)
            return values, exact, recorder.values
        except Exception as error:  # whatever differentiating a program may raise
            self.why_no_exact = str(error).strip().splitlines()[0]
        recorder = Recorder()
        values = program.mathematics(evaluator(recorder), moving, held)
        return values, None, recorder.values


def pushforward(
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
class Arguments:
    """The arguments of the compiled programs at one point.

    Those of the claim in float64 are the same arrays, but for a claim that is compiled
    apart: then they lie on its own devices, and the others at home.
    """

    moving: list[Any]
    held: list[Any]
    seed: list[Any]
    consts: list[Any]
    working: list[Any]
    claimed: list[Any]

    def flat(self) -> list[Any]:
        """Returns every array in one list."""
        parts = (self.moving, self.held, self.seed, self.consts, self.working)
        return jax.tree_util.tree_leaves([parts, self.claimed])


def constants_of(
    program: Program, claim: Claim, forward: Claim | None = None
) -> list[Any]:
    """Returns the array constants of all traces, program's first, each once."""
    return array_constants(_traces(program, claim, forward))


def array_constants(traces: Sequence[Jaxpr]) -> list[Any]:
    """Returns the array constants of programs, each once."""
    found = {
        id(const): const
        for jaxpr in traces
        for const in jaxprs.nested_consts(jaxpr)
        if hasattr(const, "dtype") and hasattr(const, "shape")
    }
    return list(found.values())


def shared_constants(
    program: Program, claim: Claim, forward: Claim | None
) -> tuple[int, ...]:
    """Returns which constants of the traces are one array, as places in the list."""
    places = {id(c): i for i, c in enumerate(constants_of(program, claim, forward))}
    return tuple(
        places.get(id(const), -1)
        for jaxpr in _traces(program, claim, forward)
        for const in jaxprs.nested_consts(jaxpr)
    )


def _reached(program: Program, claim: Claim, leaves: int, seeds: int) -> set[str]:
    """Returns the primitives that moving values or the seed pass through."""
    found = set()
    for jaxpr, ends in ((program.jaxpr, 0), (claim.jaxpr, seeds)):
        held = len(jaxpr.in_avals) - leaves - ends
        moving = [True] * leaves + [False] * held + [True] * ends
        found |= dataflow.reached_primitives(jaxpr, moving)
    return found


def _traces(program: Program, claim: Claim, forward: Claim | None) -> list[Any]:
    return [part.jaxpr for part in (program, claim, forward) if part is not None]
