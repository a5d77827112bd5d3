"""What a transformation that accumulates does between updates, and at each update.

It is fed the true gradients of the micro-batches, in float64: no update before the last
one, a state that counts and starts anew, and at the end what the wrapped transformation
makes of the accumulated gradient, once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import seeding
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.optimisers.lifted import Lifted
from gradtest._src.optimisers.multi_steps import Accumulator
from gradtest._src.program import Values

PyTree = Any
# How far the gradient that the wrapped transformation is given may round, and how much
# of what that changes is allowed.
_NOISE, _NOISE_FACTOR = 1e-14, 64


@dataclasses.dataclass(frozen=True)
class _Cycle:
    """What came of the micro-batches of one update.

    Attributes:
      updates: The updates after each.
      states: The states after each, the one before the first in front.
      wanted: What the wrapped transformation makes of the accumulated gradient: its
        update and its state; None where the update is the gradient.
    """

    updates: list[PyTree]
    states: list[Any]
    wanted: Any


class Protocol:
    """Runs a transformation over micro-batches and judges what it does."""

    def __init__(
        self, accumulator: Accumulator, case: Case, gradients: list[Values]
    ) -> None:
        self._accumulator = accumulator
        self._case = case
        self._gradients = gradients
        self._names: list[str] = []
        self._treedef: Any = None

    def findings(self) -> list[Finding]:
        """Returns what is wrong, the first thing of each kind alone."""
        self._params = self._params_values()
        full = self._case.readings.exact or self._case.readings.claimed
        values = [
            *self._params,
            *(g for each in [full, *self._gradients] for g in each),
        ]
        program = Lifted(self._run, values)
        first, *others = self._cycles(program(values))
        for judge in (
            self._before_the_last, self._no_update, self._counters, self._inner_waits,
            self._clears,
        ):  # fmt: skip
            broken = judge(first)
            if broken is not None:
                return [broken]
        near = self._cycles(program(self._nudged(values)))
        found = self._wanted(first, near[0])
        if not found and others:
            found = self._second(first, others[0], near)
        return found

    # --- running it -------------------------------------------------------------------

    def _params_values(self) -> Values:
        point, inputs = self._case.point, self._case.program.inputs
        self._tree = inputs.arguments(point.moving, point.held)[0]
        return list(point.moving)

    def _nudged(self, values: Values) -> Values:
        """Returns the values with gradients that are off by rounding."""
        count = len(self._case.leaves)
        found = list(values[:count])
        for i, value in enumerate(values[count:]):
            signs = np.sign(
                seeding.normal(
                    seeding.generator(self._case.key, "nudged", i), value.shape, float
                )
            )
            size = norm(value) / max(value.size, 1) ** 0.5
            found.append(value + _NOISE * size * signs + _NOISE * value * signs)
        return found

    def _run(self, *values: Any) -> Values:
        """Runs one cycle, or two where a state can't be looked into."""
        count = len(self._case.leaves)
        groups = [values[i : i + count] for i in range(0, len(values), count)]
        params = self._like_params(groups[0], self._tree)
        full, *gradients = (self._like_params(group, None) for group in groups[1:])
        accumulator = self._accumulator
        cycles, state, inner_state = [], accumulator.tx.init(params), None
        if accumulator.inner is not None:
            inner_state = accumulator.inner.init(params)
        for _ in range(1 if accumulator.multi_steps is not None else 2):
            updates, states = _run_over(accumulator.tx, gradients, state, params)
            wanted = None
            if accumulator.inner is not None:
                given = full
                if accumulator.multi_steps is not None:
                    bare = accumulator.bare()
                    given = _run_over(bare, gradients, bare.init(params), params)[0][-1]
                wanted = accumulator.inner.update(given, inner_state, params)
                inner_state = wanted[1]
            cycles.append({"updates": updates, "states": states, "wanted": wanted})
            state = states[-1]
        leaves, self._treedef = jax.tree_util.tree_flatten(cycles)
        return [jnp.asarray(leaf) for leaf in leaves]

    def _like_params(self, values: Sequence[Any], rest: PyTree) -> PyTree:
        """Returns a tree like the params; what is not checked is kept, or zero."""
        inputs, point = self._case.program.inputs, self._case.point
        held = list(point.held)
        if rest is None:
            held = [
                jnp.zeros_like(value) if _is_array(value) else value for value in held
            ]
        return inputs.arguments(values, held)[0]

    def _cycles(self, values: Values) -> list[_Cycle]:
        told = jax.tree_util.tree_unflatten(self._treedef, values)
        return [_Cycle(**each) for each in told]

    # --- judging it -------------------------------------------------------------------

    def _before_the_last(self, cycle: _Cycle) -> Finding | None:
        count = len(cycle.updates)
        for k, update in enumerate(cycle.updates[:-1]):
            for name, leaf in self._named(update):
                if np.any(leaf):
                    return self._found(
                        name, leaf, "update between micro-batches",
                        f"after micro-batch {k + 1} of {count} it returns an update "
                        f"that is not zero (up to {np.max(np.abs(leaf)):.3g})",
                        "return zeros until the last micro-batch is in; see that "
                        f"micro_batches={count} is what the transformation waits for",
                    )  # fmt: skip
        return None

    def _no_update(self, cycle: _Cycle) -> Finding | None:
        if self._has_updated(cycle):
            return None
        count = len(cycle.updates)
        says = f"after {count} micro-batches it has made no update"
        remedy = f"see that it updates after {count} micro-batches"
        steps, skipped = _counter(cycle.states[-1], "mini_step"), self._skipped(cycle)
        if skipped:
            says += f": should_skip_update_fn left out {len(skipped)} of them"
            remedy = "choose a batch that is not skipped, or a wider bound"
        elif steps:
            says += f": it waits for more (mini_step is {steps})"
        return self._found("all arguments", None, "no update", says, remedy)

    def _has_updated(self, cycle: _Cycle) -> bool:
        """Whether the last micro-batch brought an update, so far as can be told."""
        before, after = (
            _counter(state, "gradient_step")
            for state in (cycle.states[0], cycle.states[-1])
        )
        if before is not None and after is not None:
            return after > before
        given = [g for each in self._gradients for g in each]
        wanted = cycle.wanted[0] if cycle.wanted is not None else given
        return _any(cycle.updates[-1]) or not _any(wanted)

    def _skipped(self, cycle: _Cycle) -> list[int]:
        steps = [_counter(state, "mini_step") for state in cycle.states]
        if None in steps:
            return []
        pairs = itertools.pairwise(steps)
        return [k for k, (a, b) in enumerate(pairs) if a == b and len(steps) > 2]

    def _counters(self, cycle: _Cycle) -> Finding | None:
        first, last = cycle.states[0], cycle.states[-1]
        steps, updates = (_counter(last, n) for n in ("mini_step", "gradient_step"))
        before = _counter(first, "gradient_step")
        if steps not in (None, 0):
            says = f"after the update `mini_step` is {steps}, not 0"
        elif updates is not None and before is not None and updates != before + 1:
            says = f"after one update `gradient_step` went from {before} to {updates}"
        else:
            return None
        return self._found(
            "the state's counters", None, "counters wrong", says,
            "count micro-batches from 0 after each update, and updates one by one",
        )  # fmt: skip

    def _inner_waits(self, cycle: _Cycle) -> Finding | None:
        """The wrapped transformation's state moves at the update only."""
        inner = [getattr(state, "inner_opt_state", None) for state in cycle.states]
        if inner[0] is None:
            return None
        for k, state in enumerate(inner[1:-1]):
            for name, leaf, start in _pairs(state, inner[0], "inner_opt_state"):
                if not np.array_equal(leaf, start, equal_nan=True):
                    return self._found(
                        name, leaf, "inner state moves early",
                        f"after micro-batch {k + 1} of {len(cycle.updates)} the state "
                        "of the wrapped transformation has moved already",
                        "update the wrapped transformation once, with the accumulated "
                        "gradient",
                    )  # fmt: skip
        return None

    def _clears(self, cycle: _Cycle) -> Finding | None:
        kept = getattr(cycle.states[-1], "acc_grads", None)
        for name, leaf in self._named(kept) if kept is not None else []:
            if np.any(leaf):
                return self._found(
                    name, leaf, "accumulator not reset",
                    "after the update the accumulator is not zero: the next one starts "
                    "with this one's gradient",
                    "set the accumulator to zero after each update",
                )  # fmt: skip
        return None

    def _wanted(self, cycle: _Cycle, near: _Cycle) -> list[Finding]:
        """Compares with what the wrapped transformation makes of the gradient."""
        if cycle.wanted is None:
            return []
        found = self._unlike(
            cycle.updates[-1], cycle.wanted[0], near.wanted[0], "",
            "the update is not the wrapped transformation's, given the accumulated "
            "gradient" if self._accumulator.multi_steps is not None else
            "the update is not that of `inner`, given the full batch's gradient",
        )  # fmt: skip
        own = getattr(cycle.states[-1], "inner_opt_state", None)
        if not found and own is not None:
            found = self._unlike(
                own, cycle.wanted[1], near.wanted[1], "inner_opt_state",
                "the wrapped transformation's state is not the one after a single "
                "update with the accumulated gradient",
            )  # fmt: skip
        return found

    def _second(
        self, first: _Cycle, second: _Cycle, near: list[_Cycle]
    ) -> list[Finding]:
        """Feeds the same micro-batches again: the accumulator must start anew."""
        wanted, around = first.updates[-1], near[0].updates[-1]
        if second.wanted is not None:
            wanted, around = second.wanted[0], near[1].wanted[0]
        return self._unlike(
            second.updates[-1], wanted, around, "",
            "the first update is right, and the second, over the same micro-batches, "
            "is not: the accumulator does not start anew",
            name="accumulator not reset",
        )  # fmt: skip

    def _unlike(
        self,
        found: PyTree,
        wanted: PyTree,
        near: PyTree,
        prefix: str,
        says: str,
        name: str = "update differs",
    ) -> list[Finding]:
        rows = _pairs(found, wanted, prefix or self._case.program.inputs.names[0])
        beside = [leaf for _, _, leaf in _pairs(found, near, "")]
        for (leaf_name, claimed, truth), moved in zip(rows, beside, strict=True):
            if not np.issubdtype(np.result_type(truth), np.inexact):
                if not np.array_equal(claimed, truth):
                    return [self._found(leaf_name, claimed, name, says, _LOOK)]
                continue
            noise = _NOISE_FACTOR * norm(moved - truth) + 1e-14 * norm(truth)
            gap = leaf_gap(claimed, truth, rtol=self._case.rtol, floor=noise)
            if gap.is_exceeded or not np.isfinite(claimed - truth).all():
                finding = self._found(leaf_name, claimed, name, says, _LOOK)
                return [
                    dataclasses.replace(
                        finding,
                        gap=Gap.FORMULA,
                        size=gap.size,
                        allowed=gap.allowed,
                        entry=gap.entry,
                    )
                ]
        return []

    def _named(self, tree: PyTree) -> list[tuple[str, np.ndarray]]:
        return [
            (name, leaf)
            for name, leaf, _ in _pairs(tree, tree, self._case.program.inputs.names[0])
        ]

    def _found(
        self, name: str, leaf: Any, cause: str, says: str, remedy: str
    ) -> Finding:
        shape = () if leaf is None else np.shape(leaf)
        dtypes = {each.name: each.dtype for each in self._case.leaves}
        dtype = np.dtype(dtypes[name]).name if name in dtypes else ""
        return Finding(
            name, shape, dtype, Verdict.FAIL, Gap.STRUCTURE, trial=self._case.trial,
            size=np.inf, judged_by="the transformation by itself",
            cause=Cause(cause, says, remedy), check="update",
        )  # fmt: skip


_LOOK = (
    "look for an update of the wrapped transformation at every micro-batch, for a mean "
    "or sum of its updates in place of the gradients', and for what is kept between "
    "updates"
)


def _run_over(
    tx: Any, gradients: Sequence[PyTree], state: Any, params: PyTree
) -> tuple[list[PyTree], list[Any]]:
    updates, states = [], [state]
    for gradient in gradients:
        update, state = tx.update(gradient, states[-1], params)
        updates.append(update)
        states.append(state)
    return updates, states


def _pairs(
    found: PyTree, wanted: PyTree, name: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    others = jax.tree_util.tree_leaves(wanted)
    return [
        (name + jax.tree_util.keystr(path), np.asarray(leaf), np.asarray(other))
        for (path, leaf), other in zip(flat, others, strict=True)
    ]


def _counter(state: Any, name: str) -> int | None:
    found = getattr(state, name, None)
    return None if found is None else int(found)


def _any(tree: PyTree) -> bool:
    return any(np.any(np.asarray(leaf)) for leaf in jax.tree_util.tree_leaves(tree))


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype")
