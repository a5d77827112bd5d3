"""Per-example clipping against a loop: right ones accepted, each mistake named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

import gradtest
import gradtest.optax

assert_match = gradtest.optax.assert_clipped_grads_match
_RNG = np.random.default_rng(0)
MAX_NORM = 3.0
PARAMS = {"w": jnp.asarray(_RNG.normal(size=3), jnp.float32), "b": jnp.zeros(())}
_SIZES = np.exp(np.linspace(-2, 3, 9))[:, None]
BATCH = {
    "x": jnp.asarray(_SIZES * _RNG.normal(size=(9, 3)), jnp.float32),
    "y": jnp.asarray(_RNG.normal(size=9), jnp.float32),
}
WITH_ZERO = jax.tree.map(lambda leaf: leaf.at[3].set(0), BATCH)


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def single_loss(params, example):
    return (jnp.vdot(example["x"], params["w"]) + params["b"] - example["y"]) ** 2


def times(factor, tree):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def global_norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def each_example(clip, reduce=jnp.mean, before=1.0):
    def clipped(params, batch):
        gradients = jax.vmap(jax.grad(single_loss), (None, 0))(params, batch)
        gradients = jax.vmap(clip)(times(before, gradients))
        return jax.tree.map(lambda leaf: reduce(leaf, axis=0), gradients)

    return clipped


def to_norm(tree, bound=MAX_NORM):
    return times(jnp.minimum(1, bound / global_norm(tree)), tree)


def mean_clipped(params, batch):
    return to_norm(jax.grad(loss)(params, batch))


right = each_example(to_norm)
without_noise = optax.contrib.differentially_private_aggregate(MAX_NORM, 0.0, key=0)


@pytest.mark.parametrize("clipped", [right, jax.jit(right), without_noise])
@pytest.mark.parametrize("fn", [loss, single_loss])
def test_right_clipping_passes(clipped, fn):
    report = assert_match(clipped, fn, PARAMS, BATCH, max_norm=MAX_NORM)
    assert any("are clipped to 3" in note for note in report.notes)
    assert any("whose gradient is zero" in each for each in report.unchecked)


def test_a_sum_passes_where_a_sum_is_promised():
    clipped = each_example(to_norm, jnp.sum)
    assert_match(clipped, loss, PARAMS, BATCH, max_norm=MAX_NORM, reduction="sum")


def test_an_example_without_gradient_is_looked_at():
    report = assert_match(without_noise, loss, PARAMS, WITH_ZERO, max_norm=MAX_NORM)
    assert not report.unchecked


MISTAKES = [
    (each_example(lambda tree: tree), "all examples, unclipped"),
    (mean_clipped, "the mean of all gradients is clipped"),
    (
        each_example(
            lambda tree: jax.tree.map(
                lambda g: g * jnp.minimum(1, MAX_NORM / jnp.linalg.norm(g)), tree
            )
        ),
        "each leaf is clipped to max_norm by its own norm",
    ),
    (
        each_example(lambda tree: times(MAX_NORM / global_norm(tree), tree)),
        "scaled to max_norm, also those below it",
    ),
    (
        each_example(
            lambda tree: times(jnp.minimum(1, MAX_NORM / global_norm(tree) ** 2), tree)
        ),
        "the squared norm is compared",
    ),
    (each_example(to_norm, jnp.sum), "9 clipped gradients are added in place of"),
    (
        each_example(to_norm, jnp.sum, before=1 / 9),
        "divided by the number of examples before it is compared",
    ),
]


@pytest.mark.parametrize(("clipped", "says"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_a_mistake_is_named(clipped, says):
    with pytest.raises(gradtest.GradientMismatch, match=says) as caught:
        assert_match(clipped, loss, PARAMS, BATCH, max_norm=MAX_NORM)
    assert caught.value.report.leaf("params['w']").verdict.value == "FAIL"


def test_a_norm_of_zero_that_divides_is_named():
    def unsafe(tree):
        size = global_norm(tree)
        return times(jnp.minimum(size, MAX_NORM) / size, tree)

    clipped = each_example(unsafe)
    assert_match(clipped, loss, PARAMS, BATCH, max_norm=MAX_NORM)
    with pytest.raises(gradtest.GradientMismatch, match="example 3 has a gradient of"):
        assert_match(clipped, loss, PARAMS, WITH_ZERO, max_norm=MAX_NORM)


def test_params_are_scaled_until_some_examples_are_clipped():
    clipped = each_example(lambda tree: to_norm(tree, 500.0))
    report = assert_match(clipped, loss, PARAMS, BATCH, max_norm=500.0)
    assert any("looked at `params` times" in note for note in report.notes)
    plain = each_example(lambda tree: tree)
    with pytest.raises(gradtest.GradientMismatch, match="unclipped"):
        assert_match(plain, loss, PARAMS, BATCH, max_norm=500.0)


def test_nothing_is_concluded_where_all_examples_are_alike():
    alike = jax.tree.map(lambda leaf: jnp.stack([leaf[4]] * 3), BATCH)
    with pytest.raises(gradtest.GradientInconclusive, match="have different norms"):
        assert_match(right, loss, PARAMS, alike, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_norm": 0.0}, ValueError, "`max_norm` must be positive"),
        ({"max_norm": 1.0, "reduction": "max"}, ValueError, "`reduction` must be"),
        ({"max_norm": 1.0, "batch_axis": 5}, ValueError, "no array with an axis 5"),
    ],
)
def test_bad_input_is_named(options, error, says):
    with pytest.raises(error, match=says):
        assert_match(right, loss, PARAMS, BATCH, **options)
