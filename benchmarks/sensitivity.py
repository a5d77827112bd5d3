"""The smallest mistake that a check still refuses: `python -m benchmarks.sensitivity`.

One leaf of each right model has its gradient multiplied by 1 + 10^-k; the exponent is
bisected between 1 (a tenth) and 9. In half precision the product is taken in float32
inside the rule, and cast back. The table's last column is what the report of the right
model said it would have seen.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradtest
from tests.right_models import RIGHT_MODELS, RightModel, leaf_paths, scaled_leaf

_LEAST, _MOST = 1.0, 9.0
# How finely the exponent is bisected.
_RESOLUTION = 0.25


def _path(args: tuple[Any, ...]) -> str:
    """A leaf whose gradient is not zero: a kernel, where there are any."""
    paths = leaf_paths(args)
    kernels = [path for path in paths if "kernel" in path]
    return kernels[0] if kernels else paths[len(paths) // 2]


def smallest_refused(model: RightModel, dtype: Any) -> tuple[float, float]:
    """Returns the smallest relative error refused, and what the report promised."""
    fn, args = model.make(dtype)
    path = _path(args)
    compute_dtype = None if dtype == jnp.float32 else jnp.float32

    def is_refused(exponent: float) -> bool:
        wrong = scaled_leaf(fn, path, 1 + 10**-exponent, compute_dtype=compute_dtype)
        report = gradtest.check(wrong, *args, argnums=model.argnums)
        return report.verdict is gradtest.Verdict.FAIL

    promised = gradtest.check(fn, *args, argnums=model.argnums).smallest_seen
    refused, accepted = _LEAST, _MOST
    if not is_refused(refused):
        return float("inf"), promised
    while accepted - refused > _RESOLUTION:
        middle = (accepted + refused) / 2
        if is_refused(middle):
            refused = middle
        else:
            accepted = middle
    return 10**-refused, promised


def main() -> int:
    """Prints the table; fails where an error of 1e-4 is not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names of models; all by default")
    chosen = parser.parse_args().models
    missed = 0
    print(f"{'model':24s}{'dtype':10s}{'smallest caught':>16s}{'promised':>10s}")
    for model in RIGHT_MODELS:
        too_few = model.devices > jax.device_count()
        if (chosen and model.name not in chosen) or too_few:
            continue
        for dtype in model.dtypes:
            caught, promised = smallest_refused(model, dtype)
            missed += caught > 1e-4
            name = np.dtype(dtype).name
            print(f"{model.name:24s}{name:10s}{caught:16.1e}{promised:10.0e}")
            sys.stdout.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
