"""One loss, compiled for one set of shapes: a look at its gradient in a few numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest import domains
from gradtest._src import claims, dataflow, execution, jaxprs, seeding
from gradtest._src.devices import homes, matmuls, spanning
from gradtest._src.execution import SlipError
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.inputs import Inputs, Leaf, Point, Recorded, Role
from gradtest._src.kit import shared_constants
from gradtest._src.options import Options
from gradtest._src.program import Program, trace_program
from gradtest._src.watching.programs import (
    LiftedProgram,
    Numbers,
    Traced,
    Values,
    own_program,
)

# At a kink the gradient is looked at this far off, relative to each leaf's size.
NUDGE = 1e-7


def live_point(inputs: Inputs) -> Point:
    """Returns the values that the leaves have now, finite or not.

    Raises:
      TypeError: A leaf says how it is to be drawn, or was deleted.
    """
    for leaf in inputs.leaves:
        if isinstance(leaf.source, domains.Domain | jax.ShapeDtypeStruct | Recorded):
            raise TypeError(
                f"`{leaf.name}` must be an array that the training has now, got "
                f"{leaf.source!r}."
            )
        if isinstance(leaf.source, jax.Array) and leaf.source.is_deleted():
            raise ValueError(
                f"`{leaf.name}` has been deleted or donated: call the watcher before "
                "the step that donates it, with what that step is given."
            )
    return Point(
        tuple(leaf.source for leaf in inputs.of_role(Role.MOVES)),
        tuple(leaf.source for leaf in inputs.of_role(Role.HELD)),
    )


def emptied(inputs: Inputs) -> Inputs:
    """Returns inputs that keep none of the user's arrays alive."""
    leaves = tuple(
        leaf
        if leaf.role is Role.STATIC
        else dataclasses.replace(
            leaf, source=jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        )
        for leaf in inputs.leaves
    )
    return dataclasses.replace(inputs, leaves=leaves)


class Screen:
    """The compiled programs of a loss, and what they say at a point.

    Attributes:
      leaves: The leaves that are differentiated.
      islands: Names of the primitives that could not be lifted.
      why_no_exact: Why there is no rule-free gradient; empty where there is one.
      shares_exact: Whether no rule is in the loss.
      compile_seconds: What tracing and compiling took.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        inputs: Inputs,
        point: Point,
        options: Options,
    ):
        """Traces and compiles.

        Args:
          loss: The user's.
          inputs: Its arguments.
          point: Values of their leaves; of these only shapes, dtypes and layouts count.
          options: The user's.

        Raises:
          TypeError: The loss does not return one real number.
          Exception: Whatever the loss raises.
        """
        start = time.perf_counter()
        inputs = emptied(inputs)
        try:
            program = trace_program(
                loss, inputs, point, has_aux=options.has_aux, role="loss",
                intentions=options.expect_differs, variant=options.variant,
            )  # fmt: skip
            _require_loss(program)
            claim = claims.reverse_claim(program, point, options.variant)
        except SlipError as error:
            raise TypeError(str(error)) from None
        traced = Traced(program, claim)
        self.leaves: tuple[Leaf, ...] = inputs.moving
        self.shares_exact = traced.shares
        self.working_eps = _spacing(program)
        self.products = matmuls.coarsest(claim.jaxpr, homes.default_device())
        self.has_products = program.as_functions is not None
        self._devices = claim.devices
        self._key = options.key
        self._extra = program.extra
        self._consts = traced.constants()
        self._seed = [np.ones(out.shape, out.dtype) for out in program.outputs]
        self._count = len(program.outputs) if claim.has_value else 0
        self._by_variant = claim.call if claim.variant else None
        self._compile(traced, point, options)
        self.compile_seconds = time.perf_counter() - start

    def _compile(self, traced: Traced, point: Point, options: Options) -> None:
        arguments = self._arguments(point)
        key = (
            "watch",
            traced.program.key,
            traced.claim.key,
            traced.claim.variant,
            shared_constants(traced.program, traced.claim, None),
            tuple(map(_signature, jax.tree_util.tree_leaves(arguments))),
            options.rtol,
            homes.default_device(),
            jax.sharding.get_abstract_mesh(),
            jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        )
        compiled = execution.cached(
            key, lambda: self._compiled(traced, arguments, options.rtol)
        )
        self._own, self._lifted, self.islands, self.why_no_exact = compiled

    def _compiled(self, traced: Traced, arguments: list[Values], rtol: float) -> Any:
        lifted = LiftedProgram(traced, rtol, self.working_eps)
        self._own = execution.working(own_program(traced), arguments, quickly=False)
        # Where its results lie only the compiler knows.
        own, nobody = self._run_own(arguments), np.zeros(len(self.leaves), bool)
        at_home = self._at_home(arguments, own, 0, 0.0, nobody)
        compiled = execution.lifted(lifted, at_home, quickly=False).compile()
        count, seeds = len(self.leaves), len(self._seed)
        reached: set[str] = set()
        for jaxpr, ends in ((traced.program.jaxpr, 0), (traced.claim.jaxpr, seeds)):
            held = len(jaxpr.in_avals) - count - ends
            moving = [True] * count + [False] * held + [True] * ends
            reached |= dataflow.reached_primitives(jaxpr, moving)
        islands = tuple(sorted(lifted.islands & reached))
        return self._own, compiled, islands, lifted.why_no_exact

    def _arguments(self, point: Point) -> list[Values]:
        held = [
            value if hasattr(value, "dtype") else jnp.asarray(value)
            for value in (*point.held, *self._extra)
        ]
        return [list(point.moving), held, list(self._seed), list(self._consts)]

    def _run_own(self, arguments: list[Values]) -> Numbers:
        """Runs the loss and its gradient as they run in the training."""
        own: Numbers = self._own(*arguments)
        if self._by_variant is not None:
            with execution.working_precision():
                results = self._by_variant(*arguments[:3])
            own["values"] = results[: self._count]
            own["claimed"] = results[self._count :]
        return own

    def _at_home(
        self,
        arguments: list[Values],
        own: Numbers,
        turn: int,
        nudge: float,
        resting: np.ndarray,
    ) -> list[Any]:
        """Returns what the lifted program takes, where it runs."""
        placed = jax.tree_util.tree_map(_placed, [*arguments, own])
        moves = np.where(resting, 0.0, 1.0)
        return [*placed, self._draws(turn), np.float64(nudge), moves]

    def _draws(self, turn: int) -> np.ndarray:
        """Draws what the directions of one check are made of, by the leaves' names."""
        found = [
            [
                seeding.generator(
                    self._key, "watch", purpose, turn, leaf.name
                ).integers(2**32, dtype=np.uint32)
                for leaf in self.leaves
            ]
            for purpose in ("direction", "nudge")
        ]
        return np.array(found, np.uint32)

    def __call__(
        self, point: Point, turn: int, resting: np.ndarray, *, nudge: float = 0.0
    ) -> Numbers:
        """Looks at the gradient; everything that it returns lies on the host.

        Args:
          point: Values of the leaves.
          turn: The number of the check, which decides the directions.
          resting: Which leaves no slope is measured along.
          nudge: How far off the point to look, relative to each leaf's size.
        """
        arguments = self._arguments(point)
        own = self._run_own(arguments)
        at_home = self._at_home(arguments, own, turn, nudge, resting)
        return execution.to_host(self._lifted(*at_home))


