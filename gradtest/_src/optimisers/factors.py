"""Causes that show as factors: rates, signs, bias corrections, a moment's 1 - decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gradtest._src.findings import Cause
from gradtest._src.optimisers import sizes
from gradtest._src.optimisers.wrong import (
    FIT,
    USUAL_DECAYS,
    Wrong,
    decays_of,
    ratio_of,
)

# No moment's decay, in a factor that it makes, is below this.
_LEAST_DECAY = 0.7


def bias_correction(wrong: Wrong) -> Iterator[Cause]:
    """Another factor at each step, as powers of a decay make it."""
    count = len(wrong.true)
    if count < 2:
        return
    i = wrong.place
    pairs = zip(wrong.claimed, wrong.true, strict=True)
    # An epsilon beside the root bends the factor a little.
    ratios = [ratio_of(c[i], t[i], 1e-4) for c, t in pairs]
    found = [float(ratio) for ratio in ratios if ratio is not None]
    if len(found) < count or max(found) - min(found) < 1e-4 * abs(found[0]):
        return
    decays = list(dict.fromkeys([*decays_of(wrong), *USUAL_DECAYS]))
    steps = np.arange(1, count + 1)
    for what, factors in _corrections(decays, steps):
        for power, how in ((1, "lacks"), (-1, "has, and the reference lacks,")):
            if np.allclose(found, factors**power, rtol=1e-3):
                numbers = ", ".join(f"{ratio:.4g}" for ratio in found)
                yield Cause(
                    "bias correction missing"
                    if power == 1
                    else "bias correction added",
                    f"it is {numbers}, ... times the reference's: it {how} the bias "
                    f"correction of {what}",
                    "divide the moments by 1 - decay**step, step counted from 1"
                    if power == 1
                    else "leave the division by 1 - decay**step out",
                    0.97,
                )
                return


def _corrections(
    decays: Sequence[float], steps: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    rest = {decay: 1 - decay**steps for decay in decays}
    for decay in decays:
        yield f"the first moment (decay {decay:g})", rest[decay]
        yield f"the second moment (decay {decay:g})", rest[decay] ** -0.5
        yield f"the second moment (decay {decay:g}) without its root", 1 / rest[decay]
    for one in decays:
        for other in decays:
            yield (
                f"both moments (decays {one:g} and {other:g})",
                rest[one] / rest[other] ** 0.5,
            )


def one_factor(wrong: Wrong) -> Iterator[Cause]:
    """One factor in every step: a rate, a sign, a moment's 1 - decay."""
    i, k = wrong.place, wrong.step
    ratio = ratio_of(wrong.claimed[k][i], wrong.true[k][i])
    if ratio is None or (wrong.true[k][i].size < 2 and k) or abs(ratio - 1) < FIT:
        return
    size, word = (ratio, "large") if abs(ratio) > 1 else (1 / ratio, "small")
    flipped = "with its sign flipped and " if ratio < 0 else ""
    says = f"it is {flipped}{abs(size):.6g} times too {word} in every entry"
    pairs = zip(wrong.claimed[k:], wrong.true[k:], strict=True)
    by_step = [ratio_of(c[i], t[i], 1e-4) for c, t in pairs]
    per_leaf = _per_leaf(wrong)
    if per_leaf and sizes.varies(wrong):
        yield Cause("factor by leaf",
                    f"{says} of this step, {per_leaf}; with smaller gradients other",
                    "take one norm over all leaves (optax.global_norm), or by leaf, as "
                    "the reference does", 0.9)  # fmt: skip
        return
    if wrong.is_elsewhere and (wrong.run.scale > 1 or wrong.true[k][i].size < 2):
        return  # a threshold or an epsilon, see `terms.at_another_size`
    if sizes.varies(wrong):
        return  # see `sizes.by_size`
    if any(r is not None and abs(r / ratio - 1) > 1e-4 for r in by_step):
        numbers = ", ".join("?" if r is None else f"{r:.4g}" for r in by_step)
        yield Cause(
            "factor by step",
            f"from this step on it is {numbers}, ... times the reference's",
            "look at the schedule of the learning rate, at the step that it is asked "
            "for, and at corrections that depend on the step",
            0.85,
        )
        return
    if abs(ratio + 1) < FIT:
        yield Cause(
            "sign flipped", "it is -1 times the reference's update",
            "scale by the negative learning rate, once: optax adds updates to the "
            "params", 0.99,
        )  # fmt: skip
        return
    decays = [d for d in [*decays_of(wrong), *USUAL_DECAYS] if d > _LEAST_DECAY]
    for made, reason, remedy in _made_of(list(dict.fromkeys(decays))):
        if not per_leaf and abs(abs(ratio) / made - 1) < FIT:
            likelihood = 0.89 if k else 0.96
            yield Cause("constant factor", f"{says}: {reason}", remedy, likelihood)
            return
    remedy = "look at the learning rate, and for a mean where a sum is"
    if per_leaf:
        says += f", {per_leaf}"
        remedy = "look at the rates, labels and masks of these leaves"
    yield Cause("constant factor", says, remedy, 0.89 if k else 0.9)


def _made_of(decays: Sequence[float]) -> Iterator[tuple[float, str, str]]:
    """Yields factors that a forgotten 1 - decay makes."""
    for b in decays:
        rest, words = 1 - b, f"1 - {b:g}"
        yield (
            1 + b, f"that is 1 + {b:g}",
            f"look whether it looks ahead as Nesterov's momentum does, by {b:g}",
        )  # fmt: skip
        yield 1 / rest, f"that is 1 / ({words})", f"weigh the new gradient by {words}"
        yield rest, f"that is 1 / ({words})", f"leave the factor {words} out"
        yield (
            rest**0.5, f"that is 1 / sqrt({words})",
            f"weigh the square of the new gradient by {words} in the second moment",
        )  # fmt: skip
        yield (
            rest**-0.5, f"that is 1 / sqrt({words})",
            f"leave the factor {words} of the second moment out",
        )  # fmt: skip


def _per_leaf(wrong: Wrong) -> str:
    """Says that other leaves have other factors, where that is so."""
    k = wrong.step
    ratios = [
        ratio_of(c, t) for c, t in zip(wrong.claimed[k], wrong.true[k], strict=True)
    ]
    own = ratios[wrong.place]
    others = [r for r in ratios if r is not None and own and abs(r / own - 1) > 1e-3]
    if not others or any(abs(r - 1) < FIT for r in others):
        return ""
    return f"{others[0]:.6g} times the reference's in another leaf"
