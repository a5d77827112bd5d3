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
from gradtest._src.findings import Finding, Hazard, Verdict, worst
from gradtest._src.hunting import kinds, nearby
from gradtest._src.hunting.checks import Judge
from gradtest._src.hunting.doubts import Doubts
from gradtest._src.hunting.scopes import Scope, Sizes
from gradtest._src.inputs import Point, Role
from gradtest._src.rules import RuleUse

Values = tuple[Any, ...]
# An argument of more leaves goes to each kind of special point as a whole.
_MOST_ALONE = 6
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
        """Returns what counts as wrong."""
        doubts = Doubts(
            self._judge,
            self._moving,
            self.point(self.values),
            lambda: self.usual,
            is_lenient=self._is_lenient,
        )
        return doubts.counted(found, point, wider)

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


def _is_extreme(kind: str) -> bool:
    return any(word in kind for word in _EXTREME)
