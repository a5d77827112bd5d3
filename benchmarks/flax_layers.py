"""Checks every layer of Flax that has parameters, and prints a table of the gaps.

Run with `python -m benchmarks.flax_layers`; the table is that of `docs/flax.md`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import gradtest
import gradtest.flax
from gradtest import Report, Verdict
from tests import flax_modules


def checked(make: flax_modules.Make, dtype: Any) -> Report | None:
    """Returns the report of one layer; None where it takes no such dtype."""
    module, inputs, options = make(dtype)
    if dtype != jnp.float32 and not uses(module, dtype):
        return None
    try:
        return gradtest.flax.assert_module_grads(module, *inputs, **options)
    except (gradtest.GradientMismatch, gradtest.GradientInconclusive) as error:
        return error.report


def uses(module: Any, dtype: Any) -> bool:
    """Whether a module, or one inside of it, computes in this dtype."""
    return jnp.dtype(dtype).name in repr(module)


def gap(report: Report) -> str:
    """Returns the largest formula gap of any parameter, and the largest by rounding."""
    if report.verdict is not Verdict.PASS:
        return f"**{report.verdict.value}**"
    found = [f for f in report.findings if f.name.startswith("params")]
    rounding = max((f.rounding[0] for f in found if f.rounding), default=0.0)
    largest = max(f.size for f in found)
    return ", ".join(f"{size:.0e}" if size else "0" for size in (largest, rounding))


def rows() -> Iterator[str]:
    """Yields the rows of the table, one for each layer and way to call it."""
    for library, prefix in ((nn, "nn"), (nnx, "nnx")):
        for name, way, make in flax_modules.cases(library):
            reports = [checked(make, dtype) for dtype in flax_modules.DTYPES]
            told = ["–" if report is None else gap(report) for report in reports]
            first = reports[0]
            assert first is not None
            leaves = {f.name for f in first.findings if f.name.startswith("params")}
            rules = ", ".join(dict.fromkeys(rule.name for rule in first.rules)) or "–"
            label = f"`{prefix}.{name}`" + (f" ({way})" if way else "")
            yield f"| {label} | {len(leaves)} | {' | '.join(told)} | {rules} |"


def main() -> None:
    """Prints the table."""
    started = time.monotonic()
    print("| layer | parameters | float32 | bfloat16 | custom rules |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows():
        print(row, flush=True)
    took = time.monotonic() - started
    print(f"\njax {jax.__version__}, flax {flax.__version__}: {took:.0f} s")


if __name__ == "__main__":
    main()
