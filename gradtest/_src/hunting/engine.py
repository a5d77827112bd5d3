"""The hunt itself: what is tried, in which order, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gradtest._src import jaxprs, progress, seeding
from gradtest._src.findings import Hazard
from gradtest._src.hunting.ground import Ground
from gradtest._src.hunting.places import Example, Outcome, Place

# The parts of all examples that go to special points, and to a program's rules.
_SPECIAL, _RULES = 0.4, 0.2
# So many examples does a new set of sizes cost, and so many sets at most.
_PER_SIZES, _MOST_SIZES, _MOST_SIZES_LARGE = 12, 10, 3
_LARGE_PROGRAM = 1500
# So many further examples does shrinking by Hypothesis try.
_MOST_SHRINKS = 80
_DRAWS = 2


class Hunt:
    """Tries examples until one is wrong, or there have been enough.

    Attributes:
      ground: The places.
      tried: What came of each example.
      after: At which of them something was wrong; None where nothing was.
    """

    def __init__(self, ground: Ground, examples: int):
        self.ground = ground
        self.examples = examples
        self.tried: list[Hazard] = []
        self.after: int | None = None
        self.places: list[Place] = []
        self._outcomes: dict[Any, Outcome] = {}

    def judge(self, example: Example) -> Outcome:
        """Judges an example, or tells what came of it before."""
        key = example.key
        if key not in self._outcomes:
            self._outcomes[key] = example.place.judge(example)
            self.tried.append(self._outcomes[key].hazard)
        return self._outcomes[key]

    def prepare(self, place: Place) -> bool:
        """Makes a place ready: whether its ordinary point can be judged."""
        if self.ground.is_judged(place):
            return True
        try:
            place.first()
        except Exception:  # the place of other arguments, or an older function
            return False
        self.ground.judged.add(id(place))
        return True

    def run(self) -> Example | None:
        """Returns an example that is wrong; None where none was found."""
        found = self._at_ordinary_points()
        if found is None:
            found = self._first_wrong(self._enumerated())
        if found is None:
            found = self._searched()
        return found

    @property
    def left(self) -> int:
        """How many examples may still be tried."""
        return self.examples - len(self.tried)

    def _first_wrong(self, examples: Iterable[Example]) -> Example | None:
        for example in progress.following(examples, "special points", None):
            if self.left <= 0:
                return None
            if self.judge(example).is_wrong:
                return example
        return None

    # --- ordinary points, at every set of sizes ---------------------------------------

    def _at_ordinary_points(self) -> Example | None:
        home = self.ground.home()
        if self._ordinary(home):
            return _ordinary_example(home)
        for sizes in self.ground.shapes.choices(self._most_sizes(home)):
            if self.left <= 0:
                return None
            place = self.ground.at(sizes)
            if place is None or place is home:
                continue
            if self._ordinary(place):
                return _ordinary_example(place)
        return None

    def _ordinary(self, place: Place) -> bool:
        """Judges a place's ordinary point: whether it is wrong."""
        try:
            outcome = place.first()
        except Exception as error:
            if place is self.ground.home():
                raise
            self.ground.skip(place.sizes, error)
            return False
        self.places.append(place)
        self.ground.judged.add(id(place))
        self.tried.append(outcome.hazard)
        self._outcomes[_ordinary_example(place).key] = outcome
        return outcome.is_wrong

    def _most_sizes(self, home: Place) -> int:
        program = home.check.program
        is_large = sum(1 for _ in jaxprs.walk(program.jaxpr)) > _LARGE_PROGRAM
        most = _MOST_SIZES_LARGE if is_large else _MOST_SIZES
        return min(most, 1 + self.examples // _PER_SIZES)

    # --- special points ---------------------------------------------------------------

    def _enumerated(self) -> Iterator[Example]:
        """Yields special points: at the sizes given, at others, and of the rules."""
        room = int(self.left * _SPECIAL)
        home, *others = self.places
        inside, around = list(home.specials()), list(home.wider_specials())
        yield from _spread(inside, room)
        yield from _spread(around, max(room // 2, room - len(inside)))
        yield from self._of_rules(home, int(self.examples * _RULES))
        for place in others[:2]:
            yield from _spread(list(place.specials()), room // 4)

    def _of_rules(self, home: Place, room: int) -> Iterator[Example]:
        rules = []
        for place in self.ground.rules(home):
            outcome = place.first()
            if outcome.is_wrong:
                self._outcomes[_ordinary_example(place).key] = outcome
                yield _ordinary_example(place)
            rules.append(place)
        for place in rules:
            yield from _spread(list(place.specials()), max(2, room // len(rules)))

    # --- the search -------------------------------------------------------------------

    def _searched(self) -> Example | None:
        if self.left <= 0 or not self.places:
            return None
        from gradtest._src.hunting import choosing, mixtures

        wrong: list[Example] = []
        beyond = [_MOST_SHRINKS]

        def test(example: Example) -> None:
            if example.key not in self._outcomes:
                if self.left <= 0 or wrong:
                    beyond[0] -= 1
                if beyond[0] < 0 or (self.left <= 0 and not wrong):
                    return
            if self.judge(example).is_wrong:
                self.after = self.after or len(self.tried)
                wrong.append(example)
                raise _WrongError

        generator = seeding.generator(self.ground.options.key, "hunt")
        seed = int(generator.integers(1 << 32))
        draws = _DRAWS * self.left  # of which some are alike
        try:
            choosing.search(
                mixtures.examples(self.places), test, examples=draws, seed=seed
            )
        except _WrongError:
            return wrong[-1]
        return None


class _WrongError(Exception):
    """An example is wrong."""


def _ordinary_example(place: Place) -> Example:
    return Example(place, place.values, "an ordinary point")


def _spread(items: Sequence[Example], room: int) -> list[Example]:
    """Returns so many of the items, from all over."""
    if len(items) <= room:
        return list(items)
    places = np.unique(np.linspace(0, len(items) - 1, max(room, 1)).astype(int))
    return [items[place] for place in places]
