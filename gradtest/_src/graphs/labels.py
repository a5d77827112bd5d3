"""Short texts for types, constants and parameters; the same in every run."""

from __future__ import annotations

import contextlib
import enum
from typing import Any

import jax
import numpy as np

_SHORT = (
    ("bfloat", "bf"),
    ("float", "f"),
    ("complex", "c"),
    ("uint", "u"),
    ("int", "i"),
)
# Parameters that say what an operation does; the others are in its details.
_TELLING = (
    "y",
    "axes",
    "axis",
    "dimension",
    "dimensions",
    "permutation",
    "new_dtype",
    "axis_name",
    "name",
)
_LONGEST_PARAMETER = 28
_SMALL = 4
_PLAIN = (bool, int, float, complex, str, type(None), enum.Enum, np.dtype)


def type_text(value: Any) -> str:
    """Returns an array's type as in a jaxpr, such as `f32[2,3]`."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        return str(value)
    name = str(getattr(dtype, "name", dtype))
    for long, short in _SHORT:
        if name.startswith(long) and name[len(long) :].isdigit():
            name = short + name[len(long) :]
    return f"{name}[{','.join(map(str, shape))}]"


def number_text(value: Any) -> str:
    """Returns a literal as a short number."""
    with contextlib.suppress(Exception):
        return _array_text(np.asarray(value))
    return type_text(value)


def constant_text(value: Any) -> str:
    """Returns the entries of a small constant, the type of a large one."""
    if isinstance(value, jax.core.Tracer):
        return "traced value"
    if not hasattr(value, "dtype"):
        return number_text(value)
    key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
    here = getattr(value, "is_fully_addressable", True)
    if not key and here and value.size <= _SMALL:
        return number_text(value)
    return type_text(value)


def _array_text(array: np.ndarray) -> str:
    if array.dtype.kind not in "biufc":  # such as bfloat16
        array = array.astype(np.float64)
    entries = [f"{entry:.6g}" if array.dtype.kind in "fc" else str(entry)
               for entry in array.reshape(-1)]  # fmt: skip
    if array.ndim == 0:
        return entries[0]
    return f"[{', '.join(entries)}]" if array.ndim == 1 else f"{array.tolist()}"


def parameters_text(params: dict[str, Any]) -> str:
    """Returns the one parameter that says most about an operation, or ""."""
    for name in _TELLING:
        if params.get(name) is not None and _is_plain(params[name]):
            text = f"{name}={_plain(params[name])}"
            return text if len(text) <= _LONGEST_PARAMETER else ""
    return ""


def all_parameters(params: dict[str, Any]) -> str:
    """Returns every parameter that is made of plain values."""
    return ", ".join(
        f"{name}={_plain(value)}"
        for name, value in sorted(params.items())
        if value is not None and _is_plain(value)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) or (
        isinstance(value, type) and hasattr(value, "dtype")
    )


def _plain(value: Any) -> str:
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return f"({','.join(map(_plain, value))})"
    return getattr(value, "__name__", None) or str(value)
