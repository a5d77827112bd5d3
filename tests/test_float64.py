"""With float64 enabled, a gradient is asked for float64's own accuracy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest import Verdict
from gradtest._src import jaxprs

pytestmark = pytest.mark.core


def test_a_gradient_computed_through_float32_loses_accuracy():
    def gradient(x):
        return jnp.cos(x.astype(jnp.float32)).astype(x.dtype)

    with (
        jax.enable_x64(True),
        pytest.raises(gradtest.GradientMismatch, match="loses its accuracy"),
    ):
        gradtest.assert_grad_matches(lambda x: jnp.sin(x).sum(), gradient, jnp.ones(3))


def test_a_function_that_computes_in_float32_itself_is_asked_for_no_more():
    def wave(x):
        return jnp.sin(x.astype(jnp.float32)).astype(x.dtype)

    with jax.enable_x64(True):
        gradtest.assert_autodiff_matches(wave, jnp.linspace(0.0, 2.0, 5))


def test_what_is_traced_anew_in_float64_is_in_float64_throughout():
    # JAX 0.12 searches by a primitive that stands for a program of its own.
    def place(x):
        return jnp.searchsorted(jnp.linspace(0, 1, 4, dtype=x.dtype), x)

    narrow = jax.make_jaxpr(place)(jnp.float32(0.5))
    with jax.enable_x64(True):
        wide = jax.make_jaxpr(place)(np.float64(0.5))
    assert jaxprs.fits_together(narrow)
    assert jaxprs.fits_together(wide)


def test_an_approximate_algorithm_passes_on_every_version():
    def trace_of_exponential(a):
        return jnp.trace(jax.scipy.linalg.expm(a))

    a = jnp.asarray(np.random.RandomState(0).rand(20, 20), jnp.float32)
    report = gradtest.assert_grad_matches(
        trace_of_exponential, lambda a: jax.scipy.linalg.expm(a).T, a
    )
    assert report.findings[0].approximation.retraced < 1e-6


def test_a_nan_that_only_shows_as_xla_optimises_the_users_program_is_refused():
    w = jax.random.normal(jax.random.key(1), (5, 1))
    x = jax.random.normal(jax.random.key(2), (16, 5))
    y = x @ w  # so that the residual is exactly zero, in float32

    def distance(w):
        return jnp.sqrt(jnp.sum((x @ w - y) ** 2))

    assert np.isnan(jax.grad(distance)(w)).all()
    with pytest.raises(gradtest.GradientMismatch, match="safe norm"):
        gradtest.assert_autodiff_matches(distance, w)

    def smooth_distance(w):
        return jnp.sqrt(jnp.sum((x @ w - y) ** 2) + 1e-6)

    gradtest.assert_autodiff_matches(smooth_distance, w)


@jax.custom_vjp
def steep_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _steep_bwd(x, g):
    slope = jax.grad(lambda y: jnp.sum(jax.nn.gelu(y, approximate=False)))(x)
    return (g * slope * (1 + 1 / 32),)


steep_gelu.defvjp(lambda x: (steep_gelu(x), x), _steep_bwd)


@pytest.mark.parametrize("is_right", [True, False])
def test_constants_rounded_to_bfloat16_between_float32_leaves_excuse_no_more(is_right):
    activation = functools.partial(jax.nn.gelu, approximate=False)
    activation = activation if is_right else steep_gelu
    x = jnp.linspace(-2.0, 2.0, 18).reshape(6, 3)

    def loss(w):
        half = jnp.bfloat16
        return jnp.sum(activation(x.astype(half) @ w.astype(half)).astype(w.dtype))

    report = gradtest.check(loss, jnp.linspace(-1.0, 1.3, 12).reshape(3, 4))
    assert report.verdict is (Verdict.PASS if is_right else Verdict.FAIL)
    if is_right:
        assert "constants rounded to half precision" in str(report)
