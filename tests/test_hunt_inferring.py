"""Which domains and sizes a hunt infers around arrays that were given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradtest import domains
from gradtest._src.hunting import kinds
from gradtest._src.hunting.inferring import inferred
from gradtest._src.hunting.scopes import read_scopes
from gradtest._src.hunting.sizes import Shapes
from gradtest._src.inputs import read_inputs

_RNG = np.random.RandomState(0)
_SQUARE = _RNG.randn(3, 3).astype(np.float32)
_SYMMETRIC = (_SQUARE + _SQUARE.T) / 2

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.array([0.3, -1.2, 0.7]), "normal"),
        (np.zeros(4), "normal"),
        (_RNG.uniform(0.5, 2, 4), "positive"),
        (np.ones(4), "positive"),
        (np.array([0.0, 2.0, 3.0]), "nonnegative"),
        (_RNG.uniform(0.1, 0.9, 4), "open_unit"),
        (np.array([0.0, 0.4, 1.0]), "unit_interval"),
        (np.array([[0.2, 0.8], [0.5, 0.5]]), "open_simplex"),
        (np.array([[0.0, 1.0], [0.5, 0.5]]), "simplex"),
        (np.eye(3)[[0, 2]], "one_hot"),
        (np.array([1.0, 0.0, 1.0, 1.0]), "flags"),
        (_SYMMETRIC, "symmetric"),
        (_SYMMETRIC @ _SYMMETRIC.T + 3 * np.eye(3), "spd"),
        (np.tril(_SQUARE) + 2 * np.eye(3), "triangular"),
        (np.array([True, False]), "mask"),
        (np.array([3, 0, 7]), "integers"),
        (_RNG.randn(3) + 1j, "normal"),
    ],
)
def test_the_domain_is_the_narrowest_that_is_no_accident(array, name):
    narrow = {"float64": "float32", "complex128": "complex64", "int64": "int32"}
    array = array.astype(narrow.get(array.dtype.name, array.dtype.name))
    domain, wider = inferred(array, array.shape)
    assert domain.name == name
    for each in (domain, *wider):
        drawn = each.draw(np.random.default_rng(0))
        assert drawn.shape == array.shape
        assert drawn.dtype == array.dtype
        assert kinds.contains(each, drawn)
    if name != "open_simplex":
        assert kinds.contains(domain, array)


def test_special_points_lie_inside_of_their_domain():
    for domain in (
        kinds.open_unit((4,), np.float32),
        kinds.nonnegatives((4,), np.float32),
        kinds.symmetric((3, 3), np.float32),
        kinds.triangular((3, 3), np.float32, lower=True),
        kinds.flags((4,), np.float32),
        kinds.mask((4,)),
    ):
        found = kinds.specials(domain, domain.draw(np.random.default_rng(0)))
        assert found, domain
        assert all(kinds.contains(domain, array) for array in found.values())


def _shapes(fn, *args):
    inputs = read_inputs(fn, args)
    return Shapes(fn, inputs, read_scopes(inputs))


def test_equal_lengths_are_one_size_where_the_function_takes_it():
    shapes = _shapes(lambda x, w: x @ w, jnp.ones((5, 3)), jnp.ones((3, 2)))
    assert sorted(shapes.given.values()) == [2, 3, 5]
    assert shapes.fixed == []


def test_equal_lengths_are_split_by_position_where_one_of_them_is_fixed():
    weights = jnp.ones((4, 4))
    shapes = _shapes(lambda x, y: (x @ weights).sum(1) * y, jnp.ones((4, 4)),
                     jnp.ones(4))  # fmt: skip
    assert shapes.given == {"x.shape[0]": 4}
    assert [scope.axes for scope in shapes.scopes] == [
        ("x.shape[0]", 4),
        ("x.shape[0]",),
    ]
    assert "stays" in shapes.fixed[0]


def test_indices_stay_below_the_sizes_that_they_stayed_below():
    shapes = _shapes(
        lambda table, ids: table[ids], jnp.ones((6, 2)), jnp.array([0, 5, 3])
    )
    ids = shapes.scopes[1]
    rows = next(name for name, size in shapes.given.items() if size == 6)
    small = {name: 2 if name == rows else size for name, size in shapes.given.items()}
    assert dict(ids.at(shapes.given).parameters)["high"] == 6
    assert dict(ids.at(small).parameters)["high"] == 2


def test_each_size_takes_one_zero_odd_ones_and_powers_of_two():
    shapes = _shapes(lambda x, w: jnp.tanh(x * w), jnp.ones((5, 4)), jnp.ones(4))
    choices = shapes.choices(10)
    assert choices[0] == shapes.given
    for name in shapes.given:
        taken = {sizes[name] for sizes in choices}
        assert {1, 2, 3, 8, 17} <= taken
    assert any(0 in sizes.values() for sizes in choices)


def test_a_size_that_the_function_refuses_is_not_chosen():
    def in_pairs(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 2).sum(1)

    sizes = [each["x.shape[0]"] for each in _shapes(in_pairs, jnp.ones(4)).choices(6)]
    assert len(sizes) == 6
    assert all(size % 2 == 0 for size in sizes)


def test_named_sizes_of_domains_are_their_own():
    shapes = _shapes(lambda x: x, domains.normal(("batch", 4)))
    assert shapes.given == {"batch": 3}
    assert [sizes["batch"] for sizes in shapes.choices(5)] == [3, 8, 1, 0, 17]
