"""`assert_meta_grads_match`: gradients through the steps of an optimiser."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
import gradtest.optax
from gradtest import Verdict, domains


@jax.custom_vjp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defvjp(lambda x: (softsign(x), x), lambda x, g: (g / (1 + jnp.abs(x)) ** 2,))


@jax.custom_vjp
def frozen(x):
    return x / (1 + jnp.abs(x))


frozen.defvjp(
    lambda x: (frozen(x), x),
    lambda x, g: (g / jax.lax.stop_gradient((1 + jnp.abs(x)) ** 2),),
)


class Net(nn.Module):
    activation: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(self.activation(nn.Dense(6)(x)))[..., 0]


X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.sin(X.sum(-1))


def task(activation):
    """Returns the losses of a network, and where it starts."""
    net = Net(activation)

    def loss(params, rows):
        return jnp.mean((net.apply(params, X[rows]) - Y[rows]) ** 2)

    inner = functools.partial(loss, rows=slice(0, 4))
    outer = functools.partial(loss, rows=slice(4, 8))
    return inner, outer, net.init(jax.random.key(1), X)


OPTIMISERS = {
    "adam": lambda: optax.adam(1e-2),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "schedule": lambda: optax.rmsprop(optax.linear_schedule(0.1, 0.01, 4)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_five_steps_with_a_right_rule_pass_to_a_millionth(name):
    inner, outer, params = task(softsign)
    report = gradtest.optax.assert_meta_grads_match(
        OPTIMISERS[name](), inner, outer, params
    )
    assert report.verdict is Verdict.PASS
    assert max(finding.size for finding in report.findings) < 1e-6


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_rule_wrong_at_second_order_alone_is_refused_and_named(name):
    inner, outer, params = task(frozen)
    gradtest.assert_autodiff_matches(inner, params)  # at first order it is right
    with pytest.raises(gradtest.GradientMismatch, match="frozen") as caught:
        gradtest.optax.assert_meta_grads_match(OPTIMISERS[name](), inner, outer, params)
    wrong = [f for f in caught.value.report.findings if f.verdict is Verdict.FAIL]
    assert all("rule of frozen" in finding.cause.says for finding in wrong)


def test_a_learning_rate_has_a_meta_gradient_too():
    inner, outer, params = task(softsign)
    report = gradtest.optax.assert_meta_grads_match(
        lambda hyper: optax.sgd(hyper["rate"]), inner, outer, params, steps=2,
        hyper={"rate": 0.1},
    )  # fmt: skip
    assert report.leaf("hyper['rate']").verdict is Verdict.PASS


def test_second_derivatives_of_the_meta_loss_are_checked_on_demand():
    start = {"x": domains.normal(3)}
    report = gradtest.optax.assert_meta_grads_match(
        optax.sgd(0.1), lambda p: jnp.sum(softsign(p["x"]) ** 2),
        lambda p: jnp.sum(p["x"] ** 3), start, steps=2, order=2, trials=2,
    )  # fmt: skip
    assert {finding.order for finding in report.findings} == {1, 2}


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_it_runs_under_variants(self):
        gradtest.optax.assert_meta_grads_match(
            optax.sgd(0.1), lambda x: jnp.sum(softsign(x)), lambda x: jnp.sum(x**2),
            jnp.arange(3.0), steps=2, variant=self.variant,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"steps": 0}, ValueError, "`steps` must be an integer >= 1, got 0"),
        ({"tx": optax.adam}, TypeError, "give `hyper` with what it takes"),
        ({"tx": 0.1}, TypeError, "`tx` must be an optax.GradientTransformation"),
        ({"tx": lambda h: h, "hyper": 0.1}, TypeError, "`tx` must return"),
        ({"inner_loss": 1}, TypeError, "`inner_loss` must be callable"),
        ({"inner_loss": lambda p: p}, TypeError, "scalar-output"),
        (
            {"outer_loss": lambda p: p},
            TypeError,
            "`outer_loss` must return one real number, got float32",
        ),
    ],
)
def test_a_slip_is_told_by_the_arguments_name(change, error, says):
    arguments = {
        "tx": optax.sgd(0.1), "inner_loss": jnp.sum, "outer_loss": jnp.sum,
        "params": np.ones(3, np.float32), **change,
    }  # fmt: skip
    with pytest.raises(error, match=says):
        gradtest.optax.assert_meta_grads_match(**arguments)
