"""Runs the tests on the CPU, and those for many devices only where there are enough."""

import os
from collections.abc import Iterator

# Before anything imports JAX: the backend is chosen once per process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

_DEVICES_NEEDED = 8


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks Chex's pmap variants, and skips what too few devices can't run."""
    for item in items:
        # Chex names the tests it makes after their variants.
        if item.name.endswith("_with_pmap"):
            item.add_marker(pytest.mark.devices)
    marked = [item for item in items if item.get_closest_marker("devices")]
    # On CI too few devices are a mistake in the setup: there the tests must fail.
    if not marked or "CI" in os.environ or jax.device_count() >= _DEVICES_NEEDED:
        return
    reason = (
        f"needs {_DEVICES_NEEDED} devices, found {jax.device_count()}; set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={_DEVICES_NEEDED}"
    )
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Frees what JAX compiled for a module: thousands of tests fill the memory."""
    yield
    jax.clear_caches()
