"""Programs over an accelerator's devices, judged on as many of the CPU's.

Of eight simulated devices the last four are taken for an accelerator's, and the first
ones for the CPU's: what is mapped from one to the other truly moves.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding

import gradtest
from gradtest._src import execution
from gradtest._src.devices import homes

pytestmark = pytest.mark.devices

_P = jax.sharding.PartitionSpec
_BESIDE = "devices: truth on 4 devices of the CPU, claim on 4 devices of gpu (cpu)"
_ALONE = "devices: truth on the CPU, claim on gpu (cpu)"
_X = np.sin(np.arange(32, dtype=np.float32)).reshape(8, 4)
_W = np.cos(np.arange(12, dtype=np.float32)).reshape(4, 3)


@contextlib.contextmanager
def _simulated(monkeypatch, *, platform="gpu", cpus=4):
    """Takes the last four devices for an accelerator's, on which programs run."""
    devices = jax.devices()
    with monkeypatch.context() as patch, jax.default_device(devices[4]):
        patch.setattr(execution, "_programs", type(execution._programs)())
        patch.setattr(
            homes, "platform_of", lambda d: platform if d in devices[4:] else "cpu"
        )
        patch.setattr(homes, "cpu_devices", lambda: devices[:cpus])
        yield devices[4:]


@pytest.fixture
def gpus(monkeypatch):
    """The devices of a simulated accelerator; the CPU has as many."""
    with _simulated(monkeypatch) as devices:
        yield devices


def _mesh(devices, *, shape=(4,), names=("data",), kind=AxisType.Auto):
    return jax.sharding.Mesh(
        np.array(devices).reshape(shape), names, axis_types=(kind,) * len(shape)
    )


def _local_loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def _sharded_loss(mesh):
    def local(w, x):
        return lax.psum(_local_loss(w, x), "data")

    return jax.shard_map(local, mesh=mesh, in_specs=(_P(), _P("data")), out_specs=_P())


def _gradient(w, x):
    y = jnp.tanh(x @ w)
    return x.T @ (2 * y * (1 - y**2))


def _assert_right_passes_and_wrong_fails(loss, w, x, line, gradient=_gradient):
    report = gradtest.assert_autodiff_matches(loss, w, x)
    assert line in report.precision
    assert max(finding.size for finding in report.findings) < 1e-12
    gradtest.assert_grad_matches(loss, gradient, w, x)
    with pytest.raises(gradtest.GradientMismatch, match="4 times too large") as caught:
        gradtest.assert_grad_matches(loss, lambda *at: 4 * gradient(*at), w, x)
    truth = line.rpartition("claim on")[0]  # what is written by hand is on one device
    assert any(truth in each for each in caught.value.report.precision)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_shard_map_is_judged_on_the_cpu(gpus, backwards):
    mesh = _mesh(gpus[::-1] if backwards else gpus)
    _assert_right_passes_and_wrong_fails(_sharded_loss(mesh), _W, _X, _BESIDE)


def test_arguments_spread_over_an_accelerator_are_laid_out_anew(gpus):
    mesh = _mesh(gpus)
    w = jax.device_put(_W, NamedSharding(mesh, _P()))
    x = jax.device_put(_X, NamedSharding(mesh, _P("data")))
    _assert_right_passes_and_wrong_fails(_local_loss, w, x, _BESIDE)
    assert x.sharding == NamedSharding(mesh, _P("data"))
    np.testing.assert_array_equal(x, _X)


def test_sharding_constraints_move_with_the_program(gpus):
    layout = NamedSharding(_mesh(gpus, shape=(2, 2), names=("a", "b")), _P("b", "a"))

    def loss(w, x):
        return _local_loss(w, lax.with_sharding_constraint(x, layout))

    _assert_right_passes_and_wrong_fails(loss, _W, _X, _BESIDE)


def test_a_pmap_is_judged_on_the_cpu(gpus):
    def loss(w, x):
        parts = x.reshape(4, 2, 4)
        mapped = jax.pmap(
            lambda w, x: lax.pmean(4 * _local_loss(w, x), "i"),
            axis_name="i",
            in_axes=(None, 0),
            devices=gpus,
        )
        return mapped(w, parts)[0]

    _assert_right_passes_and_wrong_fails(loss, _W, _X, _BESIDE)


