"""Runs the pure form of a Pallas kernel at every place of its grid.

It does what Pallas' own interpreter does. Blocks that reach beyond an array are filled
up, results are written back block by block, and an output that takes an operand's
memory is seen through both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.jaxprs import kernels
from gradtest._src.jaxprs.kernels import Kernel, Window
from gradtest._src.lifting import Evaluator, Points, at_points, lifted_dtype


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in its grid a kernel runs, as it counts the axes, and how large that is."""

    indices: tuple[Any, ...]
    sizes: tuple[Any, ...]
    scoped: Mapping[int, kernels.Scoped]
    fill: float


def evaluate_kernel(
    run: Evaluator, kernel: Kernel, points: Points, fill: float
) -> list[Any]:
    """Runs the pure form of a kernel at every place of its grid, in order."""
    dynamic = sum(size is None for size in kernel.grid)
    bounds = [lax.convert_element_type(b, jnp.int32) for b in points[0][:dynamic]]
    sizes = [bounds.pop(0).reshape(()) if n is None else n for n in kernel.grid]
    memories = [_Memory(run, kernel, point[dynamic:], fill) for point in points]

    def step(i: Any, carries: Points) -> Points:
        indices = _unravel(lax.convert_element_type(i, jnp.int32), sizes)
        inner = run.fork(place=_place(kernel, indices, sizes, fill))
        views = [
            memory.view(inner, indices, carry)
            for memory, carry in zip(memories, carries, strict=True)
        ]
        results, _ = at_points(
            inner, kernel.program, [view.operands() for view in views]
        )
        return [view.written(r) for view, r in zip(views, results, strict=True)]

    axes = frozenset().union(*(jaxprs.vma(x) for p in points for x in p))
    start = [[_varying(x, axes) for x in memory.start] for memory in memories]
    # Of a static length the loop is a scan, which has a derivative in reverse mode.
    steps = functools.reduce(jnp.multiply, sizes) if dynamic else math.prod(sizes)
    alone = not dynamic and steps == 1
    end = step(0, start) if alone else lax.fori_loop(0, steps, step, start)
    return memories[-1].results(end[-1])


def _varying(value: Any, axes: frozenset[Any]) -> Any:
    """Lets a value differ along the mesh axes along which the operands do."""
    missing = tuple(axes - jaxprs.vma(value))
    return lax.pcast(value, missing, to="varying") if missing else value


def _place(
    kernel: Kernel, indices: Sequence[Any], sizes: Sequence[Any], fill: float
) -> Place:
    """Returns a place in the grid as the kernel counts: without what `vmap` added."""
    seen = [n for n in range(len(sizes)) if n not in kernel.unseen]
    return Place(
        tuple(indices[n] for n in seen),
        tuple(sizes[n] for n in seen),
        kernel.scoped,
        fill,
    )


def _unravel(step: Any, sizes: Sequence[Any]) -> list[Any]:
    """Returns the place in a grid that comes at this step: the last axis runs first."""
    indices: list[Any] = []
    for size in reversed(sizes):
        size = jnp.int32(size)
        indices.insert(0, lax.rem(step, size))
        step = lax.div(step, size)
    return indices


