"""What one process finds, all raise: run by both processes of a job."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import gradtest
from gradtest._src import jaxprs
from gradtest._src.job import agreement as processes
from tests.processes.common import (
    PARAMS,
    RANK,
    ROWS,
    doubled,
    gradient,
    loss,
    mismatch_everywhere,
    over_all,
)


def test_the_job_has_two_processes_of_four_devices():
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    assert jax.local_device_count() == 4


def test_local_data_may_differ():
    params = {"w": (RANK + 1) * PARAMS["w"], "b": PARAMS["b"]}
    report = gradtest.assert_grad_matches(loss, gradient, params, ROWS)
    assert report.verdict is gradtest.Verdict.PASS


def test_what_is_wrong_in_both_is_said_once():
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, doubled, PARAMS, ROWS)
    )
    assert "2 times too large" in message
    assert "Found in" not in message


def test_what_is_wrong_in_the_second_alone_raises_in_both():
    claimed = doubled if RANK else gradient
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(loss, claimed, PARAMS, ROWS)
    )
    assert "2 times too large" in message
    assert "Found in process 1 of 2 alone." in message


def test_what_local_data_shows_raises_in_both():
    x = np.float32([1, -1 if RANK == 0 else 1])  # its sign is wrong below zero
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(
            lambda x: jnp.sum(x**2), lambda x: 2 * jnp.abs(x), x
        )
    )
    assert "Found in process 0 of 2 alone." in message


def test_a_rule_that_is_wrong_in_the_second_alone_raises_in_both():
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    factor = 1.5 if RANK else 1.0
    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (factor * g * jnp.cos(x),))
    for check in (gradtest.assert_custom_rules_match, gradtest.assert_autodiff_matches):
        message = mismatch_everywhere(lambda check=check: check(sine, ROWS))
        assert "1.5 times too large" in message


def test_gradients_that_are_not_close_in_the_first_alone_raise_in_both():
    right = jax.grad(loss)(PARAMS, ROWS)
    claimed = right if RANK else jax.tree.map(lambda g: -g, right)
    message = mismatch_everywhere(
        lambda: gradtest.assert_grads_close(claimed, right, rtol=1e-3)
    )
    assert "the sign is flipped" in message


def test_a_gradient_that_is_not_finite_in_the_second_alone_raises_in_both():
    x = np.zeros(3, np.float32) if RANK else np.ones(3, np.float32)
    message = mismatch_everywhere(
        lambda: gradtest.assert_grads_finite(jnp.linalg.norm, x)
    )
    assert "not finite" in message


def test_what_is_inconclusive_in_one_is_so_in_both():
    x = np.float32(1.0 if RANK else -1.0)  # NaN below zero
    with pytest.raises(gradtest.GradientInconclusive, match="process 0 of 2"):
        gradtest.assert_autodiff_matches(jnp.sqrt, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = gradtest.assert_autodiff_matches(jnp.sqrt, x, inconclusive="warn")
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert "process 0 of 2" in str(caught[0].message)


def test_a_failure_outweighs_what_is_inconclusive():
    x = np.float32(1.0 if RANK else -1.0)
    message = mismatch_everywhere(
        lambda: gradtest.assert_grad_matches(jnp.sqrt, lambda x: 1 / jnp.sqrt(x), x)
    )
    assert "Found in process 1 of 2 alone." in message


def test_every_process_raises_the_users_own_exception_type():
    with pytest.raises(ArithmeticError, match="2 times too large") as raised:
        gradtest.assert_grad_matches(
            loss,
            doubled if RANK else gradient,
            PARAMS,
            ROWS,
            exception_type=ArithmeticError,
            custom_message=f"process {RANK}",
        )
    assert raised.value.report.verdict is gradtest.Verdict.FAIL
    assert f"process {RANK}" in str(raised.value)


def test_an_error_of_one_is_its_own_and_the_other_names_it():
    def raises(params, x):
        if RANK:
            raise KeyError("no such layer")
        return gradient(params, x)

    kind, text = (KeyError, "no such layer") if RANK else (RuntimeError, "process 1 of")
    with pytest.raises(kind, match=text) as raised:
        gradtest.assert_grad_matches(loss, raises, PARAMS, ROWS)
    if not RANK:
        assert "raised KeyError: 'no such layer'" in str(raised.value)


def test_a_bad_option_of_one_does_not_leave_the_other_waiting():
    kind, text = (RuntimeError, "process 0") if RANK else (ValueError, "`trials` must")
    with pytest.raises(kind, match=text):
        gradtest.assert_grad_matches(loss, gradient, PARAMS, ROWS, trials=RANK)


def test_an_interrupt_of_one_does_not_leave_the_other_waiting():
    def interrupted(params, x):
        if RANK:
            raise KeyboardInterrupt
        return gradient(params, x)

    with pytest.raises(KeyboardInterrupt if RANK else RuntimeError):
        gradtest.assert_grad_matches(loss, interrupted, PARAMS, ROWS)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: gradtest.assert_grad_matches(
                loss, gradient, PARAMS, ROWS, key=RANK
            ),
            "process 0 has key=0, process 1 has key=1",
        ),
        (
            lambda: gradtest.assert_grad_matches(
                loss, gradient, PARAMS, ROWS[: 8 + RANK]
            ),
            r"process 0 has args\[3\]: float32\[8, 4\], process 1 has args\[3\]: "
            r"float32\[9, 4\]",
        ),
        (
            lambda: gradtest.assert_grads_finite(loss, PARAMS, ROWS, trials=1 + RANK),
            "process 0 has trials: 1, process 1 has trials: 2",
        ),
        (
            lambda: gradtest.assert_grads_finite((loss, gradient)[RANK], PARAMS, ROWS),
            r"process 0 has args\[0\]: loss, process 1 has args\[0\]: gradient",
        ),
        (
            lambda: (gradtest.assert_autodiff_matches if RANK else gradtest.check)(
                loss, PARAMS, ROWS
            ),
            "process 0 has check, process 1 has assert_autodiff_matches",
        ),
    ],
    ids=["key", "shapes", "options", "function", "assertion"],
)
def test_processes_that_assert_different_things_are_told(call, told):
    with pytest.raises(RuntimeError, match=told):
        call()


def test_values_beside_arrays_over_all_devices_must_be_equal():
    params = {"w": (RANK + 1) * PARAMS["w"], "b": PARAMS["b"]}
    with pytest.raises(RuntimeError, match=r"args\[2\]\['w'\].*must be equal"):
        gradtest.assert_grad_matches(loss, gradient, params, over_all(ROWS, "data"))


def test_disabled_asserts_meet_nobody():
    import chex

    if RANK:
        chex.disable_asserts()
        try:
            report = gradtest.assert_grad_matches(loss, doubled, PARAMS, ROWS)
        finally:
            chex.enable_asserts()
        assert report.verdict is gradtest.Verdict.NOT_CHECKED


def test_assertions_inside_of_an_assertion_meet_nobody():
    @processes.agreed
    def outer():
        for _ in range(1 + RANK):
            gradtest.assert_grads_close(PARAMS, PARAMS)

    outer()
    gradtest.assert_grad_matches(loss, gradient, PARAMS, ROWS)


def test_assertions_on_traced_values_meet_nobody():
    def traced(x):
        gradtest.assert_autodiff_matches(jnp.sin, x)
        return jnp.sin(x)

    if RANK:
        error, _ = jax.jit(checkify.checkify(traced))(ROWS)
        error.throw()
    gradtest.assert_autodiff_matches(jnp.sin, ROWS)


def test_a_report_without_verdict_is_each_processs_own():
    x = np.float32([1.0, 2.0]) + RANK
    assert gradtest.check(jnp.sin, x).verdict is gradtest.Verdict.PASS


def test_a_bad_timeout_is_named(monkeypatch):
    if RANK:
        monkeypatch.setenv("GRADTEST_PROCESS_TIMEOUT", "soon")
    kind, text = (ValueError, "'soon'") if RANK else (RuntimeError, "process 1")
    with pytest.raises(kind, match=text):
        gradtest.assert_grads_finite(loss, PARAMS, ROWS)


def test_one_that_never_comes_is_named_and_one_that_comes_late_is_told(monkeypatch):
    # Last: afterwards one process is a call ahead.
    job = jaxprs.current_job()
    if RANK:
        assert job.get("test/gave up", 60) == b"yes"
        with pytest.raises(RuntimeError, match="came too late: process 0 gave up"):
            gradtest.assert_grads_finite(loss, PARAMS, ROWS)
        return
    monkeypatch.setenv("GRADTEST_PROCESS_TIMEOUT", "2")
    with pytest.raises(
        RuntimeError, match=r"process 1 of 2 did not come .* within 2 s"
    ):
        gradtest.assert_grads_finite(loss, PARAMS, ROWS)
    job.put("test/gave up", b"yes")
