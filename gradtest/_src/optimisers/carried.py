"""Causes in what is kept between steps: a state, a counter; and in the constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.findings import Cause
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.optimisers.training import (
    Trajectory,
    increments,
    is_counter,
    shift_counter,
)
from gradtest._src.optimisers.trees import paths
from gradtest._src.optimisers.wrong import USUAL_DECAYS, Wrong, agrees

_MOST_COUNTERS = 4
_MOST_NUMBERS = 48
# Leaves of states that count what seldom comes.
_MAY_REST = ("finite", "skip", "gradient_step", "inner")


def fresh_state(wrong: Wrong) -> Iterator[Cause]:
    """Each step is a first step: the state is not carried on."""
    k, i = wrong.step, wrong.place
    if not k:
        return
    params = list(wrong.both.start.params.values)
    at = wrong.remember("before", lambda: _before(wrong))
    for place, value in zip(wrong.both.start.checked, at, strict=True):
        params[place] = value
    again = wrong.remember(
        ("fresh", k),
        lambda: wrong.ask("true", params, wrong.run.grads[k:] + wrong.run.grads[:k]),
    )
    if not agrees(wrong.claimed[k][i], again[0][i], wrong.fit):
        return
    if not again[0][i].any():
        return  # a reference that waits, as an accumulation does
    if wrong.remember("moves", lambda: _moves_state(wrong)):
        yield Cause(
            "count behind",
            f"step {k + 1} is what the reference does as its very first step, though "
            "the state is returned and moves: a count or a schedule is behind",
            "look at what step the schedule is asked for: at an offset, a delay or a "
            "division of the count",
            0.895,
        )
    else:
        yield Cause(
            "state not carried",
            f"step {k + 1} is what the reference does as its very first step",
            "return the new state from `update`, not the one that came in, and use "
            "what it holds",
            0.97,
        )


def _moves_state(wrong: Wrong) -> bool:
    """Whether steps change the state: its moments, or all of it where it has none."""
    kept = _kept(wrong).values()
    moments = [leaf for leaf in kept if is_inexact(leaf[0].dtype) and leaf[0].ndim]
    return any(
        not np.array_equal(first, later)
        for first, *others in moments or kept
        for later in others
    )


def _kept(wrong: Wrong) -> dict[str, list[np.ndarray]]:
    """Returns each leaf of the state, at first and after each step."""
    states = [paths(state, "state") for state in wrong.both.states(wrong.run.grads)]
    return {
        name: [np.asarray(state[name]) for state in states]
        for name, leaf in states[0].items()
        if not jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    }


def stuck(wrong: Wrong) -> Iterator[Cause]:
    """A moment or a counter that begins at zero and stays there."""
    if not wrong.step:
        return
    names = wrong.remember("stuck", lambda: _stuck(wrong))
    if not names:
        return
    more = f" (and {len(names) - 1} more)" if names[1:] else ""
    yield Cause(
        "state not moved",
        f"{names[0]}{more} is zero at first and after every step",
        "return what the step makes of it in the new state, not what came in",
        0.895,
    )


def _stuck(wrong: Wrong) -> list[str]:
    return [
        name
        for name, leaf in _kept(wrong).items()
        if leaf[0].size
        and not any(each.any() for each in leaf)
        and not any(word in name for word in _MAY_REST)
    ]


def _before(wrong: Wrong) -> list[np.ndarray]:
    """Returns the checked params before the wrong step."""
    start = [wrong.both.start.params.values[i] for i in wrong.both.start.checked]
    at = [np.asarray(widen(value)) for value in start]
    for step in range(wrong.step):
        at = [a + moved for a, moved in zip(at, wrong.true[step], strict=True)]
    return at


def counters(wrong: Wrong) -> Iterator[Cause]:
    """A counter, of a schedule or a bias correction, is one ahead or behind."""
    for (name, by), moved in wrong.remember("counters", lambda: _shifts(wrong)).items():
        steps = range(len(wrong.true))
        alike = [
            agrees(moved[k][wrong.place], wrong.true[k][wrong.place], wrong.fit)
            for k in steps
        ]
        if not all(alike):
            continue
        ahead = "behind" if by > 0 else "ahead"
        yield Cause(
            "off by one",
            f"with {name} one {'more' if by > 0 else 'less'} from the start it is the "
            f"reference: a schedule or a bias correction is one step {ahead}",
            "count the first step as the reference does: look whether the counter is "
            "raised before or after it is used",
            0.98 if len(alike) > 1 else 0.6,
        )
        return


def _shifts(wrong: Wrong) -> dict[tuple[str, int], Trajectory]:
    start = wrong.both.start
    values = [np.asarray(widen(v)) for v in start.params.values]
    names: list[str] = []

    def name_them(state: Any) -> Any:
        flat, _ = jax.tree_util.tree_flatten_with_path(state)
        names[:] = [
            "state" + jax.tree_util.keystr(path)
            for path, leaf in flat
            if is_counter(leaf)
        ]
        return state

    wrong.both.shifted(name_them, values, wrong.run.grads)
    choices: list[tuple[str, int | None]] = [
        (name, i) for i, name in enumerate(names[:_MOST_COUNTERS])
    ]
    if len(names) > 1:
        choices.append(("every counter", None))
    checked = [values[i] for i in start.checked]
    return {
        (name, by): increments(
            checked,
            wrong.both.shifted(shift_counter(index, by), values, wrong.run.grads),
        )
        for name, index in choices
        for by in (1, -1)
    }


def other_numbers(wrong: Wrong) -> Iterator[Cause]:
    """With another number in its place it is the reference."""
    for (old, new), moved in wrong.remember("numbers", lambda: _renumbered(wrong)):
        steps = range(len(wrong.true))
        i = wrong.place
        if all(agrees(moved[k][i], wrong.true[k][i], wrong.fit) for k in steps):
            yield Cause(
                "another constant",
                f"with {new:.6g} in place of {old:.6g} it is the reference",
                "compare the decays, rates and other numbers that it is made with, and "
                "their order",
                0.97,
            )
            return


def _renumbered(wrong: Wrong) -> list[tuple[tuple[float, float], Trajectory]]:
    own, theirs = wrong.both.numbers
    wanted = [n for n in theirs if n not in own] or [
        *USUAL_DECAYS,
        *(sign * 10.0**-power for power in range(1, 9) for sign in (1, -1)),
    ]  # fmt: skip
    pairs = [
        (old, new)
        for old in sorted(own, reverse=True)
        for new in wanted
        if old not in (0, 1, -1, 0.5, 2) and (old in theirs) < (new != old)
    ]
    values = wrong.both.start.params.values
    begin = [values[i] for i in wrong.both.start.checked]
    found = []
    for old, new in pairs[:_MOST_NUMBERS]:
        other = {old: new} | {n: 1 - new for n in own if abs(n - (1 - old)) < 1e-12}
        moved = wrong.both.with_numbers(other, values, wrong.run.grads)
        found.append(((old, new), increments(begin, moved)))
    return found
