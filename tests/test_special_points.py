"""The special points of every domain lie inside of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from gradtest import domains
from gradtest._src.special_points import special_points, special_values

pytestmark = pytest.mark.core


def _points(domain):
    drawn = domain.draw(np.random.default_rng(0))
    found = special_points(domain, drawn)
    for name, point in found.items():
        assert (point.shape, point.dtype) == (drawn.shape, drawn.dtype), name
        assert not np.array_equal(point, drawn), name
    return found


def test_reals_have_zeros_ties_saturation_and_sizes():
    found = _points(domains.normal((3, 4)))
    assert np.count_nonzero(found["one zero"] == 0) == 1
    assert not found["all zero"].any()
    ordered = np.sort(found["a tie at the maximum"], axis=-1)
    assert (ordered[:, -1] == ordered[:, -2]).all()
    assert (found["all negative"] < 0).all()
    assert (found["all positive"] > 0).all()
    assert (np.diff(found["sorted downwards"], axis=-1) <= 0).all()
    assert np.ptp(found["equal rows"], axis=0).max() == 0
    assert set(np.abs(found["at 100 and -100"]).ravel()) == {100}
    assert np.abs(found["smallest normal"]).max() == np.finfo(np.float32).tiny
    largest = np.abs(found["large"]).max()
    assert largest == pytest.approx(np.finfo(np.float32).max ** 0.5 / 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_sizes_are_those_of_the_dtype(dtype):
    found = _points(domains.normal(5, dtype=dtype))
    assert np.abs(found["smallest normal"]).max() == jnp.finfo(dtype).tiny
    assert all(np.isfinite(point.astype(float)).all() for point in found.values())


def test_complex_numbers_have_real_and_imaginary_points():
    found = _points(domains.normal(4, dtype="complex64"))
    assert not found["real"].imag.any()
    assert not found["imaginary"].real.any()


@pytest.mark.parametrize(
    ("domain", "low", "high"),
    [
        (domains.unit_interval((2, 3)), 0, 1),
        (domains.uniform(6, -2.0, 5.0), -2, 5),
        (domains.positive((2, 3)), 1e-38, 1e19),
        (domains.integers(6, 2, 7), 2, 6),
        (domains.one_hot((3, 4)), 0, 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_points_lie_between_the_ends_of_their_domain(domain, low, high):
    found = _points(domain)
    assert len(found) >= 2
    for name, point in found.items():
        assert (point >= low).all(), name
        assert (point <= high).all(), name


def test_the_ends_of_an_interval_are_among_its_points():
    found = _points(domains.unit_interval(4))
    assert set(found["all 0"]) == {0}
    assert set(found["all 1"]) == {1}
    assert np.count_nonzero(found["one 1"] == 1) == 1


def test_indices_repeat_and_reach_both_ends():
    found = _points(domains.integers(6, 0, 9))
    twice = found["an index twice"]
    assert twice[0] == twice[1]
    assert set(found["all the last index"]) == {8}
    assert set(found["first and last"]) == {0, 8}


def test_probabilities_stay_probabilities():
    found = _points(domains.simplex((2, 4)))
    assert "a corner" in found
    for name, point in found.items():
        assert (point >= 0).all(), name
        np.testing.assert_allclose(point.sum(axis=-1), 1, rtol=1e-6, err_msg=name)


def test_definite_matrices_stay_definite():
    found = _points(domains.spd((3, 3)))
    for name, point in found.items():
        assert np.array_equal(point, point.T), name
        assert np.linalg.eigvalsh(point.astype(float)).min() > 0, name
    values = np.linalg.eigvalsh(found["an eigenvalue twice"])
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("det", ["any", "positive", "negative"])
def test_determinants_keep_the_sign_that_is_wanted(det):
    found = _points(domains.invertible((3, 3), det=det))
    assert found
    for name, point in found.items():
        found_sign = np.sign(np.linalg.det(point.astype(float)))
        assert found_sign != 0, name
        assert det == "any" or found_sign == (1 if det == "positive" else -1), name


def test_orthogonal_matrices_stay_orthogonal():
    for name, point in _points(domains.orthogonal((3, 3))).items():
        np.testing.assert_allclose(point @ point.T, np.eye(3), atol=1e-6, err_msg=name)


def test_what_is_kept_away_from_a_kink_stays_away_on_both_sides():
    found = _points(domains.away_from(5, 0.0))
    assert (found["just above 0"] > 0).all()
    assert (found["just below 0"] < 0).all()


def test_given_arrays_are_taken_for_numbers_indices_or_masks():
    assert "all zero" in special_values(np.ones(3, np.float32) * 2)
    indices = special_values(np.array([4, 7, 5]))
    assert set(indices["all the last index"]) == {7}
    masks = special_values(np.array([True, False, True]))
    assert not masks["all false"].any()
    assert masks["one true"].sum() == 1


def test_an_empty_array_has_no_special_points():
    assert special_values(np.zeros((0, 3))) == {}


def test_infinities_that_are_given_make_no_point_nan():
    found = special_values(np.array([-np.inf, 1.0, 2.0], np.float32))
    assert found
    assert not any(np.isnan(point).any() for point in found.values())
