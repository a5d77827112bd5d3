"""Homework and a transformer on an accelerator; see `machine` for how to run this."""

import chex
import jax
import jax.numpy as jnp
import pytest

import gradtest
from examples import homework
from tests import right_models
from tests.accelerator.machine import devices_line, needs_accelerator, platform

pytestmark = needs_accelerator


@pytest.mark.parametrize(
    "exercise",
    homework.EXERCISES,
    ids=[f"{e.task}-{e.expected.value}" for e in homework.EXERCISES],
)
def test_homework_has_the_verdicts_that_it_has_on_a_cpu(exercise):
    report = homework.judge(exercise)
    assert report.verdict is exercise.expected
    line = devices_line(report)
    assert line.startswith("devices: truth on the CPU, ")
    assert f"claim on {platform()}" in line


_MODELS = {model.name: model for model in right_models.RIGHT_MODELS}
_NAMES = ("transformer", "cnn", "lstm", "batch_norm_and_dropout")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", _NAMES)
def test_a_right_model_passes(name, dtype):
    fn, args = _MODELS[name].make(dtype)
    report = gradtest.assert_autodiff_matches(fn, *args)
    assert f"claim on {platform()}" in devices_line(report)
    reverse = [finding for finding in report.findings if finding.mode == "rev"]
    assert all(finding.rounding is not None for finding in reverse)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_a_transformer_with_one_wrong_leaf_is_refused_there(dtype):
    fn, args = _MODELS["transformer"].make(dtype)
    path = next(p for p in right_models.leaf_paths(args) if p.endswith("['kernel']"))
    wrong = right_models.scaled_leaf(fn, path, 1.01, None, jnp.float32)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(wrong, *args)
    failed = [
        finding.name
        for finding in caught.value.report.findings
        if finding.verdict is gradtest.Verdict.FAIL
    ]
    assert {name.removeprefix("params") for name in failed} == {
        path.removeprefix("[0]")
    }


def test_the_rules_that_a_model_calls_are_audited():
    fn, args = _MODELS["cnn"].make(jnp.bfloat16)
    report = gradtest.assert_custom_rules_match(fn, *args)
    assert "relu" in {rule.name for rule in report.rules}


# --- where programs may run -----------------------------------------------------------


def _loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def _arguments():
    return jnp.ones((4, 3)) / 3, jnp.linspace(-1, 1, 32).reshape(8, 4)


def test_a_cpu_that_is_forbidden_is_told():
    def another_loss(w, x):
        return 3 * _loss(w, x)

    arguments = _arguments()
    with (
        chex.restrict_backends(forbidden=["cpu"]),
        pytest.raises(RuntimeError, match=r"another_loss.* float64 .*allow 'cpu'"),
    ):
        gradtest.assert_autodiff_matches(another_loss, *arguments)


def test_what_the_user_puts_on_the_cpu_runs_there():
    with jax.default_device(jax.devices("cpu")[0]):
        report = gradtest.assert_autodiff_matches(_loss, *_arguments())
    assert not any("devices: " in line for line in report.precision)
    placed = jax.device_put(_arguments(), jax.devices("cpu")[0])
    report = gradtest.assert_autodiff_matches(_loss, *placed)
    assert not any("devices: " in line for line in report.precision)


def test_what_the_user_puts_on_the_accelerator_runs_there():
    placed = jax.device_put(_arguments(), jax.devices()[-1])
    with jax.default_device(jax.devices("cpu")[0]):
        report = gradtest.assert_autodiff_matches(_loss, *placed)
    assert f"claim on {platform()}" in devices_line(report)
