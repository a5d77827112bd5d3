"""Leaves of params and states, compared bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.findings import Entry
from gradtest._src.lifting import is_inexact
from gradtest._src.optimisers import trees

PyTree = Any


def keys_of(name: str) -> list[str]:
    """Returns the fields and keys on the way to a leaf."""
    return name.replace("]", "").replace("'", "").replace("[", ".").split(".")


def pairs_of(one: PyTree, other: PyTree, name: str) -> list[tuple[str, Any, Any]]:
    """Returns the leaves of two trees side by side, by name."""
    before, after = trees.paths(one, name), trees.paths(other, name)
    if before.keys() != after.keys():
        missing = sorted(before.keys() ^ after.keys())
        raise TypeError(
            f"`tx_or_step` must return a {name} like the one it takes: {missing[0]} is "
            "in one of them alone."
        )
    return [(path, leaf, after[path]) for path, leaf in before.items()]


def unmoved(one: PyTree, other: PyTree) -> str:
    """Returns the first leaf's name where all leaves are the same; else ""."""
    pairs = pairs_of(one, other, "params")
    return pairs[0][0] if all(is_same(old, new) for _, old, new in pairs) else ""


def is_same(one: Any, other: Any) -> bool:
    """Whether two leaves are the same bit for bit."""
    one, other = words_of(one), words_of(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.tobytes() == other.tobytes()


def words_of(leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(jnp.asarray(leaf))


def is_sound(leaf: Any) -> bool:
    """Whether a leaf has no NaN and no infinite entry."""
    if not is_inexact(getattr(leaf, "dtype", None)):
        return True
    return bool(np.isfinite(words_of(leaf).astype(np.complex128)).all())


def first_difference(old: np.ndarray, new: np.ndarray) -> Entry | None:
    """Returns the first entry that differs."""
    if old.shape != new.shape:
        return None
    wrong = np.atleast_1d((old != new) & ~((old != old) & (new != new)))
    if not wrong.any():
        return None
    index = tuple(int(n) for n in np.argwhere(wrong)[0])[: old.ndim]
    return Entry(index, _number(new[index]), _number(old[index]))


def _number(value: Any) -> complex:
    return complex(value) if np.iscomplexobj(value) else float(value)
