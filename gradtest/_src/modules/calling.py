"""What a module is called with: arrays that a check holds, and all the rest."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src.inputs import Inputs, Role, argument_names, read_inputs

_RESERVED = ("params", "collections")


@dataclasses.dataclass(frozen=True, eq=False)
class _Number:
    """A Python number among the inputs: one that the module may branch on."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments:
    """Positional inputs, then keyword ones that hold arrays; the rest is fixed.

    Attributes:
      values: The inputs in that order, numbers wrapped.
      names: Their names.
      keywords: The names of the keyword ones.
      fixed: Keyword arguments without arrays.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    fixed: dict[str, Any]

    @classmethod
    def of(
        cls,
        module: Any,
        method: Any,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Arguments:
        """Sorts what a module is called with."""
        keywords = tuple(name for name, value in kwargs.items() if _has_array(value))
        fixed = {name: kwargs[name] for name in kwargs if name not in keywords}
        values = [*inputs, *(kwargs[name] for name in keywords)]
        names = [*_names(module, method, len(inputs)), *keywords]
        return cls(tuple(map(_wrapped, values)), _unique(names), keywords, fixed)

    def at(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword arguments around the given values."""
        plain = [_unwrapped(value) for value in values]
        count = len(plain) - len(self.keywords)
        by_name = dict(zip(self.keywords, plain[count:], strict=True))
        return tuple(plain[:count]), {**self.fixed, **by_name}

    def drawn(self, key: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of the first trial."""
        inputs = read(self.sign(lambda *args: None, "module"), (0.0, {}, *self.values))
        point = inputs.draw(key, 0)
        return self.at(inputs.arguments(point.moving, point.held)[2:])

    def sign(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Gives a function of params, collections and inputs their names."""
        kind = inspect.Parameter.POSITIONAL_ONLY
        parameters = [
            inspect.Parameter(each, kind) for each in (*_RESERVED, *self.names)
        ]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__name__ = function.__qualname__ = name
        return function


def read(function: Callable[..., Any], args: tuple[Any, ...]) -> Inputs:
    """Reads the arguments of a function whose first one is differentiated."""
    return read_inputs(function, args, argnums=0)


def _has_array(value: Any) -> bool:
    inputs = read_inputs(lambda *args: None, (0.0, value), argnums=0)
    return any(
        leaf.role is not Role.STATIC and not _is_number(leaf.source)
        for leaf in inputs.leaves[1:]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float | complex) and not isinstance(value, np.generic)


def _wrapped(value: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: _Number(leaf) if _is_number(leaf) else leaf, value
    )


def _unwrapped(value: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: leaf.value if isinstance(leaf, _Number) else leaf, value
    )


def _names(module: Any, method: Any, count: int) -> list[str]:
    """Returns the names of a method's first parameters."""
    call: Any = "__call__" if method is None else method
    if isinstance(call, str):
        call = getattr(type(module), call, None)
    is_bound = inspect.ismethod(call)
    return argument_names(call, count + (not is_bound))[not is_bound :]


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names that a signature can hold, each one once."""
    taken = set(_RESERVED)
    unique = []
    for place, name in enumerate(names):
        if not name.isidentifier() or name in taken:
            name = f"input_{place}"
        taken.add(name)
        unique.append(name)
    return tuple(unique)
