"""The domains as Hypothesis strategies."""

import dataclasses
import importlib
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gradtest import domains, strategies
from gradtest._src.hunting import choosing, kinds

pytestmark = pytest.mark.core

# A run of the tests leaves no files behind, and looks at the same examples each time.
quiet = hypothesis.settings(
    max_examples=40, database=None, derandomize=True, deadline=None
)

CASES = [
    domains.normal((2, 3)),
    domains.normal(3, dtype=jnp.bfloat16),
    domains.normal(2, dtype=jnp.complex64),
    domains.uniform((4,), -2.0, 5.0),
    domains.positive((2, 2)),
    domains.unit_interval(5),
    domains.integers((2, 3), -1, 6),
    domains.spd((3, 3)),
    domains.invertible((2, 3, 3), det="positive"),
    domains.orthogonal((3, 3)),
    domains.simplex((2, 4)),
    domains.one_hot((2, 4)),
    domains.away_from((4,), 0.0, margin=0.1),
    domains.normal((40, 3)),
]


@pytest.mark.parametrize("domain", CASES, ids=repr)
def test_every_array_lies_inside_of_its_domain(domain):
    seen = []

    @quiet
    @hypothesis.given(strategies.arrays(domain))
    def draws(array):
        assert array.shape == domain.shape
        assert array.dtype == domain.dtype
        assert kinds.contains(domain, array)
        seen.append(array.tobytes())

    draws()
    assert len(set(seen)) > 5


def _drawn(strategy):
    """Returns what a strategy draws, the same each time.

    Hypothesis repeats itself: in 150 draws of its own `sampled_from` it often misses
    one of twelve.
    """
    seen = []

    @hypothesis.settings(quiet, max_examples=400, phases=[hypothesis.Phase.generate])
    @hypothesis.given(strategy)
    def draws(array):
        seen.append(array)

    draws()
    return seen


def _smallest(strategy, condition):
    return hypothesis.find(
        strategy, condition, settings=hypothesis.settings(quiet, max_examples=200)
    )


def test_zeros_ties_duplicates_and_empty_masks_are_among_the_draws():
    numbers, indices = (
        _drawn(strategies.normal(6)),
        _drawn(strategies.integers(5, 0, 9)),
    )
    assert any((x == 0).any() and (x > 0).any() for x in numbers)
    assert any((x == x.max()).sum() == 2 for x in numbers)
    assert any(len(set(i.tolist())) < 5 for i in indices)
    assert any(8 in i for i in indices)
    assert any(not mask.any() for mask in _drawn(strategies.masks(4)))


def test_arrays_shrink_towards_simple_ones():
    assert not _smallest(strategies.normal((2, 3)), lambda x: True).any()
    found = _smallest(strategies.normal(4), lambda x: (x > 0.5).any())
    assert sorted(found.tolist()) == [0, 0, 0, 1]
    assert (_smallest(strategies.positive(3), lambda x: True) == 1).all()


def test_sizes_that_are_not_given_are_drawn_and_shrink():
    batch = strategies.normal(("batch", 2))
    assert {0, 1, 2, 3} <= _sizes(batch)
    assert len(_smallest(batch, lambda x: len(x) > 6)) == 7
    assert 0 not in _sizes(strategies.simplex(("n",)))


def test_a_search_draws_the_same_whatever_modules_are_loaded(tmp_path, monkeypatch):
    # Hypothesis draws integers that stand in the source of what is loaded.
    def found():
        seen = []
        mixed = choosing.together([choosing.number(1000), choosing.one_of("abcdef")])
        choosing.search(mixed, lambda drawn: seen.append(drawn), examples=200, seed=3)
        return seen

    before = found()
    (tmp_path / "constants.py").write_text(f"CONSTANTS = {list(range(0, 1000, 7))}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("constants")
    after = found()
    monkeypatch.delitem(sys.modules, "constants")
    assert after == before


def _sizes(strategy):
    return {len(array) for array in _drawn(strategy)}


@quiet
@hypothesis.given(
    strategies.arguments(
        {"x": domains.normal(("batch", 4)), "none": None},
        domains.integers("batch", 0, 10),
        7,
        jax.ShapeDtypeStruct((2,), jnp.float32),
    )
)
def test_arguments_share_their_named_sizes(args):
    tree, labels, number, vector = args
    assert tree["x"].shape == (len(labels), 4)
    assert tree["none"] is None
    assert number == 7
    assert vector.shape == (2,)


def test_each_public_domain_has_a_strategy_of_its_name():
    made = set(domains.__all__) - {"Domain", "ShapeLike"}
    assert made <= set(strategies.__all__)
    for name in made:
        assert getattr(strategies, name).__name__ == name
        assert "strategy" in getattr(strategies, name).__doc__


def test_a_slip_is_named():
    with pytest.raises(TypeError, match="`domain` must be"):
        strategies.arrays(3)
    with pytest.raises(ValueError, match=r"sizes\['n'\]"):
        strategies.arrays(domains.normal("n"), sizes={"n": -1})
    with pytest.raises(ValueError, match="`low` must be below"):
        strategies.uniform(3, 2.0, 1.0)
    with pytest.raises(ValueError, match="use gradtest"):
        strategies.arguments(jax.ShapeDtypeStruct((2,), jnp.int32))


def test_a_domain_drawn_by_its_strategy_stays_as_it_was():
    domain = domains.normal(("n", 2))
    kept = dataclasses.replace(domain)
    assert isinstance(strategies.arrays(domain), st.SearchStrategy)
    assert domain == kept
    assert np.array_equal(
        domain.draw(np.random.default_rng(0)), kept.draw(np.random.default_rng(0))
    )
