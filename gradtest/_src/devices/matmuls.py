"""How finely a device multiplies matrices.

An accelerator may round the operands of a product to fewer bits than their dtype has:
NVIDIA's GPUs to TensorFloat-32, TPUs to bfloat16. `jax_default_matmul_precision` and
`precision=` change that, and a trace has what they came to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.devices import homes
from gradtest._src.jaxprs import Eqn, Jaxpr


@dataclasses.dataclass(frozen=True)
class Format:
    """What the operands of a product are rounded to.

    Attributes:
      name: As messages have it.
      eps: The spacing of its numbers at 1.
    """

    name: str
    eps: float


TF32 = Format("tf32", 2.0**-10)
FLOAT16 = Format("float16", 2.0**-10)
BFLOAT16 = Format("bfloat16", 2.0**-7)
THREE_BFLOAT16 = Format("bfloat16 in three passes", 2.0**-15)

_PRODUCTS = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
)
# What `jax.lax.Precision` means for float32: highest is float32 everywhere.
_TENSOR_CORES = {lax.Precision.DEFAULT: TF32, lax.Precision.HIGH: TF32}
_TPU = {lax.Precision.DEFAULT: BFLOAT16, lax.Precision.HIGH: THREE_BFLOAT16}
_ORDER = (lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST)
# Algorithms by name, where one is asked for; the others lose nothing of float32.
_ALGORITHMS = {
    "BF16_BF16_BF16": BFLOAT16,
    "BF16_BF16_F32": BFLOAT16,
    "BF16_BF16_F32_X3": THREE_BFLOAT16,
    "F16_F16_F16": FLOAT16,
    "F16_F16_F32": FLOAT16,
    "TF32_TF32_F32": TF32,
}
# Those of them by which a CPU rounds; it computes the others in float32.
_ON_CPU = frozenset({"F16_F16_F16", "F16_F16_F32"})
# From this compute capability on, NVIDIA's GPUs have TensorFloat-32.
_FIRST_WITH_TF32 = 8.0


def coarsest(jaxpr: Jaxpr, device: Any) -> Format | None:
    """Returns the coarsest format of all products of a program; None where exact."""
    return max(_formats(jaxpr, device), key=lambda found: found.eps, default=None)


def _formats(jaxpr: Jaxpr, device: Any) -> Iterator[Format]:
    for eqn in jaxprs.walk(jaxpr):
        if eqn.primitive.name in _PRODUCTS and _is_single(eqn):
            found = format_of(eqn.params.get("precision"), device)
            if found is not None:
                yield found


def _is_single(eqn: Eqn) -> bool:
    """Whether an operand is of float32: only those are multiplied more coarsely."""
    dtypes = [getattr(atom.aval, "dtype", None) for atom in eqn.invars[:2]]
    return any(dtype in (np.float32, np.complex64) for dtype in dtypes)


def format_of(precision: Any, device: Any) -> Format | None:
    """Returns what a device rounds float32 operands to; None where it does not.

    Args:
      precision: As an equation has it: None, a `jax.lax.Precision` or a pair of them,
        or an algorithm.
      device: The device that multiplies.
    """
    platform = homes.platform_of(device)
    name = getattr(precision, "name", "")
    if name in _ALGORITHMS:
        is_exact = platform == "cpu" and name not in _ON_CPU
        return None if is_exact else _ALGORITHMS[name]
    table: dict[lax.Precision, Format] = {}
    if platform == "tpu":
        table = _TPU
    elif _has_tensor_cores(device):
        table = _TENSOR_CORES
    return table.get(_precision(precision))  # type: ignore[arg-type]


def _precision(precision: Any) -> lax.Precision | None:
    """Returns the finer of both operands' precisions; None for an algorithm."""
    if precision is None or getattr(precision, "name", "") == "DEFAULT":
        return lax.Precision.DEFAULT
    pair = precision if isinstance(precision, tuple) else (precision,)
    if not all(each in _ORDER for each in pair):
        return None
    return max(pair, key=_ORDER.index)


def _has_tensor_cores(device: Any) -> bool:
    try:
        return float(device.compute_capability) >= _FIRST_WITH_TF32
    except (AttributeError, ValueError):  # no GPU, or none of NVIDIA's
        return False
