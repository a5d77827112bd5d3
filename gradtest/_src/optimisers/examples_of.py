"""The examples of a loss's arguments: cut out one by one, and put together again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.optimisers.micro_batches import count_rows

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a loss promises: see `assert_loss_reduction`."""

    reduction: str = "mean"
    where: Any = None
    where_name: str | None = None
    axis: int | Sequence[int] | None = None
    batched: int | Sequence[int] | None = None
    per_example: Callable[..., Any] | None = None
    strict_mask: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError where an option makes no sense."""
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"`reduction` must be 'mean', 'sum' or 'none', got {self.reduction!r}."
            )
        if self.per_example is not None and not callable(self.per_example):
            raise TypeError(
                f"`per_example` must be callable, got {self.per_example!r}."
            )
        if self.where is not None:
            mask = np.asarray(self.where)
            if not mask.ndim or not np.isin(mask.astype(np.float64), (0, 1)).all():
                raise ValueError(
                    "`where` must be an array of booleans (or zeros and ones), got "
                    f"{self.where!r}."
                )
            if not mask.any():
                raise ValueError("`where` must keep some entries: it is all false.")

    @property
    def mask(self) -> np.ndarray | None:
        """The mask as booleans."""
        return None if self.where is None else np.asarray(self.where).astype(bool)

    def axes(self) -> tuple[int, ...]:
        """The axes of examples.

        Raises:
          ValueError: `axis` names none.
        """
        axis = self.axis
        if axis is None:
            if self.mask is None:
                return (0,)
            return tuple(i for i, n in enumerate(self.mask.shape) if n > 1) or (0,)
        found = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
        if not found or any(type(a) is not int or a < 0 for a in found):
            raise ValueError(
                f"`axis` must be an integer >= 0, or several, got {axis!r}."
            )
        return tuple(sorted(set(found)))


def _require_fitting(mask: np.ndarray, args: Sequence[PyTree]) -> None:
    """Raises ValueError where no argument has the axes of a mask."""
    leaves = jax.tree_util.tree_leaves(args)
    shapes = [tuple(leaf.shape) for leaf in leaves if np.shape(leaf)]
    for axis, length in enumerate(mask.shape):
        if length == 1 or any(
            len(shape) > axis and shape[axis] == length for shape in shapes
        ):
            continue
        told = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            "`where` must be a mask of the examples in the arguments, whose shapes are "
            f"{told or 'empty'}: got one of the shape {list(mask.shape)}, and no "
            f"argument has {length} entries along axis {axis}."
        )


class Examples:
    """The examples along some axes of the arguments of a loss."""

    def __init__(self, args: tuple[PyTree, ...], chosen: Reduction):
        self.axes = chosen.axes()
        batched = chosen.batched
        if batched is None:
            places: tuple[int, ...] = tuple(range(len(args)))
        else:
            places = (batched,) if isinstance(batched, int) else tuple(batched)
            if not all(-len(args) <= place < len(args) for place in places):
                raise ValueError(
                    f"`batched` must name some of {len(args)} arguments, got "
                    f"{batched!r}."
                )
        self._places = {place % len(args) for place in places}
        own = [args[place] for place in sorted(self._places)]
        self.mask = chosen.mask
        if self.mask is not None and chosen.per_example is None:
            _require_fitting(self.mask, own)
        self.lengths = tuple(self._length(own, axis) for axis in self.axes)
        if 0 in self.lengths:
            raise ValueError(
                f"no argument of the loss has an axis {self.axes} of examples."
            )
        self.count = math.prod(self.lengths)

    def _length(self, args: Sequence[PyTree], axis: int) -> int:
        if (
            self.mask is not None
            and axis < self.mask.ndim
            and self.mask.shape[axis] > 1
        ):
            return self.mask.shape[axis]
        return count_rows(args, axis)

    def cut(self, args: tuple[PyTree, ...], index: Sequence[Any]) -> tuple[PyTree, ...]:
        """Returns one example, each of its axes kept with length 1."""
        return tuple(
            self._piece(arg, index) if place in self._places else arg
            for place, arg in enumerate(args)
        )

    def _piece(self, tree: PyTree, index: Sequence[Any]) -> PyTree:
        def piece(leaf: Any) -> Any:
            for axis in self.axes_of(leaf):
                i = index[self.axes.index(axis)]
                leaf = jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), i, 1, axis)
            return leaf

        return jax.tree_util.tree_map(piece, tree)

    def axes_of(self, leaf: Any) -> tuple[int, ...]:
        """Returns the axes of examples that an array has."""
        shape = getattr(leaf, "shape", ())
        return tuple(
            axis
            for axis, length in zip(self.axes, self.lengths, strict=True)
            if len(shape) > axis and shape[axis] == length
        )

    def is_batched(self, place: int) -> bool:
        """Whether an argument has examples."""
        return place in self._places

    def indices(self) -> np.ndarray:
        """Returns the place of every example along each axis."""
        grid = np.indices(self.lengths).reshape(len(self.axes), -1)
        return grid.T.astype(np.int32)

    def kept(self) -> np.ndarray:
        """Returns which examples the mask keeps."""
        if self.mask is None:
            return np.ones(self.count, bool)
        found: np.ndarray = self.mask
        for axis in range(found.ndim):  # what no axis of examples tells apart
            if axis not in self.axes:
                found = np.asarray(found.any(axis, keepdims=True))
        shape = [found.shape[axis] if axis < found.ndim else 1 for axis in self.axes]
        return np.broadcast_to(found.reshape(shape), self.lengths).ravel()

    def mask_of_one(self) -> np.ndarray | None:
        """Returns a mask for one example, which keeps it."""
        if self.mask is None:
            return None
        shape = [
            1 if axis in self.axes else n for axis, n in enumerate(self.mask.shape)
        ]
        return np.ones(shape, bool)

    def masked_entries(self, leaf: Any) -> np.ndarray:
        """Returns which entries of an array belong to masked examples alone."""
        kept = self.kept().reshape(self.lengths)
        own = self.axes_of(leaf)
        shape = np.shape(leaf)
        if not own:
            return np.zeros(shape, bool)
        lost = tuple(i for i, axis in enumerate(self.axes) if axis not in own)
        masked = ~kept.any(axis=lost)
        spread = [1] * len(shape)
        for i, axis in enumerate(own):
            spread[axis] = masked.shape[i]
        return np.broadcast_to(masked.reshape(spread), shape)
