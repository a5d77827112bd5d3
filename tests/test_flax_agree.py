"""assert_grads_agree of gradtest.flax: Linen against NNX, with a parameter map."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gradtest
import gradtest.flax
from gradtest import domains

ROWS = domains.normal((5, 3))
agree = gradtest.flax.assert_grads_agree


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))
        return nn.Dense(4)(nn.gelu(x))


class NnxNet(nnx.Module):
    def __init__(self, epsilon: float = 1e-5, half: bool = False):
        rngs, dtype = nnx.Rngs(0), jnp.bfloat16 if half else jnp.float32
        self.first = nnx.Linear(3, 3, rngs=rngs, dtype=dtype)
        self.norm = nnx.BatchNorm(
            3, use_running_average=True, epsilon=epsilon, rngs=rngs, dtype=dtype
        )
        self.norm.mean[...] = jnp.arange(3.0)
        self.last = nnx.Linear(3, 4, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.gelu(self.norm(self.first(x))))


class LinenTwins(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3)(x)
        return nn.Dense(3)(nn.tanh(x))


class NnxTwins(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](jnp.tanh(self.layers[0](x)))


@pytest.mark.core
def test_linen_and_nnx_agree_in_either_order_with_their_running_averages():
    net = NnxNet()
    for pair in ((LinenNet(), net), (net, LinenNet())):
        report = agree(*pair, ROWS)
        assert report.verdict is gradtest.Verdict.PASS
        assert {f.name for f in report.findings if f.name.startswith("params")}
        assert not any("keeps its own" in note for note in report.notes)


@pytest.mark.parametrize(
    "params_map",
    [
        {"Dense_0": "layers/0", "Dense_1": "layers.1"},
        {"Dense_0": "layers/0"},
        lambda p: {"layers": {0: p["Dense_0"], 1: p["Dense_1"]}},
    ],
    ids=["dict", "part of it", "function"],
)
def test_layers_of_one_shape_are_paired_by_a_map(params_map: Any):
    report = agree(LinenTwins(), NnxTwins(), ROWS, params_map=params_map)
    assert len({finding.name for finding in report.findings}) == 4


def test_a_map_that_swaps_layers_is_refused_by_the_values():
    with pytest.raises(gradtest.GradientMismatch, match="LinenTwins and the reference"):
        agree(
            LinenTwins(), NnxTwins(), ROWS,
            params_map={"Dense_0": "layers/1", "Dense_1": "layers/0"},
        )  # fmt: skip


def test_another_epsilon_is_a_mismatch_of_the_values():
    with pytest.raises(gradtest.GradientMismatch, match="differ in value") as caught:
        agree(LinenNet(), NnxNet(epsilon=1e-2), ROWS)
    assert "gradtest.flax.assert_grads_agree(LinenNet, NnxNet" in str(caught.value)


def test_a_gradient_that_is_cut_off_in_the_first_is_a_mismatch():
    class Cut(NnxNet):
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(jax.lax.stop_gradient(nnx.gelu(self.norm(self.first(x)))))

    with pytest.raises(gradtest.GradientMismatch) as caught:
        agree(Cut(), LinenNet(), ROWS)
    failed = caught.value.report
    assert failed.leaf("params['first']['kernel']").verdict is gradtest.Verdict.FAIL
    assert failed.leaf("params['last']['kernel']").verdict is gradtest.Verdict.PASS


def test_half_precision_agrees_with_single():
    assert agree(NnxNet(half=True), LinenNet(), ROWS).verdict is gradtest.Verdict.PASS


@pytest.mark.parametrize(
    ("params_map", "told"),
    [
        (None, "Dense_0/bias.*layers/0/bias.*params_map={"),
        ({"Dense_7": "layers/0"}, "'Dense_7'.*first module.*Dense_0"),
        ({"Dense_0": "layers/7"}, "'layers/7'.*second module.*layers/0"),
        (lambda p: {"layers": {0: p["Dense_0"]}}, "nothing at layers/1/bias"),
        (3, "must be a function"),
    ],
)
def test_parameters_that_cannot_be_paired_are_named(params_map: Any, told: str):
    with pytest.raises((ValueError, TypeError), match=f"`params_map`.*{told}"):
        agree(LinenTwins(), NnxTwins(), ROWS, params_map=params_map)


def test_the_class_of_the_reference_is_refused_by_name():
    with pytest.raises(TypeError, match=r"`reference` must be an instance.*NnxTwins"):
        agree(LinenTwins(), NnxTwins, ROWS)