def test_the_mesh_that_is_set_moves_with_the_program(gpus):
    mesh = _mesh(gpus, kind=AxisType.Explicit)

    def loss(w, x):
        y = jnp.dot(x, w, out_sharding=_P("data", None))
        part = jax.shard_map(
            lambda y: lax.psum(jnp.sum(jnp.tanh(y) ** 2), "data"),
            in_specs=_P("data", None),
            out_specs=_P(),
        )
        return part(jax.sharding.reshard(y, _P("data", None)))

    def gradient(w, x):
        y = jnp.tanh(jnp.dot(x, w, out_sharding=_P("data", None)))
        return jnp.dot(x.T, 2 * y * (1 - y**2), out_sharding=_P(None, None))

    with jax.set_mesh(mesh):
        w, x = jax.device_put(_W, _P()), jax.device_put(_X, _P("data"))
        _assert_right_passes_and_wrong_fails(loss, w, x, _BESIDE, gradient)
        assert jax.sharding.get_mesh() == mesh
    assert jax.sharding.get_mesh().empty


def _rule(bwd):
    """A sum over a mesh axis with a hand-written derivative."""

    @jax.custom_vjp
    def total(x):
        return lax.psum(jnp.sum(x**2), "data")

    total.defvjp(lambda x: (total(x), x), bwd)
    return total


@pytest.mark.parametrize("verdict", ["right", "wrong"])
def test_a_rule_inside_of_a_region_is_judged_on_the_cpu(gpus, verdict):
    factor = {"right": 2, "wrong": 3}[verdict]
    total = _rule(lambda x, g: (factor * x * g,))
    loss = jax.shard_map(
        total, mesh=_mesh(gpus), in_specs=_P("data"), out_specs=_P(), check_vma=True
    )
    if verdict == "right":
        report = gradtest.assert_autodiff_matches(loss, _X)
        assert _BESIDE in report.precision
    else:
        with pytest.raises(gradtest.GradientMismatch, match=r"1\.5 times too large"):
            gradtest.assert_autodiff_matches(loss, _X)


def test_a_program_on_one_device_is_judged_beside_it(gpus):
    _assert_right_passes_and_wrong_fails(_local_loss, _W, _X, _ALONE)


def test_other_assertions_are_judged_on_the_cpu_as_well(gpus):
    loss, key = _sharded_loss(_mesh(gpus)), jax.random.key(0)
    gradtest.assert_grads_agree(loss, _local_loss, _W, _X)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grads_agree(lambda *at: 2 * loss(*at), _local_loss, _W, _X)
    gradtest.assert_vjp_matches(
        jnp.sin, lambda primals, g: (jnp.cos(primals[0]) * g,), _X
    )

    def noisy(x, key):
        return jnp.sum(jax.nn.relu(x + jax.random.normal(key, x.shape)))

    gradtest.assert_autodiff_matches(noisy, _X, key)
    gradtest.assert_custom_rules_match(noisy, _X, key)


def test_a_gpu_with_too_few_devices_of_the_cpu_judges_by_itself(monkeypatch):
    with _simulated(monkeypatch, cpus=2) as gpus:
        line = (
            "devices: truth on 4 devices of gpu (cpu), in float64 of its own (the CPU "
            "has 2 devices where the program is over 4: set jax_num_cpu_devices=4 (or "
            "JAX_NUM_CPU_DEVICES=4) before JAX starts); claim on 4 devices of gpu (cpu)"
        )
        loss = _sharded_loss(_mesh(gpus))
        _assert_right_passes_and_wrong_fails(loss, _W, _X, line)
        _assert_right_passes_and_wrong_fails(_local_loss, _W, _X, _ALONE)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_tpu_with_too_few_devices_of_the_cpu_is_inconclusive(monkeypatch, wrong):
    with _simulated(monkeypatch, platform="tpu", cpus=2) as tpus:
        loss = _sharded_loss(_mesh(tpus))
        with pytest.raises(gradtest.GradientInconclusive) as caught:
            gradtest.assert_grad_matches(
                loss, lambda *at: (1 + wrong) * _gradient(*at), _W, _X
            )
        assert "tpu has no float64, and the CPU has 2 devices" in str(caught.value)
        assert "jax_num_cpu_devices=4" in str(caught.value)
        placed = jax.device_put(_X, NamedSharding(_mesh(tpus), _P("data")))
        report = gradtest.check(lambda x: jnp.sum(x**2), placed)
        assert report.verdict is gradtest.Verdict.INCONCLUSIVE
        report = gradtest.assert_grad_matches(_local_loss, _gradient, _W, _X)
        assert "devices: truth on the CPU, claim on tpu (cpu)" in report.precision


# --- products that a TPU rounds to bfloat16 -------------------------------------------


def _rounded_gradient(w, x):
    """What a TPU makes of `_gradient`, written out for a CPU."""

    def product(a, b):
        return lax.reduce_precision(a, 8, 7) @ lax.reduce_precision(b, 8, 7)

    y = jnp.tanh(product(x, w))
    return product(x.T, 2 * y * (1 - y**2))


