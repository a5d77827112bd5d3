"""How a batch is cut into micro-batches, and the gradient of the loss on each."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.inputs import Inputs, Point, read_inputs
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.options import Options
from gradtest._src.program import Values, derivative, trace_program

PyTree = Any
Range = tuple[int, int]
Sizes = tuple[int, ...]
# Of a hand-written accumulation's cuts, which are not known, so many are tried.
_MOST_PIECES = 12


def count_rows(batch: PyTree, axis: int) -> int:
    """Returns how many rows a batch has: the length that most arrays have there."""
    lengths = [
        leaf.shape[axis]
        for leaf in jax.tree_util.tree_leaves(batch)
        if len(getattr(leaf, "shape", ())) > axis
    ]
    counts = collections.Counter(lengths)
    return max(counts, key=lambda n: (counts[n], n)) if counts else 0


def cut(batch: PyTree, axis: int, rows: int, low: int, high: int) -> PyTree:
    """Returns some rows of a batch; what has not as many rows stays whole."""

    def piece(leaf: Any) -> Any:
        shape = getattr(leaf, "shape", ())
        if len(shape) <= axis or shape[axis] != rows:
            return leaf
        return leaf[(slice(None),) * axis + (slice(low, high),)]

    return jax.tree_util.tree_map(piece, batch)


def join(batches: Sequence[PyTree], axis: int) -> PyTree:
    """Returns the batch that micro-batches make up.

    Raises:
      ValueError: They are not trees of one structure.
    """
    if len({str(jax.tree_util.tree_structure(batch)) for batch in batches}) != 1:
        raise ValueError("`batch` must be a list of batches of one structure.")
    rows = [count_rows(batch, axis) for batch in batches]

    def joined(*leaves: Any) -> Any:
        shapes = [getattr(leaf, "shape", ()) for leaf in leaves]
        if [shape[axis] if len(shape) > axis else -1 for shape in shapes] != rows:
            return leaves[0]
        whole = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        return whole.concatenate(leaves, axis)

    return jax.tree_util.tree_map(joined, *batches)


def read_sizes(micro_batches: Any, rows: int) -> Sizes:
    """Returns the rows of each micro-batch, as `micro_batches` has it.

    Raises:
      ValueError: They do not make up the batch.
      TypeError: It is neither a number of micro-batches nor their sizes.
    """
    if isinstance(micro_batches, int | np.integer) and micro_batches is not True:
        count = int(micro_batches)
        if not 1 <= count <= rows:
            raise ValueError(
                f"`micro_batches` must be from 1 to the {rows} rows of `batch`, got "
                f"{count}."
            )
        return equal_sizes(rows, count)
    try:
        sizes = tuple(int(size) for size in micro_batches)
    except TypeError:
        raise TypeError(
            "`micro_batches` must be the number of micro-batches or the rows of each, "
            f"got {micro_batches!r}."
        ) from None
    if sum(sizes) != rows or min(sizes, default=0) < 1:
        raise ValueError(
            f"`micro_batches` must add up to the {rows} rows of `batch`, got "
            f"{list(sizes)}."
        )
    return sizes


def equal_sizes(rows: int, count: int) -> Sizes:
    """Cuts rows into so many micro-batches: equal ones, and a smaller last one."""
    chunks = chunk_sizes(rows, -(-rows // count))
    if len(chunks) == count:
        return chunks
    return tuple(len(part) for part in np.array_split(np.arange(rows), count))


def chunk_sizes(rows: int, size: int) -> Sizes:
    """Cuts rows into micro-batches of this size; what is left is the last."""
    whole, rest = divmod(rows, size)
    return (size,) * whole + (rest,) * (rest > 0)


def read_cut(jaxpr: jaxprs.Jaxpr, rows: int, axis: int) -> Sizes | None:
    """Returns the micro-batches that a program cuts arrays of so many rows into.

    They are read off its slices, or off an axis that it splits in two; None where it
    has neither. What it leaves out is cut into pieces of the same size.
    """
    found: set[int] = set()
    for eqn in jaxprs.walk(jaxpr):
        if eqn.primitive.name not in ("slice", "dynamic_slice", "gather", "reshape"):
            continue
        before, after = (
            tuple(getattr(atom.aval, "shape", ()))
            for atom in (eqn.invars[0], eqn.outvars[0])
        )
        if len(before) <= axis or before[axis] != rows or len(after) <= axis:
            continue
        if eqn.primitive.name == "reshape":
            count = after[axis]
            is_split = before[axis + 1 :] == after[axis + 2 :] and len(after) > axis + 1
            if is_split and 1 < count < rows and count * after[axis + 1] == rows:
                return (rows // count,) * count
        elif len(before) == len(after) and after[axis] < rows:
            found.add(after[axis])
    if not found:
        return None
    even = equal_sizes(rows, -(-rows // max(found)))
    chunks = chunk_sizes(rows, max(found))
    split = tuple(map(len, np.array_split(np.arange(rows), len(chunks))))
    return next((each for each in (chunks, even, split) if set(each) == found), chunks)


def ranges_of(sizes: Sequence[int]) -> list[Range]:
    """Returns where each micro-batch begins and ends."""
    ends = np.cumsum([0, *sizes]).tolist()
    return list(itertools.pairwise(ends))


class Pieces:
    """Evaluates the rule-free gradient of a loss on micro-batches, in float64."""

    def __init__(
        self,
        loss: Callable[..., Any],
        inputs: Inputs,
        point: Point,
        options: Options,
        *,
        axis: int,
        sizes: Sizes | None,
    ):
        self._loss = loss
        self._options = options
        self._params, self._batch = inputs.arguments(point.moving, point.held)
        self._axis = axis
        self._sizes = sizes
        self._compiled: dict[int, execution.Compiled] = {}
        self._known: dict[Range, Values] = {}
        self.rows = count_rows(self._batch, axis)
        self.moving = [np.asarray(widen(value)) for value in point.moving]

    def cuts(self) -> Iterator[Sizes]:
        """Yields how the batch may have been cut; only one way where it is known."""
        if self._sizes is not None:
            yield self._sizes
            return
        counts = range(2, min(self.rows, _MOST_PIECES) + 1)
        guesses = [equal_sizes(self.rows, n) for n in counts if self.rows % n == 0]
        chunks = [chunk_sizes(self.rows, size) for size in range(1, self.rows)]
        guesses += [sizes for sizes in reversed(chunks) if len(sizes) <= _MOST_PIECES]
        guesses += [
            tuple(map(len, np.array_split(range(self.rows), count))) for count in counts
        ]
        yield from dict.fromkeys(guesses)

    def on_each(self, sizes: Sizes) -> list[Values] | None:
        """Returns the gradient on each micro-batch; None where the loss takes none."""
        try:
            for each in ranges_of(sizes):
                if each not in self._known:
                    self._known[each] = self.gradient(each, self.moving)
        except Exception:  # a loss need not take a part of its batch
            return None
        return [self._known[each] for each in ranges_of(sizes)]

    def gradient(self, rows: Range, moving: Values) -> Values:
        """Returns the gradient on some rows, for these values of what moves."""
        options = self._options
        inputs = read_inputs(
            self._loss, (self._params, self._cut(*rows)), argnums=0,
            exclude=options.exclude, names=("params", "batch"),
        )  # fmt: skip
        point = inputs.draw(options.key, 0)
        held = [execution.at_home(widen(value)) for value in point.held]
        size = rows[1] - rows[0]
        if size not in self._compiled:
            traced = trace_program(
                self._loss, inputs, point, has_aux=options.has_aux, role="loss",
                intentions=options.expect_differs,
            )  # fmt: skip

            def gradient(moving: Any, held: Any) -> Values:
                one, run = [np.ones(())], Evaluator()
                return derivative(traced.mathematics, run, moving, held, one)[1]

            self._compiled[size] = execution.lifted(gradient, [moving, held])
        return execution.to_host(self._compiled[size](moving, held))

    def counts(self, sizes: Sizes) -> list[tuple[str, list[int]]]:
        """Returns how many entries each mask of the batch keeps in each micro-batch."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self._batch)
        found = []
        for path, leaf in flat:
            if is_mask(leaf) and np.ndim(leaf) > self._axis:
                kept = [
                    int(np.sum(np.asarray(self._piece(leaf, *each), np.float64)))
                    for each in ranges_of(sizes)
                ]
                found.append(("batch" + jax.tree_util.keystr(path), kept))
        return found

    def _piece(self, leaf: Any, low: int, high: int) -> Any:
        return cut(leaf, self._axis, self.rows, low, high)

    def _cut(self, low: int, high: int) -> PyTree:
        return cut(self._batch, self._axis, self.rows, low, high)


def is_mask(leaf: Any) -> bool:
    """Whether an array of the batch keeps some entries and drops others."""
    if not hasattr(leaf, "dtype") or not np.size(leaf):
        return False
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    values = np.asarray(leaf)
    return bool(np.isin(values.astype(np.float64), (0, 1)).all() and values.any())


def listed(numbers: Sequence[int]) -> str:
    """Returns numbers as a text: 8, 8 and 3."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last
