"""At kinks JAX's own convention is no mistake, and other values still are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest

pytestmark = pytest.mark.core

# Rows of padding behind a layer without bias: every relu of theirs is at its kink.
_RNG = np.random.default_rng(2)
_W = jnp.asarray(_RNG.normal(size=(3, 8)), jnp.float32)
_V = jnp.asarray(_RNG.normal(size=(8, 2)), jnp.float32)
_PADDED = jnp.asarray(_RNG.normal(size=(6, 3)), jnp.float32)
_PADDED = _PADDED.at[4:].set(0)


@jax.custom_vjp
def scaled(x):
    return 3 * x


scaled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


def _loss(x):
    return jnp.mean((jax.nn.relu(x @ _W) @ _V - 1) ** 2)


def _loss_with_a_rule(x):
    return jnp.mean((jax.nn.relu(scaled(x) @ _W) @ _V - 1) ** 2)


@pytest.mark.parametrize("loss", [_loss, _loss_with_a_rule])
def test_jaxs_convention_is_accepted_where_many_kinks_meet(loss):
    report = gradtest.assert_autodiff_matches(loss, _PADDED, modes=("rev",))
    assert any("what JAX takes for" in note for note in report.leaf("x").notes)
    gradtest.assert_grad_matches(loss, jax.grad(loss), _PADDED)


@pytest.mark.parametrize("row", [0, 5], ids=["beside it", "at it"])
@pytest.mark.parametrize("loss", [_loss, _loss_with_a_rule])
def test_another_value_is_refused_there(loss, row):
    def off(x):
        return jax.grad(loss)(x).at[row].add(2.0)

    with pytest.raises(gradtest.GradientMismatch, match="wrong at x"):
        gradtest.assert_grad_matches(loss, off, _PADDED)


def test_a_wrong_rule_is_refused_there():
    @jax.custom_vjp
    def wrong(x):
        return 3 * x

    wrong.defvjp(lambda x: (3 * x, None), lambda _, g: (2 * g,))

    def loss(x):
        return jnp.mean((jax.nn.relu(wrong(x) @ _W) @ _V - 1) ** 2)

    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_autodiff_matches(loss, _PADDED)


def test_it_is_accepted_inside_of_a_trace():
    def inside(x):
        gradtest.assert_autodiff_matches(_loss, x, modes=("rev",))
        return x

    chex.chexify(jax.jit(inside), async_check=False)(_PADDED)


def test_another_value_is_refused_inside_of_a_trace():
    def inside(x):
        gradtest.assert_grad_matches(
            _loss, lambda x: jax.grad(_loss)(x).at[5].add(2.0), x
        )
        return x

    with pytest.raises(AssertionError, match="x: the gradient is off by"):
        chex.chexify(jax.jit(inside), async_check=False)(_PADDED)
