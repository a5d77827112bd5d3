"""A check leaves JAX's settings, NumPy's generator and its arguments as they were."""

import contextlib
import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest

pytestmark = pytest.mark.core


def right(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]))


@jax.custom_vjp
def wrong(params, x):
    return right(params, x)


def _doubled(residuals, cotangent):
    params, x = residuals
    return jax.grad(right, (0, 1))(params, 2 * cotangent * x)


wrong.defvjp(lambda params, x: (right(params, x), (params, x)), _doubled)


def crashing(params, x):
    raise RuntimeError("on purpose")


@jax.custom_vjp
def crashing_backward(params, x):
    return right(params, x)


def _crash(residuals, cotangent):
    raise RuntimeError("on purpose")


crashing_backward.defvjp(lambda params, x: (right(params, x), None), _crash)


def leaking(params, x):
    # A trace that ends with a setting changed, as a careless function might.
    with jax.enable_x64(True):
        raise RuntimeError("on purpose")


def infinite(params, x):
    return jnp.sum(jnp.log(-jnp.abs(x))) + right(params, x)


_OUTCOMES = {
    "passed": (right, None),
    "failed": (wrong, gradtest.GradientMismatch),
    "inconclusive": (infinite, gradtest.GradientInconclusive),
    "crashed": (crashing, RuntimeError),
    "crashed in the rule": (crashing_backward, RuntimeError),
    "crashed in a context": (leaking, RuntimeError),
}
_outcomes = pytest.mark.parametrize(
    ("fn", "error"), _OUTCOMES.values(), ids=_OUTCOMES.keys()
)


def _run(fn, error, *args, **options):
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected:
        gradtest.assert_autodiff_matches(fn, *args, **options)


def _params():
    return {"w": jnp.linspace(-1, 1, 6).reshape(3, 2)}


def _x():
    return jnp.linspace(0.1, 1, 12).reshape(4, 3)


def _thread_settings():
    """What is in force now, contexts included: `values` holds the global ones alone."""
    return (
        jax.config.jax_enable_x64,
        jax.config.jax_disable_jit,
        jax.config.jax_debug_nans,
        jax.config.jax_numpy_dtype_promotion,
        jax.config.jax_numpy_rank_promotion,
        jax.config.jax_default_matmul_precision,
        jax.config.jax_default_device,
        jax.numpy.zeros(()).devices(),
        jnp.result_type(float),
    )


@_outcomes
def test_every_setting_of_jax_is_as_it_was(fn, error):
    before = copy.copy(jax.config.values), _thread_settings()
    _run(fn, error, _params(), _x())
    assert (jax.config.values, _thread_settings()) == before


@_outcomes
def test_settings_made_in_a_context_are_as_they_were(fn, error):
    device = jax.devices()[-1]
    with (
        jax.default_device(device),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.default_matmul_precision("float32"),
    ):
        before = _thread_settings()
        _run(fn, error, _params(), _x())
        assert _thread_settings() == before


@_outcomes
@pytest.mark.parametrize("order", [1, 2])
def test_the_callers_arrays_are_as_they_were(fn, error, order):
    params, x = _params(), np.array(_x())
    copies = np.array(params["w"]).tobytes(), x.tobytes()
    array = params["w"]
    _run(fn, error, params, x, order=order)
    assert params["w"] is array
    assert not array.is_deleted()
    assert (np.array(params["w"]).tobytes(), x.tobytes()) == copies


@_outcomes
def test_read_only_arrays_are_enough(fn, error):
    x = np.array(_x())
    x.setflags(write=False)
    _run(fn, error, _params(), x)


@_outcomes
def test_numpys_global_generator_is_as_it_was(fn, error):
    kind, words, *rest = np.random.get_state()
    _run(fn, error, _params(), jax.ShapeDtypeStruct((4, 3), jnp.float32))
    after_kind, after_words, *after_rest = np.random.get_state()
    assert (after_kind, after_rest) == (kind, rest)
    np.testing.assert_array_equal(after_words, words)


def test_a_closed_over_array_is_as_it_was():
    w = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    before = w.tobytes()
    gradtest.assert_autodiff_matches(lambda x: jnp.sum(jnp.tanh(x @ w)), _x())
    assert w.tobytes() == before


def test_a_hand_written_gradient_that_fails_leaves_all_as_it_was():
    before = copy.copy(jax.config.values), _thread_settings()
    for grad_fn, error in ((jnp.zeros_like, AssertionError), (lambda x: 3, TypeError)):
        with pytest.raises(error):
            gradtest.assert_grad_matches(lambda x: jnp.sum(x**2), grad_fn, _x())
    assert (jax.config.values, _thread_settings()) == before


def test_the_users_own_jit_cache_keeps_working_in_float32():
    fn = jax.jit(lambda x: jnp.sin(x) * 2)
    before = fn(_x())
    gradtest.assert_autodiff_matches(fn, _x())
    after = fn(_x())
    assert after.dtype == before.dtype == jnp.float32
    np.testing.assert_array_equal(after, before)
