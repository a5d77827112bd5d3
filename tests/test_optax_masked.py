"""Frozen leaves: right ways to freeze accepted, wrong ones caught with their cause."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
from gradtest.optax import assert_masked

PARAMS = {
    "body": {"w": jnp.full((4, 3), 0.7), "b": jnp.ones(3)},
    "head": {"w": jnp.full((3, 2), -0.4), "b": jnp.ones(2)},
}
GRADS = jax.tree.map(lambda p: 0.3 * p + 0.1, PARAMS)
FROZEN = {"body": True, "head": False}
MASK = {"body": {"w": True, "b": True}, "head": {"w": False, "b": False}}
OTHERS = jax.tree.map(lambda mark: not mark, MASK)


def _labels(mask):
    return jax.tree.map(lambda mark: "frozen" if mark else "trained", mask)


def _partition(mask, inner=None):
    inner = optax.adamw(0.1) if inner is None else inner
    parts = {"frozen": optax.set_to_zero(), "trained": inner}
    return optax.partition(parts, _labels(mask))


def _swapped_biases():
    mask = jax.tree.map(lambda mark: mark, MASK)
    mask["body"]["b"], mask["head"]["b"] = False, True
    return mask


def _without_bias():
    return MASK | {"body": {"w": True, "b": False}}


def _times_mask():
    def update(updates, state, params=None):
        return jax.tree.map(lambda u, mark: u * (1 - mark), updates, MASK), state

    return optax.GradientTransformation(lambda params: (), update)


RIGHT = {
    "partition": _partition(MASK),
    "selective_transform": optax.selective_transform(
        optax.adamw(0.1), freeze_mask=MASK
    ),
    "frozen before Adam": optax.chain(optax.freeze(MASK), optax.adam(0.1)),
    "masked twice": optax.chain(
        optax.masked(optax.adamw(0.1), OTHERS),
        optax.masked(optax.set_to_zero(), MASK),
    ),
    "clipped first": optax.chain(optax.clip_by_global_norm(0.1), _partition(MASK)),
    "a warm-up": _partition(MASK, optax.adam(optax.linear_schedule(0.0, 0.1, 9))),
    "accumulated": optax.MultiSteps(_partition(MASK), 5),
}
WRONG = {
    "passed through": (optax.masked(optax.adam(0.1), OTHERS),
                       "gradient passed through"),
    "not masked": (optax.adam(0.1), "not frozen"),
    "decay after it": (optax.chain(optax.freeze(MASK), optax.adamw(0.1)),
                       "weight decay"),
    "noise after it": (
        optax.chain(optax.freeze(MASK), optax.sgd(0.1), optax.add_noise(0.1, 0.5, 0)),
        "moves without a gradient",
    ),
    "inverted": (_partition(OTHERS), "mask inverted"),
    "labels swapped": (_partition(_swapped_biases()), "labels mixed up"),
    "prefix too narrow": (_partition(_without_bias()), "not frozen"),
    "state moves": (optax.chain(optax.adam(0.1), optax.freeze(MASK)), "state moves"),
    "multiplied": (optax.chain(optax.sgd(0.1), _times_mask()),
                   "multiplied by the mask"),
    "all frozen": (optax.set_to_zero(), "frozen too"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_mask_is_accepted(name):
    report = assert_masked(RIGHT[name], PARAMS, GRADS, FROZEN)
    assert len(report.findings) == 4
    assert "frozen: 2 of 4 leaves" in report.notes


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_is_refused_with_its_cause(name):
    tx, cause = WRONG[name]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_masked(tx, PARAMS, GRADS, FROZEN)
    bad = [f for f in caught.value.report.findings if f.verdict.value == "FAIL"]
    assert bad[0].cause.name == cause
    where = {"state moves": "state[0][0].mu['body']", "all frozen": "params['head']"}
    assert bad[0].name.startswith(where.get(name, "params['body']"))


def test_a_mask_in_bfloat16_counts_every_bit():
    params, grads = (
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree) for tree in (PARAMS, GRADS)
    )
    assert assert_masked(_partition(MASK), params, grads, FROZEN).findings
    tiny = optax.chain(_partition(MASK), optax.add_decayed_weights(-1e-30))
    with pytest.raises(gradtest.GradientMismatch, match="decays without a gradient"):
        assert_masked(tiny, params, grads, FROZEN)


@pytest.mark.parametrize(
    "frozen",
    [MASK, lambda params: MASK, ["body"], "body", ["params['body']"],
     ["body/w", "body/b"]],
)  # fmt: skip
def test_frozen_leaves_can_be_said_in_several_ways(frozen):
    report = assert_masked(_partition(MASK), PARAMS, GRADS, frozen)
    assert "frozen: 2 of 4 leaves" in report.notes


def test_state_and_nan_can_be_left_out():
    late = optax.chain(optax.adam(0.1), optax.freeze(MASK))
    report = assert_masked(late, PARAMS, GRADS, FROZEN, check_state=False)
    assert "the state of frozen leaves" in report.unchecked
    product = optax.chain(optax.sgd(0.1), _times_mask())
    assert assert_masked(product, PARAMS, GRADS, FROZEN, nonfinite=False).findings


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"body": False, "head": False}, "freezes no leaf"),
        (["tail"], "names 'tail', which is no leaf"),
        ({"tail": True}, "must be a tree of bools like `params`"),
        (3, "must hold bools"),
        (np.ones(3), "must"),
    ],
)
def test_what_is_no_mask_is_named(frozen, message):
    with pytest.raises((TypeError, ValueError), match=message):
        assert_masked(_partition(MASK), PARAMS, GRADS, frozen)
