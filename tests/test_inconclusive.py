"""Where nothing can be concluded the check says so, with the reason."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_an_inconclusive_check_can_warn_instead():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = gradtest.assert_autodiff_matches(
            jnp.log, jnp.array([-1.0]), inconclusive="warn"
        )
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert any("nothing can be concluded" in str(w.message) for w in caught)
