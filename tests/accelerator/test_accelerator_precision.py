"""Products of float32 that an accelerator rounds to less; see `machine`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from tests.accelerator.machine import needs_coarse_products, platform

pytestmark = needs_coarse_products

_X = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
_W = np.random.default_rng(1).normal(size=(512, 128)).astype(np.float32) / 16


def _loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def _gradient(w, x):
    y = jnp.tanh(x @ w)
    return x.T @ (2 * y * (1 - y**2))


def _note(report):
    return [line for line in report.precision if "matrix products" in line]


def test_coarse_products_pass_and_are_told():
    report = gradtest.assert_grad_matches(_loss, _gradient, _W, _X)
    (line,) = _note(report)
    name = {"gpu": "tf32", "tpu": "bfloat16"}[platform()]
    assert f"on {platform()} round to {name}" in line
    gap, allowed = report.findings[0].rounding
    assert 0 < gap < allowed < 0.1


def test_exact_products_are_held_to_float32():
    with jax.default_matmul_precision("highest"):
        report = gradtest.assert_grad_matches(_loss, _gradient, _W, _X)
    assert not _note(report)
    gap, allowed = report.findings[0].rounding
    assert gap < allowed < 1e-3


def test_a_convolution_is_a_product_as_well():
    def loss(kernel, image):
        out = jax.lax.conv(image, kernel, (1, 1), "SAME")
        return jnp.sum(jnp.tanh(out))

    image = _X[:, :256].reshape(4, 16, 32, 32)
    kernel = _W.ravel()[: 8 * 16 * 9].reshape(8, 16, 3, 3)
    report = gradtest.assert_autodiff_matches(loss, kernel, image)
    assert _note(report)


def test_a_mistake_far_below_the_rounding_of_products_is_refused():
    with pytest.raises(gradtest.GradientMismatch, match=r"1\.0001 times too large"):
        gradtest.assert_grad_matches(
            _loss, lambda *at: np.float32(1.0001) * _gradient(*at), _W, _X, argnums=0
        )


def test_arithmetic_far_worse_than_the_products_is_refused():
    def cancels(w, x):
        large = 2.0**20 * jnp.cosh(0 * x[0, 0])
        return (_gradient(w, x) + large) - large

    with pytest.raises(gradtest.GradientMismatch, match="loses its accuracy"):
        gradtest.assert_grad_matches(_loss, cancels, _W, _X / 100)
