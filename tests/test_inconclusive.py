"""Where nothing can be concluded the check says so, with the reason."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint

import gradtest

pytestmark = pytest.mark.core


def _cause(fn, *args, name):
    with pytest.raises(gradtest.GradientInconclusive) as caught:
        gradtest.assert_autodiff_matches(fn, *args)
    return caught.value.report.leaf(name).cause.name


def test_a_value_that_is_nan_has_no_derivative():
    assert _cause(jnp.log, jnp.array([-1.0, 1.0]), name="x") == "NaN value"


def test_a_value_that_overflows_in_its_own_dtype_alone_is_named():
    def fn(x):
        return jnp.log(jnp.sum(jnp.exp(x)))

    x = jnp.array([1.0, 12.0], jnp.float16)
    assert _cause(fn, x, name="x") == "infinite value in working precision"
    gradtest.assert_autodiff_matches(jax.nn.logsumexp, x)


def test_a_function_that_draws_anew_in_every_trace_is_called_impure():
    generator = np.random.default_rng(0)

    def fn(x):
        return jnp.sum(x * generator.standard_normal(3).astype(np.float32))

    assert _cause(fn, jnp.ones(3), name="result") == "impure function"


def test_a_wrong_forward_value_is_not_called_impure():
    @jax.custom_vjp
    def fn(x):
        return jnp.sin(x)

    fn.defvjp(lambda x: (1.01 * jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(fn, jnp.ones(3))
    assert caught.value.report.leaf("result").cause.name == "forward value differs"


def test_the_parameter_of_a_sampler_is_left_open_and_its_scale_is_checked():
    key = jax.random.key(3)
    shape = jnp.array([0.7, 2.0])
    assert _cause(lambda a: jax.random.gamma(key, a), shape, name="a") == "sampler"
    gradtest.assert_autodiff_matches(lambda a: a * jax.random.gamma(key, 2.0), shape)


def test_an_oscillation_finer_than_any_step_is_noise():
    def fn(x):
        return jnp.sum(x + 1e-3 * jnp.sin(1e10 * x))

    assert _cause(fn, jnp.linspace(0.5, 2.0, 4), name="x") == "noise too high"


@pytest.mark.parametrize("tolerance", [1e-6, 1e-4])
def test_a_loose_solver_is_left_open_and_a_tight_one_is_right(tolerance):
    def fn(tolerance):
        def decay(y, t, k):
            return -k * y

        times = jnp.array([0.0, 0.5, 1.0])
        return lambda y, k: odeint(decay, y, times, k, rtol=tolerance, atol=tolerance)[
            -1
        ]

    y = jnp.array([1.0, 0.4])
    gradtest.assert_autodiff_matches(fn(1e-8), y, 0.7)
    with pytest.raises(gradtest.GradientInconclusive) as caught:
        gradtest.assert_autodiff_matches(fn(tolerance), y, 0.7)
    assert caught.value.report.leaf("k").cause.name == "approximate value"


@pytest.mark.parametrize("key", range(3))
def test_a_wrong_rule_of_a_loop_that_counts_is_no_loose_solver(key):
    def fn(x):
        return lax.while_loop(
            lambda state: state[0] < 3,
            lambda state: (state[0] + 1, jnp.sin(state[1])),
            (0, x),
        )[1]

    def backward(x, g):
        for _ in range(3):
            g, x = g * jnp.cos(x), jnp.sin(x)
        return (1.1 * g,)

    rule = jax.custom_vjp(fn)
    rule.defvjp(lambda x: (fn(x), x), backward)
    with pytest.raises(gradtest.GradientMismatch, match=r"1\.1 times too large"):
        gradtest.assert_autodiff_matches(rule, jnp.linspace(0.2, 1.0, 4), key=key)


def test_padded_rows_with_a_large_negative_bias_are_right():
    logits = jnp.array([[0.5, -1.2, 0.3], [0.1, 0.4, -0.7]])
    padding = jnp.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])

    def fn(logits):
        return jnp.sum(jax.nn.softmax(logits - 1e9 * padding) * jnp.arange(3.0))

    gradtest.assert_autodiff_matches(fn, logits)


def test_an_inconclusive_check_can_warn_instead():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = gradtest.assert_autodiff_matches(
            jnp.log, jnp.array([-1.0]), inconclusive="warn"
        )
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert any("nothing can be concluded" in str(w.message) for w in caught)
