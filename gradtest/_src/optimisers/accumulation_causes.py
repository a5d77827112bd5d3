"""What is wrong with an accumulated gradient: one small function for each cause.

A cause is named only where the numbers fit it: those of the full batch, and those of
the micro-batches that it may have been cut into.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradtest._src import diagnose, jaxprs
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.optimisers.micro_batches import (
    Pieces,
    Sizes,
    listed,
    ranges_of,
)
from gradtest._src.program import Values

_SECANT_STEPS = 8
# A descent is looked for over no more micro-batches, in no fewer numbers than these.
_MOST_MOVES, _LEAST_ENTRIES = 8, 3


@dataclasses.dataclass(frozen=True)
class Scene:
    """All leaves of a case beside the micro-batches' gradients.

    Attributes:
      found: What was accumulated, by leaf.
      truth: The full batch's gradient, by leaf.
      pieces: The micro-batches' gradients.
    """

    found: Values
    truth: Values
    pieces: Pieces

    @functools.cached_property
    def descent(self) -> tuple[Sizes, float] | None:
        """The cut and the rate of a descent between micro-batches that explains all."""
        entries = sum(value.size for value in self.found)
        if entries < _LEAST_ENTRIES:
            return None  # one number always fits
        for sizes in self.pieces.cuts():
            rate = _rate(self, sizes) if 1 < len(sizes) <= _MOST_MOVES else None
            if rate is not None:
                return sizes, rate
        return None


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One wrong leaf beside what micro-batches make of it.

    Attributes:
      index: Its place among the leaves that are checked.
      scene: All leaves.
      fit: How closely numbers must fit a pattern.
    """

    index: int
    scene: Scene
    fit: float

    @property
    def pieces(self) -> Pieces:
        """The micro-batches' gradients."""
        return self.scene.pieces

    @property
    def found(self) -> np.ndarray:
        """What was accumulated."""
        return self.scene.found[self.index]

    @property
    def truth(self) -> np.ndarray:
        """The full batch's gradient."""
        return self.scene.truth[self.index]

    def is_like(self, pattern: np.ndarray) -> bool:
        """Whether what was found is this pattern, which the truth is not."""
        bound = self.fit * norm(pattern)
        return norm(self.found - pattern) <= bound < norm(self.truth - pattern)

    def cuts(self) -> Iterator[tuple[Sizes, Values]]:
        """Yields the ways to cut the batch, with this leaf's gradient on each piece."""
        for sizes in self.pieces.cuts():
            gradients = self.pieces.on_each(sizes)
            if gradients is not None and len(sizes) > 1:
                yield sizes, [gradient[self.index] for gradient in gradients]


def explain_accumulated(
    case: Case, findings: list[Finding], pieces: Pieces
) -> list[Finding]:
    """Names what is wrong with what was accumulated, where its numbers tell."""
    if case.readings.exact is None:
        return findings
    scene = Scene(case.readings.claimed, case.readings.exact, pieces)
    return [_explained(case, finding, scene) for finding in findings]


def _explained(case: Case, finding: Finding, scene: Scene) -> Finding:
    names = [leaf.name for leaf in case.leaves]
    if finding.verdict is not Verdict.FAIL or finding.name not in names:
        return finding
    if finding.gap is Gap.ROUNDING:
        return _of_accumulator(case, finding)
    if finding.gap is not Gap.FORMULA:
        return finding
    index = names.index(finding.name)
    found, truth = scene.found[index], scene.truth[index]
    if not np.isfinite(found).all() or not np.isfinite(truth).all():
        return finding
    fit = diagnose.FIT
    if norm(truth):  # a pattern must explain most of the gap to be its cause
        fit = min(fit, norm(found - truth) / norm(truth) / 10)
    wrong = Wrong(index, scene, fit)
    for recognise in _CAUSES:
        cause = recognise(wrong)
        if cause is not None:
            return dataclasses.replace(finding, cause=cause, other_causes=())
    return finding


def _of_accumulator(case: Case, finding: Finding) -> Finding:
    """Names an accumulator that is narrower than what is added to it."""
    claim, program = case.claim.jaxpr, case.program.jaxpr
    if not jaxprs.computes_in_half(claim) or jaxprs.computes_in_half(program):
        return finding
    cause = Cause(
        "accumulator in half precision",
        "the formula is right, but gradients are accumulated in half precision, where "
        "the loss computes in full: small contributions are lost",
        "keep the accumulator in float32 (MultiSteps: accumulator_dtype=jnp.float32)",
    )
    return dataclasses.replace(finding, cause=cause, other_causes=())


