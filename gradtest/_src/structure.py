"""The structure of a program as a key: equal for programs that compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax import dtypes

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr, kernels


def structure_key(jaxpr: Jaxpr) -> Hashable:
    """Returns a key that is equal for programs that compute the same.

    Array constants count by shape and dtype and by which of them coincide: their
    values are inputs of what gradtest compiles. Custom rules count by their primal
    program alone, because what is compiled never calls the rule.
    """
    numbering = {id(const): i for i, const in enumerate(jaxprs.nested_consts(jaxpr))}
    return _program_key(jaxpr, numbering)


def _program_key(jaxpr: Jaxpr, consts: dict[int, int]) -> Hashable:
    body = jaxprs.open_body(jaxpr)
    numbers: dict[Any, int] = {}

    def atom(operand: Any) -> Hashable:
        if jaxprs.is_literal(operand):
            return ("literal", _param_key(operand.val, consts), str(operand.aval))
        return numbers.setdefault(operand, len(numbers))

    def binder(var: Any) -> Hashable:
        return numbers.setdefault(var, len(numbers)), var.aval

    head = tuple(binder(var) for var in [*body.constvars, *body.invars])
    held = tuple(consts[id(const)] for const in body.consts)
    lines = tuple(
        (
            eqn.primitive,
            tuple(atom(operand) for operand in eqn.invars),
            _params_key(eqn, consts),
            tuple(binder(var) for var in eqn.outvars),
        )
        for eqn in body.eqns
    )
    return head, held, lines, tuple(atom(operand) for operand in body.outvars)


def _params_key(eqn: Eqn, consts: dict[int, int]) -> Hashable:
    if eqn.primitive.name in jaxprs.CUSTOM_RULES:
        return _program_key(jaxprs.rule_free_program(eqn), consts)
    if eqn.primitive.name == kernels.PALLAS_CALL:
        return _param_key(kernels.parts(eqn), consts)
    return tuple(
        (name, _param_key(value, consts)) for name, value in sorted(eqn.params.items())
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    """Keeps an unhashable parameter alive and equal to itself alone."""

    value: Any


def _param_key(value: Any, consts: dict[int, int]) -> Hashable:
    if jaxprs.is_program(value):
        return _program_key(value, consts)
    if isinstance(value, tuple | list):
        return (type(value), tuple(_param_key(item, consts) for item in value))
    if isinstance(value, dict):
        return tuple((k, _param_key(v, consts)) for k, v in value.items())
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if dtypes.issubdtype(value.dtype, dtypes.extended):
            return _Identity(value)
        array = np.asarray(value)
        return (array.shape, str(array.dtype), array.tobytes())
    if isinstance(value, float):
        return np.float64(value).tobytes()  # -0.0 is not 0.0, and NaN is NaN
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return value
