"""Custom rules audited inside of a trace, at the values that reach them there.

Of each rule its value and its first derivative, in every mode, are compared with its
function's. What else an audit looks at is left to a call outside of a trace: second
derivatives, other ways of calling the rule, repeated calls, dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import dtypes

from gradtest._src import jaxprs, rules
from gradtest._src.inputs import Point
from gradtest._src.lifting import is_inexact
from gradtest._src.options import Options
from gradtest._src.program import Program
from gradtest._src.reach import Call
from gradtest._src.rule_check import declared_here
from gradtest._src.tap import Samples, tap
from gradtest._src.traced.claims import autodiff_conditions
from gradtest._src.traced.gaps import Condition, escaped
from gradtest._src.traced.readings import settled_values
from gradtest._src.traced.trials import trials

Args = tuple[Any, ...]


def audit(
    fn: Callable[..., Any], args: Args, options: Options, only: Any
) -> list[Condition]:
    """Conditions of `assert_custom_rules_match`.

    Raises:
      ValueError: The function calls no custom rule, or none that is wanted.
    """
    found: list[Condition] = []
    for at in trials(fn, args, options):
        groups = rules.wanted_calls(at.program, only)
        if not groups:
            raise ValueError(rules.NO_RULES)
        chosen = [call for calls in groups for call in rules.spread(calls)]
        taps = _tapped(at.program, at.point, chosen)
        reached: Any = jnp.zeros((), bool)
        for call in chosen:
            samples = taps[call.place]
            reached |= jnp.any(samples.reached)
            found += _audit_call(call, samples, options)
        found.append(
            Condition("", False, ~reached, "no custom rule is reached at these values")
        )
    return found


def _tapped(program: Program, point: Point, chosen: Sequence[Call]) -> Any:
    held = settled_values(program.held(point))
    values = [*settled_values(point.moving), *held]
    return tap(program.jaxpr, values, {call.place: call.eqn for call in chosen}, {})


def _audit_call(call: Call, samples: Samples, options: Options) -> list[Condition]:
    """Audits one call at each of its samples, where it took place."""
    name = jaxprs.read_rule(call.eqn).name
    found: list[Condition] = []
    for k in range(len(samples.reached)):
        operands = [operand[k] for operand in samples.operands]
        took_place = jnp.any(samples.reached[k])
        found += [
            dataclasses.replace(
                condition,
                text=condition.text and f"rule {escaped(name)}: {condition.text}",
                wrong=condition.wrong & took_place,
                open=condition.open & took_place,
            )
            for condition in _audit_at(call, operands, options)
        ]
    return found


def _audit_at(call: Call, operands: list[Any], options: Options) -> list[Condition]:
    types = jaxprs.operand_types(call.eqn)
    results = jaxprs.result_types(call.eqn)
    first = jaxprs.read_rule(call.eqn).num_consts
    moving = [
        i
        for i, aval in enumerate(types)
        if i >= first and is_inexact(aval.dtype) and aval.size
    ]
    moving = [i for i in moving if call.moving[i]] or moving
    if not moving or not any(is_inexact(aval.dtype) for aval in results):
        return []  # it has no derivative
    if jaxprs.closed_over(call.eqn):
        why = (
            f"the rule {jaxprs.read_rule(call.eqn).name} closes over a traced value: "
            "make that an argument of the rule"
        )
        return [Condition("", jnp.zeros((), bool), jnp.ones((), bool), why)]
    run = rules.as_function(call)
    at = settled_values(operands)
    masks = {i: jnp.isfinite(at[i]) for i in moving}
    shown = [
        jnp.isfinite(value) if is_inexact(_dtype(value)) else None for value in run(*at)
    ]

    def rule(*moved: Any) -> list[Any]:
        """Calls the rule; entries that are infinite are held, and not looked at."""
        values = list(at)
        for i, value in zip(moving, moved, strict=True):
            values[i] = jnp.where(masks[i], value, at[i])
        return [
            value if mask is None else jnp.where(mask, value, 0)
            for value, mask in zip(run(*values), shown, strict=True)
        ]

    own = dataclasses.replace(
        options,
        argnums=None,
        exclude=(),
        has_aux=False,
        trials=1,
        modes=None,
        order=1,
        expect_differs=declared_here(call.eqn, options),
    )
    names = [f"operand {i - first}" for i in moving]
    start = tuple(jnp.where(masks[i], at[i], 0) for i in moving)
    (trial,) = trials(rule, start, own, names=names)
    broken = ~jnp.all(jnp.stack([~jnp.any(jnp.isnan(at[i])) for i in moving]))
    return [
        dataclasses.replace(c, wrong=c.wrong & ~broken, open=c.open & ~broken)
        for c in autodiff_conditions(trial)
    ]


def _dtype(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    return None if dtypes.issubdtype(dtype, dtypes.extended) else dtype
