"""Why a loss is not the mean, the sum or the list of its examples' losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.optimisers.micro_batches import listed

if TYPE_CHECKING:
    from gradtest._src.optimisers.reduction_check import ReductionCheck

# How closely a value must fit, and of how many examples all pairs are looked at.
_FIT, _MOST_PAIRED = 1e-5, 64


@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """A loss beside the losses of its examples, in float64.

    Attributes:
      check: The check.
      case: The case that failed.
    """

    check: ReductionCheck
    case: Case

    @property
    def value(self) -> np.ndarray:
        """What the loss came to."""
        values = self.case.readings.claimed_values
        assert values is not None
        return np.asarray(values[0])

    @functools.cached_property
    def losses(self) -> np.ndarray | None:
        """The losses of all examples, masked ones too."""
        indices = self.check.examples.indices()
        return self._lifted(lambda args: self.check.each(args, indices))

    @functools.cached_property
    def pairs(self) -> np.ndarray | None:
        """The losses of every first argument's example with every other's."""
        check = self.check
        one_axis = len(check.examples.axes) == 1 and check.chosen.per_example is None
        if not one_axis or check.examples.count > _MOST_PAIRED:
            return None

        def each(args: Any) -> Any:
            def one(pair: Any) -> Any:
                first = check.examples.cut(args, [pair[0]])
                other = check.examples.cut(args, [pair[1]])
                mask = check.examples.mask_of_one()
                return check.call(first[0], *other[1:], mask=mask)

            count = check.examples.count
            grid = np.indices((count, count)).reshape(2, -1).T.astype(np.int32)
            return jax.lax.map(one, grid)

        return self._lifted(each)

    def _lifted(self, fn: Any) -> np.ndarray | None:
        """Evaluates a function of the arguments in float64; None where it raises."""
        inputs, point = self.case.program.inputs, self.case.point
        values = [*point.moving, *point.held]
        count = len(point.moving)

        def flat(*xs: Any) -> Any:
            return fn(inputs.arguments(xs[:count], xs[count:]))

        try:
            with execution.user_code():
                jaxpr = jaxprs.expand_all(jax.make_jaxpr(flat)(*values))
            wide = [execution.at_home(widen(value)) for value in values]
            run = execution.lifted(lambda xs: Evaluator()(jaxpr, xs), [wide])
            return np.asarray(execution.to_host(run(wide))[0])
        except Exception:  # a loss need not take other pairs
            return None


def explain_reduction(case: Case, found: list[Finding], told: Told) -> list[Finding]:
    """Names why a loss is not what its examples make it, where the numbers tell.

    Where a gradient is wrong the value is told with it, not by itself.
    """
    if case.readings.claimed_values is None:
        return found
    of_gradient = [
        f for f in found if f.verdict is Verdict.FAIL and f.gap is Gap.FORMULA
    ]
    value = next((f for f in found if f.gap is Gap.VALUE), None)
    cause = _cause(told) if value is not None else None
    if cause is None and value is not None:
        cause = _not_told(told)
    explained = []
    for finding in found:
        if finding is value and of_gradient:
            continue
        is_told = finding.gap in (Gap.FORMULA, Gap.VALUE)
        if finding.verdict is Verdict.FAIL and cause is not None and is_told:
            is_unsure = cause.likelihood < 1 and finding.cause is not None
            others = (finding.cause,) if is_unsure and finding.cause else ()
            finding = dataclasses.replace(finding, cause=cause, other_causes=others)
        explained.append(finding)
    return explained


def _cause(told: Told) -> Cause | None:
    losses, value = told.losses, told.value
    if losses is None or not np.isfinite(value).all():
        return None
    wanted = np.asarray(told.case.readings.values[0])
    for cause, pattern in _candidates(told, losses):
        pattern = (
            np.reshape(pattern, value.shape)
            if np.size(pattern) == value.size
            else (None)
        )
        if pattern is None or not np.isfinite(pattern).all():
            continue
        bound = _FIT * norm(pattern)
        if norm(value - pattern) <= bound < norm(wanted - pattern):
            return cause
    return None


def _candidates(told: Told, losses: np.ndarray) -> Iterator[tuple[Cause, Any]]:
    """Yields usual mistakes, with the value that each of them makes."""
    kept = told.check.examples.kept()
    count, n = len(kept), int(kept.sum())
    reduction = told.check.chosen.reduction
    total, every = np.sum(losses[kept], 0), np.sum(losses, 0)
    if reduction == "none":
        if n < count:
            yield _mask_ignored("list", count - n), losses
        return
    if reduction == "mean":
        yield (
            Cause(
                "sum in place of mean",
                f"it is the sum of {n} losses, {n} times too large",
                "divide by the number of examples, or say reduction='sum'",
            ),
            total,
        )
        yield (
            Cause(
                "divided twice",
                f"it is the mean of {n} losses, divided by {n} once more",
                "divide by the number of examples once",
            ),
            total / n**2,
        )
    else:
        yield (
            Cause(
                "mean in place of sum",
                f"it is the mean of {n} losses, {n} times too small",
                "add the losses, or say reduction='mean'",
            ),
            total / n,
        )
    if n < count:
        yield (
            Cause(
                "divided by all in place of unmasked",
                f"the sum of {n} unmasked losses is divided by all {count}",
                "divide by the number of unmasked ones: jnp.sum(mask)",
            ),
            total / count,
        )
        yield _mask_ignored("mean", count - n), every / count
        yield _mask_ignored("sum", count - n), every
        yield (
            Cause(
                "mask left out of the sum",
                f"all {count} losses are added, and divided by the {n} unmasked ones",
                "mask the losses before they are added",
            ),
            every / n,
        )
        yield (
            Cause(
                "mask inverted",
                f"it is the {reduction} of the {count - n} losses that are masked",
                "keep what the mask says is kept: True counts",
            ),
            (every - total) / (count - n if reduction == "mean" else 1),
        )
    yield from _means_of_means(told, losses)
    pairs = told.pairs
    if pairs is not None and count > 1:
        yield _broadcast("mean", count), np.mean(pairs, 0)
        yield _broadcast("sum", count), np.sum(pairs, 0)
        yield (
            _broadcast("sum over pairs, divided by n", count),
            np.sum(pairs, 0) / count,
        )


def _means_of_means(told: Told, losses: np.ndarray) -> Iterator[tuple[Cause, Any]]:
    """Yields the mean of means along one axis, where a mask leaves them unequal."""
    examples = told.check.examples
    kept = examples.kept().reshape(examples.lengths)
    if kept.ndim != 2 or kept.all() or losses.size != kept.size:
        return
    masked = np.where(kept, losses.reshape(kept.shape), 0)
    for axis in (0, 1):
        counts = kept.sum(axis)
        means = masked.sum(axis) / np.maximum(counts, 1)
        yield (
            Cause(
                "mean of unequal means",
                f"it is the mean of means along axis {examples.axes[axis]}, which keep "
                f"{listed(counts.tolist()[:8])} entries and count alike",
                "divide the sum of all unmasked losses by how many they are, once",
            ),
            np.mean(means),
        )
        yield (
            Cause(
                "mean of unequal means",
                f"it is the sum of means along axis {examples.axes[axis]}",
                "divide the sum of all unmasked losses by how many they are, once",
            ),
            np.sum(means),
        )


def _mask_ignored(what: str, count: int) -> Cause:
    return Cause(
        "mask ignored",
        f"it is the {what} of all losses: the {count} masked ones count as well",
        "mask each example's loss before it is reduced",
    )


def _broadcast(what: str, count: int) -> Cause:
    return Cause(
        "examples broadcast against each other",
        f"it is the {what} over all {count * count} pairs of the {count} examples' "
        "predictions and targets",
        "give both one shape: [n, 1] against [n] makes [n, n]",
    )


def _not_told(told: Told) -> Cause:
    reduction = told.check.chosen.reduction
    wanted = np.asarray(told.case.readings.values[0])
    numbers = ""
    if told.value.size == 1 == wanted.size:
        numbers = f" ({told.value.item():.6g} and {wanted.item():.6g})"
    what = {"none": "its examples' losses", "mean": "the mean of its examples' losses",
            "sum": "the sum of its examples' losses"}[reduction]  # fmt: skip
    return Cause(
        "not the examples' losses",
        f"it is not {what}, each computed by itself{numbers}: one depends on "
        "other examples, or is weighed",
        "reduce over the features' axes before the examples'; where examples are meant "
        "to see each other, hand their formula over as per_example=",
        0.7,
    )


def one_example(count: int, reduction: str) -> Cause:
    """Says that one example that counts tells nothing of a reduction."""
    of = "there is one example" if count == 1 else "the mask keeps one example"
    return Cause(
        "one example",
        f"{of} alone: its mean, its sum and its own loss are the same number, so "
        f"reduction={reduction!r} can't be told from another",
        "hand over at least two examples that count, of other losses",
    )


def not_finite_alone(by: str) -> Cause:
    """Says that it is one example's loss that is not finite, not that of all."""
    return Cause(
        "one example not finite",
        f"the loss of all examples is finite, but {by} of one example alone is NaN or "
        "infinite: it depends on other examples, as by a batch's standard deviation, "
        "or leaves some out",
        "if examples are meant to see each other, hand over the loss of example i as "
        "per_example=lambda i, *args: ...; if not, look for a slice that drops rows, "
        "or a mean over nothing",
    )
