"""Whether an evaluation normalises by its own batch, and leaves what is held unused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.findings import Cause, Line
from gradtest._src.lifting import Evaluator, is_inexact
from gradtest._src.localise.steps import Constant
from gradtest._src.modules.held import Held, Item
from gradtest._src.silence.observed import line_of

_COLLECTIONS = frozenset({"batch_stats", "BatchStat"})
_NAMES = frozenset({"mean", "var"})
_REDUCING = "reduce_"
# Rows of one program differ by rounding alone where only another row is changed.
_ROUNDING = 256


def unused_averages(held: Held) -> list[Item]:
    """Returns the running averages that the output is not made of."""
    used = frozenset[int]().union(*map(held.flow.of_result, held.outputs))
    return [
        item
        for item in held.items
        if _is_average(item) and item.source is not None and item.source not in used
    ]


def _is_average(item: Item) -> bool:
    is_real = is_inexact(getattr(item.before, "dtype", None))
    has_axes = is_real and bool(item.shape)  # SpectralNorm holds numbers beside them
    return has_axes and (item.collection in _COLLECTIONS or item.path[-1] in _NAMES)


def statistic_of_the_batch(held: Held, averages: Sequence[Item]) -> _Statistic | None:
    """Returns a statistic of the batch that may stand in the place of an average.

    It has the shape of the average, is made by a reduction over the first axis of the
    data, and each row of the output depends on the other rows by it.
    """
    if not averages or not _mixes_rows(held):
        return None
    for i in sorted(held.flow.feeding(held.outputs)):
        step = held.flow.steps.steps[i]
        if not step.name.startswith(_REDUCING) or not step.operands:
            continue
        if 0 not in step.params.get("axes", ()) or not held.flow.is_data(step):
            continue
        shape = _core(held.flow.steps.types[step.results[0]].shape)
        for item in averages:
            if math.prod(shape) > 1 and shape in (item.shape, item.shape[1:]):
                return _Statistic(item, line_of(step))
    return None


class _Statistic:
    """A statistic of the batch, and the average that has its shape."""

    def __init__(self, average: Item, line: Line | None):
        self.average, self.line = average, line

    @property
    def cause(self) -> Cause:
        """The slip."""
        return Cause(
            "batch statistics in evaluation",
            f"the output does not depend on {self.average.name}, but on a statistic of "
            "that shape over the batch that it is called with: what one example gives "
            "depends on the others",
            "in evaluation normalise by the average that is held",
        )


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1) or tuple(shape)


def _mixes_rows(held: Held) -> bool:
    """Whether rows of the output change where only the first row of the data does."""
    steps, values = held.flow.steps, held.flow.values
    rows = [atom for atom in (steps.outputs[k] for k in held.rows)
            if not isinstance(atom, Constant)]  # fmt: skip
    counts = {steps.types[atom].shape[:1] for atom in rows}
    counts = {count for count in counts if count and count[0] > 1}
    changed = list(values)
    for i in held.flow.data:
        if np.shape(values[i])[:1] in counts and _is_numeric(values[i]):
            array = jnp.asarray(values[i])
            changed[i] = array.at[0].set(array[1])

    def run(at: Sequence[Any]) -> list[Any]:
        made = steps.run(Evaluator(wide=False), at)[1]
        return [made[atom] for atom in rows]

    with execution.working_precision():
        compiled = jax.jit(run)
        found = execution.to_host([compiled(values), compiled(changed)])
    return any(map(_differ, *found))


def _differ(one: Any, two: Any) -> bool:
    first, second = (np.asarray(each).astype(np.complex128) for each in (one, two))
    if first.ndim == 0 or not np.isfinite(first).all() or not np.isfinite(second).all():
        return False
    eps = float(jnp.finfo(one.dtype).eps)
    gap = float(np.linalg.norm((first - second)[1:]))
    return gap > _ROUNDING * eps * float(np.linalg.norm(first))


def _is_numeric(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and (
        is_inexact(dtype) or jnp.issubdtype(dtype, jnp.integer)
    )
