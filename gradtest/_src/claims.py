"""What is claimed of a program: derivatives under test, traced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs, variants
from gradtest._src.execution import SlipError
from gradtest._src.inputs import Point
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.matching import Returned, moving_order
from gradtest._src.program import Program, Values, describe
from gradtest._src.structure import structure_key


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """A derivative under test, traced.

    Attributes:
      mode: "rev" where it returns cotangents of the moving leaves, "fwd" where it
        returns tangents of the outputs.
      jaxpr: Takes moving leaves, held values and the seed (cotangents of the outputs,
        or tangents of the moving leaves); returns the function's results, where it
        has them, and then the derivative.
      call: The Python function that was traced, for running under a variant.
      has_value: Whether the results come first.
      variant: Whether `call` runs under a variant of the user's.
      devices: Length of the leading axis of devices that every result has; 0 where
        there is none.
      is_autodiff: Whether JAX made it of the program itself.
      by_hand: What hand-written thing maps the seed, and so must be linear in it: "the
        rule", or the name of a function; empty where nothing does.
      seed_name: What that calls the seed.
      is_apart: Whether it runs on devices of its own, compiled by itself: a parallel
        step, which is judged by what one device computes.
      mesh: The mesh that `call` finds around it, if any.
    """

    mode: str
    jaxpr: Jaxpr
    call: Callable[..., Values]
    has_value: bool = True
    variant: bool = False
    devices: int = 0
    is_autodiff: bool = False
    by_hand: str = ""
    seed_name: str = "cotangent"
    is_apart: bool = False
    mesh: Any = None

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for claims of the same structure."""
        own = structure_key(self.jaxpr)
        return self.mode, self.is_autodiff, self.is_apart, own


def reverse_claim(
    program: Program, point: Point, variant: Callable[..., Any] | None = None
) -> Claim:
    """Traces what JAX's reverse mode makes of the program, custom rules expanded.

    Raises:
      Exception: Whatever JAX raises where the program has no reverse mode.
    """

    def call(moving: Values, held: Values, cotangents: Values) -> Values:
        values, pull = jax.vjp(lambda *xs: program.call(xs, held), *moving)
        return [*values, *pull(list(cotangents))]

    return _trace_claim("rev", program, point, call, output_seed(program), variant)


def forward_claim(
    program: Program, point: Point, variant: Callable[..., Any] | None = None
) -> Claim:
    """Traces what JAX's forward mode makes of the program.

    Raises:
      TypeError: The program has no forward mode: a `custom_vjp` is in it.
    """

    def call(moving: Values, held: Values, tangents: Values) -> Values:
        values, slopes = jax.jvp(
            lambda *xs: program.call(xs, held), tuple(moving), tuple(tangents)
        )
        return [*values, *slopes]

    seed = [jnp.asarray(value) for value in point.moving]
    claim = _trace_claim("fwd", program, point, call, seed, variant)
    if jaxprs.NO_FORWARD_RULE in jaxprs.primitives(claim.jaxpr):
        raise TypeError("a custom_vjp function has no forward-mode derivative")
    return dataclasses.replace(claim, seed_name="tangent")


def _trace_claim(
    mode: str,
    program: Program,
    point: Point,
    call: Callable[..., Values],
    seed: Values,
    variant: Callable[..., Any] | None,
) -> Claim:
    claim = trace_claim(mode, program, point, call, seed, variant, has_value=True)
    by_hand = "the rule" if program.has_rules else ""
    return dataclasses.replace(claim, is_autodiff=True, by_hand=by_hand)


