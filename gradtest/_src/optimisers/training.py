"""An optimiser's steps, unrolled: lifted to float64, and as they run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradtest._src import execution
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.optimisers.lifted import Lifted
from gradtest._src.optimisers.trees import PyTree, Start, Values

_KEYWORD = re.compile(
    r"update\w*\(\) (missing \d+ required keyword-only|got an unexpected keyword)"
)
ExtraArgs = Mapping[str, Any] | Callable[[PyTree], Mapping[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """A transformation with the extra arguments of its `update`.

    Attributes:
      tx: The user's transformation.
      extra_args: A mapping, or a function of the params that returns one.
    """

    tx: Any
    extra_args: ExtraArgs = None

    def __post_init__(self) -> None:
        """Raises TypeError where the extra arguments are none."""
        extra = self.extra_args
        if extra is not None and not callable(extra) and not isinstance(extra, Mapping):
            raise TypeError(
                "`extra_args` must be a dict of keyword arguments of `tx.update`, or "
                f"a function of the params that returns one, got {extra!r}."
            )

    def init(self, params: PyTree) -> PyTree:
        """Returns the first state."""
        return self.tx.init(params)

    def update(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[Any, Any]:
        """Returns the updates and the next state."""
        extra = self.extra_args
        extra = extra(params) if callable(extra) else extra
        try:
            return self._updated(grads, state, params, extra)
        except TypeError as error:
            if not _KEYWORD.search(str(error)):
                raise
            raise TypeError(
                "`extra_args` must be the keyword arguments that `tx.update` takes, "
                f"got {sorted(extra or ())}: {error}."
            ) from error

    def _updated(
        self, grads: PyTree, state: PyTree, params: PyTree, extra: Any
    ) -> tuple[Any, Any]:
        if not extra:
            return self.tx.update(grads, state, params)
        if isinstance(self.tx, optax.GradientTransformation):
            return optax.with_extra_args_support(self.tx).update(
                grads, state, params, **extra
            )
        return self.tx.update(grads, state, params, **extra)

    def step(self, params: PyTree, state: PyTree, grads: PyTree) -> tuple[Any, Any]:
        """Returns the next params and the next state."""
        updates, state = self.update(grads, state, params)
        return optax.apply_updates(params, updates), state


Trajectory = list[Values]  # the checked params after each step, in float64
Shift = Callable[[PyTree], PyTree]


class Both:
    """The transformation and its reference in float64, as functions of arrays."""

    def __init__(
        self,
        optimiser: Optimiser,
        reference: Callable[..., PyTree],
        start: Start,
        steps: int,
    ):
        self.start, self.steps = start, steps
        self._optimiser, self._reference = optimiser, reference
        self._count = len(start.params.leaves)
        example = [*start.params.values, *steps * start.grads.values]
        self._claimed = Lifted(self._unrolled(None), example)
        self.plain = False
        self._narrow: set[int] = set()
        self._true = self._trace_reference(example)

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The numbers in the transformation, and in the reference if JAX traced it."""
        lifted = self._true.numbers if isinstance(self._true, Lifted) else ()
        return self._claimed.numbers, lifted

    def with_numbers(
        self,
        other: dict[float, float],
        params: Sequence[Any],
        grads: Sequence[Values],
    ) -> Trajectory:
        """Returns where the transformation goes with other numbers in it."""
        values = [*params, *_flat(grads)]
        return self._by_step(self._claimed.with_numbers(values, other))

    @property
    def draws(self) -> bool:
        """Whether the transformation draws random numbers."""
        return self._claimed.draws

    def jittered(
        self, shifts: np.ndarray, params: Sequence[Any], grads: Sequence[Values]
    ) -> Trajectory:
        """Returns where the transformation goes as its operations round otherwise."""
        return self._by_step(self._claimed.jittered([*params, *_flat(grads)], shifts))

    def reach(self, params: Sequence[Any], grads: Sequence[Values]) -> list[Trajectory]:
        """Returns how constants of narrow dtypes move the params, by constant."""
        values = [*params, *_flat(grads)]
        found = self._claimed.reach(values)
        if isinstance(self._true, Lifted):
            found += self._true.reach(values)
        return [self._by_step(moved) for moved in found]

    def claimed(self, params: Sequence[Any], grads: Sequence[Values]) -> Trajectory:
        """Returns where the transformation takes the params."""
        return self._by_step(self._claimed([*params, *_flat(grads)]))

    def true(self, params: Sequence[Any], grads: Sequence[Values]) -> Trajectory:
        """Returns where the reference takes the params."""
        if isinstance(self._true, Lifted):
            return self._by_step(self._true([*params, *_flat(grads)]))
        return self._true(params, grads)

    def shifted(
        self, shift: Shift, params: Sequence[Any], grads: Sequence[Values]
    ) -> Trajectory:
        """Returns where the transformation goes from a state that was changed."""
        values = [*params, *_flat(grads)]
        return self._by_step(Lifted(self._unrolled(shift), values)(values))

    def states(self, grads: Sequence[Values]) -> list[PyTree]:
        """Returns the first state, and the one after each step."""
        with execution.working_precision():
            values = [jnp.asarray(value) for value in self.start.params.values]
            params = self.start.params.build(values)
            found = [self._optimiser.init(params)]
            for each in grads:
                given = self.start.grads.build([jnp.asarray(g) for g in each])
                params, state = self._optimiser.step(params, found[-1], given)
                found.append(state)
        return found

    def _by_step(self, values: Values) -> Trajectory:
        count = len(self.start.checked)
        return [values[i : i + count] for i in range(0, len(values), count)]

    def _split(self, values: Sequence[Any]) -> tuple[PyTree, list[PyTree]]:
        params = self.start.params.build(values[: self._count])
        rest = values[self._count :]
        width = len(self.start.grads.leaves)
        grads = [
            self.start.grads.build(rest[k * width : (k + 1) * width])
            for k in range(self.steps)
        ]
        return params, grads

    def _checked(self, params: PyTree, role: str) -> Values:
        values = self.start.params.arrays(params, role)
        return [values[i] for i in self.start.checked]

    def _unrolled(self, shift: Shift | None) -> Callable[..., Values]:
        def run(*values: Any) -> Values:
            params, grads = self._split(values)
            state = self._optimiser.init(params)
            state = shift(state) if shift else state
            found: Values = []
            for each in grads:
                params, state = self._optimiser.step(params, state, each)
                found += self._checked(params, "tx.update")
            return found

        return run

    def _trace_reference(self, example: Values) -> Any:
        def run(*values: Any) -> Values:
            params, grads = self._split(values)
            found: Values = []
            for k in range(self.steps):
                returned = self._reference(params, list(grads[: k + 1]))
                found += [jnp.asarray(v) for v in self._checked(returned, "reference")]
            return found

        try:
            return Lifted(run, example)
        except Exception:  # it may be plain NumPy, which can't be traced
            self.plain = True
            return self._run_plainly

    def _run_plainly(
        self, params: Sequence[Any], grads: Sequence[Values]
    ) -> Trajectory:
        """Runs a reference of NumPy or Python on copies in float64."""
        found = []
        for k in range(self.steps):
            values = [np.array(widen(value)) for value in (*params, *_flat(grads))]
            tree, steps = self._split(values)
            with jax.enable_x64(True), execution.user_code():
                try:
                    returned = self._reference(tree, steps[: k + 1])
                except Exception as error:
                    error.add_note("gradtest: raised by `reference` itself.")
                    raise
            leaves = self._checked(returned, "reference")
            for place, leaf in enumerate(leaves):
                if np.asarray(leaf).dtype.itemsize < widen(leaf).dtype.itemsize:
                    self._narrow.add(place)
            found.append([np.asarray(widen(np.asarray(leaf))) for leaf in leaves])
        return found

    def is_narrow(self, place: int) -> bool:
        """Whether a reference of NumPy gave a leaf in less than float64."""
        return place in self._narrow

    def in_own_dtype(self, grads: Sequence[Values]) -> Trajectory | None:
        """Runs the reference in the params' own dtypes; None where it can't."""
        if self.plain:
            return None
        values = [jnp.asarray(v) for v in (*self.start.params.values, *_flat(grads))]
        try:
            with execution.working_precision():
                params, steps = self._split(values)
                found = [
                    self._checked(self._reference(params, steps[: k + 1]), "reference")
                    for k in range(self.steps)
                ]
        except Exception:  # it is made for other dtypes
            return None
        return [execution.to_host([np.asarray(v) for v in step]) for step in found]


