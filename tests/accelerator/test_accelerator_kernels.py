"""Kernels compiled for an accelerator, against themselves in float64; see `machine`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import gradtest
from tests.accelerator.machine import (
    devices_line,
    needs_mosaic,
    needs_tensor_cores,
    needs_tpu,
    platform,
)


def _silu_kernel(x_ref, o_ref):
    x = x_ref[...]
    o_ref[...] = x * jax.nn.sigmoid(x)


def _silu_backward_kernel(slope_of, x_ref, g_ref, o_ref):
    x = x_ref[...]
    gate = jax.nn.sigmoid(x)
    o_ref[...] = g_ref[...] * slope_of(x, gate)


def _by_blocks(kernel, *arrays, block, **options):
    spec = pl.BlockSpec((block,), lambda i: (i,))
    (size,) = arrays[0].shape
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((size,), arrays[0].dtype),
        grid=(pl.cdiv(size, block),),
        in_specs=[spec] * len(arrays),
        out_specs=spec,
        **options,
    )(*arrays)


def _make_silu(slope_of, **options):
    """Returns an activation whose both passes are kernels."""

    @jax.custom_vjp
    def silu(x):
        return _by_blocks(_silu_kernel, x, **options)

    def backward(x, g):
        kernel = functools.partial(_silu_backward_kernel, slope_of)
        return (_by_blocks(kernel, x, g, **options),)

    silu.defvjp(lambda x: (silu(x), x), backward)
    return silu


def _right_slope(x, gate):
    return gate + x * gate * (1 - gate)


def _half_a_slope(x, gate):
    return gate


# What compiles a kernel, and the blocks that it takes.
_COMPILERS = [
    pytest.param({"block": 128}, id="mosaic", marks=needs_mosaic),
    pytest.param(
        {"block": 64, "compiler_params": triton.CompilerParams()},
        id="triton",
        marks=needs_tensor_cores,
    ),
    pytest.param({"block": 1024}, id="tpu", marks=needs_tpu),
]
_VECTOR = np.linspace(-4, 4, 4096, dtype=np.float32)


@pytest.mark.parametrize("options", _COMPILERS)
def test_a_right_kernel_passes(options):
    silu = _make_silu(_right_slope, **options)
    report = gradtest.assert_autodiff_matches(silu, _VECTOR)
    assert report.precision[0] == (
        "precision: everything in float64 (lifted), claim in its own as well"
    )
    assert f"claim on {platform()}" in devices_line(report)
    (finding,) = [found for found in report.findings if found.mode == "rev"]
    assert finding.size < 1e-12
    assert finding.rounding[0] < 1e-5


@pytest.mark.parametrize("options", _COMPILERS)
def test_a_wrong_kernel_is_refused(options):
    with pytest.raises(gradtest.GradientMismatch, match="is wrong at x"):
        gradtest.assert_autodiff_matches(_make_silu(_half_a_slope, **options), _VECTOR)


@pytest.mark.parametrize("options", _COMPILERS)
def test_the_rule_around_a_kernel_is_audited(options):
    silu = _make_silu(_right_slope, **options)
    report = gradtest.assert_custom_rules_match(lambda x: jnp.sum(silu(x)), _VECTOR)
    assert [rule.name for rule in report.rules] == ["silu"]


# --- a product of matrices in a kernel ------------------------------------------------


def _product_kernel(x_ref, y_ref, o_ref):
    o_ref[...] = jnp.dot(x_ref[...], y_ref[...]).astype(o_ref.dtype)


def _product(x, y, block=32):
    (rows, inner), columns = x.shape, y.shape[1]
    return pl.pallas_call(
        _product_kernel,
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(rows // block, columns // block),
        in_specs=[
            pl.BlockSpec((block, inner), lambda i, j: (i, 0)),
            pl.BlockSpec((inner, block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        compiler_params=triton.CompilerParams(),
    )(x, y)


def _make_product(factor):
    @jax.custom_vjp
    def product(x, y):
        return _product(x, y)

    def backward(kept, g):
        x, y = kept
        return _product(g, y.T), (factor * _product(x.T, g)).astype(y.dtype)

    product.defvjp(lambda x, y: (product(x, y), (x, y)), backward)
    return product


_LEFT = np.sin(np.arange(64 * 32, dtype=np.float32)).reshape(64, 32)
_RIGHT = np.cos(np.arange(32 * 64, dtype=np.float32)).reshape(32, 64)


@needs_tensor_cores
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_in_a_kernel_passes_and_its_mistake_is_refused(dtype):
    operands = jnp.asarray(_LEFT, dtype), jnp.asarray(_RIGHT, dtype)
    gradtest.assert_autodiff_matches(_make_product(1), *operands)
    with pytest.raises(gradtest.GradientMismatch, match="2 times too large") as caught:
        gradtest.assert_autodiff_matches(_make_product(2), *operands)
    failed = [
        finding.name
        for finding in caught.value.report.findings
        if finding.verdict is gradtest.Verdict.FAIL
    ]
    assert failed == ["y"]


# --- cuDNN ----------------------------------------------------------------------------


@pytest.fixture
def heads():
    """Query, key and value in float16; skips where cuDNN does not take them."""
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(size=(2, 64, 4, 64)), jnp.float16) for _ in "qkv"]
    try:
        jax.block_until_ready(_attention("cudnn")(*drawn))
    except Exception as error:  # whatever JAX, cuDNN or the driver raises
        reason = str(error).strip().splitlines()[0]
        pytest.skip(f"needs cuDNN's attention on {platform()}: {reason}")
    return drawn


def _attention(implementation, scale=None):
    def attend(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, scale=scale,
            implementation=implementation,
        )  # fmt: skip

    return attend


@needs_tensor_cores
def test_the_gradient_of_cudnn_attention_is_that_of_the_plain_one(heads):
    report = gradtest.assert_grads_agree(_attention("cudnn"), _attention("xla"), *heads)
    assert "in its own precision ran dot_product_attention" in report.precision[0]
    assert "in float64 of its own" in devices_line(report)
    # Half-precision library calls are noisy; yet a mistake of a tenth would be seen.
    assert report.smallest_seen < 0.1


@needs_tensor_cores
def test_cudnn_attention_with_another_scale_is_refused(heads):
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grads_agree(
            _attention("cudnn", scale=0.25), _attention("xla"), *heads
        )


@needs_tensor_cores
def test_a_rule_that_scales_what_cudnn_returns_is_refused(heads):
    attend = _attention("cudnn")

    @jax.custom_vjp
    def wrong(query, key, value):
        return attend(query, key, value)

    def forward(*operands):
        return jax.vjp(attend, *operands)

    def backward(pull, g):
        query, key, value = pull(g)
        return query, 2 * key, value

    wrong.defvjp(forward, backward)
    with pytest.raises(gradtest.GradientMismatch, match="key"):
        gradtest.assert_grads_agree(wrong, _attention("xla"), *heads)
