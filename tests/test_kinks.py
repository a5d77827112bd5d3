"""At kinks the gradients of the sides are accepted, and what no side has is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest

pytestmark = pytest.mark.core

_TIED = jnp.array([1.0, 2.0, 2.0, 0.0])
_WEIGHTS = jnp.asarray(np.random.default_rng(0).standard_normal(40), jnp.float32)


def _all(x):
    return (x == x.max()).astype(x.dtype)


@pytest.mark.parametrize(
    "gradient",
    [lambda x: _all(x) / 2, lambda x: jax.nn.one_hot(jnp.argmax(x), 4)],
    ids=["shared", "to the first"],
)
def test_the_gradient_of_a_maximum_may_be_shared_or_given_to_one(gradient):
    report = gradtest.assert_grad_matches(jnp.max, gradient, _TIED)
    assert "at a kink" in " ".join(report.findings[0].notes)


def test_the_gradient_of_a_maximum_may_not_be_given_to_all():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grad_matches(jnp.max, _all, _TIED)
    (finding,) = caught.value.report.findings
    assert finding.cause.name == "ties counted together"


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0])
def test_any_slope_between_the_sides_of_relu_is_right(slope):
    def fn(x):
        return jnp.sum(_WEIGHTS * jnp.maximum(x, 0))

    def gradient(x):
        return _WEIGHTS * jnp.where(x == 0, slope, x > 0).astype(x.dtype)

    gradtest.assert_grad_matches(fn, gradient, jnp.zeros(40))


@pytest.mark.parametrize("slope", [-0.25, 1.5])
def test_a_slope_outside_of_the_sides_of_relu_is_wrong(slope):
    def fn(x):
        return jnp.sum(_WEIGHTS * jnp.maximum(x, 0))

    def gradient(x):
        return _WEIGHTS * jnp.where(x == 0, slope, x > 0).astype(x.dtype)

    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(fn, gradient, jnp.zeros(40).at[0].set(1.0))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.sum(_WEIGHTS[:6] * jnp.sort(x)),
        lambda x: jnp.sum(jnp.abs(x - 1)),
        jnp.median,
        lambda x: jnp.sum(jnp.where(x > 1, x, 2 * x - 1) * _WEIGHTS[:6]),
    ],
    ids=["sort", "abs", "median", "where"],
)
def test_what_jax_returns_at_a_tie_is_right(fn):
    gradtest.assert_autodiff_matches(fn, jnp.ones(6))


def test_a_mistake_off_the_kink_is_not_excused_by_it():
    def gradient(x):
        return jnp.where(x > 0, 1.5, 0.0).astype(x.dtype)

    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(
            lambda x: jnp.sum(jax.nn.relu(x)), gradient, jnp.array([0.0, 1.0, -1.0])
        )


def _row_norms(x):
    return jnp.sum(jnp.linalg.norm(x, axis=-1))


def _unit_rows(x):
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(length, 1e-30)


_ONE_ZERO_ROW = jnp.array([[0.0, 0.0], [1.0, 2.0]])


@pytest.mark.parametrize(("factor", "is_right"), [(1, True), (-2, False), (1.3, False)])
def test_one_entry_without_a_derivative_excuses_no_other(factor, is_right):
    # JAX's own derivative is NaN in the row that is zero, and only there.
    _expect(is_right, _row_norms, lambda x: factor * _unit_rows(x), _ONE_ZERO_ROW)


@pytest.mark.parametrize(
    ("factor", "is_right"), [(1, True), (-2, False), (1.3, False), (0, False)]
)
def test_nor_does_it_in_a_product_by_hand(factor, is_right):
    def norms(x):
        return jnp.linalg.norm(x, axis=-1)

    def pushed(primals, tangents):
        return factor * jnp.sum(_unit_rows(*primals) * tangents[0], axis=-1)

    def pulled(primals, cotangent):
        return (factor * cotangent[:, None] * _unit_rows(*primals),)

    for assertion, product in (
        (gradtest.assert_jvp_matches, pushed),
        (gradtest.assert_vjp_matches, pulled),
    ):
        if is_right:
            assertion(norms, product, _ONE_ZERO_ROW)
            continue
        with pytest.raises(gradtest.GradientMismatch):
            assertion(norms, product, _ONE_ZERO_ROW)


@pytest.mark.parametrize(("factor", "is_right"), [(1, True), (0, False), (9, False)])
def test_an_infinite_slope_in_one_entry_excuses_no_other(factor, is_right):
    def gradient(x):
        slope = jnp.sign(x) / 2 / jnp.sqrt(jnp.maximum(jnp.abs(x), 1e-30))
        return factor * jnp.where(x == 0, 0, slope)

    x = jnp.array([0.0, 1.5, 2.0, -1.0])
    _expect(is_right, lambda x: jnp.sum(jnp.sqrt(jnp.abs(x))), gradient, x)


@pytest.mark.parametrize(("factor", "is_right"), [(1, True), (1.2, False)])
def test_a_kink_in_one_leaf_excuses_no_other(factor, is_right):
    def product(p):
        return _row_norms(p["a"]) * jnp.sum(p["b"] ** 2)

    def gradient(p):
        return {
            "a": _unit_rows(p["a"]) * jnp.sum(p["b"] ** 2),
            "b": factor * 2 * p["b"] * _row_norms(p["a"]),
        }

    params = {"a": _ONE_ZERO_ROW, "b": jnp.array([1.0, 2.0, 3.0])}
    _expect(is_right, product, gradient, params)


def _expect(is_right, fn, grad_fn, *args):
    if is_right:
        report = gradtest.assert_grad_matches(fn, grad_fn, *args)
        assert report.verdict is gradtest.Verdict.PASS
        return
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(fn, grad_fn, *args)


def test_a_slope_that_cancels_to_rounding_is_the_same_in_both_modes():
    def centred_sum(x):
        spread = jnp.sqrt(jnp.maximum(jnp.var(x, -1, keepdims=True), 0.0) + 1e-6)
        return jnp.sum((x - jnp.mean(x, -1, keepdims=True)) / spread)

    gradtest.assert_autodiff_matches(centred_sum, jnp.zeros((2, 3)))


def test_a_value_that_cancels_to_rounding_is_no_other_value():
    # One less the cosine of two numbers of one sign: zero, but for rounding.
    report = gradtest.check(
        optax.losses.cosine_distance, jnp.array([[1.0]]), jnp.array([[1.5104648]])
    )
    assert not [f for f in report.findings if f.check == "value"]
    assert report.verdict is not gradtest.Verdict.FAIL


def test_a_gradient_where_all_cancels_is_told_from_one_that_is_wrong():
    @jax.custom_jvp
    def centred_sum(x):
        return jnp.sum(x - jnp.mean(x))

    @centred_sum.defjvp
    def _(primals, tangents):
        return centred_sum(*primals), 1e-3 * jnp.sum(tangents[0])

    x = jnp.array([0.1, 1.7, 2.3])
    report = gradtest.check(lambda x: jnp.sum(x - jnp.mean(x)), x)
    assert report.verdict is gradtest.Verdict.PASS
    with pytest.raises(gradtest.GradientMismatch, match="zero in every entry"):
        gradtest.assert_autodiff_matches(centred_sum, x)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: optax.losses.cosine_distance(x, 2 * x),
        lambda x: optax.losses.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(x)),
        lambda x: jnp.sum((x / jnp.linalg.norm(x, axis=-1, keepdims=True)) ** 2),
        lambda x: jnp.sin(x) ** 2 + jnp.cos(x) ** 2,
    ],
    ids=["cosine", "kl", "unit", "sin_cos"],
)
def test_where_all_cancels_rounding_is_no_mistake(fn, size):
    generator = np.random.default_rng(0)
    for shape in [(1,), (4, 1), (2, 3)]:
        x = jnp.asarray(size * generator.standard_normal(shape), jnp.float32)
        assert gradtest.check(fn, x).verdict is gradtest.Verdict.PASS


def test_a_rule_that_rounds_worse_where_all_cancels_is_refused():
    @jax.custom_vjp
    def ones(x):
        return jnp.sin(x) ** 2 + jnp.cos(x) ** 2

    ones.defvjp(lambda x: (ones(x), x), lambda x, ct: (1e4 * ct * (ones(x) - 1),))
    with pytest.raises(gradtest.GradientMismatch, match="loses its accuracy"):
        gradtest.assert_autodiff_matches(ones, jnp.array([0.3, 1.1, 0.7, 2.1, 3.3]))
