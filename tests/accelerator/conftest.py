"""Gives the CPU as many devices as the programs here are over.

It is the CPU that judges what runs on accelerators. The setting counts only where an
accelerator was asked for, and before JAX starts a backend.
"""

import contextlib
import os

import jax

_MOST_ACCELERATORS = 8

_is_for_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
_is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
if not (_is_for_cpu or _is_set) and jax.config.jax_num_cpu_devices < 0:
    with contextlib.suppress(RuntimeError):  # started already, with tests of the CPU
        jax.config.update("jax_num_cpu_devices", _MOST_ACCELERATORS)
