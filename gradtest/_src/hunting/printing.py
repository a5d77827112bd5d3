"""An example as Python code that can be pasted into a test."""

from __future__ import annotations

import textwrap
from typing import Any

import jax
import numpy as np

from gradtest._src.inputs import Inputs, Role

# Arrays of more entries are not written out.
_MOST_ENTRIES = 120
_WIDTH = 88


def code(inputs: Inputs, values: tuple[Any, ...]) -> list[str]:
    """Returns lines of code that make the arguments, one name for each argument.

    Args:
      inputs: The arguments.
      values: Their leaves that are arrays.

    Returns:
      The lines; where an array is too large to be written, a comment in its place.
    """
    arrays = iter(values)
    by_leaf = [
        leaf.source if leaf.role is Role.STATIC else next(arrays)
        for leaf in inputs.leaves
    ]
    written = [_Written(expression(value), value) for value in by_leaf]
    lines = []
    try:
        tree = jax.tree_util.tree_unflatten(inputs.treedef, written)
        for name, argument in zip(variables(inputs), tree, strict=True):
            lines += _wrapped(f"{name} = {argument!r}")
    except Exception:  # a class that takes no other leaves than arrays
        for leaf, text in zip(inputs.leaves, written, strict=True):
            lines += _wrapped(f"# {leaf.name} = {text!r}")
    return lines


def variables(inputs: Inputs) -> list[str]:
    """Returns a name for each argument that can be assigned to."""
    return [
        name if name.isidentifier() else f"argument_{i}"
        for i, name in enumerate(inputs.names)
    ]


class _Written:
    """A leaf as code; its `repr` is the code, in whatever container it stands."""

    def __init__(self, text: str, value: Any):
        self.text, self.value = text, value

    def __repr__(self) -> str:
        return self.text


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def expression(value: Any) -> str:
    """Returns an expression that makes a leaf."""
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float | complex) and not isinstance(value, np.generic):
        return repr(value)
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return repr(value)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(value)).tolist()
        return f"jax.random.wrap_key_data(jnp.array({words}, jnp.uint32))"
    return _array(np.asarray(value))


def _array(array: np.ndarray) -> str:
    kind = f"jnp.{array.dtype.name}" if array.dtype != np.bool_ else "bool"
    flat = array.ravel()
    if flat.size > 4 and all(entry.tobytes() == flat[0].tobytes() for entry in flat):
        return _constant(array.shape, flat[0], kind)
    if not flat.size:
        return f"jnp.zeros({array.shape}, {kind})"
    if flat.size > _MOST_ENTRIES:
        return _sparse(array, kind)
    return f"jnp.array({_nested(array)}, {kind})"


def _constant(shape: tuple[int, ...], entry: Any, kind: str) -> str:
    if _number(entry) in ("0.0", "0"):
        return f"jnp.zeros({shape}, {kind})"
    return f"jnp.full({shape}, {_number(entry)}, {kind})"


def _sparse(array: np.ndarray, kind: str) -> str:
    """Writes a large array as a constant one with a few entries set."""
    flat = array.ravel()
    entries, counts = np.unique(flat, return_counts=True)
    fill = entries[np.argmax(counts)]
    (others,) = np.nonzero(flat != fill)
    if others.size > 12:
        return f"...  # {kind}{list(array.shape)}: in report.inputs"
    text = _constant(array.shape, fill, kind)
    for place in others:
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, array.shape))
        text += f".at[{index}].set({_number(flat[place])})"
    return text


def _nested(array: np.ndarray) -> str:
    if not array.ndim:
        return _number(array[()])
    return f"[{', '.join(_nested(row) for row in array)}]"


def _number(entry: Any) -> str:
    """Returns the shortest number that is this entry in its dtype."""
    kind = entry.dtype
    if kind == np.bool_:
        return str(bool(entry))
    if kind.kind in "iu":
        return str(int(entry))
    if kind.kind == "c":
        return f"{complex(entry)!r}"
    wide = float(entry)
    for digits in range(1, 17):
        short = float(f"{wide:.{digits}g}")
        if np.asarray(short, kind).tobytes() == entry.tobytes():
            return repr(short)
    return repr(wide)
