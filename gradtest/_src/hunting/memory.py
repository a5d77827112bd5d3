"""The failing inputs of earlier hunts, in a database of Hypothesis's."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src.hunting.ground import Ground
from gradtest._src.hunting.places import Example, Place, cast_like

# Keys of other versions' entries are not read.
_VERSION = b"gradtest.hunt.1"


class Memory:
    """Keeps the smallest failing input of a function, and replays it.

    Args:
      database: A `hypothesis.database.ExampleDatabase`; None keeps nothing.
      fn: The function.
      ground: The places.
    """

    def __init__(self, database: Any, fn: Callable[..., Any], ground: Ground):
        self._database, self._ground = database, ground
        leaves = [f"{leaf.name} {leaf.dtype}" for leaf in ground.inputs.leaves]
        self._key = _digest(fn, leaves)

    def examples(self) -> Iterator[tuple[bytes, Example]]:
        """Yields what was kept, the smallest first; forgets what no longer fits."""
        if self._database is None:
            return
        for kept in sorted(self._database.fetch(self._key), key=lambda b: (len(b), b)):
            example = self._read(kept)
            if example is None:
                self.forget(kept)
            else:
                yield kept, example

    def keep(self, example: Example) -> None:
        """Keeps an example of the whole program."""
        if self._database is None or example.place.rule is not None:
            return
        arrays = {
            f"leaf {k}": _bits(np.asarray(value))
            for k, value in enumerate(example.values)
            if example.place.scopes[k].domain is not None
        }
        sizes = example.place.sizes
        arrays["sizes"] = np.array([sizes[n] for n in sorted(sizes)], np.int64)
        arrays["wider"] = np.array(example.wider)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        self._database.save(self._key, file.getvalue())

    def forget(self, kept: bytes) -> None:
        """Drops what was kept."""
        self._database.delete(self._key, kept)

    def _read(self, kept: bytes) -> Example | None:
        try:
            with np.load(io.BytesIO(kept)) as arrays:
                names = sorted(self._ground.shapes.given)
                numbers = arrays["sizes"].tolist()
                place = self._ground.at(dict(zip(names, numbers, strict=True)))
                if place is None:
                    return None
                wider = int(arrays["wider"])
                values = tuple(
                    value
                    if scope.domain is None
                    else _value(place, k, arrays[f"leaf {k}"])
                    for k, (scope, value) in enumerate(
                        zip(place.scopes, place.values, strict=True)
                    )
                )
        except Exception:  # of another version, or of other arguments
            return None
        example = Example(place, values, "what failed before", wider)
        return example if place.holds(values, wider) else None


def _value(place: Place, leaf: int, bits: np.ndarray) -> Any:
    scope = place.scopes[leaf]
    assert scope.domain is not None
    domain = scope.at(place.sizes)
    array = bits.view(domain.dtype) if _is_half(domain.dtype) else bits
    if array.shape != domain.shape or array.dtype != domain.dtype:
        raise ValueError("of another shape")
    return cast_like(scope, array)


def _is_half(dtype: np.dtype) -> bool:
    return dtype == jnp.bfloat16


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns an array in a dtype that NumPy's files know."""
    return array.view(np.uint16) if _is_half(array.dtype) else array


def _digest(fn: Callable[..., Any], leaves: list[str]) -> bytes:
    """Returns the key of a function: its module, name, source and arguments."""
    inner = inspect.unwrap(fn)
    try:
        source = inspect.getsource(inner)
    except (OSError, TypeError):
        source = ""
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    parts = [getattr(inner, "__module__", "") or "", name, source, *leaves]
    digest = hashlib.sha256(_VERSION)
    for part in parts:
        digest.update(str(len(part)).encode() + b":" + part.encode("utf-8", "replace"))
    return digest.digest()
