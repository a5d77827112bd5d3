"""Slopes by differences: exact to their error estimate, at any scale, kinks told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src.differences import (
    computational_noise,
    magnitude,
    measure_slope,
    richardson,
    weighted,
)

pytestmark = pytest.mark.core

_ONE = [np.array(1.0)]


def _slope(phi, scale, **options):
    """Measures a function of one number at 0."""

    def line(t):
        return [np.asarray(phi(np.float64(t)))]

    return measure_slope(line, _ONE, scale=scale, base=line(0.0), **options)


@pytest.mark.parametrize(
    ("phi", "truth"),
    [
        (lambda t: np.sin(1 + t), np.cos(1)),
        (lambda t: np.exp(3 * t), 3.0),
        (lambda t: 1e8 + 5 * t, 5.0),
        (lambda t: 1e-12 * np.sin(1 + t), 1e-12 * np.cos(1)),
        (lambda t: (2 + t) ** 7, 7 * 2.0**6),
        (lambda t: np.log(0.5 + t), 2.0),
    ],
    ids=["sine", "exponential", "large offset", "tiny", "power", "logarithm"],
)
def test_the_slope_of_a_smooth_function_is_exact_to_its_estimate(phi, truth):
    slope = _slope(phi, abs(truth))
    assert abs(slope.value - truth) <= 3 * slope.error
    assert not slope.is_kink
    assert slope.left == slope.right == slope.value


def test_the_slope_of_a_usual_function_is_exact_to_a_part_in_a_billion():
    slope = _slope(lambda t: np.sin(1 + t), 1.0)
    assert slope.value == pytest.approx(np.cos(1), rel=1e-9)
    assert slope.error < 1e-8


def test_noise_that_grows_towards_the_point_is_stepped_over():
    def slope_of_sinc(t):
        return 0.0 if t == 0 else np.cos(t) / t - np.sin(t) / t**2

    slope = _slope(slope_of_sinc, 1.0)
    assert slope.value == pytest.approx(-1 / 3, abs=3 * slope.error)
    assert slope.error < 1e-3


def test_a_constant_function_has_no_slope():
    slope = _slope(lambda t: 7.0 + 0 * t, 1.0)
    assert slope.value == 0
    assert not slope.is_kink


@pytest.mark.parametrize(
    ("phi", "left", "right"),
    [
        (lambda t: abs(t), -1.0, 1.0),
        (lambda t: max(t, 0.0), 0.0, 1.0),
        (lambda t: np.sin(t) + 0.25 * abs(t), 0.75, 1.25),
        (lambda t: abs(3 * t) + 1e3, -3.0, 3.0),
    ],
    ids=["absolute value", "ReLU", "small kink", "large offset"],
)
def test_a_kink_is_told_by_its_two_slopes(phi, left, right):
    slope = _slope(phi, 1.0)
    assert slope.is_kink
    assert slope.left == pytest.approx(left, abs=1e-4)
    assert slope.right == pytest.approx(right, abs=1e-4)
    assert slope.distance((left + right) / 2) == 0
    assert slope.distance(right + 0.5) == pytest.approx(0.5, abs=1e-4)
    assert slope.distance(left - 0.5) == pytest.approx(0.5, abs=1e-4)


def test_strong_curvature_is_no_kink():
    slope = _slope(lambda t: 1e4 * t**2 + t, 1.0)
    assert not slope.is_kink
    assert slope.value == pytest.approx(1.0, abs=1e-6)


def test_a_kink_near_the_point_is_stepped_around():
    # 1e-5 away: the first rungs lie beyond it.
    slope = _slope(lambda t: 2 * t + abs(t - 1e-5), 1.0)
    assert not slope.is_kink
    assert slope.value == pytest.approx(1.0, abs=1e-6)


def test_a_step_near_the_point_is_no_plateau():
    slope = _slope(lambda t: t + 1e-3 * (t > 1e-4), 1.0)
    assert abs(slope.value - 1.0) <= 3 * slope.error + 1e-6


def test_a_jump_at_the_point_has_no_certain_slope():
    slope = _slope(lambda t: float(np.floor(1.0 + t)), 1.0)
    assert slope.error > 1.0


def test_random_values_have_no_certain_slope():
    generator = np.random.default_rng(0)
    slope = _slope(lambda t: generator.normal(), 1.0)
    assert slope.error > 1.0


def test_float32_noise_is_estimated_and_stepped_over():
    slope = _slope(lambda t: float(np.float32(np.sin(1 + t))), 1.0, is_noisy=True)
    assert abs(slope.value - np.cos(1)) <= 3 * slope.error
    assert slope.error < 1e-3


def test_unexpected_noise_widens_the_estimate():
    generator = np.random.default_rng(0)
    slope = _slope(lambda t: np.sin(1 + t) + 1e-9 * generator.normal(), 1.0)
    assert abs(slope.value - np.cos(1)) <= 3 * slope.error


@pytest.mark.parametrize("sigma", [1e-10, 1e-6, 1e-3])
def test_the_difference_table_finds_the_level_of_noise(sigma):
    # Moré and Wild, section 3: within a factor of 4 for a smooth function.
    generator = np.random.default_rng(0)
    t = 1e-3 * sigma * np.arange(-4, 5)
    noise = computational_noise(np.cos(t) + sigma * generator.normal(size=9))
    assert sigma / 4 < noise < 4 * sigma


def test_the_difference_table_finds_no_noise_in_exact_values():
    assert computational_noise(np.arange(9.0)) == 0


def test_richardson_cancels_the_error_of_second_order():
    truth, curvature = 5.0, 7.0
    coarse, fine = (truth + curvature * h**2 for h in (1e-1, 1e-2))
    assert richardson(coarse, fine, 10.0) == pytest.approx(truth, rel=1e-14)


def test_weights_pair_complex_values_as_jax_does():
    values = [np.array([1 + 2j, 3j]), np.array(2.0)]
    weights = [np.array([1j, 2.0]), np.array(-1.0)]
    assert weighted(values, weights) == (1j * (1 + 2j)).real + (2 * 3j).real - 2.0
    assert magnitude(values, weights) == pytest.approx(5**0.5 + 6 + 2)


def test_outputs_are_differenced_one_by_one():
    def line(t):
        return [np.array([t, 2 * t]), np.array(3 * t)]

    weights = [np.ones(2), np.array(1.0)]
    slope = measure_slope(line, weights, scale=6.0, base=line(0.0))
    np.testing.assert_allclose(slope.outputs[0], [1, 2], rtol=1e-9)
    np.testing.assert_allclose(slope.outputs[1], 3, rtol=1e-9)
    assert slope.value == pytest.approx(6.0)


# --- the same through a check -----------------------------------------------------


def _relu_net(batch, width):
    key = jax.random.key(0)
    x = jax.random.normal(key, (batch, 32))
    params = {
        "first": jax.random.normal(jax.random.key(1), (32, width)) / 32**0.5,
        "second": jax.random.normal(jax.random.key(2), (width,)) / width**0.5,
    }

    def loss(params):
        hidden = jax.nn.relu(x @ params["first"])
        return jnp.mean((hidden @ params["second"]) ** 2)

    return loss, params


@pytest.mark.parametrize(("batch", "width"), [(16, 64), (128, 1024), (256, 4096)])
def test_relu_nets_of_every_width_are_accepted(batch, width):
    loss, params = _relu_net(batch, width)
    report = gradtest.assert_autodiff_matches(loss, params)
    assert report.smallest_seen < 1e-4


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e3, 3e5, 1e15])
def test_leaves_of_every_size_are_judged(scale):
    x = scale * jnp.linspace(0.5, 1.5, 5)
    gradtest.assert_grad_matches(
        lambda x: jnp.sum((x / scale) ** 3), lambda x: 3 * (x / scale) ** 2 / scale, x
    )
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(
            lambda x: jnp.sum((x / scale) ** 3),
            lambda x: 3.01 * (x / scale) ** 2 / scale,
            x,
        )


@pytest.mark.parametrize("frequency", [1e3, 1e5, 1e7])
def test_a_fast_oscillation_is_never_called_wrong(frequency):
    def fn(x):
        return jnp.sum(jnp.sin(frequency * x)) / frequency

    report = gradtest.check(fn, jnp.linspace(0.5, 2, 4))
    assert report.verdict is not gradtest.Verdict.FAIL


def test_a_rule_without_any_other_derivative_is_judged_by_differences():
    def table(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.sin(v), shape, x)

    def make(factor):
        fn = jax.custom_jvp(table)
        fn.defjvps(lambda tangent, out, x: factor * tangent * jnp.cos(x))
        return fn

    x = jnp.linspace(0.5, 2, 4)
    report = gradtest.assert_autodiff_matches(make(1.0), x)
    assert "pure_callback" in report.precision[0]
    assert report.leaf("x").judged_by == "measured"
    assert report.smallest_seen < 1e-2
    with pytest.raises(gradtest.GradientMismatch, match=r"1\.05 times too large"):
        gradtest.assert_autodiff_matches(make(1.05), x)


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (jax.nn.relu, [0.0, 1.0, -1.0]),
        (jnp.abs, [0.0, 1.0, -1.0]),
        (jnp.max, [1.0, 1.0, 0.0]),
        (jnp.median, [1.0, 1.0, 0.0]),
        (lambda x: jnp.clip(x, -1, 1), [-1.0, 0.5, 1.0]),
    ],
    ids=["relu", "abs", "max", "median", "clip"],
)
def test_any_value_between_the_slopes_is_accepted_at_a_kink(fn, x):
    report = gradtest.assert_autodiff_matches(fn, jnp.array(x))
    assert any("kink" in note for f in report.findings for note in f.notes)


@pytest.mark.parametrize("slope", [-0.5, 1.5])
def test_a_value_outside_of_the_slopes_is_refused_at_a_kink(slope):
    @jax.custom_jvp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvps(
        lambda tangent, out, x: (
            jnp.where(x == 0, slope, (x > 0).astype(x.dtype)) * tangent
        )
    )
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(relu, jnp.array([0.0, 1.0, -1.0]))
    assert caught.value.report.leaf("x").cause.name == "wrong at exact zeros"


def test_a_staircase_is_not_called_wrong():
    # Away from its jumps: the derivative is zero, and JAX says so.
    x = jnp.array([0.3, 1.2, 2.6])
    report = gradtest.check(lambda x: jnp.floor(x) * x, x)
    assert report.verdict is gradtest.Verdict.PASS


def _bend(right):
    @jax.custom_jvp
    def sinc(x):
        return jnp.sinc(x)

    @sinc.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        slope = jax.vmap(jax.grad(jnp.sinc))(x)
        return sinc(x), dx * (slope if right else jnp.where(x == 0, 14 * x, slope))

    return sinc


@pytest.mark.parametrize("x", [[0.0], [0.0, 0.3], [1.0, 0.3, 0.0]])
def test_second_derivatives_where_singular_terms_cancel_are_judged(x):
    gradtest.assert_autodiff_matches(jnp.sinc, jnp.array(x), order=2)
    gradtest.assert_autodiff_matches(_bend(right=True), jnp.array(x), order=2)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(_bend(right=False), jnp.array(x), order=2)
    causes = [f.cause.name for f in caught.value.report.findings if f.cause]
    assert "wrong at exact zeros" in causes


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_derivative_that_cancels_more_than_the_values_is_judged(factor):
    def mean_log(x):
        return jnp.log1p(x) / x

    def scaled(primals, tangents):
        value, slope = jax.jvp(mean_log, primals, tangents)
        return value, factor * slope

    ruled = jax.custom_jvp(mean_log)
    ruled.defjvp(scaled)
    report = gradtest.check(ruled, jnp.array([1e-6, 0.3, 2.0]), order=2)
    right = factor == 1.0
    assert report.verdict is gradtest.Verdict["PASS" if right else "FAIL"]
