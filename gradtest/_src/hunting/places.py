"""Where a hunt looks: a program at arrays of one set of sizes, or one of its rules."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradtest._src import seeding
from gradtest._src.check import Check
from gradtest._src.findings import Finding, Gap, Hazard, Verdict, worst
from gradtest._src.hunting import kinds, nearby, second_order
from gradtest._src.hunting.checks import Judge
from gradtest._src.hunting.scopes import Scope, Sizes
from gradtest._src.inputs import Point, Role
from gradtest._src.rules import RuleUse

Values = tuple[Any, ...]
# An argument of more leaves goes to each kind of special point as a whole.
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
# Special points that are tried after all others.
_EXTREME = ("large", "smallest normal", "tiny")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Arrays at one place.

    Attributes:
      place: The place.
      values: All leaves that are arrays, in the order of the arguments.
      name: What is special about them.
      wider: 0 inside of the domains; n in the n-th ones around them.
    """

    place: Place
    values: Values
    name: str
    wider: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells examples apart."""
        arrays = (
            np.asarray(v).tobytes() if _has_numbers(v) else id(v) for v in self.values
        )
        return (id(self.place), *arrays)

    @property
    def entries(self) -> int:
        """The number of entries."""
        return sum(int(np.size(v)) for v in self.values if _has_numbers(v))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an example: its verdict, and what counts as wrong there."""

    hazard: Hazard
    wrong: tuple[Finding, ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether anything counts as wrong."""
        return bool(self.wrong)


def _has_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | float | complex)


class Place:
    """A check, and what its arrays may be.

    Attributes:
      check: The check.
      scopes: What each leaf that is an array may be.
      sizes: The sizes by name.
      values: The ordinary point.
      rule: The custom rule whose place it is; None for the whole program.
    """

    def __init__(
        self,
        check: Check,
        scopes: Sequence[Scope],
        sizes: Sizes,
        values: Values,
        *,
        is_lenient: bool,
        rule: RuleUse | None = None,
        usual: Callable[[], Mapping[str, float]] = dict,
    ):
        self.check = check
        self.scopes = tuple(scopes)
        self.sizes = dict(sizes)
        self.values = values
        self.rule = rule
        self._judge = Judge(check)
        self._is_lenient = is_lenient
        self._usual_elsewhere = usual

    @property
    def label(self) -> str:
        """What tells the place from others of the hunt."""
        own = f"rule {self.rule.rule.name}, " if self.rule is not None else ""
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        return own + sizes

    def point(self, values: Values) -> Point:
        """Returns the point of the check at these arrays."""
        every = self.check.inputs.leaves
        leaves = [leaf for leaf in every if leaf.role is not Role.STATIC]
        pairs = list(zip(leaves, values, strict=True))
        return Point(
            tuple(v for leaf, v in pairs if leaf.role is Role.MOVES),
            tuple(v for leaf, v in pairs if leaf.role is Role.HELD),
        )

    # --- judging ----------------------------------------------------------------------

    def first(self) -> Outcome:
        """Judges the ordinary point in full."""
        findings = self._judge.ordinary()
        verdict = worst(f.verdict for f in findings)
        name = self._named("an ordinary point")
        wrong = [f for f in findings if f.verdict is Verdict.FAIL]
        kept = self._counted(wrong, self.point(self.values), 0)
        if verdict is Verdict.FAIL and not kept:
            says = "what is off there by rounding, or in second order, does not count"
            return Outcome(Hazard(name, Verdict.INCONCLUSIVE, says))
        causes = [f.cause.says for f in findings if f.cause and f.verdict is verdict]
        says = causes[0] if causes and verdict is not Verdict.PASS else ""
        return Outcome(Hazard(name, verdict, says), tuple(kept))

    def judge(self, example: Example) -> Outcome:
        """Judges an example."""
        point = self.point(example.values)
        name = self._named(example.name)
        hazard, found = self._judge.at(name, point)
        if not found:
            return Outcome(hazard)
        wrong = self._counted(found, point, example.wider)
        if wrong:
            return Outcome(hazard, tuple(wrong))
        says = f"not counted as wrong: {hazard.says}"
        return Outcome(Hazard(name, Verdict.INCONCLUSIVE, says))

    @functools.cached_property
    def usual(self) -> dict[str, float]:
        """The largest entry of each leaf's gradient, here or where arguments came."""
        here, elsewhere = self._judge.usual, self._usual_elsewhere()
        return {n: max(size, elsewhere.get(n, 0.0)) for n, size in here.items()}

    def _named(self, name: str) -> str:
        return f"{name} ({self.label})" if self.label else name

    def _counted(
        self, found: Iterable[Finding], point: Point, wider: int
    ) -> list[Finding]:
        """Returns what counts as wrong.

        Around its domain a function need not have a second derivative, nor any at the
        edge of where it has values. At huge numbers a right formula may cancel: there
        only what overflows counts. What only rounds badly must do so nearby as well:
        where a gradient cancels to nothing, its rounding is all that is left of it.
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
        exact = [f for f in counted if not _is_rounding(f)]
        if exact or not counted:
            return exact
        return counted if self._rounds_badly_nearby(point, counted[0].order) else []

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
            for value in self.point(self.values).moving
        ]
        return all(s <= factor * u for s, u in zip(sizes, usual, strict=True))

    def _is_noise(self, finding: Finding) -> bool:
        """Whether what is off is nothing beside the gradient at an ordinary point."""
        entry = finding.entry
        if finding.gap is not Gap.FORMULA or entry is None or entry.true is None:
            return False
        usual = self.usual
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

    @functools.cached_property
    def _moving(self) -> list[nearby.Moving]:
        scopes = [scope for scope in self.scopes if scope.moves]
        leaves = self.check.inputs.moving
        return [
            nearby.Moving(leaf, None if scope.domain is None else scope.at(self.sizes))
            for scope, leaf in zip(scopes, leaves, strict=True)
        ]

    # --- special points ---------------------------------------------------------------

    def specials(self) -> Iterator[Example]:
        """Yields the special points inside of the domains, all leaves at once first."""
        yield from self._specials(0)

    def wider_specials(self) -> Iterator[Example]:
        """Yields the special points of the domains around them."""
        widest = max((len(scope.wider) for scope in self.scopes), default=0)
        for wider in range(1, widest + 1):
            yield from self._ordinary(wider)
            yield from self._specials(wider)

    def _ordinary(self, wider: int) -> Iterator[Example]:
        values = list(self.values)
        for k, scope in enumerate(self.scopes):
            if len(scope.wider) >= wider:
                generator = seeding.generator(0, "wider", wider, scope.name)
                values[k] = self._cast(k, scope.at(self.sizes, wider).draw(generator))
        yield Example(self, tuple(values), "ordinary numbers of any sign", wider)

    def _specials(self, wider: int) -> Iterator[Example]:
        by_kind: dict[str, dict[int, Any]] = {}
        for k, scope in enumerate(self.scopes):
            if scope.domain is None or (wider and len(scope.wider) < wider):
                continue
            domain = scope.at(self.sizes, wider)
            drawn = np.asarray(self.values[k]).astype(domain.dtype)
            for kind, array in kinds.specials(domain, drawn).items():
                by_kind.setdefault(kind, {})[k] = self._cast(k, array)
        by_kind = dict(sorted(by_kind.items(), key=lambda item: _is_extreme(item[0])))
        for kind, arrays in by_kind.items():
            where = "all" if len(arrays) > 1 else self.scopes[min(arrays)].name
            yield self._with(arrays, f"{where}: {kind}", wider)
        for one, other in self._alike():
            value = {other: self.values[one]}
            name = f"{self.scopes[other].name}: equal to {self.scopes[one].name}"
            yield self._with(value, name, wider)
        for kind, arrays in by_kind.items():
            if 1 < len(arrays) <= _MOST_ALONE:
                for k, array in arrays.items():
                    name = f"{self.scopes[k].name}: {kind}"
                    yield self._with({k: array}, name, wider)

    def _alike(self) -> list[tuple[int, int]]:
        """Returns pairs of leaves that may be equal, each to the one before it."""
        free = [k for k, scope in enumerate(self.scopes) if scope.domain is not None]
        pairs = []
        for n, other in enumerate(free):
            for one in reversed(free[:n]):
                if self.may_be_equal(one, other):
                    pairs.append((one, other))
                    break
        return pairs[:_MOST_ALONE]

    def may_be_equal(self, one: int, other: int) -> bool:
        """Whether two leaves are of one domain."""
        domains = [self.scopes[k].at(self.sizes) for k in (one, other)]
        first, second = domains
        same = first.shape == second.shape and first.dtype == second.dtype
        return same and first.name == second.name and bool(math.prod(first.shape))

    def _with(self, arrays: dict[int, Any], name: str, wider: int) -> Example:
        values = tuple(arrays.get(k, value) for k, value in enumerate(self.values))
        return Example(self, values, name, wider)

    def _cast(self, leaf: int, array: np.ndarray) -> Any:
        return cast_like(self.scopes[leaf], array)

    def holds(self, values: Values, wider: int) -> bool:
        """Whether arrays lie inside of the domains."""
        for scope, value in zip(self.scopes, values, strict=True):
            if scope.domain is None:
                continue
            array = np.asarray(value)
            inside = any(
                kinds.contains(scope.at(self.sizes, n), array) for n in range(wider + 1)
            )
            if not inside:
                return False
        return True


def cast_like(scope: Scope, array: np.ndarray) -> Any:
    """Returns an array as the leaf came: a Python number, or of its dtype."""
    if isinstance(scope.given, float | complex) and not isinstance(
        scope.given, np.generic
    ):
        return complex(array) if isinstance(scope.given, complex) else float(array)
    assert scope.domain is not None
    return np.asarray(array, scope.domain.dtype)


def _has_tiny(point: Point) -> bool:
    """Whether an entry is next to zero."""
    sizes = [np.abs(np.asarray(value, complex)) for value in point.moving]
    return any(((size > 0) & (size < _TINY)).any() for size in sizes)


def _is_extreme(kind: str) -> bool:
    return any(word in kind for word in _EXTREME)


def _is_finite(finding: Finding) -> bool:
    """Whether what is off is a number."""
    entry = finding.entry
    return math.isfinite(finding.size) and (
        entry is None or bool(np.isfinite(entry.claimed))
    )


def _is_rounding(finding: Finding) -> bool:
    return finding.gap is Gap.ROUNDING