def _counts_alike(wrong: Wrong) -> Cause | None:
    """Micro-batches that weigh differently were averaged as if they weighed alike."""
    for sizes, gradients in wrong.cuts():
        mean = np.mean(np.nan_to_num(gradients), axis=0)
        for scale, what in ((1.0, "the mean"), (float(len(sizes)), "the sum")):
            if not wrong.is_like(scale * mean) or norm(wrong.truth - mean) <= (
                wrong.fit * norm(mean)
            ):
                continue
            why, remedy = _weights(wrong, sizes, gradients)
            return Cause(
                "micro-batches count alike",
                f"it is {what} of the gradients of {len(sizes)} micro-batches, which "
                f"count alike: {why}",
                remedy,
            )
    return None


def _weights(wrong: Wrong, sizes: Sizes, gradients: Values) -> tuple[str, str]:
    """Says what micro-batches should be weighed by."""

    def explains(weights: Sequence[int]) -> bool:
        total = sum(weights)
        if not total:
            return False
        weighed = [
            w / total * np.nan_to_num(g)
            for w, g in zip(weights, gradients, strict=True)
        ]
        pattern = np.sum(weighed, axis=0)
        return norm(pattern - wrong.truth) <= wrong.fit * norm(wrong.truth)

    if len(set(sizes)) > 1 and explains(sizes):
        return (
            f"{listed(sizes)} rows",
            "weigh each micro-batch's gradient by its rows, or drop or pad (and mask) "
            "the last one",
        )
    for name, kept in wrong.pieces.counts(sizes):
        if explains(kept):
            return (
                f"a mask's counts differ, {name} keeps {listed(kept)}",
                "accumulate the gradient of the sum and the count apart, and divide "
                "once by the whole batch's count",
            )
    return (
        f"{listed(sizes)} rows, each with its own number of unmasked entries, its own "
        "statistics or its own draw of a random key",
        "accumulate numerator and denominator apart and divide once; draw what is "
        "random for the whole batch",
    )


def _sum_or_mean(wrong: Wrong) -> Cause | None:
    """A factor that is the number of micro-batches."""
    factor = diagnose.factor_between(wrong.found, wrong.truth)
    if factor is None or not wrong.is_like(factor * wrong.truth):
        return None
    for sizes in wrong.pieces.cuts():
        count = len(sizes)
        for power, words, remedy in (
            (count, "{0} times too large, the number of micro-batches: it is their sum",
             "divide what was accumulated by {0}, once (MultiSteps: "
             "use_grad_mean=True), or let the loss be a sum"),
            (1 / count, "{0} times too small, the number of micro-batches: it was "
             "divided by it once too often",
             "divide what was accumulated by {0} once, or not at all where the loss is "
             "a sum"),
        ):  # fmt: skip
            if count > 1 and abs(factor / power - 1) < wrong.fit:
                every = diagnose.all_entries(wrong.truth)
                return Cause(
                    "sum in place of mean" if power > 1 else "mean in place of sum",
                    f"in {every} it is {words.format(count)}",
                    remedy.format(count),
                )
    return None


def _one_alone(wrong: Wrong) -> Cause | None:
    """The accumulator was reset: only one micro-batch is left."""
    for sizes, gradients in wrong.cuts():
        count = len(sizes)
        for k, gradient in enumerate(gradients):
            for scale in _scales(sizes, k):
                if not wrong.is_like(scale * gradient):
                    continue
                which = {0: "first", count - 1: "last"}.get(k, f"number {k}")
                return Cause(
                    "one micro-batch alone",
                    f"it is the gradient of the {which} of {count} micro-batches alone"
                    + _of_rows(sizes) + ": what the others gave is lost",
                    "add to the accumulator in place of setting it, and reset it only "
                    "after the update",
                )  # fmt: skip
    return None


def _left_out(wrong: Wrong) -> Cause | None:
    """A micro-batch is missing."""
    for sizes, gradients in wrong.cuts():
        for pattern, k in _all_but(sizes, gradients):
            if wrong.is_like(pattern):
                which = "last" if k == len(sizes) - 1 else f"number {k}"
                which = "first" if k == 0 else which
                return Cause(
                    "micro-batch left out",
                    f"it is accumulated over all of {len(sizes)} micro-batches but the "
                    f"{which}" + _of_rows(sizes),
                    "look for a loop that ends too early, an update that comes before "
                    "the last gradient is added, or a remainder that is dropped",
                )
    return None


def _all_but(sizes: Sizes, gradients: Values) -> Iterator[tuple[np.ndarray, int]]:
    count, rows = len(sizes), sum(sizes)
    for k in (count - 1, *range(count - 1)):
        if count < 3:
            return  # then it is the other one alone
        rest = [j for j in range(count) if j != k]
        total = np.sum([gradients[j] for j in rest], axis=0)
        weighed = np.sum([sizes[j] * gradients[j] for j in rest], axis=0)
        for pattern in (total / count, total / (count - 1), total):
            yield pattern, k
        for weight in (rows, rows - sizes[k]):
            yield weighed / weight, k


