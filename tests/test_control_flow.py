"""Loops, branches, rules and solvers are lifted; bits, keys and islands are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import gradtest
from tests.lifted import Row, assert_lifted, lift

pytestmark = pytest.mark.core

_VECTOR = np.linspace(-1.3, 1.7, 6, dtype=np.float32)
_MATRIX = np.cos(np.arange(12, dtype=np.float32)).reshape(3, 4)
_SQUARE = np.sin(np.arange(9, dtype=np.float32)).reshape(3, 3) + 3 * np.eye(
    3, dtype=np.float32
)
_INTEGERS = np.array([4, 0, 4, 2], dtype=np.int32)


@jax.custom_jvp
def _cube(x):
    return x**3


_cube.defjvps(lambda tangent, out, x: 100 * tangent)


@jax.custom_vjp
def _fourth(x):
    return x**4


_fourth.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))


def _scan(x):
    def step(carry, row):
        carry = (carry * 0.5 + jnp.sin(row)).astype(jnp.bfloat16).astype(carry.dtype)
        return carry, carry**2

    return lax.scan(step, jnp.zeros_like(x[0]), x, reverse=True)


def _scan_in_float64(x):
    def step(carry, row):
        carry = carry * 0.5 + jnp.sin(row)
        return carry, carry**2

    return lax.scan(step, jnp.zeros_like(x[0]), x, reverse=True)


def _power(x):
    """A loop whose length depends on the value: examples of a batch end apart."""
    start = (x * 0, x)
    return lax.while_loop(
        lambda state: state[0] < 3 + 2 * x,
        lambda state: (state[0] + 1, state[1] * jnp.sin(x) + lax.stop_gradient(x)),
        start,
    )[1]


def _while(x):
    def body(state):
        count, value = state
        return count + 1, jnp.cos(value) * 1.25

    return lax.while_loop(lambda state: state[0] < 7, body, (0, x))[1]


def _nested_loops(x):
    def outer(carry, row):
        inner = lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + i * row, carry)
        return inner, None

    return lax.scan(outer, x[0], x)[0]


def _cond(x):
    return lax.cond(x[0] < 0, lambda: jnp.sin(x), lambda: jnp.cos(x) + x)


def _switch(n, x):
    return lax.switch(n[0] // 2, [jnp.sin, jnp.cos, jnp.tanh], x)


def _linear_call(x):
    def double(_, y):
        return 2 * y

    return jax.custom_derivatives.linear_call(double, double, (), x) * x


def _linear_solve(matrix, b):
    def solve(_, rhs):
        return jnp.linalg.inv(matrix) @ rhs

    return lax.custom_linear_solve(lambda x: matrix @ x, b, solve)


def _linear_solve_with_aux(matrix, b):
    def solve(_, rhs):
        return jnp.linalg.inv(matrix) @ rhs, 3 * rhs

    return lax.custom_linear_solve(lambda x: matrix @ x, b, solve, has_aux=True)


def _root(b):
    def newton(residual, guess):
        return lax.fori_loop(
            0, 20, lambda _, x: x - residual(x) / (3 * x**2 + 1), guess
        )

    return lax.custom_root(
        lambda x: x**3 + x - b,
        b,
        newton,
        lambda linear, y: y / linear(jnp.ones_like(y)),
    )


_CALLS = (
    Row("jit", jax.jit(lambda x: jnp.sin(x) * 2), (_VECTOR,)),
    Row("jit inside of jit", jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2), (_VECTOR,)),
    Row("closed_call", lambda x: jax.core.eval_jaxpr(
        jax.make_jaxpr(jnp.sin)(_VECTOR).jaxpr, [], x), (_VECTOR,), jnp.sin),
    Row("remat", jax.checkpoint(lambda x: jnp.sin(jnp.cos(x))), (_VECTOR,)),
    Row("custom_jvp", _cube, (_VECTOR,)),
    Row("custom_vjp", _fourth, (_VECTOR,)),
    Row("linear_call", _linear_call, (_VECTOR,)),
    Row("custom_linear_solve", _linear_solve, (_SQUARE, _VECTOR[:3])),
    Row("custom_linear_solve with auxiliary data", _linear_solve_with_aux,
        (_SQUARE, _VECTOR[:3])),
    Row("custom_root", _root, (_VECTOR,)),
    Row("scan in bfloat16", _scan, (_MATRIX,), _scan_in_float64),
    Row("scan of no steps", lambda x: lax.scan(lambda c, _: (c * 2, c), x, None, 0),
        (_VECTOR,)),
    Row("while", _while, (_VECTOR,)),
    Row("vmap of a while", jax.vmap(_power), (_VECTOR,)),
    Row("vmap of a vmap of a while", jax.vmap(jax.vmap(_power)), (_MATRIX,)),
    Row("loops in loops", _nested_loops, (_MATRIX,)),
    Row("map", lambda x: lax.map(jnp.sum, x), (_MATRIX,)),
    Row("cond", _cond, (_VECTOR,)),
    Row("switch", _switch, (_INTEGERS, _VECTOR)),
    Row("vmap", jax.vmap(_cond), (_MATRIX,)),
    Row("stop_gradient", lambda x: lax.stop_gradient(x) * x, (_VECTOR,)),
    Row("optimization_barrier", lambda x: lax.optimization_barrier(x) * 2, (_VECTOR,)),
    Row("named values", lambda x: checkpoint_name(x, "x") ** 2,
        (_VECTOR,)),
    Row("gradient in the program", jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)),
        (_VECTOR,)),
)  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in _CALLS])
def test_is_lifted(row):
    assert_lifted(row)


# --- bits and keys are kept -------------------------------------------------------


def _dropout(key, x):
    keep = jax.random.bernoulli(key, 0.6, x.shape)
    return jnp.where(keep, x / 0.6, 0)


_DRAWS = {
    "uniform": lambda key: jax.random.uniform(key, (64,)),
    "normal": lambda key: jax.random.normal(key, (64,)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.4, (64,)).astype(float),
    "categorical": lambda key: jax.random.categorical(
        key, jnp.arange(9.0), shape=(64,)
    ),
    "permutation": lambda key: jax.random.permutation(key, 64),
    "bits": lambda key: jax.random.bits(key, (64,)),
    "gumbel": lambda key: jax.random.gumbel(key, (64,)),
    "exponential": lambda key: jax.random.exponential(key, (64,)),
    "choice": lambda key: jax.random.choice(key, jnp.arange(9.0), (64,)),
    "split keys": lambda key: jax.vmap(jax.random.normal)(jax.random.split(key, 8)),
}


@pytest.mark.parametrize("draw", _DRAWS.values(), ids=_DRAWS.keys())
@pytest.mark.parametrize(
    "make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed key", "raw key"]
)
def test_random_draws_are_those_of_the_program(draw, make_key):
    key = make_key(7)
    (found,), islands = lift(draw, key)
    # Floats made of bits keep their own precision.
    assert islands <= {"bitcast_convert_type"}
    # In float64 another number of bits would be drawn, and other numbers with them.
    np.testing.assert_allclose(found, np.asarray(draw(key)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("draw", _DRAWS.values(), ids=_DRAWS.keys())
def test_random_draws_leave_a_check_in_float64(draw):
    # Beside them the sign bit of what moves is read as an integer: no float of it.
    def fn(x):
        return (
            jnp.where(jnp.signbit(x), x**2, x)
            * draw(jax.random.key(7)).astype(x.dtype).sum()
        )

    report = gradtest.assert_autodiff_matches(fn, jnp.array([-0.5, 0.7]))
    assert report.precision[0].startswith("precision: everything in float64")


def test_dropout_keeps_the_units_that_the_program_keeps():
    key = jax.random.key(3)
    x = jnp.linspace(1, 2, 100)
    (found,), _ = lift(_dropout, key, x)
    np.testing.assert_array_equal(found == 0, np.asarray(_dropout(key, x)) == 0)
    np.testing.assert_allclose(
        found[found != 0], np.asarray(x, float)[found != 0] / 0.6
    )


def test_bits_of_floats_are_those_of_the_program():
    def sign_bit(x):
        return lax.bitcast_convert_type(x, jnp.uint32) >> 31

    (found,), _ = lift(sign_bit, _VECTOR)
    np.testing.assert_array_equal(found, _VECTOR < 0)


def test_integers_overflow_as_in_the_program():
    (found,), _ = lift(lambda n: n * np.int32(2**30), _INTEGERS)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, _INTEGERS * np.int32(2**30))


# --- what cannot be lifted runs as it is ------------------------------------------


def _callback(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda v: np.sin(v), shape, x) * 2


def test_a_callback_runs_in_its_own_precision_and_is_named():
    (found,), islands = lift(_callback, _VECTOR)
    assert islands == {"pure_callback"}
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, 2.0 * np.sin(_VECTOR).astype(float))


def test_an_island_in_a_loop_is_named():
    def fn(x):
        return lax.fori_loop(0, 3, lambda _, y: _callback(y), x)

    _, islands = lift(fn, _VECTOR)
    assert islands == {"pure_callback"}


def test_nextafter_runs_in_its_own_precision_and_is_named():
    (found,), islands = lift(lambda x: jnp.nextafter(x, 2.0), _VECTOR)
    assert islands == {"nextafter"}
    np.testing.assert_array_equal(found, np.nextafter(_VECTOR, np.float32(2)))


def test_debugging_prints_are_left_out(capsys):
    def fn(x):
        jax.debug.print("x = {}", x)
        return jnp.sin(x)

    (found,), islands = lift(fn, _VECTOR)
    jax.effects_barrier()
    assert capsys.readouterr().out == ""
    assert not islands
    np.testing.assert_allclose(found, np.sin(_VECTOR.astype(float)), rtol=1e-14)


def test_a_loop_whose_rule_alone_gives_it_a_gradient_has_no_second_order():
    @jax.custom_vjp
    def root(x):
        return lax.while_loop(
            lambda state: state[0] < 20,
            lambda state: (state[0] + 1, (state[1] + x / state[1]) / 2),
            (0, jnp.ones_like(x)),
        )[1]

    root.defvjp(lambda x: (y := root(x), y), lambda y, g: (g / (2 * y),))
    x = jnp.array([0.5, 2.0])
    gradtest.assert_autodiff_matches(root, x)
    with pytest.raises(ValueError, match=r"`order` 2 needs a gradient without custom"):
        gradtest.assert_autodiff_matches(root, x, order=2)
    report = gradtest.hunt(root, x, examples=30, database=None)
    assert report.verdict is gradtest.Verdict.PASS
