"""The domains as Hypothesis strategies. The one file that imports Hypothesis."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradtest._src.domain import Domain
from gradtest._src.hunting import drawing, kinds

try:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.database import ExampleDatabase
    from hypothesis.strategies import SearchStrategy as SearchStrategy
except ImportError as error:
    raise ImportError(
        "Hypothesis is not installed, by which inputs are searched: "
        "pip install 'gradtest[hunt]'"
    ) from error

# So many entries of an array are also drawn one by one. Larger arrays have no fewer of
# them than smaller ones, to which Hypothesis could not shrink them otherwise.
_MOST_ENTRIES = 24
_MOST_SEEDS = 1 << 20
_RARELY = 12
_FAR = 1 << 100
# Sizes that a named axis has where none is given, the smallest first.
SIZES = (1, 2, 3, 0, 4, 5, 7, 8, 9, 15, 16, 17)


def number(most: int) -> SearchStrategy[int]:
    """Returns a strategy for whole numbers from 0 to `most`, small ones the simplest.

    Into integers Hypothesis mixes those that stand in the source of modules loaded at
    the time, and no key would fix what is drawn: hence a range where none of them is.
    """
    return st.integers(_FAR, _FAR + most).map(lambda drawn: drawn - _FAR)


def one_of(items: Sequence[Any]) -> SearchStrategy[Any]:
    """Returns a strategy for one of some items, the first the simplest."""
    return number(len(items) - 1).map(items.__getitem__)


def arrays(domain: Domain) -> SearchStrategy[np.ndarray]:
    """Returns a strategy for the arrays of a domain whose shape is in numbers.

    They shrink towards constant arrays of the simplest entry; small arrays entry by
    entry.
    """
    is_entrywise = domain.name in kinds.ENTRYWISE
    special = kinds.special_entries(domain) if is_entrywise else []
    count = min(math.prod(domain.sized_shape()), _MOST_ENTRIES)
    # A low number puts a special entry in the place of what was drawn.
    code = number(_RARELY * len(special))
    codes = st.lists(code, min_size=count, max_size=count) if special else st.just([])

    def make(recipe: drawing.Recipe, seed: int, chosen: list[int]) -> np.ndarray:
        drawn = drawing.draw(domain, recipe, np.random.default_rng(seed))
        entries = drawn.ravel().copy()
        for place, number in enumerate(chosen):
            if number < len(special):
                entries[place] = special[number]
        return entries.reshape(drawn.shape)

    recipes, seeds = one_of(drawing.RECIPES), number(_MOST_SEEDS)
    return st.builds(make, recipes, seeds, codes)


def just(value: Any) -> SearchStrategy[Any]:
    """Returns a strategy for one value."""
    return st.just(value)


def together(strategies: Sequence[SearchStrategy[Any]]) -> SearchStrategy[Any]:
    """Returns a strategy for tuples of what several draw."""
    return st.tuples(*strategies)


def sizes(names: Sequence[str], last: frozenset[str]) -> SearchStrategy[Any]:
    """Returns a strategy for sizes by name; those of `last` are not 0."""
    return st.fixed_dictionaries(
        {name: one_of([s for s in SIZES if s or name not in last]) for name in names}
    )


def default_database() -> Any:
    """Returns the database that Hypothesis itself would use; None where it has none."""
    return hypothesis.settings().database


def is_database(value: Any) -> bool:
    """Whether a value is a database of examples."""
    return isinstance(value, ExampleDatabase)


def search(
    strategy: SearchStrategy[Any], test: Any, *, examples: int, seed: int
) -> None:
    """Runs a test on examples of a strategy; it raises what the smallest one raises.

    Nothing is printed, nothing is kept, and a test of the user's own around it, by
    Hypothesis or not, hears nothing of it.
    """
    settings = hypothesis.settings(
        max_examples=max(1, examples),
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    made: list[Callable[[], None]] = []

    def make() -> None:
        made.append(hypothesis.seed(seed)(settings(hypothesis.given(strategy)(test))))

    # Inside of a test that is Hypothesis's own it refuses to make another one; in a
    # thread of its own it does not see that test.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    made[0]()
