"""The traced program of an assertion at each trial's point, inside of a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import dataflow, diagnose, jaxprs, seeding
from gradtest._src.case import MOST_BITS
from gradtest._src.claims import Claim
from gradtest._src.execution import SlipError
from gradtest._src.hand_written import COTANGENT
from gradtest._src.inputs import Inputs, Point, read_inputs
from gradtest._src.options import Options
from gradtest._src.program import Program, Values, trace_program
from gradtest._src.traced.gaps import Condition, finite_part
from gradtest._src.traced.judge import reverse_conditions
from gradtest._src.traced.readings import (
    Bench,
    as_varying,
    draw,
    norm,
    root_mean_square,
    settled_values,
)

Fn = Callable[..., Any]
Args = tuple[Any, ...]


class _EveryTracer(Mapping[int, int]):
    """Says of every traced value that a program may close over it."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: int) -> int:
        raise KeyError(key)

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial's program at its point."""

    program: Program
    point: Point
    options: Options
    trial: int

    def bench(self, claim: Claim, seed: Values, **settings: Any) -> Bench:
        """Returns what evaluates a claim about the program."""
        return Bench(
            self.program,
            claim,
            self.point,
            seed,
            key=self.options.key,
            trial=self.trial,
            **settings,
        )

    def cotangents(
        self, values: Values | None = None, *, plain: bool = False
    ) -> Values:
        """Returns cotangents of the outputs, that vary over devices as these do.

        Args:
          values: The outputs, to weigh each by its size.
          plain: Whether the cotangent of one real number is 1.
        """
        drawn = []
        like = jaxprs.open_body(self.program.jaxpr).outvars
        if self.program.order > 1:
            like = self.point.moving
        for i, out in enumerate(self.program.outputs):
            generator = seeding.generator(self.options.key, "cotangent", self.trial, i)
            seed = draw(generator, out.shape, out.dtype)
            if self.program.is_scalar:
                seed = np.full((), 1.0 if plain else COTANGENT, out.dtype)
            drawn.append(as_varying(jnp.asarray(seed), like[i]))
        if values is None or len(drawn) < 2:
            return drawn
        return [_balanced(s, v) for s, v in zip(drawn, values, strict=True)]

    def tangents(self) -> Values:
        """Returns a tangent of every leaf, of the leaf's own size."""
        found = []
        for leaf, value in zip(
            self.program.inputs.moving, settled_values(self.point.moving), strict=True
        ):
            generator = seeding.generator(
                self.options.key, "tangent", self.trial, leaf.name
            )
            drawn = draw(generator, leaf.shape, leaf.dtype)
            size = root_mean_square(value.astype(_accumulated(value.dtype)))
            found.append((drawn * size).astype(leaf.dtype))
        return found

    def excuse(self) -> str:
        """Says why a formula can't be refused: a sampler's derivative is by design."""
        moving = [True] * len(self.program.inputs.moving)
        held = [False] * (len(self.program.jaxpr.in_avals) - len(moving))
        reached = dataflow.reached_primitives(self.program.jaxpr, moving + held)
        return diagnose.SAMPLER.says if reached & jaxprs.SAMPLERS else ""

    def gradient(self) -> Trial:
        """Returns the gradient of the program, as a program."""
        seeds = self.cotangents(plain=True)
        return dataclasses.replace(self, program=self.program.gradient(seeds))

    def judge(
        self, claim: Claim, seed: Values, *, own: Program | None = None, **settings: Any
    ) -> list[Condition]:
        """Returns the conditions of a claim in reverse mode."""
        options = self.options
        return reverse_conditions(
            self.bench(claim, seed, own=own),
            options.rtol,
            options.rounding_rtol,
            excuse=self.excuse(),
            **settings,
        )


def _accumulated(dtype: Any) -> Any:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.complex64 if is_complex else jnp.float32


def _balanced(seed: Any, value: Any) -> Any:
    """Weighs a cotangent by its output's size, in powers of two."""
    size = norm(finite_part(value.astype(_accumulated(value.dtype))))
    size = size / max(value.size, 1) ** 0.5
    bits = -jnp.round(jnp.log2(jnp.where(size > 0, size, 1.0)))
    return (seed * 2.0 ** jnp.clip(bits, -MOST_BITS, MOST_BITS)).astype(seed.dtype)


def trials(
    fn: Fn, args: Args, options: Options, *, role: str = "fn", names: Any = None
) -> Iterator[Trial]:
    """Yields the traced program at each trial's point.

    Raises:
      TypeError: What is handed over makes no sense, or a `variant` is given as well.
    """
    if options.variant is not None:
        raise TypeError(
            "`variant` can't be used where the assertion is called on traced values: "
            "it runs under the transformation around it already; leave it out."
        )
    inputs = read_inputs(
        fn,
        args,
        argnums=options.argnums,
        exclude=options.exclude,
        names=names,
        traced=True,
    )
    for trial in range(options.trials):
        point = inputs.draw(options.key, trial)
        program = traced_program(fn, inputs, point, options, role)
        yield Trial(program, point, options, trial)


def traced_program(
    fn: Fn, inputs: Inputs, point: Point, options: Options, role: str
) -> Program:
    try:
        program = trace_program(
            fn,
            inputs,
            point,
            has_aux=options.has_aux,
            role=role,
            intentions=options.expect_differs,
        )
    except SlipError as error:
        raise TypeError(str(error)) from None
    return dataclasses.replace(program, closed_over=_EveryTracer())


def values_here(at: Trial) -> Values:
    """Returns the outputs as they run, for their sizes."""
    moving, held = (
        settled_values(at.point.moving),
        settled_values(at.program.held(at.point)),
    )
    return [jax.lax.stop_gradient(v) for v in at.program.call(moving, held)]
