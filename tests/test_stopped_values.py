"""Stopped gradients are honoured where the function stops them, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradtest

pytestmark = pytest.mark.core

_X = jnp.linspace(0.3, 1.4, 6)
_STOP = lax.stop_gradient


def straight(x, stop=lax.stop_gradient):
    return jnp.sum(x * stop(jnp.sin(x)))


def straight_through(x, stop=lax.stop_gradient):
    return jnp.sum((x + stop(jnp.round(x) - x)) ** 2)


def stopped_twice(x, stop=lax.stop_gradient):
    return jnp.sum(stop(x) * x + stop(x * stop(x)) * jnp.cos(x))


def stop_in_jit(x, stop=lax.stop_gradient):
    return jax.jit(lambda y: straight(y, stop))(x) + straight(2 * x, stop)


def stop_in_remat(x, stop=lax.stop_gradient):
    return jax.checkpoint(lambda y: straight(y, stop))(x)


def stop_in_vmap(x, stop=lax.stop_gradient):
    return jnp.sum(jax.vmap(lambda v: v * stop(v**2))(x))


def stop_in_scan(x, stop=lax.stop_gradient):
    def step(carry, row):
        carry = jnp.tanh(carry + row) * stop(carry) + row
        return carry, carry

    return jnp.sum(lax.scan(step, jnp.float32(0.5), x)[1])


def stop_in_nested_scans(x, stop=lax.stop_gradient):
    def outer(carry, row):
        inner = lax.scan(lambda c, _: (jnp.tanh(c * stop(c)) + row, c), carry, None, 2)[
            0
        ]
        return inner, None

    return lax.scan(outer, jnp.float32(0.5), x)[0]


def stop_in_fori_loop(x, stop=lax.stop_gradient):
    return jnp.sum(lax.fori_loop(0, 3, lambda i, y: y * stop(jnp.cos(y)) + i, x))


def stop_in_cond(x, stop=lax.stop_gradient):
    return lax.cond(
        x[0] > 0, lambda: jnp.sum(x * stop(x)), lambda: jnp.sum(stop(x) ** 2)
    )


def stop_in_switch(x, stop=lax.stop_gradient):
    branches = [jnp.sum, lambda y: jnp.sum(y * stop(y) ** 2), jnp.prod]
    return lax.switch(jnp.int32(1), branches, x)


def stop_in_scan_in_cond(x, stop=lax.stop_gradient):
    return lax.cond(x[0] > 0, lambda y: stop_in_scan(y, stop), jnp.sum, x)


def stop_in_tree(x, stop=lax.stop_gradient):
    stopped = stop({"a": x, "b": jnp.cos(x)})
    return jnp.sum(stopped["a"] * x + stopped["b"] * x**2)


def log_sum_exp(x, stop=lax.stop_gradient):
    peak = stop(jnp.max(x))
    return peak + jnp.log(jnp.sum(jnp.exp(x - peak)))


def baseline(x, stop=lax.stop_gradient):
    """REINFORCE with a baseline that depends on the parameters."""
    reward = jnp.sin(3 * x)
    return jnp.sum(jax.nn.log_softmax(x) * stop(reward - jnp.mean(reward)))


def detached_target(x, stop=lax.stop_gradient):
    return jnp.mean((jnp.tanh(x) - stop(0.9 * jnp.tanh(x[::-1]) + 1.0)) ** 2)


_STOPPED = (
    straight,
    straight_through,
    stopped_twice,
    stop_in_jit,
    stop_in_remat,
    stop_in_vmap,
    stop_in_scan,
    stop_in_nested_scans,
    stop_in_fori_loop,
    stop_in_cond,
    stop_in_switch,
    stop_in_scan_in_cond,
    stop_in_tree,
    log_sum_exp,
    baseline,
    detached_target,
)


@pytest.mark.parametrize("fn", _STOPPED, ids=lambda fn: fn.__name__)
def test_a_stopped_value_is_held(fn):
    report = gradtest.assert_autodiff_matches(fn, _X)
    assert report.leaf("x").size < 1e-6
    # Held exactly, not excused as a kink or as noise.
    assert report.smallest_seen < 1e-4


@pytest.mark.parametrize(
    "fn",
    # The maximum's own derivative cancels from a log-sum-exp.
    [fn for fn in _STOPPED if fn is not log_sum_exp],
    ids=lambda fn: fn.__name__,
)
def test_a_gradient_that_ignores_the_stop_is_refused(fn):
    unstopped = jax.grad(lambda x: fn(x, stop=lambda value: value))
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(fn, unstopped, _X)


def test_a_stop_in_a_while_loop_is_held_in_forward_mode():
    def fn(x):
        def body(state):
            count, y = state
            return count + 1, y * _STOP(jnp.cos(y)) + x

        return lax.while_loop(lambda state: state[0] < 4, body, (0, x))[1]

    report = gradtest.assert_autodiff_matches(fn, _X)
    assert report.modes == ("fwd",)


def test_a_stop_in_a_while_loop_whose_length_depends_on_the_values_is_held():
    def fn(x):
        def body(y):
            return y * 1.5 + 0.1 * _STOP(y)

        return lax.while_loop(lambda y: jnp.max(y) < 20, body, x)

    report = gradtest.assert_autodiff_matches(fn, _X)
    assert report.modes == ("fwd",)


def test_a_batch_of_loops_that_end_apart_holds_what_each_of_them_stops():
    def power(x):
        return lax.while_loop(
            lambda state: state[0] < 3 + 10 * x,
            lambda state: (state[0] + 1, state[1] * jnp.sin(x) + _STOP(state[1])),
            (x * 0, x),
        )[1]

    report = gradtest.assert_autodiff_matches(jax.vmap(power), jnp.array([0.3, 0.71]))
    assert report.modes == ("fwd",)
    assert "values under stop_gradient are held constant" in report.notes


def test_second_order_honours_a_stop():
    for fn in (straight, stop_in_scan, log_sum_exp):
        gradtest.assert_autodiff_matches(fn, _X, order=2)


def test_a_stop_inside_a_rule_is_seen_at_second_order():
    @jax.custom_vjp
    def sine(x):
        return jnp.sum(jnp.sin(x))

    def backward(x, cotangent):
        return (cotangent * _STOP(jnp.cos(x)),)

    sine.defvjp(lambda x: (jnp.sum(jnp.sin(x)), x), backward)
    gradtest.assert_autodiff_matches(sine, _X)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(sine, _X, order=2)
    wrong = [f for f in caught.value.report.findings if f.cause]
    assert {f.order for f in wrong} == {2}
    assert "zero gradient" in {f.cause.name for f in wrong}


_MATRIX = jnp.asarray(
    np.sin(np.arange(16)).reshape(4, 4) + 3 * np.eye(4), dtype=jnp.float32
)


@pytest.mark.parametrize(
    "solve",
    [
        jnp.linalg.solve,
        lambda matrix, b: jnp.linalg.inv(matrix) @ b,
        lambda matrix, b: jax.jit(jnp.linalg.solve)(matrix, b),
        lambda matrix, b: lax.scan(
            lambda c, _: (jnp.linalg.solve(matrix, c), None), b, None, 2
        )[0],
        lambda matrix, b: lax.cond(
            b[0] > 0, jnp.linalg.solve, lambda m, c: m @ c, matrix, b
        ),
        lambda matrix, b: jax.scipy.linalg.solve(matrix @ matrix.T, b, assume_a="pos"),
        lambda matrix, b: jnp.linalg.slogdet(matrix)[1] * b,
        lambda matrix, b: jnp.linalg.det(matrix) * b,
    ],
    ids=["solve", "inverse", "jit", "scan", "cond", "definite", "slogdet", "det"],
)
def test_the_factors_of_a_linear_solve_follow_the_matrix(solve):
    # They are stopped too, but only because the solver's rule makes up for it.
    b = jnp.linspace(0.5, 1.5, 4)
    gradtest.assert_autodiff_matches(solve, _MATRIX, b)


def test_a_stopped_solution_is_held():
    def fn(matrix, b):
        return jnp.sum(_STOP(jnp.linalg.solve(matrix, b)) * b * matrix[0])

    gradtest.assert_autodiff_matches(fn, _MATRIX, jnp.linspace(0.5, 1.5, 4))


@pytest.mark.devices
def test_a_stop_in_a_shard_map_is_held():
    mesh = jax.make_mesh(
        (4,),
        ("x",),
        devices=jax.devices()[:4],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    spec = jax.sharding.PartitionSpec("x")

    def local(x):
        return x * _STOP(jnp.sin(x)) + lax.pmean(x * _STOP(x), "x")

    fn = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    gradtest.assert_autodiff_matches(fn, jnp.linspace(0.1, 1, 8))
