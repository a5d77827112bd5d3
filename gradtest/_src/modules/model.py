"""What Linen and NNX modules have in common: variables, and a pure call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import jax
import numpy as np

from gradtest._src import seeding
from gradtest._src.lifting import is_inexact

PyTree = Any
# Takes params, collections, positional and keyword inputs; returns the output and the
# updated collections.
Apply = Callable[[PyTree, PyTree, tuple[Any, ...], dict[str, Any]], tuple[Any, PyTree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One leaf of the parameters.

    Attributes:
      name: Its name in messages, such as `params['Dense_0']['kernel']`.
      path: The module path, such as `("Dense_0", "kernel")`.
      value: What filters are asked about: an array, or NNX's variable.
    """

    name: str
    path: tuple[Any, ...]
    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A module's variables, and its call as a pure function of them.

    Attributes:
      params: What is differentiated.
      collections: All other variables.
      apply: The call.
      entries: The leaves of `params`.
      notes: What a report should say of the module.
      after: The call again; returns the output, and all variables as the call leaves
        them: the parameters under "params", beside the collections.
    """

    params: PyTree
    collections: dict[str, PyTree]
    apply: Apply
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    after: Apply | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """How a module is to be called when it is read.

    Attributes:
      inputs: Positional inputs, all of them values.
      kwargs: Keyword inputs.
      method: The method, or its name; None for `__call__`.
      rngs: As the user gave it.
      key: Draws what `rngs` leaves open.
    """

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: Any
    rngs: Any
    key: Any


class Streams:
    """The keys of a module's random streams: fixed, whatever a check does.

    Args:
      rngs: None, an integer or a key for every stream, or a mapping of streams.
      key: Stands in for None.

    Raises:
      TypeError: `rngs` is none of them.
    """

    def __init__(self, rngs: Any, key: Any):
        self.is_open = not isinstance(rngs, Mapping)
        self.given: dict[str, Any] = {}
        self._base = None
        if isinstance(rngs, Mapping):
            self.given = {
                _stream_name(name): _as_key(f"rngs[{name!r}]", value)
                for name, value in rngs.items()
            }
            rngs = None
        if rngs is not None:
            self._base = _as_key("rngs", rngs)
        self._key = key

    def derived(self, name: str) -> Any:
        """Returns the key of a stream that is not given by its name."""
        with jax.ensure_compile_time_eval():  # may be asked for inside of a trace
            base = self._base
            if base is None:
                seed = seeding.generator(self._key, "stream").integers(2**31)
                base = jax.random.key(int(seed))
            return jax.random.fold_in(base, crc32(name.encode()) & 0x7FFFFFFF)

    def key_of(self, name: str) -> Any:
        """Returns the key of a stream, given or derived."""
        return self.given.get(name, self.derived(name))


def _stream_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"`rngs` must name its streams by strings, got {name!r}.")
    return name


def _as_key(role: str, value: Any) -> Any:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return jax.random.key(int(value))
    try:
        seeding.describe(value)
    except TypeError as error:
        what = str(error).partition("got ")[2] or repr(value)
        raise TypeError(
            f"`{role}` must be an integer or one JAX key (`rngs` may also be a dict "
            f"of them by stream, such as {{'dropout': 0}}), got {what}."
        ) from None
    return jax.numpy.asarray(value)


def entries_of(params: PyTree, value_at: Callable[..., Any]) -> tuple[Entry, ...]:
    """Returns the leaves of the parameters that can be differentiated.

    Args:
      params: Nested dicts.
      value_at: Takes a leaf's path and the leaf; returns what filters are asked about.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_drawn)
    entries = []
    for path, leaf in flat:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and not isinstance(leaf, float | complex):
            continue
        if dtype is not None and not is_inexact(jax.numpy.dtype(dtype)):
            continue
        keys = tuple(_part(entry) for entry in path)
        name = "params" + jax.tree_util.keystr(path)
        entries.append(Entry(name, keys, value_at(keys, leaf)))
    return tuple(entries)


def _is_drawn(value: Any) -> bool:
    return hasattr(value, "draw") or isinstance(value, jax.ShapeDtypeStruct)


def _part(entry: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)