def _require_loss(program: Program) -> None:
    """Raises TypeError unless a program returns one real number, or one per device."""
    (*others, out) = program.outputs
    is_mapped = (
        not others
        and len(out.shape) == 1
        and not jnp.issubdtype(out.dtype, jnp.complexfloating)
        and len(jaxprs.mesh_devices(program.jaxpr)) == out.shape[0]
    )
    if not is_mapped:
        program.require_loss(
            "`loss` must return one real number (under pmap one for each device)",
            "with auxiliary data beside it say has_aux=True",
        )


def _spacing(program: Program) -> float:
    """Returns the spacing of the coarsest dtype among the leaves and the loss."""
    dtypes = [leaf.dtype for leaf in program.inputs.moving]
    dtypes += [out.dtype for out in program.outputs]
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def _placed(value: Any) -> Any:
    """Returns an array where a lifted program takes it: the CPU's are there already."""
    if not isinstance(value, jax.Array):
        return value
    if {homes.platform_of(d) for d in value.sharding.device_set} == {"cpu"}:
        return value
    layout = execution.spread_of(value)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return execution.spread(execution.at_home(value), layout)
    return execution.spread(spanning.whole(value), layout)


def _signature(value: Any) -> tuple[Any, ...]:
    kind = jax.typeof(value)
    layout = value.sharding if isinstance(value, jax.Array) else None
    return kind.shape, str(kind.dtype), kind.weak_type, layout


def signature(inputs: Inputs) -> tuple[Any, ...]:
    """Returns what a screen is compiled for: shapes, dtypes, layouts, plain values."""
    leaves: list[Any] = []
    for leaf in inputs.leaves:
        if leaf.role is Role.STATIC:
            leaves.append((type(leaf.source), repr(leaf.source)))
            continue
        leaves.append((leaf.role, *_signature(leaf.source)))
    return inputs.treedef, *leaves


def not_finite(inputs: Inputs) -> Finding | None:
    """Returns a finding on the leaves that are not finite; None where all are."""
    broken = [
        leaf
        for leaf in inputs.moving
        if not np.isfinite(spanning.own_part(leaf.source).astype(np.complex128)).all()
    ]
    return broken_leaves(broken) if broken else None


def broken_leaves(leaves: Sequence[Leaf]) -> Finding:
    """Says that parameters are NaN or infinite: there is nothing to differentiate."""
    leaf, *others = leaves
    more = f" (and {len(others)} more)" if others else ""
    cause = Cause(
        "not finite",
        f"{leaf.name}{more} holds NaN or infinite numbers already",
        "look at the steps before: the loss, the gradient's size, the step's",
    )
    return Finding(
        leaf.name, leaf.shape, np.dtype(leaf.dtype).name, Verdict.INCONCLUSIVE,
        Gap.REACH, cause=cause,
    )  # fmt: skip
