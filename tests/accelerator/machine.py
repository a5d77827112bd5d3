"""What the machine has, and why a test can't run without it.

The tests of this folder need a GPU or a TPU. On such a machine run them by

    JAX_PLATFORMS= python -m pytest tests/accelerator

The empty setting lets JAX take what it finds, the CPU beside it: without it the tests
choose the CPU, as all others do. Where JAX_PLATFORMS is set to something else, it must
name the CPU as well: `JAX_PLATFORMS=cuda,cpu`.
"""

import jax
import pytest

_HOW = "on a machine that has, run `JAX_PLATFORMS= python -m pytest tests/accelerator`"
_FIRST_WITH_TENSOR_CORES = 8.0
_FIRST_WITH_MOSAIC = 9.0


def accelerators():
    """Returns the devices that JAX runs programs on by default, if they are no CPUs."""
    return [device for device in jax.devices() if device.platform != "cpu"]


def capability():
    """Returns the compute capability of an NVIDIA GPU; 0 where there is none."""
    try:
        return float(accelerators()[0].compute_capability)
    except (IndexError, AttributeError, ValueError):
        return 0.0


def platform():
    """Returns the name of the default backend."""
    return jax.devices()[0].platform


def _needs(is_there, what):
    found = ", ".join(dict.fromkeys(device.device_kind for device in jax.devices()))
    return pytest.mark.skipif(
        not is_there, reason=f"needs {what}, JAX found {found}; {_HOW}"
    )


needs_accelerator = _needs(accelerators(), "a GPU or a TPU")
needs_tpu = _needs(platform() == "tpu", "a TPU")
needs_tensor_cores = _needs(
    capability() >= _FIRST_WITH_TENSOR_CORES,
    "an NVIDIA GPU of compute capability 8.0 or more, which has TensorFloat-32",
)
needs_mosaic = _needs(
    capability() >= _FIRST_WITH_MOSAIC,
    "an NVIDIA GPU of compute capability 9.0 or more, which Mosaic compiles for",
)
needs_coarse_products = _needs(
    platform() == "tpu" or capability() >= _FIRST_WITH_TENSOR_CORES,
    "a TPU or a GPU with TensorFloat-32, which multiply float32 more coarsely",
)
needs_several = _needs(len(accelerators()) > 1, "at least two GPUs or TPU cores")


def devices_line(report):
    """Returns the line of a report that says where truth and claim ran."""
    (line,) = {line for line in report.precision if "devices: " in line}
    return line
