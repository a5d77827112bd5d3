"""Layers ranked by how large their gradient is beside their parameters."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.inputs import Leaf

# So many of the smallest and of the largest are told.
_MOST_TOLD = 3


@dataclasses.dataclass
class _Layer:
    """Sums over the entries of one layer's leaves."""

    gradient: float = 0.0
    parameter: float = 0.0
    entries: int = 0

    @property
    def size(self) -> float:
        """The gradient's root mean square beside the parameters'."""
        if not self.entries:
            return math.nan
        parameter = math.sqrt(self.parameter / self.entries)
        return math.sqrt(self.gradient / self.entries) / (parameter or 1.0)


class Ranking:
    """How large the gradient of each layer is.

    Args:
      vanishing: What part of the median layer's gradient is too small; None for none.
      exploding: How many times the median layer's is too large; None for none.

    Raises:
      ValueError: A limit makes no sense.
    """

    def __init__(self, vanishing: float | None, exploding: float | None):
        if vanishing is not None and not (_is_number(vanishing) and 0 < vanishing < 1):
            raise ValueError(
                f"`vanishing` must lie between 0 and 1, got {vanishing!r}: it is a "
                "part of the median layer's gradient."
            )
        if exploding is not None and not (_is_number(exploding) and exploding > 1):
            raise ValueError(
                f"`exploding` must be above 1, got {exploding!r}: it is a multiple of "
                "the median layer's gradient."
            )
        self._vanishing, self._exploding = vanishing, exploding
        self._layers: dict[str, _Layer] = {}

    def add(
        self, leaves: Sequence[Leaf], gradient: Sequence[Any], values: Sequence[Any]
    ) -> None:
        """Adds a trial's gradients."""
        for leaf, slope, value in zip(leaves, gradient, values, strict=True):
            array = np.abs(np.asarray(slope))
            if not array.size:
                continue
            layer = self._layers.setdefault(_layer_of(leaf.name), _Layer())
            wide = np.abs(_wide(value))
            # Under a variant the gradient has an axis of devices.
            copies = array.size // wide.size
            with np.errstate(over="ignore", invalid="ignore"):
                layer.gradient += float(np.sum(array**2)) / copies
                layer.parameter += float(np.sum(wide**2))
            layer.entries += wide.size

    def ranked(self) -> list[tuple[str, float]]:
        """Returns each layer with a gradient and its size, the smallest first."""
        sizes = {name: layer.size for name, layer in self._layers.items()}
        finite = {n: s for n, s in sizes.items() if math.isfinite(s) and s > 0}
        return sorted(finite.items(), key=lambda pair: pair[1])

    def notes(self) -> list[str]:
        """Says which layers have the smallest and the largest gradients."""
        ranked = self.ranked()
        if len(ranked) < 2:
            return []
        head = "gradient beside parameters (root mean square) by layer"
        span = math.log10(ranked[-1][1] / ranked[0][1])
        told = f"they span {span:.1f} orders of magnitude"
        if len(ranked) <= 2 * _MOST_TOLD:
            return [f"{head}, from the smallest: {_listed(ranked)}; {told}"]
        return [
            f"{head}, smallest of {len(ranked)}: {_listed(ranked[:_MOST_TOLD])}",
            f"{head}, largest: {_listed(ranked[: -_MOST_TOLD - 1 : -1])}; {told}",
        ]

    def findings(self) -> list[Finding]:
        """Returns a finding for each layer beyond a limit, and for the limits kept."""
        ranked = self.ranked()
        if (self._vanishing is None and self._exploding is None) or not ranked:
            return []
        median = statistics.median(size for _, size in ranked)
        return [
            finding
            for name, size in ranked
            if (finding := self._finding(name, size, median)) is not None
        ]

    def _finding(self, name: str, size: float, median: float) -> Finding | None:
        part = size / median
        if self._vanishing is not None and part < self._vanishing:
            return _beyond(
                name, part, self._vanishing, size, median, "vanish",
                "look at what lies between it and the loss: saturation, a small "
                "initialisation, many layers without a residual branch; normalise",
            )  # fmt: skip
        if self._exploding is not None and part > self._exploding:
            return _beyond(
                name, part, self._exploding, size, median, "explode",
                "look at what lies between it and the loss: a large initialisation, "
                "recurrence, a norm or division near zero; normalise, or clip",
            )  # fmt: skip
        return None


def _beyond(
    name: str, part: float, limit: float, size: float, median: float, does: str,
    remedy: str,
) -> Finding:  # fmt: skip
    says = (
        f"its gradient is {size:.2g} of its parameters (root mean square), {part:.2g} "
        f"times the median layer's {median:.2g}; the limit is {limit:.2g}"
    )
    cause = Cause(f"{does.removesuffix('e')}ing gradient", says, remedy)
    return Finding(
        name, (), "", Verdict.FAIL, Gap.SIZE, size=part, allowed=limit, check="size",
        cause=cause,
    )  # fmt: skip


def _listed(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {size:.2g}" for name, size in pairs)


def _layer_of(name: str) -> str:
    """Returns the name of the module that a leaf belongs to."""
    head, bracket, _ = name.rpartition("[")
    return head if bracket and head else name


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _wide(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
