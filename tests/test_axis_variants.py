"""Functions that use the axis of a variant, and devices that are wrong alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import gradtest

_X = jnp.arange(1.0, 5.0)


def _square_sum(x):
    return jnp.sum(x**2)


def _mean(x):
    return lax.pmean(_square_sum(x), "data")


def _sum(x):
    return lax.psum(_square_sum(x), "data")


@jax.custom_vjp
def _wrong_on_5(x):
    return x**2


def _backward(x, g):
    factor = jnp.where(lax.axis_index("data") == 5, 1.5, 1.0)
    return (2 * x * g * factor,)


_wrong_on_5.defvjp(lambda x: (x**2, x), _backward)

_ONE_DEVICE = r"device 5 of 8 \(counted from 0\) is wrong, .* 1.5 times too large"


class AxisVariantsTest(chex.TestCase):
    @property
    def mapped(self):
        return functools.partial(self.variant, axis_name="data")

    @chex.variants(with_pmap=True)
    def test_reductions_of_what_all_devices_have(self):
        under = {"variant": self.mapped}
        count = jax.device_count()
        gradtest.assert_grad_matches(_mean, lambda x: 2 * x, _X, **under)
        gradtest.assert_grad_matches(_sum, lambda x: 2 * count * x, _X, **under)
        gradtest.assert_autodiff_matches(_sum, _X, order=2, **under)
        gradtest.assert_grads_agree(_mean, _square_sum, _X, **under)
        gradtest.assert_grads_finite(_mean, _X, **under)
        gradtest.assert_grads_flow(_mean, _X, **under)

    @chex.variants(with_pmap=True)
    def test_a_gradient_that_forgets_how_many_devices_there_are(self):
        with pytest.raises(gradtest.GradientMismatch, match="8 times too small"):
            gradtest.assert_grad_matches(_sum, lambda x: 2 * x, _X, variant=self.mapped)

    @chex.variants(with_pmap=True)
    def test_a_device_that_is_wrong_alone_is_named(self):
        def gradient(x):
            return _backward(x, 1.0)[0]

        with pytest.raises(gradtest.GradientMismatch, match=_ONE_DEVICE):
            gradtest.assert_grad_matches(_square_sum, gradient, _X, variant=self.mapped)
        with pytest.raises(gradtest.GradientMismatch, match=_ONE_DEVICE):
            gradtest.assert_autodiff_matches(
                lambda x: lax.pmean(jnp.sum(_wrong_on_5(x)), "data"), _X,
                variant=self.mapped,
            )  # fmt: skip

    @chex.variants(with_pmap=True)
    def test_a_function_that_is_another_one_on_each_device_is_refused(self):
        with pytest.raises(TypeError, match="`fn` uses axis_index over an axis of"):
            gradtest.assert_autodiff_matches(
                lambda x: _square_sum(x) * lax.axis_index("data"), _X,
                variant=self.mapped,
            )  # fmt: skip

    @chex.variants(with_jit=True)
    def test_an_axis_that_no_variant_binds_is_told(self):
        with pytest.raises(NameError) as caught:
            gradtest.assert_autodiff_matches(_mean, _X, variant=self.mapped)
        assert any("hand over what binds it" in n for n in caught.value.__notes__)

    @chex.variants(with_pmap=True)
    def test_a_function_whose_first_device_alone_was_seen_says_nothing_else(self):
        report = gradtest.assert_grad_matches(
            _square_sum, self.variant(lambda x: 2 * x), _X
        )
        assert any("the first alone was seen" in note for note in report.notes)
        assert not any("each of 8 devices" in note for note in report.notes)


_NO_TRANSFORMATIONS = {
    "a function of arrays": jax.jit(_square_sum),
    "vmap": jax.vmap,
    "grad": jax.grad,
    "what returns nothing": lambda fn: None,
}


@pytest.mark.parametrize(
    "variant", _NO_TRANSFORMATIONS.values(), ids=_NO_TRANSFORMATIONS
)
def test_what_is_no_transformation_is_named(variant):
    with pytest.raises(TypeError, match="`variant` must be a transformation"):
        gradtest.assert_grad_matches(_square_sum, lambda x: 2 * x, _X, variant=variant)


@pytest.mark.parametrize("variant", [jax.grad, lambda fn: None])
def test_what_is_no_variant_to_agree_is_named(variant):
    with pytest.raises(TypeError, match="`variants` must be a transformation"):
        gradtest.assert_variants_agree(jnp.tanh, _X, variants=[variant])
