"""Optax's optimisers against plain references: `python -m benchmarks.optax_aliases`.

Each takes six steps in float32, bfloat16 and a mixture of both. The gap is that of the
leaf and the step that are farthest off, in float64; the last column is what the float32
params lose over the six steps, relative to how far they move.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp

from gradtest.optax import assert_update_matches
from tests.optax_references import ALIASES, DEPARTURES, FACTORED, Alias

_DTYPES = {
    "float32": {"w": jnp.float32, "b": jnp.float32},
    "bfloat16": {"w": jnp.bfloat16, "b": jnp.bfloat16},
    "mixed": {"w": jnp.bfloat16, "b": jnp.float32},
}
_PARAMS = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.full(3, 0.5)}
_GRADS = {
    "w": jax.random.normal(jax.random.key(1), (4, 3)),
    "b": jnp.array([0.3, -1.0, 0.7]),
}


def _cast(tree: dict[str, Any], dtypes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astype(dtypes[name]) for name, value in tree.items()}


def _row(name: str, alias: Alias) -> str:
    gaps, lost = [], "-"
    for kind, dtypes in _DTYPES.items():
        report = assert_update_matches(
            alias.make(),
            alias.reference,
            _cast(_PARAMS, dtypes),
            _cast(_GRADS, dtypes),
            steps=6,
            extra_args=alias.extra_args,
        )
        gaps.append(max(finding.size for finding in report.findings))
        roundings = [f.rounding[0] for f in report.findings if f.rounding]
        if kind == "float32" and roundings:
            lost = f"{max(roundings):.0e}"
    cells = " | ".join(f"{gap:.0e}" for gap in gaps)
    note = " *" if name in DEPARTURES else ""
    return f"| `{name}`{note} | {alias.source} | {cells} | {lost} |"


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="optimisers; all by default")
    chosen = parser.parse_args(arguments).names
    print("| optimiser | formula | float32 | bfloat16 | mixed | lost |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, alias in [*ALIASES.items(), ("adafactor, factored", FACTORED)]:
        if not chosen or name in chosen:
            print(_row(name, alias), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
