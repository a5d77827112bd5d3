"""Claims that hand-written products make: each traced as one of the two modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from gradtest._src.claims import Claim, output_seed, trace_claim
from gradtest._src.inputs import Point
from gradtest._src.matching import (
    Returned,
    cotangent_tree,
    match_cotangents,
    moving_order,
    tangent_trees,
)
from gradtest._src.program import Program, PyTree, Values

HAND_WRITTEN = "hand_written"
TRANSPOSE = "transpose_fn"

Product = Callable[..., PyTree]
Variant = Callable[..., Any] | None


def vjp_claim(
    program: Program,
    point: Point,
    product: Product,
    variant: Variant,
    seed: Values | None = None,
) -> Claim:
    """Traces `product(args, cotangent)`, which returns cotangents of the arguments.

    Args:
      program: The function.
      point: Where it is traced.
      product: The hand-written product.
      variant: What it runs under.
      seed: Cotangents of the types to trace it for; by default ones.

    Raises:
      TypeError: It returns another tree, shape or dtype than the arguments have.
    """

    def call(moving: Values, held: Values, seed: Values) -> Values:
        arguments = program.inputs.arguments(moving, held)
        cotangent = cotangent_tree(program, seed)
        returned = _returned_by(HAND_WRITTEN, product, arguments, cotangent)
        return _leaves_of_arguments(program, returned, HAND_WRITTEN)

    seed = seed or output_seed(program)
    claim = trace_claim("rev", program, point, call, seed, variant)
    return _made_by(claim, HAND_WRITTEN, "cotangent")


def jvp_claim(
    program: Program, point: Point, product: Product, variant: Variant
) -> Claim:
    """Traces `product(args, tangents)`, which returns the tangent of the result.

    Raises:
      TypeError: It returns another tree, shape or dtype than the result has.
    """

    def call(moving: Values, held: Values, seed: Values) -> Values:
        arguments = program.inputs.arguments(moving, held)
        tangents = tangent_trees(program.inputs, seed)
        returned = _returned_by(HAND_WRITTEN, product, arguments, tangents)
        tree = Returned(returned, HAND_WRITTEN, f"{HAND_WRITTEN}(...)")
        return tree.like_result(program)

    seed = [jnp.asarray(value) for value in point.moving]
    claim = trace_claim("fwd", program, point, call, seed, variant)
    return _made_by(claim, HAND_WRITTEN, "tangent")


def hvp_claim(
    gradient: Program,
    point: Point,
    product: Product,
    variant: Variant,
    seed: Values | None = None,
) -> Claim:
    """Traces `product(args, tangents)`, which returns a Hessian's product with them.

    A Hessian is symmetric, for complex arguments as well in JAX's pairing
    `Re(sum(w * v))`. So the product is the reverse mode of the gradient, which is
    judged by leaf and entry.

    Raises:
      TypeError: It returns another tree, shape or dtype than the arguments have.
    """

    def call(moving: Values, held: Values, seed: Values) -> Values:
        arguments = gradient.inputs.arguments(moving, held)
        tangents = tangent_trees(gradient.inputs, seed)
        returned = _returned_by(HAND_WRITTEN, product, arguments, tangents)
        return _leaves_of_arguments(gradient, returned, HAND_WRITTEN)

    seed = seed or output_seed(gradient)
    claim = trace_claim("rev", gradient, point, call, seed, variant)
    return _made_by(claim, HAND_WRITTEN, "tangent")


def transpose_claim(
    program: Program,
    point: Point,
    product: Product,
    variant: Variant,
    seed: Values | None = None,
) -> Claim:
    """Traces `product(cotangent)`, the transpose of a linear function of one argument.

    Raises:
      TypeError: It returns another tree, shape or dtype than the argument has.
    """

    def call(moving: Values, held: Values, seed: Values) -> Values:
        cotangent = cotangent_tree(program, seed)
        returned = _returned_by(TRANSPOSE, product, cotangent)
        return _leaves_of_arguments(program, returned, TRANSPOSE)

    seed = seed or output_seed(program)
    claim = trace_claim("rev", program, point, call, seed, variant)
    return _made_by(claim, TRANSPOSE, "cotangent")


def _returned_by(role: str, product: Product, *arguments: Any) -> PyTree:
    try:
        return product(*arguments)
    except Exception as error:
        error.add_note(f"gradtest: raised by `{role}` itself, while it was traced.")
        raise


def _leaves_of_arguments(program: Program, returned: PyTree, role: str) -> Values:
    """Returns cotangents, as the user's function gave them, in the leaves' order."""
    by_argument = match_cotangents(program.inputs, returned, role, f"{role}(...)")
    found = [value for values in by_argument for value in values]
    return [found[i] for i in moving_order(program.inputs)]


def _made_by(claim: Claim, role: str, seed_name: str) -> Claim:
    return dataclasses.replace(claim, by_hand=f"`{role}`", seed_name=seed_name)
