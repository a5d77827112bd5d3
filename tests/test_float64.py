"""With float64 enabled, a gradient is asked for float64's own accuracy."""

import jax
import jax.numpy as jnp
import pytest

import gradtest

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
