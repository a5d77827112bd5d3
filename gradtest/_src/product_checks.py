"""Checks of hand-written products: what is traced for each, and what it claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gradtest._src.check import Check
from gradtest._src.claiming import Claiming, Claims, is_missing_mode
from gradtest._src.claims import Claim, output_seed
from gradtest._src.findings import Report
from gradtest._src.inputs import Inputs, Point
from gradtest._src.linear import nonlinear_findings
from gradtest._src.options import Options
from gradtest._src.product_claims import (
    Product,
    hvp_claim,
    jvp_claim,
    transpose_claim,
    vjp_claim,
)
from gradtest._src.program import Program, trace_program

_Tracer = Callable[[Program, Point, Product, Any], Claim]


def check_vjp(
    fn: Callable[..., Any], product: Product, args: tuple[Any, ...], options: Options
) -> Check:
    """Returns the check of a hand-written vector-Jacobian product."""
    return Check(fn, args, _claiming(vjp_claim, product, options), options)


def check_jvp(
    fn: Callable[..., Any], product: Product, args: tuple[Any, ...], options: Options
) -> Check:
    """Returns the check of a hand-written Jacobian-vector product."""

    def claims(traced: Program, point: Point) -> Claims:
        claim = jvp_claim(traced, point, product, options.variant)
        return Claims(None, claim)

    return Check(fn, args, claims, options)


def check_hvp(
    fn: Callable[..., Any], product: Product, args: tuple[Any, ...], options: Options
) -> Check:
    """Returns the check of a hand-written Hessian-vector product."""
    claims = _claiming(hvp_claim, product, options)
    return HessianCheck(fn, args, claims, options)


def check_transpose(
    fn: Callable[..., Any], product: Product, args: tuple[Any, ...], options: Options
) -> Check:
    """Returns the check of a hand-written transpose of a linear function."""

    def claims(traced: Program, point: Point) -> Claims:
        claim = transpose_claim(traced, point, product, options.variant)
        return Claims(claim, None, beside=nonlinear_findings)

    return TransposeCheck(fn, args, claims, options)


def _claiming(trace: _Tracer, product: Product, options: Options) -> Claiming:
    def claims(traced: Program, point: Point) -> Claims:
        return Claims(trace(traced, point, product, options.variant), None)

    return claims


# What has a Hessian, and what to use where there is none.
HAS_HESSIAN = (
    "`fn` must return one real number to have a Hessian",
    "use assert_jvp_matches for other functions",
)


class HessianCheck(Check):
    """Checks a claim about the gradient of the function, itself taken as a program."""

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        traced = super()._trace(inputs, point)
        traced.require_scalar(*HAS_HESSIAN)
        return traced.gradient(output_seed(traced))

    def report(self, assertion: str) -> Report:
        """Runs the check.

        Raises:
          ValueError: The function has no rule-free gradient that differences can take.
        """
        try:
            report = super().report(assertion)
        except Exception as error:
            if not is_missing_mode(error):
                raise
            raise ValueError(
                "`fn` must have a gradient without its custom rules, which is what a "
                f"Hessian is measured on, but JAX finds none: {error}"
            ) from error
        return dataclasses.replace(report, order=2)


class TransposeCheck(Check):
    """Checks the transpose of a linear function, and that the function is linear."""

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        return trace_program(
            self.fn, inputs, point, role="linear_fn", variant=self.options.variant
        )