def _twice(wrong: Wrong) -> Cause | None:
    """A micro-batch was counted twice."""
    for sizes, gradients in wrong.cuts():
        count, rows = len(sizes), sum(sizes)
        total = np.sum(gradients, axis=0)
        weighed = np.sum(
            [size * g for size, g in zip(sizes, gradients, strict=True)], axis=0
        )
        for k, gradient in enumerate(gradients):
            added = weighed + sizes[k] * gradient
            patterns = (
                (total + gradient) / count,
                (total + gradient) / (count + 1),
                total + gradient,
                added / rows,
                added / (rows + sizes[k]),
            )
            if any(map(wrong.is_like, patterns)):
                which = {0: "first", count - 1: "last"}.get(k, f"number {k}")
                return Cause(
                    "micro-batch counted twice",
                    f"the {which} of {count} micro-batches{_of_rows(sizes)} counts "
                    "twice",
                    "start the accumulator with zeros, or the loop after the "
                    "micro-batch that it was started with",
                )
    return None


def _dropped_rows(wrong: Wrong) -> Cause | None:
    """The rows that do not divide were left out."""
    rows = wrong.pieces.rows
    for sizes in wrong.pieces.cuts():
        kept = rows - rows % sizes[0]
        if not 0 < kept < rows:
            continue
        gradients = wrong.pieces.on_each((kept, rows - kept))
        if gradients is not None and wrong.is_like(gradients[0][wrong.index]):
            return Cause(
                "rows dropped",
                f"it is the gradient of the first {kept} of {rows} rows: the batch "
                "does not divide into equal micro-batches, and the rest is left out",
                "take the rest as a smaller micro-batch, weighed by its rows, or pad "
                "the batch and mask the padding",
            )
    return None


def _params_move(wrong: Wrong) -> Cause | None:
    """The parameters were changed between micro-batches, as by gradient descent."""
    if wrong.scene.descent is None:
        return None
    sizes, rate = wrong.scene.descent
    return Cause(
        "parameters move between micro-batches",
        f"it is the mean over {len(sizes)} micro-batches{_of_rows(sizes)} of gradients "
        "at parameters that gradient descent moves in between, at a rate of "
        f"{rate:.3g}",
        "take every micro-batch's gradient at the same parameters, and update them "
        "once",
    )


def _rate(scene: Scene, sizes: Sizes) -> float | None:
    """Returns the learning rate that explains what was found, if one does."""
    found, truth = _flat(scene.found), _flat(scene.truth)
    here = _at_rate(scene, sizes, 0.0)
    if here is None or norm(here - truth) > diagnose.FIT * norm(truth):
        return None
    fit = min(diagnose.FIT, norm(found - truth) / norm(truth) / 10)
    rate, step = 0.0, 1e-4
    for _ in range(_SECANT_STEPS):
        there = _at_rate(scene, sizes, rate + step)
        if there is None:
            return None
        slope = (there - here) / step
        steepness = float(np.vdot(slope, slope).real)
        if not steepness or not np.isfinite(steepness):
            return None
        change = float(np.vdot(slope, found - here).real) / steepness
        rate, step = rate + change, max(abs(change) * 1e-2, 1e-6 * abs(rate), 1e-12)
        here = _at_rate(scene, sizes, rate)
        if here is None or not np.isfinite(here).all():
            return None
        if norm(found - here) <= fit * norm(found):
            return rate
    return None


def _at_rate(scene: Scene, sizes: Sizes, rate: float) -> np.ndarray | None:
    """Returns the mean gradient where parameters move after each micro-batch."""
    moving, total = scene.pieces.moving, np.zeros(())
    for rows in ranges_of(sizes):
        try:
            gradients = scene.pieces.gradient(rows, moving)
        except Exception:  # a loss need not take a part of its batch
            return None
        total = total + _flat(gradients)
        # Descent goes against the conjugate of what JAX calls a gradient.
        moving = [x - rate * np.conj(g) for x, g in zip(moving, gradients, strict=True)]
    return total / len(sizes)


def _flat(values: Values) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in values])


def _scales(sizes: Sizes, k: int) -> tuple[float, ...]:
    return 1.0, 1 / len(sizes), sizes[k] / sum(sizes)


def _of_rows(sizes: Sizes) -> str:
    """Says how the batch was cut."""
    if len(set(sizes)) == 1:
        return f" of {sizes[0]} row{'s' * (sizes[0] > 1)}"
    return f" of {listed(sizes)} rows"


_CAUSES: tuple[Callable[[Wrong], Cause | None], ...] = (
    _sum_or_mean,
    _counts_alike,
    _dropped_rows,
    _left_out,
    _one_alone,
    _twice,
    _params_move,
)