class _Memory:
    """The arrays that a kernel reads and writes, filled up to whole blocks.

    Attributes:
      scalars: What comes before the blocks; the kernel only reads it.
      windows: On the operands that follow, and on the results.
      homes: For each window, which of the arrays it is on.
      changing: Which of the arrays the kernel may change.
      start: The arrays that the kernel changes, before it has run.
    """

    def __init__(
        self, run: Evaluator, kernel: Kernel, operands: Sequence[Any], fill: float
    ):
        self.kernel = kernel
        self.scalars = list(operands[: kernel.scalars])
        self.windows = [*kernel.inputs, *kernel.outputs]
        inputs = list(operands[kernel.scalars :])
        outputs = [
            operands[kernel.aliases[i]]
            if i in kernel.aliases
            else blank(run, window.aval, fill)
            for i, window in enumerate(kernel.outputs)
        ]
        # An input whose memory an output takes is seen there, as it changes.
        self.homes = list(range(len(self.windows)))
        for output, operand in kernel.aliases.items():
            if operand >= kernel.scalars:
                self.homes[operand - kernel.scalars] = len(inputs) + output
        scratch = [blank(run, aval, fill) for aval in kernel.scratch]
        self._arrays = [
            self._filled(run, i, array, fill)
            for i, array in enumerate([*inputs, *outputs])
        ]
        self._arrays += scratch
        changes = {
            home
            for home, window in zip(self.homes, self.windows, strict=True)
            if window.is_written
        }
        changes |= set(range(len(inputs), len(self._arrays)))
        self.changing = sorted(changes)
        self.start = [self._arrays[i] for i in self.changing]

    def _filled(self, run: Evaluator, i: int, array: Any, fill: float) -> Any:
        """Fills up an array to whole blocks of every window on it."""
        windows = [
            window
            for home, window in zip(self.homes, self.windows, strict=True)
            if home == i
        ]
        if not windows:
            return array
        if len(windows) > 1 and any(_is_padded(window) for window in windows):
            raise NotImplementedError("a padded window on memory that is shared")
        padding = [
            (low, max(_overhang(n, window.axes[d]) for window in windows), 0)
            for d, (n, (low, _)) in enumerate(
                zip(array.shape, (a.padding for a in windows[0].axes), strict=True)
            )
        ]
        if not any(low or high for low, high, _ in padding):
            return array
        filling = blank(run, jax.ShapeDtypeStruct((), array.dtype), fill)
        return lax.pad(array, filling, padding)

    def view(self, run: Evaluator, indices: list[Any], carry: list[Any]) -> _View:
        """Returns what a kernel sees of the memory at one place of its grid."""
        arrays = list(self._arrays)
        for i, array in zip(self.changing, carry, strict=True):
            arrays[i] = array
        starts = [
            _start(run, window, [*indices, *self.scalars]) for window in self.windows
        ]
        return _View(self, arrays, starts)

    def results(self, carry: list[Any]) -> list[Any]:
        """Returns the outputs, without what their blocks were filled up with."""
        ends = dict(zip(self.changing, carry, strict=True))
        first = len(self.kernel.inputs)
        return [
            _cut(ends[first + i], window)
            for i, window in enumerate(self.kernel.outputs)
        ]


@dataclasses.dataclass(frozen=True)
class _View:
    """The blocks that a kernel sees at one place of its grid."""

    memory: _Memory
    arrays: list[Any]
    starts: list[list[Any]]

    def operands(self) -> list[Any]:
        """Returns what the pure form of the kernel takes."""
        memory = self.memory
        blocks = [
            _block(self.arrays[home], window, start)
            for home, window, start in zip(
                memory.homes, memory.windows, self.starts, strict=True
            )
        ]
        return [*memory.scalars, *blocks, *self.arrays[len(memory.windows) :]]

    def written(self, results: Sequence[Any]) -> list[Any]:
        """Returns the changing arrays after the kernel has run."""
        memory = self.memory
        count, first = len(memory.windows), len(memory.scalars)
        arrays = [*self.arrays[:count], *results[first + count :]]
        for i, window in enumerate(memory.windows):
            if window.is_written:
                home = memory.homes[i]
                arrays[home] = _replaced(
                    arrays[home], window, self.starts[i], results[first + i]
                )
        return [arrays[i] for i in memory.changing]


def _is_padded(window: Window) -> bool:
    return any(axis.padding != (0, 0) for axis in window.axes)


def _overhang(length: int, axis: kernels.Axis) -> int:
    """How many entries are added behind an array, for padding and whole blocks."""
    low, high = axis.padding
    return high + -(low + length + high) % axis.size


def _start(run: Evaluator, window: Window, operands: list[Any]) -> list[Any]:
    """Returns the first entry of a block along each axis."""
    indices = run(window.index_map, operands)[: len(window.axes)]
    return [
        lax.convert_element_type(index, jnp.int32) * jnp.int32(axis.stride)
        for index, axis in zip(indices, window.axes, strict=True)
    ]


def _block(array: Any, window: Window, start: list[Any]) -> Any:
    block = lax.dynamic_slice(array, start, [axis.size for axis in window.axes])
    return lax.squeeze(block, _squeezed(window))


def _replaced(array: Any, window: Window, start: list[Any], block: Any) -> Any:
    return lax.dynamic_update_slice(
        array, lax.expand_dims(block, _squeezed(window)), start
    )


def _squeezed(window: Window) -> list[int]:
    return [d for d, axis in enumerate(window.axes) if axis.is_squeezed]


def _cut(array: Any, window: Window) -> Any:
    first = [axis.padding[0] for axis in window.axes]
    last = [low + n for low, n in zip(first, window.aval.shape, strict=True)]
    return lax.slice(array, first, last)


def blank(run: Evaluator, aval: Any, fill: float) -> Any:
    """Returns memory that nothing was written to yet; integers are the least ones."""
    dtype = lifted_dtype(aval.dtype) if run.wide else aval.dtype
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.full(aval.shape, fill, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.full(aval.shape, jnp.iinfo(dtype).min, dtype)
    return jnp.zeros(aval.shape, dtype)
