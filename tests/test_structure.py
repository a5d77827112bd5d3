"""A program's key is its structure: names and constants' values play no part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradtest._src import dataflow, jaxprs
from gradtest._src.structure import structure_key

pytestmark = pytest.mark.core

_X = np.linspace(0.5, 1.5, 4, dtype=np.float32)
_ROWS = np.ones((3, 4), np.float32)


def _key(fn, *args):
    key = structure_key(jax.make_jaxpr(fn)(*(args or (_X,))))
    hash(key)
    return key


def _rule(factor):
    @jax.custom_vjp
    def fn(x):
        return jnp.sin(x)

    fn.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (factor * cotangent * x,))
    return fn


def _closure(value):
    return lambda x: jnp.sin(x) * value


def _scan(body, length=3):
    return lambda x: lax.scan(body, x, None, length)[0]


_SAME = {
    "a fresh function": (
        lambda: lambda x: jnp.sin(x) * 2,
        lambda: (lambda y: 2 * jnp.sin(y)) and (lambda z: jnp.sin(z) * 2),
    ),
    "a constant array of another value": (
        lambda: _closure(_X),
        lambda: _closure(_X + 1),
    ),
    "a jitted function made anew": (
        lambda: jax.jit(lambda x: jnp.cos(x)),
        lambda: jax.jit(lambda x: jnp.cos(x)),
    ),
    "a scan made anew": (
        lambda: _scan(lambda c, _: (jnp.sin(c), None)),
        lambda: _scan(lambda c, _: (jnp.sin(c), None)),
    ),
    "a branch made anew": (
        lambda: lambda x: lax.cond(x[0] > 0, lambda: x, lambda: -x),
        lambda: lambda x: lax.cond(x[0] > 0, lambda: x, lambda: -x),
    ),
    "a rule with the same primal": (lambda: _rule(1.0), lambda: _rule(2.0)),
    "a partial": (
        lambda: functools.partial(jnp.sum, axis=0),
        lambda: lambda x: jnp.sum(x, axis=0),
    ),
}


@pytest.mark.parametrize("change", _SAME)
def test_the_key_is_the_same_for(change):
    first, second = _SAME[change]
    assert _key(first()) == _key(second())


_OTHER = {
    "another literal": (lambda x: x * 2.0, lambda x: x * 3.0),
    "another sign of zero": (lambda x: x + 0.0, lambda x: x + -0.0),
    "an integer for a float": (lambda x: x**2, lambda x: x**2.0),
    "another primitive": (jnp.sin, jnp.cos),
    "another axis": (
        lambda x: jnp.sum(x.reshape(2, 2), 0),
        lambda x: jnp.sum(x.reshape(2, 2), 1),
    ),
    "another order of operands": (lambda x: x - x[::-1], lambda x: x[::-1] - x),
    "another result": (
        lambda x: (jnp.sin(x), jnp.cos(x))[0],
        lambda x: (jnp.sin(x), jnp.cos(x))[1],
    ),
    "one constant used twice": (
        lambda x: x * jnp.asarray(_X) + jnp.asarray(_X),
        lambda x: x * jnp.asarray(_X) + jnp.asarray(_X.copy()),
    ),
    "a constant of another shape": (_closure(_X), _closure(_X[None])),
    "a constant of another dtype": (_closure(_X), _closure(_X.astype(jnp.bfloat16))),
    "another length of a loop": (
        _scan(lambda c, _: (jnp.sin(c), None)),
        _scan(lambda c, _: (jnp.sin(c), None), 4),
    ),
    "another body of a loop": (
        _scan(lambda c, _: (jnp.sin(c), None)),
        _scan(lambda c, _: (jnp.cos(c), None)),
    ),
    "another literal deep inside": (
        _scan(lambda c, _: (jax.jit(lambda y: y * 2.0)(c), None)),
        _scan(lambda c, _: (jax.jit(lambda y: y * 2.5)(c), None)),
    ),
    "another branch": (
        lambda x: lax.cond(x[0] > 0, lambda: x, lambda: -x),
        lambda x: lax.cond(x[0] > 0, lambda: x, lambda: 2 * x),
    ),
    "another callback": (
        lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), _X.dtype), x),
        lambda x: jax.pure_callback(np.cos, jax.ShapeDtypeStruct((4,), _X.dtype), x),
    ),
    "a gradient where none was stopped": (
        lambda x: x * lax.stop_gradient(x),
        lambda x: x * x,
    ),
}


@pytest.mark.parametrize("change", _OTHER)
def test_the_key_tells(change):
    first, second = _OTHER[change]
    assert _key(first) != _key(second)


def test_the_key_tells_shapes_and_dtypes_of_the_arguments():
    keys = [
        _key(jnp.sin, x)
        for x in (_X, _X[:3], _X[None], _X.astype(jnp.bfloat16), _X > 1)
        if x.dtype != bool
    ]
    assert len(set(keys)) == len(keys)


def test_the_derivative_of_another_rule_is_another_program():
    def gradient(factor):
        return jax.grad(lambda x: jnp.sum(_rule(factor)(x)))

    assert _key(gradient(1.0)) == _key(gradient(1.0))
    assert _key(gradient(1.0)) != _key(gradient(2.0))


# --- the other questions that jaxprs answers --------------------------------------


def test_primitives_are_found_at_any_depth():
    def fn(x):
        inner = jax.jit(lambda y: lax.cond(y[0] > 0, jnp.sin, jnp.cos, y))
        return lax.scan(lambda c, row: (inner(c) + row, None), x[0], x)[0]

    found = jaxprs.primitives(jax.make_jaxpr(fn)(_ROWS))
    assert {"sin", "cos", "scan", "cond"} <= found


def test_constants_are_found_at_any_depth_each_once():
    constant = jnp.arange(4.0) + 1

    def fn(x):
        inner = jax.jit(lambda y: y * constant)
        return lax.scan(lambda c, row: (inner(c) + row * constant, None), x[0], x)[0]

    consts = jaxprs.nested_consts(jax.make_jaxpr(fn)(_ROWS))
    assert [np.shape(const) for const in consts] == [(4,)]


def test_literals_of_half_precision_that_may_be_rounded_are_found():
    def fn(x):
        return x * 0.5 + jnp.sin(x) * 0.7 + 3 * x - 1.1

    half = jaxprs.half_literals(jax.make_jaxpr(fn)(_X.astype(jnp.bfloat16)))
    # 1/2 and 3 are exact in every dtype.
    found = sorted(float(np.asarray(literal.val)) for literal in half)
    assert found == pytest.approx([0.7, 1.1], rel=1e-2)
    assert not jaxprs.half_literals(jax.make_jaxpr(fn)(_X))


def test_a_stop_that_feeds_only_a_solver_is_told_from_others():
    matrix = np.eye(4, dtype=np.float32) * 2

    def stops(fn):
        return len(dataflow.solver_only_stops(jax.make_jaxpr(fn)(matrix, _X)))

    assert stops(jnp.linalg.solve) > 0
    assert stops(lambda a, b: lax.stop_gradient(a) @ b) == 0
    assert stops(lambda a, b: jnp.linalg.solve(a, lax.stop_gradient(b))) == stops(
        jnp.linalg.solve
    )
