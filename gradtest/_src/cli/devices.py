"""The JAX that a command runs in: how many devices, and how precise."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

from gradtest._src.cli.errors import UsageError


@contextlib.contextmanager
def running_in(devices: int | None, x64: bool) -> Iterator[None]:
    """Sets JAX up for a `with` block; it does not start here.

    Code of the user's that is imported in the block may still choose a platform or join
    other processes, as `require_devices` starts JAX. Then the number of devices stays.
    """
    import jax

    # All of it now: a file of the user's may have the name of something it needs.
    importlib.import_module("gradtest._src.public")

    if devices is not None:
        # Where JAX runs already it refuses, and `require_devices` says what to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)
            jax.config.update("jax_platforms", "cpu")
    before = jax.config.values["jax_enable_x64"]
    if x64:
        jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        if x64:
            jax.config.update("jax_enable_x64", before)


def require_devices(wanted: int | None) -> None:
    """Starts JAX where a number of devices was asked for.

    Raises:
      UsageError: It has another number of them.
    """
    import jax

    if wanted is None:
        return
    found = jax.local_devices()
    if len(found) != wanted or found[0].platform != "cpu":
        raise UsageError(
            f"--devices {wanted}: JAX runs on {len(found)} of {found[0].platform}, as "
            "it was set or started before. Leave that to --devices."
        )
