"""How far a cell's results lie from the reference, and how far they may."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gradtest._src import rounding
from gradtest._src.case import NOISE_FLOOR, norm
from gradtest._src.cells.reference import Reference
from gradtest._src.cells.ways import Cell, Row
from gradtest._src.devices import homes, matmuls
from gradtest._src.gaps import LeafGap, leaf_gap
from gradtest._src.program import Values

# Float64 rounds the same sums in another order.
_FLOOR = 1e-12
_FLOAT64_EPS = float(np.finfo(np.float64).eps)
# Operation by operation XLA rounds more often than in one program.
_EAGER_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """A cell's result for one item (a value or a leaf's gradient) at one point.

    Attributes:
      item: Which of the values and gradients.
      place: Which row of the result, or which device's copy.
      places: How many rows or copies there are of this item.
      row: What it is to be compared at.
      found: The result.
    """

    item: int
    place: int
    places: int
    row: Row
    found: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """One part beside the reference.

    Attributes:
      part: What was compared.
      truth: What it should be.
      gap: The difference, relative to the truth.
      is_undecided: Whether rounding may explain it at this point.
    """

    part: Part
    truth: np.ndarray
    gap: LeafGap
    is_exceeded: bool
    is_undecided: bool = False

    @property
    def strain(self) -> float:
        """The difference as a part of what is allowed."""
        if not np.isfinite(self.gap.size):
            return np.inf
        if not self.gap.size:
            return 0.0
        return self.gap.size / self.gap.allowed if self.gap.allowed else np.inf


class Judge:
    """Compares parts of results with the reference.

    Args:
      reference: The derivative by itself.
      outputs: How many of its results are values; the rest are gradients.
      rtol: Allowed relative difference in float64.
      rounding_rtol: Allowed in working precision; None measures it.
    """

    def __init__(
        self,
        reference: Reference,
        outputs: int,
        rtol: float,
        rounding_rtol: float | None,
    ):
        self.reference = reference
        self.outputs = outputs
        self.spacing = reference.spacing
        self.rtol = max(rtol, 64 * self.spacing) if reference.islands else rtol
        self.rounding_rtol = rounding_rtol
        self._products = matmuls.coarsest(reference.jaxpr, homes.default_device())
        self._losses: dict[tuple[Row, float], list[float]] = {}

    def in_float64(self, part: Part) -> Difference:
        """Compares a part of a lifted result."""
        wanted = self.reference.lifted(part.row)
        truth = wanted[part.item]
        largest = self._largest(wanted, part.item)
        gap = leaf_gap(
            part.found, truth, rtol=self.rtol, floor=_FLOOR * largest, beside=largest
        )
        wrong = gap.is_exceeded or not np.isfinite(part.found).all()
        undecided = wrong and self._is_noise(part, truth, 4 * _FLOAT64_EPS, 8.0)
        return Difference(part, truth, gap, wrong, undecided)

    def as_it_runs(self, part: Part, cell: Cell) -> Difference:
        """Compares a part of a result in working precision with the lifted one."""
        lifted = self.reference.lifted(part.row)
        truth = lifted[part.item]
        size, scale = norm(part.found - truth), norm(truth)
        allowed = self._allowed(part.row, part.item)
        largest = self._largest(lifted, part.item)
        is_silent = scale <= NOISE_FLOOR * largest
        unit = (largest if is_silent else scale) or 1.0
        if cell.family == "eager" and not cell.is_own and self.rounding_rtol is None:
            allowed = max(allowed, min(_EAGER_FACTOR * allowed, rounding.LARGE * unit))
        wrong = not size <= allowed
        undecided = not np.isfinite(self.reference.working(part.row)[part.item]).all()
        if wrong and self.rounding_rtol is None and np.isfinite(size):
            loss = self._shaken(part.row, self.spacing)[part.item]
            allowed = max(allowed, rounding.allowance(loss, 0.0, unit))
            wrong = size > min(allowed, rounding.LARGE * unit)
            undecided = wrong and size <= max(allowed, 8 * loss)
        gap = leaf_gap(part.found, truth, rtol=allowed / unit, floor=0.0)
        gap = dataclasses.replace(
            gap, size=float(size / unit), allowed=float(allowed / unit)
        )
        return Difference(part, truth, gap, wrong, undecided)

    def _largest(self, items: Values, item: int) -> float:
        """Returns the largest norm among values, or among gradients."""
        is_value = item < self.outputs
        own = items[: self.outputs] if is_value else items[self.outputs :]
        return max(map(norm, own), default=0.0)

    def _allowed(self, row: Row, item: int) -> float:
        """Returns what rounding may do: what it does where the program runs alone."""
        lifted = self.reference.lifted(row)
        scale = norm(lifted[item])
        relative = self.rounding_rtol
        if relative is not None:
            return relative * scale
        relative = rounding.floor(self.spacing, self._products)
        # A gradient that is zero by cancellation keeps the rounding of its terms.
        largest = self._largest(lifted, item)
        cancelled = 4 * self.spacing * largest
        floor = relative * scale + (cancelled if scale < NOISE_FLOOR * largest else 0)
        loss = norm(self.reference.working(row)[item] - lifted[item])
        if not np.isfinite(loss):
            return floor
        unit = max(scale, largest if scale < NOISE_FLOOR * largest else 0.0)
        return max(floor, rounding.allowance(loss, 0.0, unit))

    def _shaken(self, row: Row, eps: float) -> list[float]:
        if (row, eps) not in self._losses:
            self._losses[row, eps] = self.reference.losses(row, eps)
        return self._losses[row, eps]

    def _is_noise(
        self, part: Part, truth: np.ndarray, eps: float, factor: float
    ) -> bool:
        """Whether rounding of this size moves the reference as far as that."""
        size = norm(part.found - truth)
        return size <= factor * self._shaken(part.row, eps)[part.item]


def worst_of(differences: Sequence[Difference]) -> Difference:
    """Returns the difference that exceeds its allowance by most."""
    return max(differences, key=lambda d: (d.is_exceeded, d.strain))
