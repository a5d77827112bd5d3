"""Skipped steps: right ones accepted, wrong ones caught with leaf and cause."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gradtest
from gradtest.optax import assert_overflow_skipped

PARAMS = {"w": jnp.full((3, 2), 0.5), "b": jnp.ones(2)}
GRADS = {"w": jnp.full((3, 2), 0.3), "b": jnp.array([0.1, -0.2])}
_ADAM = optax.adam(0.1)


def _init(params):
    return {"adam": _ADAM.init(params), "scale": jnp.float32(2.0**15),
            "good": jnp.int32(0)}  # fmt: skip


def _is_finite(grads, kind):
    leaves = jax.tree.leaves(grads)
    if kind == "looks at one leaf":
        return jnp.isfinite(leaves[0]).all()
    if kind == "looks for NaN only":
        return ~jnp.stack([jnp.isnan(leaf).any() for leaf in leaves]).any()
    if kind == "never steps":
        return jnp.array(False)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _step(kind):
    """A step with a dynamic loss scale and a slip; right where there is none."""

    def step(params, state, grads):
        grads = jax.tree.map(lambda g: g / state["scale"], grads)
        fine = _is_finite(grads, kind)
        updates, adam = _ADAM.update(grads, state["adam"], params)

        def chosen(new, old):
            return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)

        moved = chosen(optax.apply_updates(params, updates), params)
        if kind == "multiplies":
            updates = jax.tree.map(lambda u: u * fine, updates)
            moved = optax.apply_updates(params, updates)
        if kind != "keeps the new state":
            adam = chosen(adam, state["adam"])
        if kind == "counts skipped steps":
            count = adam[0].count + jnp.where(fine, 0, 1)
            adam = (adam[0]._replace(count=count), *adam[1:])
        scale = jnp.where(fine, state["scale"], state["scale"] / 2)
        good = jnp.where(fine, state["good"] + 1, 0)
        return moved, {"adam": adam, "scale": scale, "good": good}

    return step


RIGHT = {
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 5),
    "skip_not_finite": optax.MultiSteps(
        optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "of four": optax.MultiSteps(
        optax.sgd(0.1), 4, should_skip_update_fn=optax.skip_not_finite
    ),
}
WRONG = {
    "looks at one leaf": ("not skipped", "params['b']"),
    "looks for NaN only": ("not skipped", "params['b']"),
    "multiplies": ("not skipped", "params['b']"),
    "keeps the new state": ("state poisoned", "state['adam'][0].mu['b']"),
    "counts skipped steps": ("state changed", "state['adam'][0].count"),
    "never steps": ("never steps", "params['b']"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_optax_skips_as_it_should(name):
    report = assert_overflow_skipped(RIGHT[name], PARAMS, GRADS)
    assert report.unchecked  # its counters


def test_a_dynamic_loss_scale_is_followed():
    report = assert_overflow_skipped(
        _step("right"), PARAMS, GRADS, init=_init, changes=("scale", "good")
    )
    assert set(report.unchecked) == {
        "state['scale'] (may change)", "state['good'] (may change)",
    }  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_step_is_refused_with_its_cause(kind):
    cause, leaf = WRONG[kind]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_overflow_skipped(
            _step(kind), PARAMS, GRADS, init=_init(PARAMS), changes=("scale", "good")
        )
    (finding,) = caught.value.report.findings
    assert (finding.cause.name, finding.name) == (cause, leaf)


def test_a_state_that_changes_must_be_declared():
    with pytest.raises(gradtest.GradientMismatch, match="name it in `changes`"):
        assert_overflow_skipped(
            _step("right"), PARAMS, GRADS, init=_init, changes=["scale"]
        )


def test_what_a_skipped_step_leaves_for_the_next_one_is_found():
    def step(params, state, grads):
        fine = _is_finite(grads, "")
        rate = jnp.where(state["warm"] > 0, 0.5, 0.1)
        moved = jax.tree.map(
            lambda p, g: jnp.where(fine, p - rate * g, p), params, grads
        )
        return moved, {"warm": jnp.where(fine, 0, 3)}

    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_overflow_skipped(
            step, PARAMS, GRADS, init={"warm": jnp.int32(0)}, changes=["warm"]
        )
    assert caught.value.report.findings[0].cause.name == "next step differs"


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.apply_if_finite(_ADAM, 0)])
def test_an_optimiser_that_does_not_skip_is_refused(tx):
    with pytest.raises(gradtest.GradientMismatch, match="gets into the params"):
        assert_overflow_skipped(tx, PARAMS, GRADS)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="`tx_or_step` must be"):
        assert_overflow_skipped(3, PARAMS, GRADS)
    with pytest.raises(ValueError, match="`init` is for a step"):
        assert_overflow_skipped(_ADAM, PARAMS, GRADS, init=_init)
    with pytest.raises(TypeError, match="must return the pair"):
        assert_overflow_skipped(
            lambda params, state, grads: params, PARAMS, GRADS, init=()
        )
    with pytest.raises(ValueError, match="`init` must be given for a step"):
        assert_overflow_skipped(_step(""), PARAMS, GRADS)
    with pytest.raises(ValueError, match=r"`changes` names 'scael'.*'scale'"):
        assert_overflow_skipped(
            _step(""), PARAMS, GRADS, init=_init, changes=("scael", "good")
        )
    with pytest.raises(TypeError, match="`changes` must be names"):
        assert_overflow_skipped(_step(""), PARAMS, GRADS, init=_init, changes="scale")
    with pytest.raises(ValueError, match=r"`params` must hold .* float"):
        assert_overflow_skipped(_ADAM, jnp.arange(3), jnp.arange(3))
