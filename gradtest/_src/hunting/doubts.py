"""What speaks against a failure: whether it counts as wrong in a hunt."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gradtest._src.findings import Finding, Gap
from gradtest._src.hunting import nearby, second_order
from gradtest._src.hunting.checks import Judge
from gradtest._src.inputs import Point

# The leaves of so many are also moved one by one.
_MOST_ALONE = 6
_NEIGHBOURS, _NEAR, _STEP, _CALM = 2, 0.02, 1e-3, 1e-6
# Of a leaf's usual gradient, and of the largest one, what is no more than noise.
_NOISE, _NOISE_OF_LARGEST = 1e-6, 1e-9
# So many times the usual gradient no function is steep that makes sense there.
_STEEP = 1e10
# Second derivatives that nobody asked for count at entries that are not larger.
_MODERATE = 8.0
# Where entries are larger than this, what is wrong but finite does not count.
_HUGE = 200.0
# Of leaves that are smaller than this, differences see little.
_TINY = 1e-6


class Doubts:
    """Asks of what failed at a point whether it is the gradient's mistake."""

    def __init__(
        self,
        judge: Judge,
        moving: Sequence[nearby.Moving],
        ordinary: Point,
        usual: Callable[[], Mapping[str, float]],
        *,
        is_lenient: bool,
    ):
        """Takes what is known of the place.

        Args:
          judge: Judges its points.
          moving: The leaves that move.
          ordinary: Its ordinary point.
          usual: Returns the largest entry of each leaf's gradient at ordinary points.
          is_lenient: Whether second derivatives are looked at that nobody asked for.
        """
        self._judge = judge
        self._moving = moving
        self._ordinary = ordinary
        self._usual = usual
        self._is_lenient = is_lenient

    def counted(
        self, found: Iterable[Finding], point: Point, wider: int
    ) -> list[Finding]:
        """Returns what counts as wrong.

        Around its domain a function need not have a second derivative, nor any at the
        edge of where it has values. At huge numbers a right formula may cancel: there
        only what overflows counts. What only rounds badly must do so nearby as well:
        where a gradient cancels to nothing, its rounding is all that is left of it.
        What iterates to an end elsewhere, and not there, has no value to differentiate.
        """
        counted = [f for f in found if not (wider and f.order > 1)]
        if self._is_lenient:
            is_moderate = self._is_within(_MODERATE, point) and not _has_tiny(point)
            counted = second_order.plain(counted, is_moderate)
            counted = [
                f for f in counted if f.order == 1 or self._is_promised(f, point)
            ]
        if self._is_blind(point):
            counted = [f for f in counted if self._holds(f, point)]
        if _has_tiny(point):  # smaller than the steps of differences
            counted = [f for f in counted if f.judged_by != "measured"]
        counted = [f for f in counted if not self._is_noise(f)]
        if not self._is_within(_HUGE, point):
            counted = [f for f in counted if not _is_finite(f)]
        if counted and wider and not self._makes_sense_around(point):
            return []
        if counted and not self._judge.settles(point) and self._settles_usually:
            return []
        exact = [f for f in counted if not _is_rounding(f)]
        if exact or not counted:
            return exact
        return counted if self._rounds_badly_nearby(point, counted[0].order) else []

    @functools.cached_property
    def _settles_usually(self) -> bool:
        return self._judge.settles(self._ordinary)

    def _holds(self, finding: Finding, point: Point) -> bool:
        """Whether what a derivative was compared with is the same nearby.

        At a branch for one point, autodiff without rules differentiates that branch:
        the value is right there, and its derivatives are not.
        """
        entry = finding.entry
        if finding.judged_by != "exact" or entry is None or entry.true is None:
            return True
        for number in range(_NEIGHBOURS):
            near = self._near(point, number, _STEP)
            exact = self._judge.exact(finding.order, finding.name, near)
            if exact is None:
                continue
            jump = abs(exact[entry.index] - entry.true)
            if not jump <= 0.3 * abs(entry.claimed - entry.true):
                return False
        return True

    def _is_promised(self, finding: Finding, point: Point) -> bool:
        """Whether a second derivative is one that the program means to have.

        A backward pass that treats one point apart has the right derivative there, and
        no other: of `custom_vjp` rules what is wrong must be so nearby as well.
        """
        if not self._holds(finding, point):
            return False
        if not self._judge.has_backward_rules:
            return True
        near = [self._near(point, number, _STEP) for number in range(_NEIGHBOURS)]
        found = [self._judge.at("", each)[1] for each in near]
        return any(f.order == finding.order for each in found for f in each)

    def _is_blind(self, point: Point) -> bool:
        """Whether a leaf is so small that differences along it say nothing.

        Then nothing but autodiff speaks, and of a branch for exact zeros it is wrong.
        """
        sizes = [np.abs(np.asarray(value, complex)) for value in point.moving]
        return any(0 < np.max(size, initial=0.0) < _TINY for size in sizes)

    def _is_within(self, factor: float, point: Point) -> bool:
        """Whether no entry is so many times larger than the usual ones, or than 1."""
        sizes = [
            np.max(np.abs(np.asarray(value, complex)), initial=0.0)
            for value in point.moving
        ]
        usual = [
            np.max(np.abs(np.asarray(value, complex)), initial=1.0)
            for value in self._ordinary.moving
        ]
        return all(s <= factor * u for s, u in zip(sizes, usual, strict=True))

    def _is_noise(self, finding: Finding) -> bool:
        """Whether what is off is nothing beside the gradient at an ordinary point."""
        entry = finding.entry
        if finding.gap is not Gap.FORMULA or entry is None or entry.true is None:
            return False
        usual = self._usual()
        largest = max(usual.values(), default=0.0)
        own = usual.get(finding.name, largest)
        off = abs(entry.claimed - entry.true)
        if _STEEP * max(largest, 1.0) < abs(entry.true) < math.inf:
            return True  # an iteration that does not converge there, or overflows
        return bool(off <= max(_NOISE * own, _NOISE_OF_LARGEST * largest))

    def _is_finite_around(self, point: Point) -> bool:
        """Whether the function is finite on all sides, of each leaf by itself as well.

        So it is not where two leaves meet at an edge, as in `p * log(q)` at zeros.
        """
        around = [self._near(point, n, _STEP) for n in range(2 * _NEIGHBOURS)]
        leaves = range(len(point.moving))
        if 1 < len(leaves) <= _MOST_ALONE:
            around += [
                nearby.with_one_of(point, near, k) for near in around for k in leaves
            ]
        return all(map(self._judge.is_finite, around))

    def _makes_sense_around(self, point: Point) -> bool:
        """Whether the function is finite on all sides, and no chaos."""
        if not self._is_finite_around(point):
            return False
        here = self._judge.values(point)
        near = self._judge.values(self._near(point, 0, _CALM))
        return all(
            float(np.max(np.abs(a - b), initial=0.0))
            <= math.sqrt(_CALM) * max(1.0, float(np.max(np.abs(a), initial=0.0)))
            for a, b in zip(here, near, strict=True)
        )

    def _rounds_badly_nearby(self, point: Point, order: int) -> bool:
        for number in range(_NEIGHBOURS):
            _, found = self._judge.at("", self._near(point, number, _NEAR))
            if not any(f.order == order for f in found):
                return False
        return True

    def _near(self, point: Point, number: int, step: float) -> Point:
        return nearby.near(self._moving, point, number, step)


def _has_tiny(point: Point) -> bool:
    """Whether an entry is next to zero."""
    sizes = [np.abs(np.asarray(value, complex)) for value in point.moving]
    return any(((size > 0) & (size < _TINY)).any() for size in sizes)


def _is_finite(finding: Finding) -> bool:
    """Whether what is off is a number."""
    entry = finding.entry
    return math.isfinite(finding.size) and (
        entry is None or bool(np.isfinite(entry.claimed))
    )


def _is_rounding(finding: Finding) -> bool:
    return finding.gap is Gap.ROUNDING
