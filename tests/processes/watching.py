"""A watcher in a job: all processes raise the same, or none. Run by both of them."""

import jax
import jax.numpy as jnp
import pytest

import gradtest
from tests.processes.common import (
    PARAMS,
    RANK,
    ROWS,
    loss,
    mismatch_everywhere,
    over_all,
    replicated,
)


@jax.custom_vjp
def layer(x):
    return jnp.clip(x, -1, 1)


layer.defvjp(lambda x: (layer(x), x), lambda x, g: (g,))


def saturating(params, x):
    return jnp.mean(layer(x @ params["w"]) ** 2)


def test_a_right_loss_passes_with_arrays_of_one_process_and_of_both():
    assert gradtest.watch(loss)(0, PARAMS, ROWS).verdict is gradtest.Verdict.PASS
    report = gradtest.watch(loss)(0, replicated(PARAMS), over_all(ROWS, "data"))
    assert report.verdict is gradtest.Verdict.PASS


def test_what_goes_wrong_in_one_process_raises_in_both():
    params = {"w": (20.0 if RANK else 0.01) * PARAMS["w"]}
    message = mismatch_everywhere(lambda: gradtest.watch(saturating)(0, params, ROWS))
    assert "watch at step 0 failed" in message
    assert "Found in process 1 of 2 alone." in message


def test_what_goes_wrong_over_both_raises_in_both():
    params = replicated({"w": 20 * PARAMS["w"]})
    message = mismatch_everywhere(
        lambda: gradtest.watch(saturating)(0, params, over_all(ROWS, "data"))
    )
    assert "watch at step 0 failed" in message
    assert "Found in" not in message


def test_processes_at_different_steps_are_told_so():
    with pytest.raises(RuntimeError, match="step"):
        gradtest.watch(loss, every=5)(RANK, PARAMS, ROWS)
