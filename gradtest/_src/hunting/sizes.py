"""Which sizes of the arguments may change, and which are tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.hunting import scopes as _scopes
from gradtest._src.hunting.scopes import Scope, Sizes, shape_at
from gradtest._src.inputs import Inputs, Role

# Odd ones, powers of two and one off. Of several sizes each takes all of them in turn.
SIZES = (3, 8, 1, 17, 2, 5, 33, 16)
FURTHER = (9, 4, 7, 32, 12, 6, 64)
# Arguments of more entries are not made larger.
_MOST_ENTRIES = 5_000
_STRIDE = 3
# An index so many times as large as one that is looked at lies far behind it.
_FAR = 3

Place = tuple[int, int]  # a leaf and one of its axes


class Shapes:
    """The arguments' shapes as functions of sizes.

    Attributes:
      scopes: What each leaf may be, with names for the sizes that may change.
      given: The sizes that the arguments came with.
      fixed: Why sizes can't change, one line each.
    """

    def __init__(
        self, fn: Callable[..., Any], inputs: Inputs, leaves: Sequence[Scope | None]
    ):
        self._fn, self._inputs = fn, inputs
        self.scopes = list(leaves)
        self.given = _scopes.named_sizes(leaves)
        self.fixed: list[str] = []
        self._known: dict[Any, bool] = {}
        self._find()
        self.scopes = _scopes.with_index_bounds(self.scopes, self.given, self._reaches)

    def accepts(self, sizes: Sizes) -> bool:
        """Whether the function takes arguments of these sizes."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            self._known[key] = self._takes(self.scopes, sizes)
        return self._known[key]

    def _takes(self, leaves: Sequence[Scope | None], sizes: Sizes) -> bool:
        return not self._refusal(leaves, sizes)

    def _refusal(self, leaves: Sequence[Scope | None], sizes: Sizes) -> str:
        """Returns what the function raises at sizes; empty where it does not."""
        if not all(scope.is_whole() for scope in leaves if scope is not None):
            return "matrices are no longer square"
        arrays, static = [], []
        for leaf, scope in zip(self._inputs.leaves, leaves, strict=True):
            if scope is None:
                static.append(leaf.source)
            elif scope.domain is None or isinstance(leaf.source, float | complex):
                arrays.append(leaf.source)
            else:
                shape = shape_at(scope.axes, sizes)
                arrays.append(jax.ShapeDtypeStruct(shape, leaf.dtype))

        def call(arrays: list[Any]) -> Any:
            values, others = iter(arrays), iter(static)
            whole = [
                next(others) if leaf.role is Role.STATIC else next(values)
                for leaf in self._inputs.leaves
            ]
            tree = jax.tree_util.tree_unflatten(self._inputs.treedef, whole)
            results = jax.tree_util.tree_leaves(self._fn(*tree))
            return [jnp.asarray(value) for value in results if hasattr(value, "dtype")]

        try:
            jax.eval_shape(call, arrays)
        except Exception as error:  # whatever the user's code raises at this size
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        return ""

    def _reaches(self, leaf: int, index: int) -> bool:
        """Whether the function tells an index from one that is far out of range."""
        held = [each for each in self._inputs.leaves if each.role is Role.HELD]
        place = held.index(self._inputs.leaves[leaf])
        point = self._inputs.draw(0, 0)
        array = np.asarray(point.held[place])
        far = min(_FAR * (index + 1), np.iinfo(array.dtype).max)

        def values(index: int) -> list[np.ndarray]:
            filled = jnp.asarray(np.full_like(array, index))
            held = [*point.held[:place], filled, *point.held[place + 1 :]]
            results = self._fn(*self._inputs.arguments(point.moving, held))
            return [np.asarray(value) for value in jax.tree_util.tree_leaves(results)]

        try:
            pairs = list(zip(values(index), values(far), strict=True))
        except Exception:  # whatever the user's code raises out of range
            return False
        return any(one.tobytes() != other.tobytes() for one, other in pairs)

    # --- which sizes may change -------------------------------------------------------

    def _find(self) -> None:
        """Names the axes of given arrays whose lengths may change together."""
        refusal = self._refusal(self.scopes, self.given)
        if refusal:
            self.fixed.append(f"sizes stay as given: {refusal}")
            return
        by_length: dict[Hashable, list[Place]] = {}
        for i, scope in enumerate(self.scopes):
            if scope is None or scope.domain is None or scope.given is None:
                continue
            for j, length in enumerate(scope.axes):
                if length:
                    by_length.setdefault(length, []).append((i, j))
        kept = [
            places for group in by_length.values() for places in self._splits([group])
        ]
        for places in kept:
            self._name(places)
        for length, places in by_length.items():
            left = [p for p in places if not any(p in group for group in kept)]
            if left:
                names = sorted({self._scope(i).name for i, _ in left})
                self.fixed.append(
                    f"size {length} of {', '.join(names[:4])} stays: the function "
                    "takes no other"
                )

    def _scope(self, leaf: int) -> Scope:
        scope = self.scopes[leaf]
        assert scope is not None
        return scope

    def _splits(
        self, groups: list[list[Place]], depth: int = 0
    ) -> Iterator[list[Place]]:
        """Yields the largest groups of equal axes that may change by themselves."""
        for group in groups:
            if self._may_change(group):
                yield group
                continue
            for split in _SPLITS[depth:]:
                depth += 1
                parts: dict[Hashable, list[Place]] = {}
                for i, j in group:
                    parts.setdefault(split(i, j, self._scope(i)), []).append((i, j))
                if len(parts) > 1:
                    yield from self._splits(list(parts.values()), depth)
                    break

    def _may_change(self, group: Sequence[Place]) -> bool:
        i, j = group[0]
        length = self._scope(i).axes[j]
        trial = self._with_name(group, "any_size")
        return any(
            self._takes(trial, {**self.given, "any_size": size})
            for size in dict.fromkeys((length + 1, 2 * length, length + 4, length - 1))
            if size > 0 and size != length
        )

    def _with_name(self, group: Sequence[Place], name: str) -> list[Scope | None]:
        named: dict[int, dict[int, str]] = {}
        for i, j in group:
            named.setdefault(i, {})[j] = name
        return [
            scope.renamed(named[i]) if scope is not None and i in named else scope
            for i, scope in enumerate(self.scopes)
        ]

    def _name(self, group: Sequence[Place]) -> None:
        i, j = group[0]
        length = self._scope(i).axes[j]
        name = f"{self._scope(i).name}.shape[{j}]"
        self.scopes = self._with_name(group, name)
        self.given = {**self.given, name: length}

    # --- which sizes are tried --------------------------------------------------------

    def choices(self, most: int) -> list[dict[str, int]]:
        """Returns up to so many sets of sizes to try, those of the arguments first."""
        found: list[dict[str, int]] = []
        for sizes in self._candidates():
            if len(found) == most:
                break
            if sizes not in found and self._fits(sizes) and self.accepts(sizes):
                found.append(sizes)
        return found

    def _candidates(self) -> Iterator[dict[str, int]]:
        names = list(self.given)
        yield dict(self.given)
        if not names:
            return
        # Blocks may be as long as the arguments that somebody chose for a test.
        long = {name: size for name, size in self.given.items() if size > max(SIZES)}
        for more in (1, max(long.values(), default=0)):
            if long:
                yield {**self.given, **{n: size + more for n, size in long.items()}}
        for row in range(len(SIZES)):
            chosen = [
                SIZES[(row + _STRIDE * i) % len(SIZES)] for i in range(len(names))
            ]
            sizes = dict(zip(names, chosen, strict=True))
            yield sizes
            if row == 2:
                yield {**self.given, names[0]: 0}
            if len(names) > 1 and not (self._fits(sizes) and self.accepts(sizes)):
                yield from ({**self.given, name: sizes[name]} for name in names)
        for size, name in itertools.product(FURTHER, names):
            yield {**self.given, name: size}
        for factor, name in itertools.product((2, 3), names):
            yield {**self.given, name: factor * self.given[name]}

    def _fits(self, sizes: Sizes) -> bool:
        """Whether arrays of these sizes are not much larger than those given."""
        ceiling = max(_MOST_ENTRIES, 3 * _scopes.count(self.scopes, self.given))
        return _scopes.count(self.scopes, sizes) <= ceiling


_SPLITS: tuple[Callable[[int, int, Scope], Hashable], ...] = (
    lambda i, j, scope: j,
    lambda i, j, scope: j - len(scope.axes),
    lambda i, j, scope: i,
    lambda i, j, scope: (i, j),
)
