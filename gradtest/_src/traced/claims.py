"""What each assertion asks inside of a trace: programs, claims and their conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src import claims, jaxprs
from gradtest._src.claiming import hand_written_claims, in_each_mode
from gradtest._src.claims import Claim, trace_claim
from gradtest._src.execution import SlipError
from gradtest._src.inputs import Point
from gradtest._src.linear import FACTOR, ROUNDING
from gradtest._src.matching import match_results
from gradtest._src.options import Options
from gradtest._src.product_checks import HAS_HESSIAN
from gradtest._src.product_claims import (
    Product,
    hvp_claim,
    jvp_claim,
    transpose_claim,
    vjp_claim,
)
from gradtest._src.program import Program, Values
from gradtest._src.traced.gaps import Condition, escaped, traced_gap
from gradtest._src.traced.pushed import pushed_conditions
from gradtest._src.traced.readings import (
    Bench,
    in_float64,
    norm,
    root_mean_square,
)
from gradtest._src.traced.trials import Trial, traced_program, trials, values_here

Fn = Callable[..., Any]
Args = tuple[Any, ...]


def gradient(fn: Fn, grad_fn: Fn, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_grad_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        claim = hand_written_claims(grad_fn, options)(at.program, at.point).reverse
        assert claim is not None
        found += at.judge(claim, at.cotangents(plain=True))
    return found


def autodiff(fn: Fn, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_autodiff_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        found += autodiff_conditions(at)
        if options.order > 1:
            found += _second_order(at.gradient(), options)
    return found


def autodiff_conditions(at: Trial) -> list[Condition]:
    """Conditions of what JAX differentiates, in every mode asked for that there is."""
    found, _ = in_each_mode(
        at.options.modes, lambda: _reverse(at), lambda: _forward(at)
    )
    return [condition for conditions in found.values() for condition in conditions]


def _reverse(at: Trial, **settings: Any) -> list[Condition]:
    outputs = len(at.program.outputs)
    seed = at.cotangents(values_here(at) if outputs > 1 else None)
    return at.judge(reverse_claim(at.program, at.point, seed), seed, **settings)


def _forward(at: Trial) -> list[Condition]:
    claim = claims.forward_claim(at.program, at.point)
    return pushed_conditions(
        at.bench(claim, at.tangents()),
        at.options.rtol,
        at.options.rounding_rtol,
        each_leaf=False,
        excuse=at.excuse(),
    )


def _second_order(at: Trial, options: Options) -> list[Condition]:
    if options.modes is not None and "rev" not in options.modes:
        raise ValueError("`order` 2 needs a reverse mode: add 'rev' to `modes`.")
    what = {"what": "the second derivative", "judges_values": False}
    if at.program.declared:
        once = at.program.declared_once()
        at = dataclasses.replace(at, program=once)
    return _reverse(at, **what)


def reverse_claim(program: Program, point: Point, seed: Values) -> Claim:
    """Traces JAX's reverse mode; cotangents vary over devices as the outputs do."""

    def call(moving: Values, held: Values, cotangents: Values) -> Values:
        values, pull = jax.vjp(lambda *xs: program.call(xs, held), *moving)
        return [*values, *pull(list(cotangents))]

    claim = trace_claim("rev", program, point, call, seed, None, has_value=True)
    return dataclasses.replace(claim, is_autodiff=True)


