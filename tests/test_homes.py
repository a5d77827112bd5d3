"""Where truth runs, what is said of it, and what Chex may forbid."""

import contextlib
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src import execution
from gradtest._src.devices import homes

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device: what the choice depends on, and nothing else."""

    platform: str
    id: int
    process_index: int = 0
    device_kind: str = "any kind"


def _devices(platform, count, processes=1):
    return [
        Device(platform, process * count + i, process)
        for process in range(processes)
        for i in range(count)
    ]


@contextlib.contextmanager
def _simulated(monkeypatch, platform, cpus):
    """Takes the one device at hand for an accelerator's."""
    with monkeypatch.context() as patch:
        patch.setattr(execution, "_programs", type(execution._programs)())
        patch.setattr(homes, "platform_of", lambda device: platform)
        patch.setattr(homes, "cpu_devices", lambda: cpus)
        yield


# --- the choice -------------------------------------------------------------------


def test_a_program_on_the_cpu_is_at_home_on_its_own_devices():
    own = _devices("cpu", 8)[4:]
    assert homes.choose(own, _devices("cpu", 8)) == homes.Home(tuple(own))


@pytest.mark.parametrize("platform", ["tpu", "gpu", "METAL"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_program_on_an_accelerator_is_at_home_on_as_many_of_the_cpu(platform, count):
    home = homes.choose(_devices(platform, 8)[4 : 4 + count], _devices("cpu", count))
    assert home == homes.Home(tuple(_devices("cpu", count)))


def test_the_order_of_devices_is_kept():
    zero, one, two = _devices("tpu", 3)
    home = homes.choose([two, zero, one, zero], _devices("cpu", 8))
    assert [device.id for device in home.devices] == [2, 0, 1, 0]


def test_each_process_has_its_own_devices_of_the_cpu():
    first, second = _devices("tpu", 2, processes=2)[::2]
    home = homes.choose([second, first], _devices("cpu", 3, processes=2))
    assert [(d.process_index, d.id) for d in home.devices] == [(1, 3), (0, 0)]


def test_a_gpu_keeps_what_is_over_more_devices_than_the_cpu_has():
    own = _devices("gpu", 4)
    home = homes.choose(own, _devices("cpu", 1))
    assert home.devices == tuple(own)
    assert home.why == (
        "the CPU has 1 device where the program is over 4: set jax_num_cpu_devices=4 "
        "(or JAX_NUM_CPU_DEVICES=4) before JAX starts"
    )


def test_the_devices_that_lack_are_those_of_one_process():
    own = _devices("gpu", 2, processes=2)
    home = homes.choose(own, _devices("cpu", 1, processes=2))
    assert "the CPU has 1 device where the program is over 2" in home.why


def test_a_gpu_computes_the_truth_where_there_is_no_cpu_backend():
    (own,) = _devices("gpu", 1)
    home = homes.choose([own], [])
    assert home.devices == (own,)
    assert home.why == (
        "JAX was started without the CPU backend: set JAX_PLATFORMS=gpu,cpu"
    )


@pytest.mark.parametrize(
    ("count", "cpus", "says", "remedy"),
    [
        (1, 0, "JAX was started without the CPU backend", "JAX_PLATFORMS=tpu,cpu"),
        (8, 2, "the CPU has 2 devices where the program is over 8",
         "jax_num_cpu_devices=8"),
    ],
)  # fmt: skip
def test_a_tpu_without_a_cpu_beside_it_has_no_home(count, cpus, says, remedy):
    with pytest.raises(homes.NoHomeError) as caught:
        homes.choose(_devices("tpu", count), _devices("cpu", cpus))
    assert caught.value.says == f"tpu has no float64, and {says}"
    assert remedy in caught.value.remedy


def test_what_must_stay_stays_where_float64_is_native():
    own, cpus = _devices("gpu", 1), _devices("cpu", 8)
    home = homes.choose(own, cpus, stays="cuDNN runs on its accelerator alone")
    assert home == homes.Home(tuple(own), "cuDNN runs on its accelerator alone")
    with pytest.raises(homes.NoHomeError, match="runs on its accelerator alone"):
        homes.choose(_devices("tpu", 1), cpus, stays="it runs on its accelerator alone")


def test_what_a_cpu_can_not_lower_is_known_only_on_an_accelerator():
    missing = NotImplementedError("rule for 'x' not found for platform cpu")
    gpu, cpu = _devices("gpu", 1) + _devices("cpu", 1)
    assert homes.is_for_accelerators(missing, gpu)
    assert homes.is_for_accelerators(homes.MustStayError("x"), gpu)
    assert not homes.is_for_accelerators(missing, cpu)
    assert not homes.is_for_accelerators(NotImplementedError("another"), gpu)


# --- what is said -----------------------------------------------------------------


def test_nothing_is_said_where_all_ran_on_the_cpu():
    assert homes.describe(_devices("cpu", 8), _devices("cpu", 8)) == ""


def test_the_report_line_says_where_both_ran():
    assert homes.describe(_devices("cpu", 4), _devices("gpu", 4)) == (
        "devices: truth on 4 devices of the CPU, claim on 4 devices of gpu (any kind)"
    )
    assert homes.describe(_devices("cpu", 1), _devices("tpu", 1)) == (
        "devices: truth on the CPU, claim on tpu (any kind)"
    )


def test_the_report_line_says_why_truth_stayed_on_the_accelerator():
    own = _devices("gpu", 1)
    assert homes.describe(own, own, "cuDNN runs there alone") == (
        "devices: truth on gpu (any kind), in float64 of its own (cuDNN runs there "
        "alone); claim on gpu (any kind)"
    )


# --- meshes without devices --------------------------------------------------------


def test_an_abstract_mesh_takes_the_kind_of_device_of_its_home():
    kind = jax.sharding.AbstractDevice(
        device_kind="TPU v5e", num_cores=1, platform="tpu"
    )
    names, types = ("x", "y"), (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.sharding.AbstractMesh((1, 1), names, types, abstract_device=kind)
    assert homes.moved(mesh) is mesh
    with homes.lifting():
        moved = homes.moved(mesh)
    assert moved.abstract_device.platform == "cpu"
    assert (moved.axis_sizes, moved.axis_names) == (mesh.axis_sizes, mesh.axis_names)
    assert moved.axis_types == mesh.axis_types


def test_an_abstract_mesh_too_large_for_the_cpu_stays_what_it_is():
    kind = jax.sharding.AbstractDevice(device_kind="GPU", num_cores=1, platform="gpu")
    mesh = jax.sharding.AbstractMesh((512,), ("x",), abstract_device=kind)
    with homes.lifting():
        assert homes.moved(mesh) is mesh


def test_layouts_on_the_cpu_are_left_as_they_are():
    mesh = jax.make_mesh((1,), ("x",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with homes.lifting():
        for each in (mesh, layout, alone, mesh.abstract_mesh, "no layout", None):
            assert homes.moved(each) is each


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_the_cpu_compiles_with_few_optimisations(monkeypatch, platform):
    with _simulated(monkeypatch, platform, []):
        program = execution.lifted(lambda x: x * 3, [np.zeros(2)])
        assert program._quickly == (platform == "cpu")


# --- no float64 --------------------------------------------------------------------


def _square(x):
    return jnp.sum(jnp.sin(x) ** 2)


_CHECKS = [
    (gradtest.assert_autodiff_matches, (_square,)),
    (gradtest.assert_grad_matches, (_square, lambda x: jnp.sin(2 * x))),
    (gradtest.assert_custom_rules_match, (lambda x: jnp.sum(jax.nn.relu(x)),)),
    (gradtest.assert_grads_agree, (_square, lambda x: jnp.sum(1 - jnp.cos(x) ** 2))),
    (gradtest.assert_vjp_matches, (jnp.sin, lambda a, g: (jnp.cos(a[0]) * g,))),
]


@pytest.mark.parametrize(("check", "functions"), _CHECKS)
def test_a_tpu_without_a_cpu_backend_is_inconclusive(monkeypatch, check, functions):
    with (
        _simulated(monkeypatch, "tpu", []),
        pytest.raises(gradtest.GradientInconclusive) as caught,
    ):
        check(*functions, jnp.arange(3.0))
    assert "tpu has no float64" in str(caught.value)
    assert "set JAX_PLATFORMS=tpu,cpu" in str(caught.value)
    assert caught.value.report.findings[0].cause.name == "no float64"


def test_check_reports_it_without_raising(monkeypatch):
    with _simulated(monkeypatch, "tpu", []):
        report = gradtest.check(_square, jnp.arange(3.0))
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert "no float64" in str(report)


def test_inconclusive_can_be_a_warning(monkeypatch):
    with (
        _simulated(monkeypatch, "tpu", []),
        pytest.warns(UserWarning, match="tpu has no float64"),
    ):
        gradtest.assert_autodiff_matches(_square, 1.0, inconclusive="warn")


def test_a_gpu_without_a_cpu_backend_judges_by_its_own_float64(monkeypatch):
    with _simulated(monkeypatch, "gpu", []):
        report = gradtest.assert_autodiff_matches(_square, jnp.arange(3.0))
        with pytest.raises(gradtest.GradientMismatch, match="2 times too small"):
            gradtest.assert_grad_matches(
                _square, lambda x: jnp.sin(2 * x) / 2, jnp.arange(3.0)
            )
    assert report.precision[1].startswith("devices: truth on gpu (cpu), in float64 of")
    assert "set JAX_PLATFORMS=gpu,cpu" in report.precision[1]


# --- chex.restrict_backends ---------------------------------------------------------


def _odd(x):
    return jnp.sum(jax.nn.relu(jnp.tanh(x) * jnp.cosh(x) + 17))


@pytest.mark.parametrize("limits", [{"forbidden": ["cpu"]}, {"allowed": ["gpu"]}])
@pytest.mark.parametrize(
    "check",
    [
        gradtest.assert_autodiff_matches,
        gradtest.assert_custom_rules_match,
        gradtest.assert_grads_finite,
        gradtest.assert_grads_flow,
        gradtest.check,
    ],
)
def test_restricted_backends_are_told(check, limits):
    x = jnp.arange(7.0)
    jax.clear_caches()
    execution._programs.clear()
    with (
        chex.restrict_backends(**limits),
        pytest.raises(RuntimeError) as caught,
    ):
        check(_odd, x)
    text = str(caught.value)
    assert text.startswith(f"{check.__name__}(_odd, ...): ")
    assert "float64" in text or "the program itself" in text
    assert "for cpu" in text
    assert "call the assertion outside of it, or allow 'cpu' there" in text
    assert type(caught.value.__cause__).__name__ == "RestrictedBackendError"


def test_the_float64_form_is_named_where_it_alone_is_refused():
    program = execution.lifted(lambda x: x * 3, [np.zeros(2)])
    itself = execution.working(lambda x: x * 5, [np.float32(2)])
    with chex.restrict_backends(forbidden=["cpu"]):
        with pytest.raises(RuntimeError, match=r"float64 form .* runs where it did"):
            program.compile()
        with pytest.raises(RuntimeError, match=r"the program itself was .* for cpu"):
            itself.compile()
    assert program(np.full(2, 2.0)).tolist() == [6, 6]


def test_allowed_backends_do_no_harm():
    with chex.restrict_backends(allowed=["cpu"]):
        gradtest.assert_autodiff_matches(_odd, jnp.arange(7.0))


def test_other_errors_of_the_users_function_are_left_alone():
    def breaks(x):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        gradtest.assert_autodiff_matches(breaks, 1.0)
