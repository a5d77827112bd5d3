"""What a rule does with its cotangents is seen, on scalar losses too."""

import functools

import jax
import jax.numpy as jnp
import pytest

import gradtest

pytestmark = pytest.mark.core

_X = jnp.arange(3.0)


def _loss(backward):
    @jax.custom_vjp
    def loss(x):
        return jnp.sum(x**2)

    loss.defvjp(lambda x: (jnp.sum(x**2), 2 * x), backward)
    return loss


def test_a_rule_linear_in_its_cotangent_is_right():
    gradtest.assert_autodiff_matches(_loss(lambda kept, g: (g * kept,)), _X)


@pytest.mark.parametrize(
    "backward",
    [
        lambda kept, g: (kept,),
        lambda kept, g: (g * g * kept,),
        lambda kept, g: (jnp.abs(g) * kept,),
        lambda kept, g: (g * kept + (1 - g),),
    ],
    ids=["forgotten", "squared", "without its sign", "with a constant"],
)
def test_a_rule_that_is_right_for_the_cotangent_1_alone_is_refused(backward):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(_loss(backward), _X)
    cause = caught.value.report.leaf("x").cause
    assert cause.name == "not linear in the cotangent"


def test_a_small_output_does_not_hide_behind_a_large_one():
    def fn(x):
        return {"loss": 1e6 * jnp.sum(x**2), "aux": jnp.sin(x)}

    rule = jax.custom_vjp(fn)
    rule.defvjp(lambda x: (fn(x), x), lambda x, g: (2e6 * g["loss"] * x,))
    gradtest.assert_autodiff_matches(fn, _X + 1)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_autodiff_matches(rule, _X + 1)


def test_a_downcast_in_a_float64_program_is_refused_and_a_float64_one_is_right():
    def fn(x):
        return jnp.sum(jnp.sin(x))

    def narrow(x):
        return jnp.cos(x.astype(jnp.bfloat16)).astype(x.dtype)

    with jax.enable_x64(True):
        x = jnp.array([0.3, 1.7, -2.1])
        gradtest.assert_grad_matches(fn, jnp.cos, x)
        with pytest.raises(gradtest.GradientMismatch) as caught:
            gradtest.assert_grad_matches(fn, narrow, x)
    assert caught.value.report.leaf("x").cause.name == "downcast"


def test_a_variant_that_numbers_arguments_is_refused_by_name():
    variant = functools.partial(jax.jit, static_argnums=1)
    with pytest.raises(TypeError, match=r"`variant` sets static_argnums"):
        gradtest.assert_grad_matches(jnp.sum, jnp.ones_like, _X, variant=variant)
