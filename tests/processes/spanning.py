"""Arrays over the devices of two processes: run by both of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import gradtest
from tests.processes.common import (
    MESH,
    PARAMS,
    RANK,
    ROWS,
    doubled,
    gradient,
    loss,
    mismatch_everywhere,
    over_all,
    replicated,
)

BATCH = over_all(ROWS, "data")


def step(params, x, *, reduce=lax.pmean, wrong_on=None):
    """A data-parallel gradient over all eight devices."""

    def local(params, x):
        found = jax.grad(loss)(params, x)
        if reduce is not None:
            found = jax.tree.map(lambda g: reduce(g, "data"), found)
        if wrong_on is not None:
            off = jnp.where(lax.axis_index("data") == wrong_on, 1.5, 1.0)
            found = jax.tree.map(lambda g: off.astype(g.dtype) * g, found)
        return found

    return jax.shard_map(
        local, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )(params, x)


@pytest.mark.parametrize("params", [PARAMS, replicated(PARAMS)], ids=["local", "all"])
@pytest.mark.parametrize("claimed", [jax.jit(gradient), step])
def test_a_right_gradient_of_a_global_batch_passes(params, claimed):
    report = gradtest.assert_grad_matches(loss, claimed, params, BATCH)
    assert report.verdict is gradtest.Verdict.PASS


@pytest.mark.parametrize("params", [PARAMS, replicated(PARAMS)], ids=["local", "all"])
def test_a_wrong_gradient_of_a_global_batch_raises_in_both(params):
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, jax.jit(doubled), params, BATCH)
    )
    assert "['w']" in message
    assert "2 times too large" in message
    assert "Found in" not in message


def test_a_sum_over_devices_raises_in_both():
    claimed = functools.partial(step, reduce=lax.psum)
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, claimed, PARAMS, BATCH)
    )
    assert "relative gap 7," in message


@pytest.mark.parametrize("device", [0, 6])
def test_a_step_that_is_wrong_on_one_device_raises_in_both(device):
    claimed = functools.partial(step, wrong_on=device)
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, claimed, PARAMS, BATCH)
    )
    assert "['w']" in message


def test_arguments_may_be_named():
    gradtest.assert_grads_close(claimed=BATCH, reference=ROWS)
    mismatch_everywhere(
        lambda: gradtest.assert_grads_close(claimed=-BATCH, reference=ROWS)
    )
    with pytest.raises(RuntimeError, match=r"reference: float32.* must be equal"):
        gradtest.assert_grads_close(claimed=BATCH, reference=(1 + RANK) * ROWS)


def test_a_step_without_reduction_raises_in_both():
    claimed = functools.partial(step, reduce=None)
    mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, claimed, PARAMS, BATCH)
    )


def test_a_batch_that_the_function_closes_over_is_taken_whole():
    gradtest.assert_grad_matches(
        lambda p: loss(p, BATCH), lambda p: gradient(p, BATCH), PARAMS
    )
    mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(
            lambda p: loss(p, BATCH), lambda p: doubled(p, BATCH), PARAMS
        )
    )


def test_autodiff_of_a_global_batch_is_checked_in_every_argument_and_order():
    report = gradtest.assert_autodiff_matches(
        loss, replicated(PARAMS), BATCH, argnums=(0, 1), order=2
    )
    assert {"params['w']", "params['b']", "x"} < {f.name for f in report.findings}
    assert report.order == 2
    assert report.modes == ("rev", "fwd")


@jax.custom_vjp
def tanh(x):
    return jnp.tanh(x)


def _tanh_backward(y, g):
    return (g * (1 - y),)


tanh.defvjp(lambda x: (tanh(x), tanh(x)), _tanh_backward)


def test_a_wrong_rule_that_runs_over_both_processes_is_named_in_both():
    def with_rule(params, x):
        return jnp.mean(tanh(x @ params["w"]) ** 2)

    for check in (gradtest.assert_custom_rules_match, gradtest.assert_autodiff_matches):
        mismatch_everywhere(lambda check=check: check(with_rule, PARAMS, BATCH))


def test_products_and_transposes_of_global_arrays():
    gradtest.assert_vjp_matches(jnp.sin, lambda args, g: (g * jnp.cos(args[0]),), BATCH)
    gradtest.assert_jvp_matches(jnp.sin, lambda args, t: t[0] * jnp.cos(args[0]), BATCH)
    gradtest.assert_hvp_matches(
        lambda x: jnp.sum(jnp.sin(x)),
        lambda args, t: (-t[0] * jnp.sin(args[0]),),
        BATCH,
    )
    gradtest.assert_transpose_matches(lambda x: 2 * x, lambda x: 2 * x, BATCH)
    mismatch_everywhere(
        lambda: gradtest.assert_vjp_matches(
            jnp.sin, lambda args, g: (g * jnp.sin(args[0]),), BATCH
        )
    )
    mismatch_everywhere(
        lambda: gradtest.assert_transpose_matches(
            lambda x: 2 * x, lambda x: 3 * x, BATCH
        )
    )


def test_implementations_on_global_arrays_agree_or_raise_in_both():
    params = replicated(PARAMS)
    gradtest.assert_grads_agree(
        lambda p, x: jnp.mean(jnp.square(jnp.tanh(x @ p["w"] + p["b"]))),
        loss,
        params,
        BATCH,
    )
    mismatch_everywhere(
        lambda: gradtest.assert_grads_agree(
            lambda p, x: 2 * loss(p, x), loss, params, BATCH
        )
    )


def test_gradients_over_both_processes_are_compared_whole():
    params = replicated(PARAMS)
    claimed = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, BATCH)
    reference = jax.grad(loss, argnums=(0, 1))(PARAMS, ROWS)
    gradtest.assert_grads_close(claimed, reference)
    wrong = (claimed[0], jnp.where(jnp.arange(16)[:, None] == 13, 0, claimed[1]))
    message = mismatch_everywhere(lambda: gradtest.assert_grads_close(wrong, reference))
    assert "claimed[1]" in message


def test_gradients_over_both_processes_are_finite_and_flow():
    params = replicated(PARAMS)
    gradtest.assert_grads_finite(loss, params, BATCH)
    gradtest.assert_grads_flow(loss, params, BATCH)
    zeros_at_the_end = over_all(ROWS * (np.arange(16) < 14)[:, None], "data")
    mismatch_everywhere(
        lambda: gradtest.assert_grads_finite(
            lambda x: jnp.sum(jnp.linalg.norm(x, axis=1)), zeros_at_the_end
        )
    )
    mismatch_everywhere(
        lambda: gradtest.assert_grads_flow(
            lambda p, x: jnp.mean(x @ p["w"]), params, BATCH
        )
    )


def test_half_precision_loops_and_stopped_values_over_both_processes():
    def stopped(x):
        return lax.scan(
            lambda c, row: (c + jnp.sum(row * lax.stop_gradient(c)), None),
            jnp.ones((), x.dtype),
            x / 4,
        )[0]

    gradtest.assert_autodiff_matches(stopped, BATCH)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), replicated(PARAMS))
    gradtest.assert_grad_matches(loss, gradient, params, BATCH.astype(jnp.bfloat16))


def test_keys_that_every_device_holds():
    words = np.asarray(jax.random.key_data(jax.random.key(3)))
    key = jax.random.wrap_key_data(over_all(words))

    def noisy(x, key):
        return jnp.mean((x + jax.random.normal(key, x.shape)) ** 2)

    gradtest.assert_autodiff_matches(noisy, BATCH, key)
    report = gradtest.assert_autodiff_matches(jnp.sin, BATCH, key=key)
    assert report.key == "jax.random.key(3)"


def test_a_value_that_is_not_finite_in_one_process_is_named():
    rows = np.where(np.arange(16)[:, None] == 12, np.nan, ROWS)
    kind, text = (ValueError, "`x` must be") if RANK else (RuntimeError, "process 1")
    with pytest.raises(kind, match=text):
        gradtest.assert_autodiff_matches(loss, PARAMS, over_all(rows, "data"))


def test_an_error_while_tracing_one_leaves_nobody_in_a_collective():
    def raises(params, x):
        if RANK:
            raise KeyError("no such layer")
        return step(params, x)

    with pytest.raises(KeyError if RANK else RuntimeError, match="no such layer"):
        gradtest.assert_grad_matches(loss, raises, PARAMS, BATCH)


def test_variants_of_a_function_of_a_global_batch():
    ways = ["jit", "shard_map[2, check_vma=False]", "sharded jit[4]"]
    report = gradtest.assert_variants_agree(loss, PARAMS, BATCH, variants=ways)
    assert report.verdict is gradtest.Verdict.PASS


def test_a_parallel_step_over_both_processes():
    report = gradtest.assert_parallel_grads_match(step, loss, PARAMS, BATCH)
    assert report.verdict is gradtest.Verdict.PASS
    for claimed, told in (
        (functools.partial(step, reduce=lax.psum), "8 times too large"),
        (functools.partial(step, reduce=None), "the 8 devices disagree"),
        (functools.partial(step, wrong_on=6), "device 6 of 8"),
    ):
        message = mismatch_everywhere(
            lambda claimed=claimed: gradtest.assert_parallel_grads_match(
                claimed, loss, PARAMS, BATCH
            )
        )
        assert told in message
