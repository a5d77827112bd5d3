import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradtest import domains
from gradtest._src import samplers, seeding

REAL = ["float16", "bfloat16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
SHAPES = [(), (5,), (2, 3), (0,), (2, 0), (200, 100)]
MATRICES = [(1, 1), (4, 4), (2, 3, 5, 5), (0, 3, 3), (0, 0), (2, 0, 0), (40, 40)]
LAST_AXES = [(1,), (5,), (2, 3), (0, 3), (2, 3, 50)]


def draw(domain, trial=0, name="x", sizes=None):
    """Draws a point, as a trial does, and checks what every domain promises."""
    point = domain.draw(seeding.generator(0, trial, name), sizes)
    assert isinstance(point, np.ndarray)
    assert point.dtype == domain.dtype
    assert jnp.asarray(point).shape == point.shape
    return point


def widened(point):
    return point.astype(complex if point.dtype.kind == "c" else float)


def rounding(domain):
    return 4 * float(jnp.finfo(domain.dtype).eps)


def adjoint(matrix):
    return matrix.conj().swapaxes(-1, -2)


EVERY_KIND = {
    "normal": domains.normal((2, 3)),
    "complex": domains.normal((2, 3), dtype=jnp.complex64),
    "uniform": domains.uniform((2, 3), -1, 1),
    "positive": domains.positive((2, 3)),
    "unit_interval": domains.unit_interval((2, 3)),
    "integers": domains.integers((2, 3), 0, 1000),
    "spd": domains.spd((3, 3)),
    "invertible": domains.invertible((3, 3)),
    "orthogonal": domains.orthogonal((3, 3)),
    "simplex": domains.simplex((2, 3)),
    "one_hot": domains.one_hot((5, 100)),
    "away_from": domains.away_from((2, 3), [0.0, 1.0]),
}


@pytest.mark.core
@pytest.mark.parametrize("domain", EVERY_KIND.values(), ids=EVERY_KIND)
def test_each_trial_and_each_leaf_draws_another_point(domain):
    point = draw(domain)
    assert (point == draw(domain)).all()
    assert (point != draw(domain, trial=1)).any()
    assert (point != draw(domain, name="y")).any()


@pytest.mark.parametrize("domain", EVERY_KIND.values(), ids=EVERY_KIND)
def test_a_domain_is_one_hashable_leaf(domain):
    assert jax.tree.leaves({"weights": domain}) == [domain]
    assert hash(domain) == hash(pickle.loads(pickle.dumps(domain)))


@pytest.mark.parametrize("domain", EVERY_KIND.values(), ids=EVERY_KIND)
def test_draws_are_the_same_in_64_bit_mode(domain):
    expected = draw(domain)
    with jax.enable_x64(True):
        assert (domain.draw(seeding.generator(0, 0, "x")) == expected).all()


def test_domains_of_the_same_arguments_are_equal():
    assert domains.normal((2, "n")) == domains.normal([2, "n"], dtype="float32")
    assert domains.normal(2) != domains.positive(2)
    assert domains.uniform(2, 0, 1) != domains.uniform(2, 0, 2)
    assert domains.normal(2) != domains.normal(2, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_entries_have_mean_zero_and_variance_one(shape, dtype):
    point = widened(draw(domains.normal(shape, dtype=dtype)))
    assert point.shape == shape
    if point.size > 10_000:
        # Five standard errors of the mean and of the variance.
        assert abs(point.mean()) < 5 * np.sqrt(2 / point.size)
        for part in (point.real, point.imag) if dtype in COMPLEX else (point,):
            assert abs(part.var() - 1) < 5 * np.sqrt(2 / point.size)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_parts_are_independent(dtype):
    point = widened(draw(domains.normal((200, 100), dtype=dtype)))
    assert abs((point.real * point.imag).mean()) < 5 / np.sqrt(point.size)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_entries_lie_between_the_ends(shape, dtype):
    point = widened(draw(domains.uniform(shape, -2.0, 6.0, dtype=dtype)))
    assert point.shape == shape
    assert (point >= -2).all()
    assert (point <= 6).all()
    if point.size > 10_000:
        assert abs(point.mean() - 2) < 0.1
        assert point.min() < -1.9
        assert point.max() > 5.9


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_positive_entries_are_off_zero(shape, dtype):
    point = widened(draw(domains.positive(shape, dtype=dtype)))
    assert point.shape == shape
    assert (point >= 1 / 4).all()
    assert (point <= 4).all()
    if point.size > 10_000:
        assert abs(np.log(point).mean()) < 0.05


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_unit_interval_entries_are_off_both_ends(shape, dtype):
    point = widened(draw(domains.unit_interval(shape, dtype=dtype)))
    assert point.shape == shape
    assert (point >= 1 / 64).all()
    assert (point <= 63 / 64).all()


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_reach_low_and_stay_below_high(shape, dtype):
    point = draw(domains.integers(shape, 2, 5, dtype=dtype))
    assert point.shape == shape
    assert set(point.ravel().tolist()) <= {2, 3, 4}
    if point.size > 10_000:
        assert set(point.ravel().tolist()) == {2, 3, 4}


def test_integers_may_fill_their_dtype():
    assert draw(domains.integers(1000, -128, 128, dtype=jnp.int8)).min() < -120
    assert draw(domains.integers(9, 2**63, 2**64, dtype="uint64")).min() >= 2**63


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("shape", MATRICES)
def test_spd_matrices_are_symmetric_and_well_conditioned(shape, dtype):
    domain = domains.spd(shape, dtype=dtype)
    point = widened(draw(domain))
    assert point.shape == shape
    assert (point == adjoint(point)).all()
    eigenvalues = np.linalg.eigvalsh(point) if point.size else np.ones(shape[:-1])
    assert (eigenvalues > 1 / 4 - 4 * rounding(domain)).all()
    assert (eigenvalues < 4 + 4 * rounding(domain)).all()


def test_eigenvalues_and_singular_values_lie_apart():
    eigenvalues = np.linalg.eigvalsh(draw(domains.spd((20, 20), dtype="float64")))
    singular = np.linalg.svd(draw(domains.invertible((20, 20), dtype="float64")))[1]
    for values in (eigenvalues, singular[::-1]):
        assert (values[1:] / values[:-1] > 16 ** (0.5 / 20) - 1e-9).all()


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("shape", MATRICES)
def test_invertible_matrices_are_well_conditioned(shape, dtype):
    domain = domains.invertible(shape, dtype=dtype)
    point = widened(draw(domain))
    assert point.shape == shape
    if point.size:
        singular = np.linalg.svd(point)[1]
        assert (singular > 1 / 4 - 4 * rounding(domain)).all()
        assert (singular < 4 + 4 * rounding(domain)).all()


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (50, 3, 3), (0, 3, 3), (20, 20)])
@pytest.mark.parametrize(("det", "sign"), [("positive", 1), ("negative", -1)])
def test_the_determinant_has_the_sign_asked_for(shape, dtype, det, sign):
    for trial in range(5):
        point = widened(draw(domains.invertible(shape, det=det, dtype=dtype), trial))
        assert point.shape == shape
        assert (np.linalg.slogdet(point)[0] == sign).all()


