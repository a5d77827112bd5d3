"""What Hypothesis draws for a hunt: arrays that are special in several ways at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from gradtest._src.hunting import choosing
from gradtest._src.hunting.places import Example, Place, cast_like


def examples(places: Sequence[Place]) -> choosing.SearchStrategy[Example]:
    """Returns a strategy for examples at any of the places, the smallest first."""
    by_size = sorted(places, key=lambda p: Example(p, p.values, "").entries)
    by_size = [p for p in by_size if Example(p, p.values, "").entries] or by_size

    @st.composite
    def drawn(draw: Any) -> Example:
        place = draw(choosing.one_of(by_size))
        widest = max((len(scope.wider) for scope in place.scopes), default=0)
        wider = draw(choosing.number(widest))
        values = list(place.values)
        free = [k for k, scope in enumerate(place.scopes) if scope.domain is not None]
        for n, k in enumerate(free):
            # A leaf that stays ordinary lets what is wrong in another one be seen.
            if len(free) > 1 and draw(choosing.number(3)) == 3:
                continue
            scope = place.scopes[k]
            alike = [j for j in free[:n] if place.may_be_equal(j, k)]
            if alike and draw(choosing.number(4)) == 4:
                values[k] = values[draw(choosing.one_of(alike))]
                continue
            domain = scope.at(place.sizes, wider)
            values[k] = cast_like(scope, draw(choosing.arrays(domain)))
        return Example(place, tuple(values), "a mixture", wider)

    return drawn()