def trace_claim(
    mode: str,
    program: Program,
    point: Point,
    call: Callable[..., Values],
    seed: Values,
    variant: Callable[..., Any] | None,
    *,
    has_value: bool | None = False,
) -> Claim:
    """Traces a claim; under a variant, as the variant makes it.

    Args:
      mode: "rev" or "fwd".
      program: What it is a derivative of.
      point: Where it is traced.
      call: Takes moving leaves, held values and the seed.
      seed: Cotangents of the outputs, or tangents of the leaves.
      variant: What `call` runs under.
      has_value: Whether `call` returns the function's results first; None where only
        what it returns can tell.

    Raises:
      TypeError: The variant changes what the function returns.
    """
    arguments = [list(point.moving), list(program.held(point)), seed]
    moving, outputs = program.inputs.moving, program.outputs
    derived = [item.shape for item in (moving if mode == "rev" else outputs)]
    try:
        run = call if variant is None else variants.apply_variant(variant, call)
        traced = run
        if variant is not None and variants.only_places_arguments(variant):
            traced = call
        with execution.user_code():
            jaxpr = jaxprs.expand_all(jax.make_jaxpr(traced)(*arguments))
    except SlipError:
        raise
    except jax.errors.UnexpectedTracerError:
        if not program.has_rules:
            raise
        raise _leak("") from None
    except Exception as error:
        if variant is not None:
            variants.require_transformation(variant, arguments, error)
        raise
    refuse_strays(jaxpr, program)
    found = [tuple(aval.shape) for aval in jaxpr.out_avals]
    if has_value is None:
        has_value = len(found) > len(derived)
    shapes = [item.shape for item in outputs] if has_value else []
    shapes += derived
    devices = 0
    if found != shapes:
        devices = found[0][0] if found and found[0] else 0
        if found != [(devices, *shape) for shape in shapes]:
            raise TypeError(
                f"`variant` must return the results of the function it is given, with "
                f"or without an axis of devices: wanted shapes {shapes}, got {found}."
            )
    return Claim(mode, jaxpr, run, has_value, variant is not None, devices)


def refuse_strays(jaxpr: Jaxpr, program: Program) -> None:
    """Refuses a trace that holds a value of another trace, as a leaking rule does.

    Raises:
      TypeError: It does; as a slip of the user's.
    """
    for stray in jaxprs.stray_values(jaxpr, program.closed_over)[:1]:
        raise _leak(f" ({describe(stray)})")


def _leak(value: str) -> SlipError:
    return SlipError(
        f"a custom rule of `fn` leaks or closes over a traced value{value}: pass it as "
        "an argument, or as a residual from fwd to bwd."
    )


def output_seed(program: Program) -> Values:
    """Returns cotangents of the right shapes and dtypes for the outputs: ones."""
    return [np.ones(out.shape, dtype=out.dtype) for out in program.outputs]


def hand_written_claim(
    program: Program,
    point: Point,
    grad_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    variant: Callable[..., Any] | None = None,
) -> Claim:
    """Traces a hand-written gradient of a scalar function.

    Raises:
      TypeError: `grad_fn` is not callable, or returns another tree, shape or dtype
        than the arguments it differentiates.
    """
    inputs = program.inputs
    single = isinstance(argnums, int)

    def call(moving: Values, held: Values, seed: Values) -> Values:
        arguments = inputs.arguments(moving, held)
        try:
            returned = grad_fn(*arguments)
        except Exception as error:
            error.add_note("gradtest: raised by `grad_fn` itself, while it was traced.")
            raise
        trees = (returned,) if single else returned
        if not single and not isinstance(trees, tuple):
            raise SlipError(
                "`grad_fn` must return a tuple with one tree for each of argnums="
                f"{tuple(argnums)}, got {describe(returned)}."  # type: ignore[arg-type]
            )
        if len(trees) != len(inputs.argnums):
            raise SlipError(
                f"`grad_fn` must return {len(inputs.argnums)} trees, one for each of "
                f"`argnums`, got {len(trees)}."
            )
        found: Values = []
        for position, argument in enumerate(inputs.argnums):
            label = "grad_fn(...)" + ("" if single else f"[{position}]")
            tree = Returned(trees[position], "grad_fn", label, strict=False)
            found += tree.like_argument(inputs, argument)
        return [found[i] for i in moving_order(inputs)]

    if not callable(grad_fn):
        raise TypeError(f"`grad_fn` must be callable, got {grad_fn!r}.")
    return trace_claim("rev", program, point, call, output_seed(program), variant)