def test_products_round_as_their_device_does(monkeypatch):
    with _simulated(monkeypatch, platform="tpu"):
        report = gradtest.assert_grad_matches(_local_loss, _rounded_gradient, _W, _X)
    (line,) = [line for line in report.precision if "matrix products" in line]
    assert line.startswith("precision: matrix products on tpu round to bfloat16")
    gap, allowed = report.findings[0].rounding
    assert 1e-4 < gap < allowed == pytest.approx(1 / 16)
    with pytest.raises(gradtest.GradientMismatch, match="loses its accuracy"):
        gradtest.assert_grad_matches(_local_loss, _rounded_gradient, _W, _X)


# --- what runs on its accelerator alone ---------------------------------------------

# A stand-in for cuDNN's attention, under the name that its primitive has.
_library = core.Primitive("dot_product_attention_fwd_wrapper")
_library.def_abstract_eval(lambda x: x)
mlir.register_lowering(_library, mlir.lower_fun(jnp.sin, multiple_results=False))


def _of_a_library(factor):
    @jax.custom_vjp
    def sine(x):
        return _library.bind(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (factor * jnp.cos(x) * g,))
    return lambda x: jnp.sum(sine(x))


def test_what_a_library_of_the_accelerator_computes_stays_there(gpus):
    report = gradtest.assert_grads_agree(
        _of_a_library(1), lambda x: jnp.sum(jnp.sin(x)), _X
    )
    assert "but in its own precision ran dot_product_attention" in report.precision[0]
    assert (
        "devices: truth on gpu (cpu), in float64 of its own "
        "(dot_product_attention_fwd_wrapper runs on its accelerator alone); claim on "
        "gpu (cpu)"
    ) in report.precision
    with pytest.raises(gradtest.GradientMismatch, match=r"1\.5 times too large"):
        gradtest.assert_grads_agree(
            _of_a_library(1.5), lambda x: jnp.sum(jnp.sin(x)), _X
        )


def test_differences_judge_it_where_there_is_no_reference(gpus):
    report = gradtest.assert_autodiff_matches(_of_a_library(1), _X)
    assert {finding.judged_by for finding in report.findings} == {"measured"}
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_autodiff_matches(_of_a_library(1.5), _X)


def test_it_stays_where_its_arguments_are_spread(gpus):
    x = jax.device_put(_X, NamedSharding(_mesh(gpus), _P("data")))
    report = gradtest.assert_grads_agree(
        _of_a_library(1), lambda x: jnp.sum(jnp.sin(x)), x
    )
    assert any("in float64 of its own" in line for line in report.precision)


def test_it_is_inconclusive_where_the_accelerator_has_no_float64(monkeypatch):
    with (
        _simulated(monkeypatch, platform="tpu"),
        pytest.raises(gradtest.GradientInconclusive, match="runs on its accelerator"),
    ):
        gradtest.assert_autodiff_matches(_of_a_library(1), _X)


# --- devices that the user chose ----------------------------------------------------


@pytest.mark.parametrize("chosen", [0, 3])
@pytest.mark.parametrize("committed", [None, 0, 5])
def test_the_users_device_is_where_the_claim_runs(chosen, committed):
    devices = jax.devices()
    w = _W if committed is None else jax.device_put(_W, devices[committed])
    with jax.default_device(devices[chosen]):
        gradtest.assert_autodiff_matches(_local_loss, w, _X)
        report = gradtest.assert_grad_matches(_local_loss, _gradient, w, _X)
        with pytest.raises(gradtest.GradientMismatch, match="2 times too large"):
            gradtest.assert_grad_matches(
                _local_loss, lambda *at: 2 * _gradient(*at), w, _X
            )
    assert not any(line.startswith("devices") for line in report.precision)
    if committed is not None:
        assert w.devices() == {devices[committed]}


@pytest.mark.parametrize(
    "check",
    [
        gradtest.assert_autodiff_matches,
        gradtest.assert_custom_rules_match,
        gradtest.assert_grads_finite,
    ],
)
def test_arrays_on_any_one_device_are_checked(check):
    def loss(x, key):
        return jnp.sum(jax.nn.relu(x) * jax.random.normal(key, x.shape))

    for device in (jax.devices()[0], jax.devices()[6]):
        x, key = jax.device_put((_X, jax.random.key(1)), device)
        assert check(loss, x, key).verdict is gradtest.Verdict.PASS


def test_arrays_on_several_devices_are_jaxs_own_error():
    w, x = (
        jax.device_put(array, device)
        for array, device in zip((_W, _X), jax.devices()[2:], strict=False)
    )
    with pytest.raises(ValueError, match="incompatible devices"):
        gradtest.assert_autodiff_matches(_local_loss, w, x)
