"""Times the assertion on data-parallel steps: `python -m benchmarks.parallel`.

One global batch over 1, 2, 4 and 8 simulated devices, each in a fresh process. The step
is run once before the assertion, as a training would; what the assertion compiles after
that is counted, and apart from it what it compiles of the step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

import gradtest
from benchmarks import models

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_DEVICES = (1, 2, 4, 8)
_SEQUENCES = 16


class _Compilations:
    """How many programs XLA compiles, and how many of them run over several devices."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, *_: Any, fun_name: str = "", **__: Any) -> None:
        if event == _COMPILE_EVENT:
            self.names.append(fun_name)

    def take(self) -> list[str]:
        """Returns the names of what was compiled since the last call."""
        names, self.names = self.names, []
        return names


def _make_step(loss: Any, devices: int) -> Any:
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip
    split = PartitionSpec("data")

    def local(params: Any, tokens: jax.Array) -> Any:
        value = jax.value_and_grad(loss)(params, tokens)
        return lax.pmean(value, "data")

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), split),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def _measure(devices: int, size: str) -> dict[str, float]:
    loss, params, tokens = models.transformer(size)
    tokens = jnp.tile(tokens, (_SEQUENCES // len(tokens), 1))
    tokens = (tokens + jnp.arange(_SEQUENCES)[:, None]) % tokens.max()
    step = _make_step(loss, devices)
    compilations = _Compilations()
    found = {}
    start = time.perf_counter()
    jax.block_until_ready(step(params, tokens))
    found["step, first"] = time.perf_counter() - start
    compilations.take()
    for name in ("assertion, first", "assertion, again"):
        start = time.perf_counter()
        gradtest.assert_parallel_grads_match(step, loss, params, tokens)
        found[name] = time.perf_counter() - start
        names = compilations.take()
        found[name.replace("assertion", "compiled")] = len(names)
        found[name.replace("assertion", "of the step")] = sum(
            name in ("jit(claimed)", "jit(local)", "claimed", "local") for name in names
        )
        params = models.another_point(params)
        compilations.take()
    return found


def _fresh(repeats: int, devices: int, size: str) -> dict[str, float]:
    """Measures in fresh processes; the least of each number counts."""
    flags = f"--xla_force_host_platform_device_count={max(_DEVICES)}"
    command = [sys.executable, "-m", "benchmarks.parallel", "--size", size]
    runs = [
        json.loads(
            subprocess.run(
                [*command, "--measure", str(devices)], check=True, text=True,
                capture_output=True, env=os.environ | {"XLA_FLAGS": flags},
            ).stdout
        )
        for _ in range(repeats)
    ]  # fmt: skip
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Prints the table, or measures one row of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row")
    parser.add_argument("--size", choices=["650k", "11m"], default="650k")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.measure, options.size)))
        return
    rows = {n: _fresh(options.repeats, n, options.size) for n in _DEVICES}
    print(f"{'devices':>10}", *(f"{name:>18}" for name in rows[1]))
    for devices, found in rows.items():
        print(f"{devices:>10}", *(f"{value:18.3g}" for value in found.values()))
    for name in ("assertion, first", "assertion, again"):
        ratio = rows[max(_DEVICES)][name] / rows[1][name]
        print(f"{name}, on {max(_DEVICES)} devices to one: {ratio:.2f}")


if __name__ == "__main__":
    main()
