"""Peak memory of a check beside one float64 gradient: `python -m benchmarks.memory`.

Each is measured in a process of its own: the peak of its resident memory, less what was
resident when the model stood ready in float32. Linux only.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import gradtest
from benchmarks import models

_MEBIBYTE = 2**20
PyTree = Any


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check(loss: models.Loss, params: PyTree, tokens: jax.Array) -> None:
    gradtest.assert_autodiff_matches(loss, params, tokens)


def _float64_gradient(loss: models.Loss, params: PyTree, tokens: jax.Array) -> None:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(wide, tokens))


_CALLS: dict[str, Callable[..., None]] = {
    "assert_autodiff_matches": _check,
    "float64 value_and_grad": _float64_gradient,
}


def _measure(name: str, size: str) -> int:
    """Returns by how many bytes the call lifts the peak above what was resident."""
    model = jax.block_until_ready(models.transformer(size))
    before = _resident_bytes()
    _CALLS[name](*model)
    return _peak_bytes() - before


def _fresh(name: str, size: str, repeats: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", name]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(
            [*command, "--size", size], check=True, stdout=subprocess.PIPE, text=True
        )
        runs.append(int(done.stdout.splitlines()[-1]))
    return min(runs) / _MEBIBYTE


def main() -> None:
    """Prints the table, or measures one entry of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each entry")
    parser.add_argument("--size", choices=["650k", "11m"], default="11m")
    parser.add_argument("--measure", choices=list(_CALLS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(_measure(options.measure, options.size))
        return
    print(f"{f'transformer, {options.size}':<32}{'peak (MiB)':>14}")
    peaks = {}
    for name in _CALLS:
        peaks[name] = _fresh(name, options.size, options.repeats)
        print(f"{name:<32}{peaks[name]:>14.0f}", flush=True)
    ours, reference = peaks.values()
    print(f"{'ratio':<32}{ours / reference:>14.2f}")


if __name__ == "__main__":
    main()
