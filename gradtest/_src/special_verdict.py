"""What comes of a claim at a special point of its arguments.

A point may be so far out that the function itself fails there, or its arithmetic: a
claim is blamed for what it does where its function still works.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from gradtest._src import rounding
from gradtest._src.case import Case, norm
from gradtest._src.findings import Finding, Gap, Hazard, Verdict, worst
from gradtest._src.gaps import leaf_gap
from gradtest._src.inputs import Point
from gradtest._src.lifting import widen
from gradtest._src.program import Values
from gradtest._src.special_slopes import Slopes

# Of the largest contribution, below which a gap is noise.
_FLOOR = 1e-11
# Numbers of other sizes overflow or vanish when they are multiplied a few times.
_SMALLEST, _LARGEST = 1e-9, 1e3
# What four runs with every operation off by an ulp show of all that may happen.
_NOISE_FACTOR = 4
# Numbers so much larger than usual are still usual.
_USUAL = 2

Judge = Callable[[Case], list[Finding]]
_OPEN = Verdict.INCONCLUSIVE


def is_ordinary(point: Point) -> bool:
    """Whether the numbers of a point are of a size that programs are written for."""
    for value in point.moving:
        sizes = np.abs(widen(value))
        seen = sizes[sizes > 0]
        if seen.size and not _SMALLEST <= seen.min() <= seen.max() <= _LARGEST:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Usual:
    """What a gradient is like at an ordinary point.

    Attributes:
      norms: Of each leaf's gradient, or of each output's tangent.
      largest: The largest number among the leaves that move.
      is_autodiff: Whether the claim is what rule-free autodiff gives there.
    """

    norms: tuple[float, ...]
    largest: float = math.inf
    is_autodiff: bool = False

    @classmethod
    def of(cls, case: Case) -> Usual:
        """Reads it off the claim at an ordinary point."""
        norms = tuple(norm(array) for array in case.readings.claimed)
        is_lifted = not case.bench.islands
        is_one = is_lifted and _Special(case, cls(norms)).agrees_with_autodiff()
        return cls(norms, _largest(case.point), is_one)


def _largest(point: Point) -> float:
    sizes = [np.abs(widen(value)).max(initial=0.0) for value in point.moving]
    return float(max(sizes, default=0.0))


def judge_special(
    name: str, case: Case, usual: Usual, judge: Judge
) -> tuple[Hazard, list[Finding]]:
    """Judges a claim at a special point.

    Where claim and rule-free autodiff agree there, and both with the slope on either
    side, that is all: what confirms autodiff closely was done at an ordinary point.

    Args:
      name: What is special about the point.
      case: The claim there.
      usual: The gradient at an ordinary point.
      judge: Judges it in full.

    Returns:
      What came of it, and the findings of a claim that is wrong there.
    """
    readings = case.readings
    if not all(np.isfinite(value).all() for value in readings.values):
        says = "the function is not finite there"
        return Hazard(name, Verdict.NOT_CHECKED, says), []
    special = _Special(case, usual)
    if special.agrees() and special.works():
        return Hazard(name, Verdict.PASS), []
    found = judge(case)
    wrong = [f for f in found if f.verdict is Verdict.FAIL and special.counts(f)]
    if wrong and special.slopes.is_edge():
        says = "an edge of where the function has values, and a slope"
        return Hazard(name, Verdict.NOT_CHECKED, says), []
    if wrong and special.is_kinked():
        verdict = Verdict.PASS if special.agrees_with_autodiff() else _OPEN
        return Hazard(name, verdict, "kink: the function has no derivative there"), []
    if wrong:
        named = [dataclasses.replace(f, hazard=name) for f in wrong]
        cause = wrong[0].cause
        return Hazard(name, Verdict.FAIL, cause.name if cause else ""), named
    verdict = worst(f.verdict for f in found)
    if verdict is Verdict.FAIL:
        says = "rounding alone can do this to any rule at such numbers"
        return Hazard(name, _OPEN, says), []
    if verdict is Verdict.PASS:
        notes = [note for f in found for note in f.notes]
        return Hazard(name, verdict, notes[0] if notes else ""), []
    reasons = [f.cause.says for f in found if f.cause and f.verdict is verdict]
    return Hazard(name, verdict, reasons[0] if reasons else ""), []


class _Special:
    """A claim at a special point, and what its own precision makes of it there."""

    def __init__(self, case: Case, usual: Usual):
        self._case = case
        self._usual = usual
        self.slopes = Slopes(case)
        self._is_ordinary = is_ordinary(case.point)

    @functools.cached_property
    def _working(self) -> tuple[Values | None, Values]:
        return self._case.bench.read_working(
            self._case.point, self._case.readings.claimed
        )

    def _is_function_accurate(self) -> bool:
        """Whether the function's own precision gives its value there."""
        values, root = self._working[0], self._case.working_eps**0.5
        return values is None or all(
            norm(worked - value) <= root * norm(value)
            for worked, value in zip(values, self._case.readings.values, strict=True)
        )

    def agrees(self) -> bool:
        """Whether claim, rule-free autodiff and slopes are one, in float64."""
        # Far out differences of values are noise, and autodiff speaks alone.
        is_right = not self._is_ordinary or self.slopes.agree(self._scales())
        return is_right and self.agrees_with_autodiff()

    def agrees_with_autodiff(self) -> bool:
        """Whether claim and rule-free autodiff are one, in float64."""
        readings = self._case.readings
        if readings.exact is None or readings.plain is not None:
            return False
        arrays = [*readings.claimed, *readings.exact, *(readings.claimed_values or ())]
        if not all(np.isfinite(array).all() for array in arrays):
            return False
        return _values_agree(self._case) and self._gradients_agree()

    def _agrees_but_for_noise(self) -> bool:
        """The same, where every operation in float64 rounds as it may."""
        case, readings = self._case, self._case.readings
        if readings.exact is None or readings.plain is not None:
            return False
        pairs = zip(readings.claimed, readings.exact, strict=True)
        gaps = [norm(claimed - exact) for claimed, exact in pairs]
        return all(
            gap <= _FLOOR * scale or gap <= _NOISE_FACTOR * case.evaluation_noise(i)
            for i, (gap, scale) in enumerate(zip(gaps, self._scales(), strict=True))
        )

    def is_kinked(self) -> bool:
        """Whether it is the function that has no derivative there, along no kink."""
        return self._is_ordinary and not self.slopes.add_up()

    def works(self) -> bool:
        """Whether the claim's own precision gives it, wherever it gives the function.

        False where that is to be looked at more closely.
        """
        if not self._is_function_accurate():
            return True
        if not all(np.isfinite(array).all() for array in self._working[1]):
            return not self._is_representable()
        if not self._is_ordinary:
            return True
        return not any(map(self._loses_much, range(len(self._gaps()))))

    def counts(self, finding: Finding) -> bool:
        """Whether a failure is the claim's, not what so special a point makes of it."""
        if finding.gap is Gap.VALUE:
            return self._is_ordinary
        if finding.check != "derivative":
            return False  # of noise, where ties and saturation cancel the gradient
        if finding.gap is not Gap.ROUNDING:
            if self._agrees_but_for_noise():
                return self._is_ordinary and not self.slopes.agree(self._scales())
            return self._is_ordinary or self._is_followed(finding)
        if not self._is_function_accurate() or not self._is_representable():
            return False
        if all(np.isfinite(array).all() for array in self._working[1]):
            return self._is_ordinary and self._is_inaccurate(finding)
        return self._is_ordinary or self._is_plain_finite()

    def _is_followed(self, finding: Finding) -> bool:
        """Whether autodiff is to be trusted far from the usual, without differences.

        Not among tiny numbers, where differences can't say which branch it follows.
        """
        is_large = _largest(self._case.point) > _LARGEST
        return self._usual.is_autodiff and (is_large or not math.isfinite(finding.size))

    def _is_inaccurate(self, finding: Finding) -> bool:
        """Whether a claim loses more than its arithmetic does far from the usual.

        Logits of thousands cost any formula digits that autodiff happens to keep. What
        every operation loses in float32 is no mistake there; what a narrower one loses
        is.
        """
        names = [leaf.name for leaf in self._case.leaves]
        if finding.name not in names:
            return True
        index = names.index(finding.name)
        if not self._loses_much(index):
            return False
        if _largest(self._case.point) <= _USUAL * self._usual.largest:
            return True
        steps = np.finfo(np.float32).eps / np.finfo(np.float64).eps
        noise = float(_NOISE_FACTOR * steps * self._case.evaluation_noise(index))
        return self._gaps()[index] > noise

    def _loses_much(self, index: int) -> bool:
        """Whether rounding loses more than operands that are an ulp off account for.

        Where much cancels, as in rows that are all equal, nothing is left to be lost.
        """
        gap = self._gaps()[index]
        if gap <= self._floor(index):
            return False
        return self._case.readings.exact is None or gap > self._moved[index]

    @functools.cached_property
    def _moved(self) -> list[float]:
        moved = rounding.losses_of_operands(self._case)
        return [rounding.FACTOR * each for each in moved]

    def _gaps(self) -> list[float]:
        pairs = zip(self._working[1], self._case.readings.claimed, strict=True)
        return [norm(worked - lifted) for worked, lifted in pairs]

    def _floor(self, index: int) -> float:
        """What rounding may do to a gradient, beside the largest and a usual one.

        Ties and saturation make gradients cancel to zero, of which no rule keeps many
        digits: half of them is what is asked for.
        """
        root = rounding.FACTOR * self._case.working_eps**0.5
        return min(root, rounding.LARGE) * self._scales()[index]

    def _scales(self) -> list[float]:
        """Returns the size beside which a gap is to be seen: here, or usually."""
        claimed, sizes = self._case.readings.claimed, _sizes(self._case)
        norms = [norm(array) for array in claimed]
        largest = max(each * size for each, size in zip(norms, sizes, strict=True))
        return [
            max(each, largest / size, usual)
            for each, size, usual in zip(norms, sizes, self._usual.norms, strict=True)
        ]

    def _gradients_agree(self) -> bool:
        claimed, exact = self._case.readings.claimed, self._case.readings.exact
        assert exact is not None
        return not any(
            leaf_gap(c, e, rtol=self._case.rtol, floor=_FLOOR * scale).is_exceeded
            for c, e, scale in zip(claimed, exact, self._scales(), strict=True)
        )

    def _is_representable(self) -> bool:
        """Whether what is true fits into the dtypes of the leaves."""
        readings, limits = self._case.readings, self._limits()
        true = readings.exact if readings.exact is not None else readings.claimed
        return all(
            np.isfinite(array).all() and np.abs(array).max(initial=0.0) < limit
            for array, limit in zip(true, limits, strict=True)
        )

    def _limits(self) -> list[float]:
        items = (
            self._case.leaves
            if self._case.claim.mode == "rev"
            else self._case.program.outputs
        )
        return [float(jnp.finfo(item.dtype).max) for item in items]

    def _is_plain_finite(self) -> bool:
        """Whether rule-free autodiff is finite in the same precision."""
        plain = self._case.bench.read_working_exact(self._case.point)
        return plain is not None and all(np.isfinite(array).all() for array in plain)


def _values_agree(case: Case) -> bool:
    readings = case.readings
    return readings.claimed_values is None or not any(
        leaf_gap(claimed, value, rtol=case.rtol, floor=0.0).is_exceeded
        for claimed, value in zip(readings.claimed_values, readings.values, strict=True)
    )


def _sizes(case: Case) -> Sequence[float]:
    """Returns what makes norms of a derivative's items comparable with each other."""
    if case.claim.mode == "rev":
        return case.sizes
    return [1 / (norm(value) or 1.0) for value in case.readings.values]