def test_either_sign_of_the_determinant_is_drawn():
    signs = np.linalg.slogdet(draw(domains.invertible((50, 3, 3))))[0]
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_an_empty_matrix_has_no_negative_determinant():
    assert draw(domains.invertible((0, 0), det="positive")).shape == (0, 0)
    domain = domains.invertible(("n", "n"), det="negative")
    with pytest.raises(ValueError, match="`det` must not be 'negative'"):
        draw(domain, sizes={"n": 0})


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("shape", MATRICES)
def test_orthogonal_matrices_have_themselves_as_inverse_adjoint(shape, dtype):
    domain = domains.orthogonal(shape, dtype=dtype)
    point = widened(draw(domain))
    assert point.shape == shape
    gap = point @ adjoint(point) - np.eye(shape[-1])
    assert (abs(gap) < rounding(domain)).all()


def test_rotations_and_reflections_are_equally_likely():
    signs = np.linalg.slogdet(draw(domains.orthogonal((1000, 2, 2))))[0]
    assert abs(signs.mean()) < 5 / np.sqrt(1000)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", LAST_AXES)
def test_simplex_points_are_positive_and_sum_to_one(shape, dtype):
    domain = domains.simplex(shape, dtype=dtype)
    point = widened(draw(domain))
    assert point.shape == shape
    assert (point > 0.19 / shape[-1]).all()
    assert (abs(point.sum(axis=-1) - 1) < rounding(domain)).all()


@pytest.mark.parametrize("dtype", [*REAL, "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", LAST_AXES)
def test_one_hot_points_have_a_single_one(shape, dtype):
    point = draw(domains.one_hot(shape, dtype=dtype)).astype(int)
    assert point.shape == shape
    assert set(point.ravel().tolist()) <= {0, 1}
    assert (point.sum(axis=-1) == 1).all()


def test_every_place_of_a_one_hot_point_is_reached():
    assert draw(domains.one_hot((200, 4))).any(axis=0).all()


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("values", "margin"), [(0, 0.1), ([0, 0.25, 1], 0.2), ([-6, 6], 5.5), ([], 1)]
)
def test_entries_stay_away_from_the_kinks(shape, dtype, values, margin):
    domain = domains.away_from(shape, values, margin=margin, dtype=dtype)
    point = widened(draw(domain))
    assert point.shape == shape
    for value in np.ravel(values):
        assert (abs(point - value) >= margin).all()
    if point.size > 10_000:
        assert point.std() > 0.2


def test_overlapping_margins_count_once():
    mass = samplers.normal_mass_away_from([0.0, 0.0, 0.05], 0.1)
    assert mass == pytest.approx(1 - 0.0994, abs=2e-4)


def test_named_axes_take_their_sizes_when_drawn():
    domain = domains.normal(("batch", 4, "width"))
    assert draw(domain).shape == (3, 4, 3)
    assert draw(domain, sizes={"batch": 2, "other": 7}).shape == (2, 4, 3)
    assert draw(domain, sizes={"batch": 0, "width": 1}).shape == (0, 4, 1)
    assert draw(domains.normal("n"), sizes={"n": np.int64(5)}).shape == (5,)
    assert draw(domains.spd(("n", "n")), sizes={"n": 5}).shape == (5, 5)


@pytest.mark.parametrize(
    ("domain", "text"),
    [
        (domains.normal((3, "n")), "normal((3, 'n'), float32)"),
        (domains.uniform(3, 0, 2), "uniform((3,), low=0.0, high=2.0, float32)"),
        (
            domains.invertible((2, 2), det="positive", dtype=jnp.bfloat16),
            "invertible((2, 2), det='positive', bfloat16)",
        ),
        (
            domains.away_from((), 0, margin=0.5),
            "away_from((), values=(0.0,), margin=0.5, float32)",
        ),
    ],
)
def test_a_domain_shows_how_it_was_made(domain, text):
    assert repr(domain) == text


@pytest.mark.core
def test_normal_entries_are_never_all_of_one_sign():
    for seed in range(200):
        for shape in ((2,), (3, 1), (5,)):
            drawn = domains.normal(shape).draw(np.random.default_rng(seed))
            assert (drawn > 0).any()
            assert (drawn < 0).any()
