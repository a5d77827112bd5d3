"""What a check ran with: versions, flags and devices, so that it can be run again."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform

import jax

_PACKAGES = ("gradtest", "jax", "jaxlib", "flax", "optax", "chex", "numpy")
_FLAGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_dtype_bits",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
_VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS")


def environment() -> tuple[tuple[str, str], ...]:
    """Returns names and values of what may change a result of JAX's."""
    flags = [
        (flag, str(getattr(jax.config, flag)))
        for flag in _FLAGS
        if hasattr(jax.config, flag)
    ]
    variables = [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return (*versions(), *flags, *variables, ("devices", _devices()))


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """Returns Python, the system and the packages that gradtest stands on."""
    found = [
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return tuple(found)


def _devices() -> str:
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
