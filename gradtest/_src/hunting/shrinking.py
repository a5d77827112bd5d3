"""The smallest example that is still wrong: fewest entries, then roundest numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gradtest._src.domain import Domain
from gradtest._src.findings import Finding
from gradtest._src.hunting import kinds
from gradtest._src.hunting.ground import Ground
from gradtest._src.hunting.places import Example, Outcome, Place, cast_like

# So many new sets of sizes are tried, and so many examples.
_MOST_PLACES, _MOST_EXAMPLES, _MOST_EXAMPLES_LARGE = 6, 160, 40
# Arguments of more entries are large.
_LARGE = 20_000
# Entries of more are not looked at one by one.
_MOST_ALONE = 32
_SMALL = (1, 2, 3, 4, 5, 6, 8, 12, 16)

Judge = Callable[[Example], Outcome]


class Shrinking:
    """Makes an example smaller as long as it stays wrong in the same way."""

    def __init__(self, ground: Ground, judge: Judge, found: Example):
        self._ground, self._judge = ground, judge
        self.best = found
        self._sort = _sort_of(judge(found).wrong)
        is_large = found.entries > _LARGE
        self._places = _MOST_PLACES
        self._examples = _MOST_EXAMPLES_LARGE if is_large else _MOST_EXAMPLES

    def run(self) -> Example:
        """Returns the smallest example that was found."""
        for _ in range(2):  # of simpler values, less need be kept
            if self.best.place.rule is None:
                self._shrink_sizes()
            self._shrink_values()
        return self.best

    def _is_wrong(self, example: Example) -> bool:
        """Whether an example is wrong in the same way; then it is the best one."""
        if self._examples <= 0:
            return False
        self._examples -= 1
        if not example.place.holds(example.values, example.wider):
            return False
        wrong = self._judge(example).wrong
        if not wrong or _sort_of(wrong) != self._sort:
            return False
        self.best = example
        return True

    # --- sizes ------------------------------------------------------------------------

    def _shrink_sizes(self) -> None:
        names = sorted(self.best.place.sizes, key=lambda n: -self.best.place.sizes[n])
        for name in names:
            for size in _SMALL:
                if size >= self.best.place.sizes[name]:
                    break
                sizes = {**self.best.place.sizes, name: size}
                place = self._place(sizes)
                if place is not None and self._is_wrong_at(place):
                    break

    def _place(self, sizes: dict[str, int]) -> Place | None:
        if not self._ground.shapes.accepts(sizes):
            return None
        if not self._ground.is_known(sizes):
            if self._places <= 0:
                return None
            self._places -= 1
        order = self._sort[0]
        place = self._ground.at(sizes, order)
        if place is None or order == 1 or self._ground.is_judged(place):
            return place
        try:
            place.first()  # the second order is traced there
        except Exception:
            return None
        self._ground.judged.add(id(place))
        return place

    def _is_wrong_at(self, place: Place) -> bool:
        best = self.best
        return any(
            self._is_wrong(Example(place, values, best.name, best.wider))
            for values in _cut(best, place)
        )

    # --- values -----------------------------------------------------------------------

    def _shrink_values(self) -> None:
        for _ in range(2):
            before = self.best
            for k, scope in enumerate(self.best.place.scopes):
                if scope.domain is not None:
                    self._shrink_leaf(k)
            if self.best is before:
                return

    def _shrink_leaf(self, leaf: int) -> None:
        domain = self._domain(leaf)
        if any(self._tries(leaf, array) for array in self._wholes(leaf, domain)):
            return
        if domain.name not in kinds.ENTRYWISE:
            return
        self._shrink_blocks(leaf)
        if np.size(self.best.values[leaf]) <= _MOST_ALONE:
            self._shrink_entries(leaf)

    def _domain(self, leaf: int) -> Domain:
        return self.best.place.scopes[leaf].at(self.best.place.sizes, self.best.wider)

    def _tries(self, leaf: int, array: np.ndarray) -> bool:
        """Tries another array of a leaf: whether that is simpler, and still wrong."""
        current = np.asarray(self.best.values[leaf])
        if _weight(array) >= _weight(current):
            return False
        values = list(self.best.values)
        values[leaf] = cast_like(self.best.place.scopes[leaf], array)
        best = self.best
        return self._is_wrong(Example(best.place, tuple(values), best.name, best.wider))

    def _wholes(self, leaf: int, domain: Domain) -> Iterator[np.ndarray]:
        """Yields simple arrays of the leaf's shape, the simplest first."""
        current = np.asarray(self.best.values[leaf])
        if domain.name not in kinds.ENTRYWISE:
            yield from kinds.specials(domain, current).values()
            return
        entries = kinds.special_entries(domain)[:6]
        yield from (np.full_like(current, entry) for entry in entries)
        if domain.name in ("integers", "mask", "flags"):
            return
        wide = _widened(current)
        yield np.sign(np.real(wide)).astype(current.dtype)
        for digits in (0, 1):
            yield np.round(wide, digits).astype(current.dtype)
        yield _to_one_digit(wide).astype(current.dtype)

    def _shrink_blocks(self, leaf: int) -> None:
        """Replaces ever smaller blocks of entries by the simplest ones."""
        size = np.size(self.best.values[leaf])
        entries = kinds.special_entries(self._domain(leaf))[:2]
        block = size // 2
        while block > max(1, size // _MOST_ALONE):
            for start in range(0, size, block):
                for entry in entries:
                    array = np.array(self.best.values[leaf])
                    array.reshape(-1)[start : start + block] = entry
                    if self._tries(leaf, array):
                        break
            block //= 2

    def _shrink_entries(self, leaf: int) -> None:
        entries = kinds.special_entries(self._domain(leaf))[:6]
        for place in range(np.size(self.best.values[leaf])):
            current = np.array(self.best.values[leaf])
            old = current.reshape(-1)[place]
            near = []
            if current.dtype.kind not in "biu":
                wide = _widened(np.asarray(old))
                near = [np.round(wide), np.round(wide, 1), _to_one_digit(wide)]
            for entry in (*entries, *near):
                array = current.copy()
                array.reshape(-1)[place] = entry
                if self._tries(leaf, array):
                    break


def _sort_of(wrong: tuple[Finding, ...]) -> tuple[Any, ...]:
    """Returns what an example must keep: the order, and the gap, of what is wrong."""
    first = min(wrong, key=lambda f: f.order)
    return first.order, first.gap


def _cut(example: Example, place: Place) -> Iterator[tuple[Any, ...]]:
    """Yields the values of an example cut to the smaller sizes of another place."""
    scopes = place.scopes
    for take_last in (False, True):
        values = []
        for k, (scope, value) in enumerate(zip(scopes, example.values, strict=True)):
            if scope.domain is None:
                values.append(value)
                continue
            array = np.asarray(value)
            wanted = np.shape(place.values[k])
            for axis, size in enumerate(wanted):
                most = array.shape[axis]
                start = most - size if take_last else 0
                array = np.take(array, range(start, start + size), axis=axis)
            values.append(cast_like(scope, _inside(scope.at(place.sizes), array)))
        yield tuple(values)
    yield place.values


def _inside(domain: Domain, array: np.ndarray) -> np.ndarray:
    """Returns indices that were cut back to what there is to be indexed."""
    if domain.name != "integers":
        return array
    ends = dict(domain.parameters)
    return np.clip(array, ends["low"], ends["high"] - 1)


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _to_one_digit(wide: np.ndarray) -> np.ndarray:
    """Rounds to one significant digit."""
    if np.iscomplexobj(wide):
        return _to_one_digit(wide.real) + 1j * _to_one_digit(wide.imag)
    with np.errstate(all="ignore"):
        power = 10.0 ** np.floor(np.log10(np.abs(wide)))
        return np.where(wide == 0, 0.0, np.round(wide / power) * power)


def _weight(array: np.ndarray) -> tuple[float, float]:
    """Returns how far an array is from the simplest: digits to be written, and size."""
    wide = _widened(array).ravel()
    parts = np.concatenate([wide.real, wide.imag]) if np.iscomplexobj(wide) else wide
    different = len(np.unique(parts[:4096]))
    digits = sum(_digits(value) for value in parts[:256])
    capped = np.minimum(np.abs(parts), 1e6)
    signs = int(np.signbit(parts).sum())
    return digits + different, float(capped.sum()) + 0.5 * signs


def _digits(value: float) -> float:
    """Returns how many characters a number takes, but for small whole numbers."""
    if value in (0, 1):
        return float(value)
    return float(len(f"{abs(value):.9g}") + 1)