def vjp(fn: Fn, product: Product, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_vjp_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        outputs = len(at.program.outputs)
        seed = at.cotangents(values_here(at) if outputs > 1 else None)
        claim = _slipping(vjp_claim, at, product, seed)
        found += at.judge(claim, seed, what="the cotangent")
    return found


def jvp(fn: Fn, product: Product, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_jvp_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        claim = _slipping(jvp_claim, at, product)
        found += pushed_conditions(
            at.bench(claim, at.tangents()),
            options.rtol,
            options.rounding_rtol,
            each_leaf=True,
            excuse=at.excuse(),
        )
    return found


def hvp(fn: Fn, product: Product, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_hvp_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        at.program.require_scalar(*HAS_HESSIAN)
        second = at.gradient()
        seed = second.cotangents()
        claim = _slipping(hvp_claim, second, product, seed)
        found += second.judge(claim, seed, what="the product")
    return found


def transpose(
    fn: Fn, product: Product, args: Args, options: Options
) -> list[Condition]:
    """Conditions of `assert_transpose_matches`."""
    found: list[Condition] = []
    for at in trials(fn, args, options, role="linear_fn"):
        seed = at.cotangents()
        claim = _slipping(transpose_claim, at, product, seed)
        found += at.judge(claim, seed, what="the transpose")
        found += _linear(at, at.bench(claim, seed))
    return found


def _linear(at: Trial, bench: Bench) -> list[Condition]:
    """Asks whether a function is linear, by its values alone."""

    def conditions() -> list[Condition]:
        found = []
        start = bench.wide[0]
        other = [
            root_mean_square(x) * bench.draw("another point", i)
            for i, x in enumerate(start)
        ]
        mixed = [FACTOR * x + y for x, y in zip(start, other, strict=True)]
        zeros = list(map(jnp.zeros_like, start))
        here, there, both, none = map(bench.values, (start, other, mixed, zeros))
        for i, output in enumerate(at.program.outputs):
            wanted = FACTOR * here[i] + there[i]
            floor = ROUNDING * (norm(here[i]) + norm(there[i]))
            for value, says in (
                (both[i], f"its result for {FACTOR} x + y"),
                (wanted + none[i], "its result for zeros"),
            ):
                gap = traced_gap(value, wanted, rtol=at.options.rtol, floor=floor)
                found.append(
                    Condition(
                        f"{escaped(output.name)}: `linear_fn` is not linear, {says} is "
                        "off by {gap:.3g}, allowed are {allowed:.3g}",
                        gap.exceeded,
                        numbers={"gap": gap.size, "allowed": gap.allowed},
                    )
                )
        return found

    return in_float64(conditions)


def agreement(fn: Fn, reference: Fn, args: Args, options: Options) -> list[Condition]:
    """Conditions of `assert_grads_agree`."""
    found: list[Condition] = []
    for at in trials(fn, args, options):
        own, inputs = at.program, at.program.inputs
        other = traced_program(reference, inputs, at.point, options, "reference")
        try:
            match_results(own, other)
        except SlipError as error:
            raise TypeError(str(error)) from None
        _match_devices(own, other)
        against = dataclasses.replace(
            at, program=dataclasses.replace(other, outputs=own.outputs)
        )
        outputs = len(own.outputs)
        seed = at.cotangents(values_here(at) if outputs > 1 else None)
        claim = reverse_claim(own, at.point, seed)
        claim = dataclasses.replace(claim, is_autodiff=False)
        found += against.judge(claim, seed, own=own)
        if own.has_rules:
            found += _values_agree(against, claim, seed, own)
    return found


def _match_devices(own: Program, other: Program) -> None:
    """Asks that results differ between devices in both functions, or in neither."""
    for output, *atoms in zip(
        own.outputs,
        jaxprs.open_body(own.jaxpr).outvars,
        jaxprs.open_body(other.jaxpr).outvars,
        strict=True,
    ):
        mine, theirs = (sorted(map(str, jaxprs.vma(atom))) for atom in atoms)
        if mine != theirs:
            raise TypeError(
                f"{output.name} of `fn` varies over the mesh axes {mine}, that of "
                f"`reference` over {theirs}, so JAX's gradients are of other sums over "
                "devices: use jax.lax.pcast or a collective to make the two alike."
            )


def _values_agree(
    at: Trial, claim: Claim, seed: Values, own: Program
) -> list[Condition]:
    """Compares the values where neither function is differentiated."""
    bench = at.bench(claim, seed, own=own)

    def conditions() -> list[Condition]:
        moving, found = bench.wide[0], []
        for output, mine, other in zip(
            at.program.outputs,
            bench.values(moving, own),
            bench.values(moving),
            strict=True,
        ):
            floor = 1e-13 * norm(other)
            gap = traced_gap(mine, other, rtol=at.options.rtol, floor=floor)
            found.append(
                Condition(
                    f"{escaped(output.name)}: the values differ by {{gap:.3g}} of "
                    "their norm, allowed are {allowed:.3g} (both in float64)",
                    gap.exceeded,
                    numbers={"gap": gap.size, "allowed": gap.allowed},
                )
            )
        return found

    return in_float64(conditions)


def _slipping(
    trace: Callable[..., Claim], at: Trial, product: Product, *seed: Values
) -> Claim:
    try:
        return trace(at.program, at.point, product, None, *seed)
    except SlipError as error:
        raise TypeError(str(error)) from None
