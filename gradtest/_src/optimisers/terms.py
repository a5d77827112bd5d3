"""Causes that show as terms: weight decay, momentum, an epsilon, a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import norm
from gradtest._src.findings import Cause
from gradtest._src.lifting import widen
from gradtest._src.optimisers import epsilons
from gradtest._src.optimisers.training import Trajectory
from gradtest._src.optimisers.wrong import FIT, Wrong, agrees, ratio_of


def weight_decay(wrong: Wrong) -> Iterator[Cause]:
    """A difference that goes away where the params are zero."""
    if wrong.step or not wrong.param().any():
        return
    i = wrong.place
    claimed, true = wrong.remember("no params", lambda: _without_params(wrong))
    if not agrees(claimed[0][i], true[0][i], wrong.fit):
        return
    param = wrong.param()
    theirs = wrong.true[0][i] - true[0][i]
    own = wrong.claimed[0][i] - claimed[0][i]
    wanted, has = ratio_of(theirs, param, 1e-3), ratio_of(own, param, 1e-3)
    taken = _convention(wanted, has)
    if taken is not None:
        yield taken
        return
    if not _counts(wrong.claimed, claimed, i):
        says = "at params of zero the two agree, and it does not depend on them"
        says += (
            f": a decay of {wanted:.4g} times the params is missing" if wanted else ""
        )
        remedy = "add the weight decay, before the learning rate scales it"
        yield Cause("weight decay missing", says, remedy, 0.97)
    elif not _counts(wrong.true, true, i):
        says = "the reference does not depend on the params"
        says += f", here {has:.4g} times them is added" if has else ""
        yield Cause("weight decay added", says, "leave the weight decay out", 0.97)
    elif wanted and has:
        yield Cause(
            "weight decay scaled otherwise",
            f"{has:.4g} times the params is added, the reference adds {wanted:.4g} "
            f"times them: {has / wanted:.4g} times as much",
            "let the learning rate scale the decay as the reference does, once",
            0.97,
        )
    elif (wanted is None) != (has is None):
        how = "decays the params apart from" if wanted else "takes the decay into"
        other = "takes the decay into" if wanted else "decays the params apart from"
        yield Cause(
            "weight decay elsewhere",
            f"at params of zero the two agree: the reference {how} the gradient's "
            f"moments or scaling, this {other} them",
            "add the decay after the moments (AdamW), or to the gradient before them "
            "(L2), as the reference does",
            0.92,
        )


def _convention(wanted: float | None, has: float | None) -> Cause | None:
    """Returns what it means where the params themselves are added or taken away."""
    if wanted is not None and abs(wanted + 1) < FIT:
        return Cause(
            "reference returns updates",
            "the reference moves by minus the params, beside the step: it returns "
            "updates, it seems, where the params after the steps are wanted",
            "return the params after all steps from `reference`: params + updates",
            0.98,
        )
    if has is not None and abs(has - 1) < FIT:
        return Cause(
            "returns new params",
            "it adds the params themselves, beside the step: it returns new params, it "
            "seems, where updates are wanted",
            "return updates from `tx.update`: optax adds them to the params",
            0.98,
        )
    return None


def _without_params(wrong: Wrong) -> tuple[Trajectory, Trajectory]:
    floats = set(wrong.both.start.params.floats)
    params = [
        0 * np.asarray(widen(value)) if i in floats else value
        for i, value in enumerate(wrong.both.start.params.values)
    ]
    grads = wrong.run.grads
    return wrong.ask("claimed", params, grads), wrong.ask("true", params, grads)


def _counts(moved: Trajectory, without: Trajectory, place: int) -> bool:
    """Whether the params change any step of a leaf by more than rounding."""
    pairs = [(m[place], w[place]) for m, w in zip(moved, without, strict=True)]
    return any(norm(m - w) > 1e-9 * norm(m) for m, w in pairs)


def added_terms(wrong: Wrong) -> Iterator[Cause]:
    """A multiple of a known array is added."""
    i, k = wrong.place, wrong.step
    gap, true = wrong.claimed[k][i] - wrong.true[k][i], wrong.true[k][i]
    if true.size < 3 or ratio_of(wrong.claimed[k][i], true) is not None:
        return
    known = [("the gradient of that step", wrong.gradient(k))]
    if k:
        known += [
            ("the gradient of the step before", wrong.gradient(k - 1)),
            ("the update of the step before", wrong.true[k - 1][i]),
        ]
    for what, array in known:
        times = ratio_of(gap, array, 1e-4)
        if times is None:
            continue
        yield Cause(
            "term added",
            f"it is the reference's plus {times:.4g} times {what}",
            "compare the momentum's factors (decay, 1 - decay, dampening), and whether "
            "it looks ahead as Nesterov's does",
            0.9,
        )
        return


def none_at_all(wrong: Wrong) -> Iterator[Cause]:
    """One of the two does not move the leaf."""
    k, i = wrong.step, wrong.place
    claimed, true = wrong.claimed[k][i], wrong.true[k][i]
    if (
        k
        and len(wrong.true) > 2
        and not any(leaf.any() for step in wrong.true[1:] for leaf in step)
    ):
        yield Cause(
            "reference takes one step",
            "the reference returns the same params after two gradients and more as "
            "after the first one",
            "take a step of `reference` for each gradient of the list, not for the "
            "first alone", 0.98,
        )  # fmt: skip
        return
    if (
        not claimed.any()
        and true.any()
        and any(step[i].any() for step in wrong.claimed[k + 1 :])
    ):
        yield Cause(
            "no update yet",
            "it does not move the leaf in this step, but in a later one; the "
            "reference moves it",
            "look for a schedule, a moment or an accumulation that lags behind", 0.895,
        )  # fmt: skip
    elif not claimed.any() and true.any():
        yield Cause(
            "no update", "it does not move the leaf, the reference does",
            "look for a mask, a label or a set_to_zero that takes this leaf", 0.97,
        )  # fmt: skip
    if claimed.any() and not true.any():
        yield Cause(
            "update of zero expected", "it moves the leaf, the reference does not",
            "mask the leaf, or give it set_to_zero", 0.97,
        )  # fmt: skip


def at_another_size(wrong: Wrong) -> Iterator[Cause]:
    """What shows only at small gradients is an epsilon, at large ones a threshold."""
    k, i = wrong.step, wrong.place
    found = epsilons.cause(
        wrong.claimed[0][i], wrong.true[0][i], wrong.gradient(0), wrong.usual_size()
    )
    if not wrong.is_elsewhere or wrong.run.scale == 1:
        if found.likelihood > 0.9 and not k:
            yield found
        return
    if wrong.run.scale > 1:
        ratio = ratio_of(wrong.claimed[k][i], wrong.true[k][i])
        yield Cause(
            "threshold",
            "at gradients of the user's size the two agree"
            + (f", here it is {ratio:.6g} times the reference's" if ratio else "")
            + ": a clipping or a trust ratio is another",
            "compare the threshold, whether the norm is of a leaf or of the whole "
            "tree, and what is clipped: the gradient or the update",
            0.7,
        )
        return
    yield found


def as_any_gradient(wrong: Wrong) -> Iterator[Cause]:
    """What shows in the arrays as in any gradient's."""
    k = wrong.step
    names = [wrong.both.start.params.leaves[i].name for i in wrong.both.start.checked]
    scene = diagnose.Scene(names=tuple(names))
    for cause in diagnose.leaf_causes(
        wrong.claimed[k], wrong.true[k], wrong.place, 2e-6, scene=scene
    ):
        if cause.name != "different":
            yield dataclasses.replace(
                cause,
                says=cause.says.replace("gradient", "update"),
                remedy=cause.remedy.replace("gradient", "update"),
                likelihood=min(cause.likelihood, 0.89),
            )
