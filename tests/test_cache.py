"""What is compiled once serves every point and every program of the same structure."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest

pytestmark = pytest.mark.core

_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Returns how many programs XLA has compiled since the fixture was made."""
    events = []

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: events.count(_COMPILED)
    jax.monitoring.unregister_event_duration_listener(listen)


def _point(seed, *shape):
    """NumPy draws, because JAX would compile its own."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _make_loss(scale):
    """A fresh function each time, that closes over an array."""
    return lambda params, x: jnp.mean(jnp.tanh(x @ params["w"] * scale) ** 2)


def _args(seed):
    return {"w": _point(seed, 3, 4)}, _point(seed + 100, 5, 3)


def _make_rule(slope):
    """A function whose rule is right where `slope` is all ones."""

    @jax.custom_vjp
    def fn(x):
        return jnp.sum(jnp.sin(x))

    def backward(x, cotangent):
        return (cotangent * slope * jnp.cos(x),)

    fn.defvjp(lambda x: (jnp.sum(jnp.sin(x)), x), backward)
    return fn


def test_another_point_compiles_nothing(compiled):
    fn = _make_loss(_point(0, 4))
    gradtest.assert_autodiff_matches(fn, *_args(1))
    assert compiled() > 0
    before = compiled()
    gradtest.assert_autodiff_matches(fn, *_args(2))
    gradtest.assert_autodiff_matches(fn, *_args(2), key=3)
    assert compiled() == before


def test_a_fresh_function_of_the_same_structure_compiles_nothing(compiled):
    gradtest.assert_autodiff_matches(_make_loss(_point(0, 4)), *_args(1))
    before = compiled()
    gradtest.assert_autodiff_matches(_make_loss(_point(5, 4)), *_args(2))
    assert compiled() == before


def test_many_trials_compile_once(compiled):
    def fn(x):
        return jnp.sum(jnp.sin(x) ** 3)

    gradtest.assert_autodiff_matches(fn, jax.ShapeDtypeStruct((7,), jnp.float32))
    before = compiled()
    report = gradtest.assert_autodiff_matches(
        fn, jax.ShapeDtypeStruct((7,), jnp.float32), trials=10
    )
    assert report.trials == 10
    assert compiled() == before


def test_a_hand_written_gradient_is_compiled_once(compiled):
    def check(seed):
        gradtest.assert_grad_matches(
            lambda x: jnp.sum(x**3), lambda x: 3 * x**2, _point(seed, 6)
        )

    check(0)
    before = compiled()
    check(1)
    assert compiled() == before


def test_a_repeated_check_of_second_order_compiles_nothing(compiled):
    def fn(x):
        return jnp.sum(jnp.sin(x) ** 2)

    gradtest.assert_autodiff_matches(fn, _point(0, 6), order=2)
    before = compiled()
    gradtest.assert_autodiff_matches(fn, _point(1, 6), order=2)
    assert compiled() == before


def test_other_constants_give_another_verdict_from_the_same_program():
    right, wrong = np.ones(4, np.float32), np.full(4, 1.5, np.float32)
    x = _point(0, 4)
    gradtest.assert_autodiff_matches(_make_rule(right), x)
    report = gradtest.check(_make_rule(wrong), x)
    assert report.verdict is gradtest.Verdict.FAIL
    assert "1.5 times too large" in report.leaf("x").cause.says
    gradtest.assert_autodiff_matches(_make_rule(right), x)


def test_two_constants_are_not_taken_for_one():
    x = _point(0, 4)
    left, right = np.full(4, 2.0, np.float32), np.full(4, 3.0, np.float32)

    def make(first, second):
        return lambda x: jnp.sum(x * jnp.asarray(first) * jnp.sin(x * second))

    def gradient(first, second):
        return lambda x: (
            first * (jnp.sin(x * second) + x * second * jnp.cos(x * second))
        )

    for pair in ((left, left), (left, right), (right, left)):
        gradtest.assert_grad_matches(make(*pair), gradient(*pair), x)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(make(left, left), gradient(left, right), x)


@pytest.mark.parametrize("wrong_first", [False, True])
def test_another_literal_is_another_program(wrong_first):
    x = _point(0, 4)

    def check(factor):
        return gradtest.check(_scaled(factor), x).verdict

    def _scaled(factor):
        @jax.custom_jvp
        def fn(x):
            return jnp.sin(x)

        fn.defjvps(lambda tangent, out, x: factor * tangent * jnp.cos(x))
        return fn

    factors = {1.0: gradtest.Verdict.PASS, 1.25: gradtest.Verdict.FAIL}
    order = sorted(factors, reverse=wrong_first)
    assert [check(factor) for factor in order] == [factors[f] for f in order]


def test_other_shapes_and_dtypes_are_other_programs():
    def fn(x):
        return jnp.sum(jnp.tanh(x) ** 2)

    for x in (_point(0, 4), _point(0, 5), _point(0, 4).astype(jnp.bfloat16)):
        report = gradtest.assert_autodiff_matches(fn, x)
        finding = report.leaf("x")
        assert (finding.shape, finding.dtype) == (x.shape, x.dtype.name)


def test_a_function_that_changes_is_traced_anew():
    x = _point(0, 4)
    power = 2

    def fn(x):
        return jnp.sum(x**power)

    gradtest.assert_grad_matches(fn, lambda x: 2 * x, x)
    power = 3
    gradtest.assert_grad_matches(fn, lambda x: 3 * x**2, x)
