"""What is wrong with gradients that are clipped example by example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.program import Values

_EACH = "clip each example's gradient by itself, before they are added"


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples' own gradients, and how they are to be clipped.

    Attributes:
      gradients: By example, the leaves' gradients in float64.
      max_norm: The norm that each example's gradient may have.
      is_mean: Whether the clipped gradients are averaged, not added.
    """

    gradients: list[Values]
    max_norm: float
    is_mean: bool

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.gradients)

    def norms(self) -> np.ndarray:
        """Returns the global norm of each example's gradient."""
        squares = [sum(norm(g) ** 2 for g in each) for each in self.gradients]
        return np.sqrt(squares)

    def factors(self) -> np.ndarray:
        """Returns by what each example's gradient is multiplied."""
        norms = self.norms()
        return self.max_norm / np.maximum(norms, self.max_norm)

    def weighed(self, factors: np.ndarray) -> Values:
        """Returns the mean, or the sum, of the gradients times these factors."""
        total = self.count if self.is_mean else 1
        return [
            np.tensordot(factors, np.stack(leaf), 1) / total
            for leaf in zip(*self.gradients, strict=True)
        ]


def explain_clipped(
    case: Case, findings: list[Finding], examples: Examples
) -> list[Finding]:
    """Names what is wrong with clipped gradients, where the numbers tell."""
    names = [leaf.name for leaf in case.leaves]
    if case.readings.exact is None:
        return findings
    found = []
    for finding in findings:
        if finding.verdict is Verdict.FAIL and finding.gap is Gap.FORMULA:
            i = names.index(finding.name)
            cause = _cause(
                case.readings.claimed[i], case.readings.exact[i], i, examples
            )
            if cause is not None:
                finding = dataclasses.replace(finding, cause=cause, other_causes=())
        found.append(finding)
    return found


def _cause(
    claimed: np.ndarray, truth: np.ndarray, leaf: int, examples: Examples
) -> Cause | None:
    if not np.isfinite(claimed).all():
        return _not_finite(examples)
    fit = diagnose.FIT
    if norm(truth):
        fit = min(fit, norm(claimed - truth) / norm(truth) / 10)

    def is_like(pattern: np.ndarray) -> bool:
        bound = fit * norm(pattern)
        return norm(claimed - pattern) <= bound < norm(truth - pattern)

    for cause, patterns in _candidates(examples):
        if is_like(patterns[leaf]):
            return cause
    if examples.is_mean:
        other, how = float(examples.count), "added in place of averaged"
        remedy = "divide their sum by the number of examples, or say reduction='sum'"
    else:
        other, how = 1 / examples.count, "averaged in place of added"
        remedy = "add the clipped gradients, or say reduction='mean'"
    if is_like(other * truth):
        return Cause(
            "sum or mean", f"{examples.count} clipped gradients are {how}", remedy
        )
    for cause, patterns in _candidates(examples):
        if is_like(other * patterns[leaf]):
            says = f"{cause.says}; and they are {how}"
            return Cause(cause.name, says, cause.remedy)
    return None


def _not_finite(examples: Examples) -> Cause | None:
    zeros = np.flatnonzero(examples.norms() == 0)
    if not zeros.size:
        return None
    return Cause(
        "division by a zero norm",
        f"example {zeros[0]} has a gradient of zeros, whose norm divides max_norm",
        "take max_norm / jnp.maximum(norm, max_norm), which never divides by zero",
    )


def _candidates(examples: Examples) -> Iterator[tuple[Cause, Values]]:
    """Yields usual mistakes, with the gradient that each of them makes."""
    norms, bound, count = examples.norms(), examples.max_norm, examples.count
    ones = np.ones(count)
    plain = examples.weighed(ones)
    yield (
        Cause("not clipped", "it is the gradient of all examples, unclipped", _EACH),
        (plain),
    )
    whole = np.sqrt(sum(norm(g) ** 2 for g in plain))
    yield (
        Cause(
            "mean clipped",
            f"the {'mean' if examples.is_mean else 'sum'} of all gradients is clipped, "
            "not each example's own",
            _EACH,
        ),
        [g * min(1.0, bound / whole) for g in plain] if whole else plain,
    )
    if examples.is_mean is False or count > 1:
        mean = [g / count if not examples.is_mean else g for g in plain]
        size = np.sqrt(sum(norm(g) ** 2 for g in mean))
        yield (
            Cause("mean clipped", "the mean of all gradients is clipped, not each "
                  "example's own", _EACH),
            [g * min(1.0, bound / size) for g in mean] if size else mean,
        )  # fmt: skip
    yield (
        Cause(
            "norm of each leaf",
            "each leaf is clipped to max_norm by its own norm",
            "take one norm over all leaves: optax.global_norm(gradients)",
        ),
        _by_leaf(examples),
    )
    with np.errstate(all="ignore"):
        scaled = np.where(norms > 0, bound / norms, 0.0)
        squared = np.where(norms > 0, np.minimum(1, bound / norms**2), 1.0)
        divided = np.where(norms > 0, np.minimum(1, bound * count / norms), 1.0)
    yield (
        Cause(
            "small gradients scaled up",
            "every example's gradient is scaled to max_norm, also those below it",
            "multiply by jnp.minimum(1, max_norm / norm)",
        ),
        examples.weighed(scaled),
    )
    yield (
        Cause("norm squared", "the squared norm is compared with max_norm",
              "take the square root of the sum of squares"),
        examples.weighed(squared),
    )  # fmt: skip
    for power, more in ((1, ""), (0, ", and their sum is not divided again")):
        part = examples.weighed(divided / count**power)
        yield (
            Cause(
                "loss divided by the batch",
                "each example's gradient is divided by the number of examples before "
                "it is compared with max_norm" + more,
                "take the gradient of one example's own loss: the mean over a batch of "
                "one",
            ),
            part,
        )
    yield (
        Cause("entries clipped", "each entry is clipped to max_norm, not the norm",
              "scale the whole gradient by jnp.minimum(1, max_norm / norm)"),
        _by_entry(examples),
    )  # fmt: skip


def _by_leaf(examples: Examples) -> Values:
    total = examples.count if examples.is_mean else 1
    found = []
    for leaf in zip(*examples.gradients, strict=True):
        sizes = np.array([norm(g) for g in leaf])
        factors = examples.max_norm / np.maximum(sizes, examples.max_norm)
        found.append(np.tensordot(factors, np.stack(leaf), 1) / total)
    return found


def _by_entry(examples: Examples) -> Values:
    total, bound = (examples.count if examples.is_mean else 1), examples.max_norm
    return [
        np.clip(np.stack(leaf).real, -bound, bound).sum(0) / total
        for leaf in zip(*examples.gradients, strict=True)
    ]
