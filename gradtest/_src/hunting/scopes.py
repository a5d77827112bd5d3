"""What a hunt may do with each leaf of the arguments: its domain, and its sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes

from gradtest import domains
from gradtest._src.devices import spanning
from gradtest._src.domain import DEFAULT_SIZE, Domain
from gradtest._src.hunting import kinds
from gradtest._src.hunting.inferring import inferred
from gradtest._src.inputs import Inputs, Leaf, Role

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Scope:
    """What one leaf of the arguments may be.

    Attributes:
      name: Its path in the user's names.
      axes: Its shape; a string is a size that may change.
      domain: Where it is drawn; None where it stays as it was given.
      wider: Domains around that, in which the function need not make sense.
      given: The value that it came as; None for a domain.
      bounds: For indices, sizes that they stay below, each with what is added to it.
      moves: Whether the derivative is taken with respect to it.
    """

    name: str
    axes: tuple[Any, ...]
    domain: Domain | None
    wider: tuple[Domain, ...] = ()
    given: Any = None
    bounds: tuple[tuple[str | int, int], ...] = ()
    moves: bool = True

    def at(self, sizes: Sizes, wider: int = 0) -> Domain:
        """Returns the domain at sizes in numbers, or one of the wider ones.

        Args:
          sizes: The sizes by name.
          wider: 0 for the domain itself; n for the n-th around it, or the last.
        """
        assert self.domain is not None
        choices = (self.domain, *self.wider)
        domain = choices[min(wider, len(choices) - 1)]
        numbers = shape_at(domain.shape, sizes)
        sized = dataclasses.replace(domain, shape=numbers)
        if not self.bounds:
            return sized
        ends = dict(domain.parameters)
        ends["high"] = max(ends["low"] + 1, self._bound(sizes))
        return dataclasses.replace(sized, parameters=tuple(ends.items()))

    def _bound(self, sizes: Sizes) -> int:
        return min(
            more + (sizes[size] if isinstance(size, str) else size)
            for size, more in self.bounds
        )

    def renamed(self, names: Mapping[int, str]) -> Scope:
        """Returns the scope with names for some of its axes, by position."""
        axes = tuple(names.get(i, axis) for i, axis in enumerate(self.axes))
        if self.domain is None:
            return dataclasses.replace(self, axes=axes)
        return dataclasses.replace(
            self,
            axes=axes,
            domain=dataclasses.replace(self.domain, shape=axes),
            wider=tuple(dataclasses.replace(w, shape=axes) for w in self.wider),
        )

    def is_whole(self) -> bool:
        """Whether square matrices are still square, however the sizes change."""
        is_square = self.domain is not None and self.domain.name in kinds.SQUARE
        return not is_square or self.axes[-1] == self.axes[-2]


def shape_at(axes: Sequence[Any], sizes: Sizes) -> tuple[int, ...]:
    """Returns a shape in numbers."""
    return tuple(sizes[a] if isinstance(a, str) else int(a) for a in axes)


def read_scopes(inputs: Inputs) -> list[Scope | None]:
    """Returns the scope of each leaf of the arguments; None for those of no arrays."""
    return [_read(leaf) for leaf in inputs.leaves]


def _read(leaf: Leaf) -> Scope | None:
    if leaf.role is Role.STATIC:
        return None
    source, moves = leaf.source, leaf.role is Role.MOVES
    if isinstance(source, jax.ShapeDtypeStruct):
        source = domains.normal(tuple(source.shape), dtype=source.dtype)
    if isinstance(source, Domain):
        dtype = np.dtype(dtypes.canonicalize_dtype(source.dtype))
        source = dataclasses.replace(source, dtype=dtype)
        return Scope(leaf.name, source.shape, source, moves=moves)
    if not _has_numbers(source):
        return Scope(leaf.name, leaf.shape, None, given=source, moves=moves)
    array = np.asarray(source).astype(leaf.dtype)
    wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    if not np.isfinite(wide).all():  # such as a mask of -inf: held, or refused later
        return Scope(leaf.name, leaf.shape, None, given=source, moves=moves)
    domain, wider = inferred(array, tuple(leaf.shape))
    return Scope(leaf.name, tuple(leaf.shape), domain, wider, source, moves=moves)


def _has_numbers(value: Any) -> bool:
    """Whether a leaf is an array of numbers, all of them here."""
    if isinstance(value, float | complex):
        return True
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, np.dtype) and not spanning.spans(value)


def with_index_bounds(
    scopes: Sequence[Scope | None],
    given: Sizes,
    reaches: Callable[[int, int], bool],
) -> list[Scope | None]:
    """Ties the range of indices to the sizes that they may index.

    That is the size where an index begins to do nothing. Where none is, it stays below
    every size that it was below, at most at every size that it reached, and among those
    that do something.

    Args:
      scopes: Of all leaves.
      given: The sizes that the arguments came with.
      reaches: Whether the function tells an index, in place of all those of a leaf,
        from one that is far out of range.
    """
    fixed = {a for s in scopes if s is not None and s.moves for a in s.axes}
    lengths: dict[str | int, int] = {
        axis: given[axis] if isinstance(axis, str) else axis for axis in fixed
    }

    def bounds_of(
        leaf: int, axes: tuple[Any, ...], largest: int
    ) -> list[tuple[str | int, int]]:
        above = {axis: length for axis, length in lengths.items() if length > largest}
        ends = {n for n in above.values() if reaches(leaf, n - 1)}
        ends = {n for n in ends if not reaches(leaf, n)}
        if ends:
            found = [(axis, 0) for axis, length in above.items() if length in ends]
            # As many indices as there are to choose from may be an accident.
            is_own = all(axis in axes for axis, _ in found)
            return [*found, (largest + 1, 0)] if is_own else found
        bounds = [
            (axis, int(length == largest))
            for axis, length in lengths.items()
            if length >= largest > 0
        ]
        high = min(above.values(), default=largest + 1)
        if all(more for _, more in bounds) or not reaches(leaf, high - 1):
            bounds.append((largest + 1, 0))
        return bounds

    def bounded(leaf: int, scope: Scope | None) -> Scope | None:
        is_index = (
            scope is not None
            and scope.given is not None
            and scope.domain is not None
            and scope.domain.name == "integers"
        )
        if scope is None or not is_index or not np.size(scope.given):
            return scope
        largest = int(np.max(np.asarray(scope.given)))
        bounds = bounds_of(leaf, scope.axes, largest)
        return dataclasses.replace(scope, bounds=tuple(bounds))

    return [bounded(leaf, scope) for leaf, scope in enumerate(scopes)]


def named_sizes(scopes: Sequence[Scope | None]) -> dict[str, int]:
    """Returns the sizes that came with names, each at what it is drawn at first."""
    return {
        axis: DEFAULT_SIZE
        for scope in scopes
        if scope is not None
        for axis in scope.axes
        if isinstance(axis, str)
    }


def count(scopes: Sequence[Scope | None], sizes: Sizes) -> int:
    """Returns the number of entries of all leaves."""
    return sum(
        math.prod(shape_at(scope.axes, sizes)) for scope in scopes if scope is not None
    )