def _flat(grads: Sequence[Values]) -> Values:
    return [value for step in grads for value in step]


def increments(begin: Sequence[Any], trajectory: Trajectory) -> Trajectory:
    """Returns by how much each step moves each of the params."""
    at = [np.asarray(widen(value)) for value in begin]
    found = []
    for after in trajectory:
        found.append([new - old for new, old in zip(after, at, strict=True)])
        at = list(after)
    return found


def shift_counter(index: int | None, by: int) -> Shift:
    """Returns a change of a state: one integer of it, or all of them, moved.

    Args:
      index: Which one, in the state's order; None takes all.
      by: By how much.
    """

    def shift(state: PyTree) -> PyTree:
        leaves, treedef = jax.tree_util.tree_flatten(state)
        counters = [i for i, leaf in enumerate(leaves) if is_counter(leaf)]
        for place, i in enumerate(counters):
            if index is None or place == index:
                leaves[i] = leaves[i] + by
        return jax.tree_util.tree_unflatten(treedef, leaves)

    return shift


def is_counter(leaf: Any) -> bool:
    """Whether a leaf of a state is a count of steps: one integer."""
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None
        and not is_inexact(dtype)
        and jnp.issubdtype(dtype, jnp.integer)
        and np.shape(leaf) == ()
    )
