"""How finely devices multiply matrices, and what that does to the rounding gap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradtest
from gradtest._src.devices import matmuls

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device: what products depend on, and nothing else."""

    platform: str
    compute_capability: str = ""


_CPU = Device("cpu")
_V100 = Device("gpu", compute_capability="7.0")
_H100 = Device("gpu", compute_capability="9.0")
_MI300 = Device("gpu", compute_capability="gfx942")
_TPU = Device("tpu")
_NAMES = {
    None: None,
    "default": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
}


@pytest.mark.parametrize(
    ("device", "formats"),
    [
        (_CPU, (None, None, None, None)),
        (_V100, (None, None, None, None)),
        (_MI300, (None, None, None, None)),
        (_H100, (matmuls.TF32, matmuls.TF32, matmuls.TF32, None)),
        (_TPU, (matmuls.BFLOAT16, matmuls.BFLOAT16, matmuls.THREE_BFLOAT16, None)),
    ],
    ids=["CPU", "V100", "MI300", "H100", "TPU"],
)
def test_precision_means_what_the_device_makes_of_it(device, formats):
    found = [matmuls.format_of(precision, device) for precision in _NAMES.values()]
    assert tuple(found) == formats


def test_the_finer_precision_of_both_operands_counts():
    pair = (lax.Precision.DEFAULT, lax.Precision.HIGHEST)
    assert matmuls.format_of(pair, _TPU) is None
    assert matmuls.format_of(pair[:1] * 2, _TPU) is matmuls.BFLOAT16


@pytest.mark.parametrize(
    ("algorithm", "on_gpu", "on_cpu"),
    [
        ("BF16_BF16_F32", matmuls.BFLOAT16, None),
        ("BF16_BF16_F32_X3", matmuls.THREE_BFLOAT16, None),
        ("BF16_BF16_F32_X6", None, None),
        ("TF32_TF32_F32", matmuls.TF32, None),
        ("F16_F16_F16", matmuls.FLOAT16, matmuls.FLOAT16),
        ("F32_F32_F32", None, None),
        ("DEFAULT", matmuls.TF32, None),
    ],
)
def test_an_algorithm_rounds_by_its_name(algorithm, on_gpu, on_cpu):
    preset = lax.DotAlgorithmPreset[algorithm]
    assert matmuls.format_of(preset, _H100) is on_gpu
    assert matmuls.format_of(preset, _CPU) is on_cpu


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        (None, matmuls.BFLOAT16),
        ("bfloat16", matmuls.BFLOAT16),
        ("tensorfloat32", matmuls.THREE_BFLOAT16),
        ("float32", None),
        ("BF16_BF16_F32", matmuls.BFLOAT16),
    ],
)
def test_the_default_precision_is_in_the_trace(setting, found):
    def fn(x):
        image = x[None, None]
        return x @ x, lax.conv(image, image[..., :3, :3], (1, 1), "SAME")

    x = jnp.ones((8, 8))
    with jax.default_matmul_precision(setting):
        jaxpr = jax.make_jaxpr(fn)(x)
    assert matmuls.coarsest(jaxpr, _TPU) is found
    assert matmuls.coarsest(jaxpr, _CPU) is None


def test_half_and_double_precision_are_multiplied_as_they_are():
    half = jax.make_jaxpr(jnp.dot)(jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    assert matmuls.coarsest(half, _TPU) is None
    with jax.enable_x64(True):
        double = jax.make_jaxpr(jnp.dot)(np.ones(3), np.ones(3))
    assert matmuls.coarsest(double, _H100) is None


def test_products_in_loops_and_rules_are_found():
    def fn(x):
        return lax.fori_loop(0, 3, lambda _, y: jax.nn.relu(y @ y), x)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones((3, 3)))
    assert matmuls.coarsest(jaxpr, _H100) is matmuls.TF32


# A CPU rounds the operands of this algorithm to float16, as accelerators do by default.
_COARSE = lax.DotAlgorithmPreset.F16_F16_F16


def _product(x, w):
    return jnp.sum(jnp.tanh(jnp.dot(x, w, precision=_COARSE)) ** 2)


def _by_hand(precision):
    def grad_fn(x, w):
        y = jnp.tanh(jnp.dot(x, w, precision=precision))
        return jnp.dot(x.T, 2 * y * (1 - y**2), precision=precision)

    return grad_fn


_X = np.sin(np.arange(96, dtype=np.float32)).reshape(8, 12)
_W = np.cos(np.arange(60, dtype=np.float32)).reshape(12, 5) / 3


def test_coarse_products_widen_the_rounding_allowance_visibly():
    report = gradtest.assert_grad_matches(
        _product, _by_hand(_COARSE), _X, _W, argnums=1
    )
    (finding,) = report.findings
    gap, allowed = finding.rounding
    assert 128 * np.finfo(np.float32).eps < gap < allowed
    assert allowed >= 8 * matmuls.FLOAT16.eps
    assert (
        "precision: matrix products on cpu round to float16 (eps 9.8e-04), and the "
        "rounding gap is judged by that"
    ) in report.precision


def test_exact_products_widen_nothing():
    def exact(x, w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    report = gradtest.assert_grad_matches(exact, _by_hand(None), _X, _W, argnums=1)
    _, allowed = report.findings[0].rounding
    assert allowed < 1e-4
    assert not any("matrix products" in line for line in report.precision)


def test_a_wrong_formula_is_refused_under_coarse_products_as_well():
    def slightly_off(x, w):
        return 1.001 * _by_hand(_COARSE)(x, w)

    with pytest.raises(gradtest.GradientMismatch, match=r"1\.001 times too large"):
        gradtest.assert_grad_matches(_product, slightly_off, _X, _W, argnums=1)


def test_what_rounds_far_worse_than_the_products_is_refused():
    def cancels(x, w):
        huge = 2.0**22 * jnp.cosh(0 * x[0, 0])  # a constant would be folded away
        return (_by_hand(_COARSE)(x, w) + huge) - huge

    with pytest.raises(gradtest.GradientMismatch, match="loses its accuracy"):
        gradtest.assert_grad_matches(_product, cancels, _X, _W, argnums=1)
