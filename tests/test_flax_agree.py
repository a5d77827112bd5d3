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


def test_a_map_that_sends_two_layers_to_one_is_refused():
    both = {"Dense_0": "layers/0", "Dense_1": "layers/0"}
    told = "`params_map` sends 'Dense_0' and 'Dense_1' to one place.*layers/0/"
    with pytest.raises(ValueError, match=told):
        agree(LinenTwins(), NnxTwins(), ROWS, params_map=both)


def test_of_nested_paths_in_a_map_the_longer_counts():
    nested = {"Dense_0": "layers/0", "Dense_1": "layers/1"}
    nested |= {"Dense_0/bias": "layers/1/bias", "Dense_1/bias": "layers/0/bias"}
    with pytest.raises(gradtest.GradientMismatch):
        agree(LinenTwins(), NnxTwins(), domains.normal((5, 3)), params_map=nested,
              variables={"params": {
                  "Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)},
                  "Dense_1": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
              }})  # fmt: skip


@pytest.mark.parametrize("is_first", [True, False])
def test_a_parameter_that_the_other_lacks_is_told_of(is_first: bool):
    bare = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    pair = (nn.Dense(4), bare) if is_first else (bare, nn.Dense(4))
    told = f"the {'second' if is_first else 'first'} module has nothing for bias"
    with pytest.raises(ValueError, match=told):
        agree(*pair, ROWS)


def test_an_output_of_another_shape_is_told_of_the_module():
    reference = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`module` must return the shapes"):
        agree(nn.Conv(4, (3, 3), padding="VALID"), reference, jnp.ones((1, 6, 6, 2)))


def test_a_string_as_input_is_named():
    with pytest.raises(TypeError, match="`inputs` must be what Dense can be called"):
        gradtest.flax.assert_module_grads(nn.Dense(3), "x")
