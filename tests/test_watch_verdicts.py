"""`watch`: right trainings go on, wrong rules are caught where they begin to bite."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import gradtest
from tests.watched import (
    BATCH,
    X,
    counts,
    fresh_params,
    loss_with,
    right_clip,
    rule,
    scaled,
    train,
    wrong_clip,
)

# --- right trainings ------------------------------------------------------------------


class _Network(nn.Module):
    width: int = 64
    dtype: object = jnp.float32
    activation: object = nn.relu
    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.activation(nn.Dense(self.width, dtype=self.dtype)(x))
            if self.rate:
                x = nn.Dropout(self.rate, deterministic=False)(x)
        return nn.Dense(1, dtype=self.dtype)(x)


def _of_module(**settings):
    module = _Network(**settings)
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)

    def loss(params, batch):
        (x, y), key = batch
        return jnp.mean((module.apply(params, x, rngs={"dropout": key}) - y) ** 2)

    return loss, params


def _recurrent():
    def loss(params, batch):
        x, y = batch[0]

        def cell(state, column):
            state = right_clip(jnp.tanh(state @ params["w"] + column[:, None]))
            return state, None

        state, _ = jax.lax.scan(cell, jnp.zeros((len(x), 4)), x.T)
        return jnp.mean((state @ params["out"] - y) ** 2)

    return loss, {"w": 0.3 * jnp.eye(4), "out": jnp.ones((4, 1))}


def _normalised():
    """The bias is cancelled by the normalisation: its gradient is rounding."""

    def loss(params, batch):
        x, y = batch[0]
        hidden = x @ params["w"] + params["b"]
        hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        return jnp.mean((right_clip(nn.relu(hidden)) @ params["out"] - y) ** 2)

    return loss, fresh_params()


def _tied():
    """Whole rows are zero, and a layer starts at zero: relu at 0 again and again."""

    def loss(params, batch):
        x, y = batch[0]
        x = jnp.where(jnp.arange(len(x))[:, None] < 8, 0.0, x)
        hidden = nn.relu(x @ params["w"] + params["b"])
        hidden = nn.relu(hidden @ params["zero"])
        return jnp.mean((hidden.sum(1, keepdims=True) + params["end"] - y) ** 2)

    params = fresh_params() | {"zero": jnp.zeros((16, 4)), "end": jnp.zeros(1)}
    del params["out"]
    return loss, params


@pytest.mark.parametrize(
    ("make", "in_full"),
    [
        (lambda: _of_module(rate=0.3), 0),
        (lambda: _of_module(dtype=jnp.bfloat16, activation=nn.silu), 0),
        (_recurrent, 0),
        (_normalised, 0),
        (_tied, 2),
    ],
    ids=["dropout", "bfloat16", "scan", "cancelled bias", "ties"],
)
def test_a_right_training_is_never_accused_and_seldom_looked_at_twice(make, in_full):
    loss, params = make()
    watcher = train(
        loss,
        params,
        60,
        every=5,
        batch=lambda step: (BATCH, jax.random.key(step)),
    )
    checks, looked_at_twice, failures, undecided = counts(watcher)
    assert (checks, failures, undecided) == (12, 0, 0)
    assert looked_at_twice <= in_full


def test_constants_rounded_to_half_precision_are_looked_at_twice_only_at_first():
    # The exact gelu rounds its constants to bfloat16, by 1e-3 of the gradient.
    loss, params = _of_module(
        dtype=jnp.bfloat16, activation=lambda x: nn.gelu(x, approximate=False)
    )
    watcher = gradtest.watch(loss, every=1)
    for step in range(4):
        report = watcher(step, params, (BATCH, jax.random.key(step)))
    _, in_full, failures, _ = counts(watcher)
    assert failures == 0
    assert 1 <= in_full <= 3
    assert "as a whole check has explained before" in str(report)


def test_a_loop_without_a_reverse_mode_of_its_own_is_judged_by_differences():
    def root(a):  # of x**3 + x = a, by Newton's steps
        return jax.lax.fori_loop(
            0, 30, lambda i, x: x - (x**3 + x - a) / (3 * x**2 + 1), jnp.zeros_like(a)
        )

    def looped(a):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 30,
            lambda carry: (
                carry[0] + 1,
                carry[1] - (carry[1] ** 3 + carry[1] - a) / (3 * carry[1] ** 2 + 1),
            ),
            (0, jnp.zeros_like(a)),
        )[1]

    right = rule(looped, lambda a: 1 / (3 * root(a) ** 2 + 1))
    wrong = rule(looped, lambda a: 1 / (3.001 * root(a) ** 2 + 1))
    report = gradtest.watch(loss_with(right))(0, fresh_params(), BATCH)
    assert report.verdict is gradtest.Verdict.PASS
    assert {finding.judged_by for finding in report.findings} == {"measured"}
    with pytest.raises(gradtest.GradientMismatch, match="watch at step 0 failed"):
        gradtest.watch(loss_with(wrong))(0, scaled(fresh_params(), 4), BATCH)


# --- wrong rules that begin to bite ---------------------------------------------------


def _caught(loss, points, batches=None, **options):
    """Watches a loss at several points; returns the error, and the step it came at."""
    watcher = gradtest.watch(loss, every=1, **options)
    for step, params in enumerate(points):
        batch = batches[step] if batches else BATCH
        try:
            watcher(step, params, batch)
        except gradtest.GradientMismatch as error:
            return error, step
    raise AssertionError("nothing was caught")


@pytest.mark.core
def test_a_rule_that_forgets_saturation_is_caught_where_it_saturates_first():
    growing = [scaled(fresh_params(), factor) for factor in (0.5, 1, 2, 8)]
    error, step = _caught(loss_with(wrong_clip), growing)
    assert step == 3
    message = str(error)
    assert message.startswith("watch at step 3 failed: the gradient of loss is wrong")
    assert "the custom_vjp rule of layer" in message
    assert "|x| > 3" in message
    assert "with what step 3 was given" in message
    assert 2 <= len(message.splitlines()) <= 9
    assert "at step 3" in error.report.notes


def test_a_rule_that_forgets_a_mask_is_caught_at_the_first_padded_batch():
    @jax.custom_vjp
    def masked_mean(values, mask):
        return jnp.sum(values * mask) / jnp.sum(mask)

    def forward(values, mask):
        return masked_mean(values, mask), mask

    masked_mean.defvjp(
        forward, lambda mask, g: (g * jnp.ones_like(mask) / jnp.sum(mask), None)
    )

    def loss(params, batch):
        (x, y), mask = batch
        each = (jnp.tanh(x @ params["w"]) @ params["out"] - y) ** 2
        return masked_mean(each[:, 0], mask)

    full = jnp.ones(len(X))
    batches = [(BATCH, full), (BATCH, full), (BATCH, full.at[20:].set(0))]
    error, step = _caught(loss, [fresh_params()] * 3, batches)
    assert step == 2
    assert "masked_mean" in str(error)


def test_a_factor_of_one_in_a_hundred_thousand_is_caught():
    slightly = rule(jnp.tanh, lambda x: (1 + 1e-5) * (1 - jnp.tanh(x) ** 2))
    _, step = _caught(loss_with(slightly), [fresh_params()])
    assert step == 0


def test_a_gradient_that_turns_nan_beside_a_finite_loss_is_caught_there():
    def loss(params, batch):
        return jnp.sqrt(jnp.sum((params["w"] - 1) ** 2)) + jnp.mean(batch[0])

    points = [{"w": jnp.full(3, value)} for value in (3.0, 2.0, 1.0)]
    error, step = _caught(loss, points)
    assert step == 2
    assert "NaN although the value is finite" in str(error)


def test_a_backward_pass_in_half_precision_is_caught():
    narrow = rule(
        jnp.tanh,
        lambda x: (1 - jnp.tanh(x.astype(jnp.bfloat16)) ** 2).astype(jnp.float32),
    )
    error, _ = _caught(loss_with(narrow), [fresh_params()])
    assert "loses its accuracy" in str(error)


def test_another_value_under_differentiation_is_caught():
    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x)

    layer.defvjp(
        lambda x: (1.01 * jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),)
    )
    error, _ = _caught(loss_with(layer), [fresh_params()])
    assert "another value under differentiation" in str(error)


def test_a_wrong_leaf_is_caught_beside_ties_that_were_found_harmless():
    loss, params = _tied()

    def later(params, batch):
        return loss(params, batch) + jnp.sum(wrong_clip(params["late"]))

    points = [params | {"late": jnp.full(2, value)} for value in (1.0, 2.0, 5.0)]
    error, step = _caught(later, points, [(BATCH, None)] * 3)
    assert step == 2
    assert "params['late']" in str(error)
