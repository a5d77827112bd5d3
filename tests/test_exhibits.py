"""What a failure keeps to be looked at: arrays, slopes at many steps, inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src import exhibits, ladders
from gradtest._src.findings import Verdict

pytestmark = pytest.mark.core
X = np.array([0.3, -1.2, 0.8, 1.7], np.float32)


def with_vjp(fn, backward):
    rule = jax.custom_vjp(fn)
    rule.defvjp(lambda *args: (fn(*args), args), backward)
    return rule


doubled_sine = with_vjp(jnp.sin, lambda r, g: (2 * jnp.cos(r[0]) * g,))


def failed(assertion, *args, **options):
    wrong = (gradtest.GradientMismatch, gradtest.GradientInconclusive)
    with pytest.raises(wrong) as caught:
        assertion(*args, **options)
    return caught.value.report


def sum_of(rule):
    return lambda x: jnp.sum(rule(x))


def test_a_pass_keeps_nothing():
    report = gradtest.assert_autodiff_matches(sum_of(jnp.sin), X)
    assert report.exhibits == ()
    assert report.inputs == ()


def test_a_wrong_leaf_is_kept_with_claim_and_truth_in_float64():
    report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), X)
    (exhibit,) = report.exhibits
    assert (exhibit.name, exhibit.mode, exhibit.order) == ("x", "rev", 1)
    assert exhibit.claimed.dtype == exhibit.true.dtype == np.float64
    np.testing.assert_allclose(exhibit.true, np.cos(X.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(exhibit.claimed, 2 * exhibit.true, rtol=1e-12)
    assert not exhibit.is_part


def test_right_leaves_beside_a_wrong_one_are_not_kept():
    report = failed(
        gradtest.assert_autodiff_matches,
        lambda x, y: jnp.sum(doubled_sine(x)) + jnp.sum(y**2),
        X,
        2 * X,
    )
    assert {exhibit.name for exhibit in report.exhibits} == {"x"}
    assert [name for name, _ in report.inputs] == ["x", "y"]


def test_complex_leaves_are_kept_as_complex128():
    z = (X + 1j * X[::-1]).astype(np.complex64)
    report = failed(
        gradtest.assert_grad_matches,
        lambda z: jnp.sum(jnp.abs(z) ** 2),
        lambda z: 2 * z,  # the conjugate is right
        z,
    )
    (exhibit,) = report.exhibits
    assert exhibit.claimed.dtype == np.complex128
    np.testing.assert_allclose(exhibit.true, np.conj(exhibit.claimed), rtol=1e-6)


def test_at_most_eight_leaves_are_kept_the_gravest_first():
    tree = {f"leaf{i:02}": X[: 1 + i % 4] for i in range(12)}

    def wrong(tree):
        return {
            name: (2 + i) * leaf * 1.5
            for i, (name, leaf) in enumerate(sorted(tree.items()))
        }

    report = failed(
        gradtest.assert_grad_matches,
        lambda tree: sum(jnp.sum(leaf**2) for leaf in tree.values()),
        wrong,
        tree,
    )
    assert len(report.exhibits) == 8
    strains = [report.leaf(exhibit.name).strain for exhibit in report.exhibits]
    assert strains == sorted(strains, reverse=True)
    assert [e.ladder is not None for e in report.exhibits] == [True] + [False] * 7


class TestLadders:
    def test_the_true_slope_is_met_and_the_claimed_one_is_not(self):
        report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), X)
        ladder = report.exhibits[0].ladder
        assert list(ladder.steps) == [10.0**-k for k in range(1, 10)]
        assert not ladder.measured
        near = np.abs(ladder.slopes - ladder.true)
        assert near[4] < 1e-8 * abs(ladder.true)
        assert (near[5:] <= ladder.noise[5:]).all()
        assert abs(ladder.claimed) == pytest.approx(2 * abs(ladder.true))

    def test_remainders_fall_as_h_for_the_claim_and_as_its_square_for_the_truth(self):
        report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), X)
        ladder = report.exhibits[0].ladder
        claimed = ladder.remainders[:4] / ladder.remainders[1:5]
        true = ladder.true_remainders[:4] / ladder.true_remainders[1:5]
        np.testing.assert_allclose(claimed, 10, rtol=0.3)
        np.testing.assert_allclose(true, 100, rtol=0.3)

    def test_one_wrong_entry_of_many_shows_along_the_direction(self):
        x = np.linspace(0.1, 1, 2000, dtype=np.float32)
        report = failed(
            gradtest.assert_grad_matches,
            lambda x: jnp.sum(x**3),
            lambda x: (3 * x**2).at[1234].multiply(1.01),
            x,
        )
        ladder = report.exhibits[0].ladder
        assert abs(ladder.claimed / ladder.true) == pytest.approx(1.01, abs=1e-4)

    def test_without_a_true_derivative_differences_measure_the_slope(self):
        def cubed(x):
            return jax.lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x)
            )[1]

        rule = with_vjp(cubed, lambda r, g: (5 * r[0] ** 3 * g,))  # right: 4 x^3
        report = failed(gradtest.assert_autodiff_matches, sum_of(rule), X)
        (exhibit,) = report.exhibits
        assert exhibit.true is None
        assert exhibit.ladder.measured
        ratio = exhibit.ladder.claimed / exhibit.ladder.true
        assert ratio == pytest.approx(1.25, rel=1e-6)

    def test_at_a_kink_there_is_none_and_no_truth_by_entries(self):
        tripled = with_vjp(jnp.abs, lambda r, g: (3 * g * jnp.ones_like(r[0]),))
        at_kink = np.array([0.0, 0.0, 1.0], np.float32)
        report = failed(gradtest.assert_autodiff_matches, sum_of(tripled), at_kink)
        exhibit = report.exhibits[0]
        assert exhibit.ladder is None
        assert exhibit.true is None

    def test_a_claim_of_nan_has_none(self):
        x = np.array([0.0, -1.0, 2.0], np.float32)
        report = failed(
            gradtest.assert_autodiff_matches,
            lambda x: jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0)),
            x,
        )
        exhibit = report.exhibits[0]
        assert np.isnan(exhibit.claimed[1])
        assert exhibit.ladder is None

    def test_steps_at_which_the_value_is_not_finite_are_left_out(self):
        x = np.array([1e-3, 1.0], np.float32)
        report = failed(
            gradtest.assert_grad_matches,
            lambda x: jnp.sum(jnp.log(x)),
            lambda x: 2 / x,
            x,
        )
        ladder = report.exhibits[0].ladder
        assert 3 <= len(ladder.steps) < 9
        assert np.isfinite(ladder.slopes).all()

    @pytest.mark.parametrize(
        ("jumps", "noise", "kinked"),
        [
            ([1.0, 1.0, 1.0], [1e-9] * 3, True),
            ([1e-1, 1e-2, 1e-3], [1e-9] * 3, False),
            ([1e-3, 1e-4, 1.0], [1e-9, 1e-9, 1.0], False),
            ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], False),
        ],
    )
    def test_a_kink_is_told_from_curvature_and_noise(self, jumps, noise, kinked):
        assert ladders._is_kinked(np.array(jumps), np.array(noise)) is kinked


def test_forward_mode_keeps_the_tangent_of_the_worst_output():
    @jax.custom_jvp
    def scaled(x):
        return jnp.sin(x) * jnp.arange(3.0), jnp.cos(x)

    @scaled.defjvp
    def scaled_jvp(primals, tangents):
        (x,), (t,) = primals, tangents
        tangent = 2 * jnp.cos(x) * t * jnp.arange(3.0)
        return scaled(x), (tangent, -jnp.sin(x) * t)

    report = failed(
        gradtest.assert_autodiff_matches, scaled, jnp.float32(0.3), modes=("fwd",)
    )
    (exhibit,) = report.exhibits
    assert (exhibit.name, exhibit.mode) == ("x", "fwd")
    assert exhibit.of == "tangent of result[0]"
    np.testing.assert_allclose(exhibit.claimed, 2 * exhibit.true, rtol=1e-12)
    ladder = exhibit.ladder
    assert ladder.slopes[4] == pytest.approx(ladder.true, rel=1e-8)
    assert ladder.claimed == pytest.approx(2 * ladder.true)


def test_a_wrong_value_is_kept_beside_the_functions_own():
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (1.01 * jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))
    report = failed(gradtest.assert_autodiff_matches, rule, X)
    (exhibit,) = [each for each in report.exhibits if each.of == "value"]
    np.testing.assert_allclose(exhibit.claimed, 1.01 * exhibit.true, rtol=1e-6)
    assert exhibit.ladder is None


def test_a_rounding_gap_keeps_the_claim_in_its_own_dtype():
    report = failed(
        gradtest.assert_grad_matches,
        lambda x: jnp.sum(x**2),
        lambda x: ((2 * x + 3e5) * 2 - 6e5) / 2,  # cancels
        X,
    )
    exhibit = report.exhibits[0]
    assert exhibit.of == "in float32"
    np.testing.assert_allclose(exhibit.true, 2 * X.astype(np.float64), rtol=1e-6)
    assert 1e-3 < np.abs(exhibit.claimed - exhibit.true).max() < 1


def test_a_custom_rule_is_named_in_its_exhibit():
    report = failed(gradtest.assert_custom_rules_match, sum_of(doubled_sine), X)
    exhibit = report.exhibits[0]
    assert exhibit.rule == report.rules[0]
    assert exhibit.rule.kind == "custom_vjp"


def test_an_exhibit_that_cannot_be_made_is_left_out(monkeypatch):
    def without_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr(exhibits, "pulled_ladder", without_memory)
    report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), X)
    assert report.verdict is Verdict.FAIL
    assert report.exhibits[0].ladder is None


def test_in_a_job_nothing_is_evaluated_that_others_would_have_to(monkeypatch):
    monkeypatch.setattr(exhibits, "_in_job", lambda: True)
    report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), X)
    (exhibit,) = report.exhibits
    assert exhibit.true is not None
    assert exhibit.ladder is None


def test_a_mistake_of_gradtests_own_is_not_hidden(monkeypatch):
    def mistaken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(exhibits, "pulled_ladder", mistaken)
    with pytest.raises(ZeroDivisionError):
        gradtest.assert_autodiff_matches(sum_of(doubled_sine), X)


class TestTrimmed:
    def test_a_large_leaf_is_kept_in_part_around_the_entry_farthest_off(self):
        true = np.zeros((300, 400))
        claimed = true.copy()
        claimed[250, 17] = 1.0
        exhibit = exhibits.trimmed("w", claimed, true, room=1000)
        assert exhibit.is_part
        assert exhibit.whole == (300, 400)
        assert 500 <= exhibit.claimed.size <= 1000
        place = 250 - exhibit.start[0], 17 - exhibit.start[1]
        assert exhibit.claimed[place] == 1.0
        assert exhibit.claimed.shape == exhibit.true.shape

    @pytest.mark.parametrize("shape", [(10_000,), (3, 3, 50, 60), (1, 7000, 1)])
    @pytest.mark.parametrize("at", [0, -1])
    def test_a_part_has_room_and_lies_within_any_shape(self, shape, at):
        claimed = np.zeros(shape)
        claimed.flat[at] = np.nan
        exhibit = exhibits.trimmed("w", claimed, None, room=500)
        assert 0 < exhibit.claimed.size <= 500
        assert np.isnan(exhibit.claimed).sum() == 1
        ends = np.add(exhibit.start, exhibit.claimed.shape)
        assert (np.array(exhibit.start) >= 0).all()
        assert (ends <= np.array(shape)).all()

    def test_what_fits_is_whole_and_a_copy(self):
        claimed = np.ones(3)
        exhibit = exhibits.trimmed("w", claimed, None)
        claimed[:] = 0
        assert exhibit.claimed.tolist() == [1, 1, 1]
        assert not exhibit.is_part


class TestInputs:
    def test_all_leaves_are_kept_as_they_came(self):
        def fn(params, key, scale, flag, note, n):
            noise = jax.random.normal(key, (2,))
            return jnp.sum(params["w"].astype(jnp.float32) * noise) * scale * n[0]

        def wrong(params, *rest):
            return {"w": jnp.ones_like(params["w"]), "none": None}

        args = (
            {"w": jnp.array([1, 2], jnp.bfloat16), "none": None},
            jax.random.key(3),
            2.0,
            True,
            "a note",
            np.array([1, 2], np.int16),
        )
        report = failed(gradtest.assert_grad_matches, fn, wrong, *args)
        kept = dict(report.inputs)
        assert list(kept) == [
            "params['none']", "params['w']", "key", "scale", "flag", "note", "n",
        ]  # fmt: skip
        assert kept["params['w']"].dtype == jnp.bfloat16
        assert kept["key"].impl == "threefry2x32"
        assert (kept["scale"], kept["flag"], kept["note"]) == (2.0, True, "a note")
        assert type(kept["scale"]) is float
        assert kept["n"].dtype == np.int16
        key = kept["key"].key()
        assert jax.random.key_data(key).tolist() == [0, 3]

    def test_they_are_copies_of_the_users_arrays(self):
        x = X.copy()
        report = failed(gradtest.assert_autodiff_matches, sum_of(doubled_sine), x)
        x[:] = 0
        np.testing.assert_array_equal(dict(report.inputs)["x"], X)

    def test_drawn_inputs_are_those_of_a_trial_that_failed(self):
        report = failed(
            gradtest.assert_grad_matches,
            lambda x: jnp.sum(x**2),
            lambda x: 2 * x * jnp.where(x[0] > 0, 1.5, 1.0),
            gradtest.domains.normal((3,)),
            trials=6,
        )
        x = dict(report.inputs)["x"]
        assert x[0] > 0
        exhibit = report.exhibits[0]
        np.testing.assert_allclose(exhibit.claimed, 3 * x.astype(np.float64), rtol=1e-6)

    def test_a_weak_scalar_stays_a_number_of_pythons(self):
        value = next(exhibits._kept(jnp.asarray(2.0)))
        assert type(value) is float
        assert next(exhibits._kept(jnp.float32(2.0))).dtype == np.float32

    def test_an_object_is_left_out(self):
        assert list(exhibits._kept(object())) == []
