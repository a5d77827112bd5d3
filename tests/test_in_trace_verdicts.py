"""What each assertion accepts and refuses where it stands inside of a trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from tests.in_trace import X, asserting, refused, right, run

# --- each assertion's own ----------------------------------------------------------


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _straight_through(x):
    return jnp.sum(rounded(3 * sine(x)) * x)


def test_rules_are_audited_as_declared_and_as_chosen():
    def inside(x, **keywords):
        gradtest.assert_custom_rules_match(_straight_through, x, **keywords)
        return x

    declared = {rounded: lambda x: x}
    run(jax.jit(functools.partial(inside, expect_differs=declared)), X)
    run(jax.jit(functools.partial(inside, only="sine")), X)
    assert "rule rounded: operand 0: the gradient" in refused(jax.jit(inside), X)


def test_a_rule_in_a_branch_that_is_not_taken_concludes_nothing():
    def inside(x):
        gradtest.assert_custom_rules_match(
            lambda x: jax.lax.cond(x[0] > 9, sine, jnp.cos, x), x
        )
        return x

    message = refused(jax.jit(inside), X)
    assert "nothing can be concluded: no custom rule is reached" in message
    run(jax.jit(inside), X + 9)


def test_a_function_without_rules_is_a_slip():
    with pytest.raises(ValueError, match="`fn` calls no custom rule"):
        jax.jit(lambda x: gradtest.assert_custom_rules_match(jnp.sin, x))(X)


def test_the_second_order_is_checked_where_it_is_asked_for():
    @jax.custom_vjp
    def stopped(x):
        return jnp.sin(x)

    stopped.defvjp(
        lambda x: (jnp.sin(x), x),
        lambda x, g: (g * jax.lax.stop_gradient(jnp.cos(x)),),
    )

    def inside(x, order):
        gradtest.assert_autodiff_matches(lambda x: jnp.sum(stopped(x)), x, order=order)
        return x

    run(jax.jit(functools.partial(inside, order=1)), X)
    message = refused(jax.jit(functools.partial(inside, order=2)), X)
    assert "x: the second derivative is off by" in message


def test_each_leaf_of_a_jvp_is_looked_at_alone():
    def inside(x, factor):
        gradtest.assert_jvp_matches(
            lambda x, y: x + 1e-6 * y, lambda _, t: t[0] + factor * 1e-6 * t[1], x, x
        )
        return x

    run(jax.jit(functools.partial(inside, factor=1.0)), X)
    message = refused(jax.jit(functools.partial(inside, factor=1.1)), X)
    assert "result along y: the tangent is off by 0.1 " in message


def test_a_transpose_of_what_is_not_linear_is_refused():
    def inside(x, shift):
        gradtest.assert_transpose_matches(lambda x: 2 * x + shift, lambda w: 2 * w, x)
        return x

    run(jax.jit(functools.partial(inside, shift=0.0)), X)
    message = refused(jax.jit(functools.partial(inside, shift=1.0)), X)
    assert "`linear_fn` is not linear" in message


def test_two_implementations_of_other_values_are_refused():
    def inside(x, shift):
        gradtest.assert_grads_agree(jnp.sin, lambda x: jnp.sin(x) + shift, x)
        return x

    run(jax.jit(functools.partial(inside, shift=0.0)), X)
    refused(jax.jit(functools.partial(inside, shift=1.0)), X)


def test_trees_that_are_unlike_are_refused_when_the_program_runs():
    def inside(x):
        gradtest.assert_grads_close({"w": x}, {"v": x})
        return x

    assert "`reference` has nothing" in refused(jax.jit(inside), X)


def test_a_leaf_without_gradient_is_told_why():
    def inside(x):
        gradtest.assert_grads_flow(lambda p: jnp.sum(p["w"]), {"w": x, "unused": x})
        return x

    message = refused(jax.jit(inside), X)
    assert "p['unused']: it has no gradient: the loss does not depend on it" in message


# --- numerics ---------------------------------------------------------------------


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.5, 1.0])
def test_at_a_kink_every_slope_between_is_accepted(slope):
    weights = jnp.array([1.0, -2.0, 3.0])

    def grad_fn(x):
        return weights * jnp.where(x == 0, slope, jnp.sign(x))

    def fn(x):
        return jnp.sum(weights * jnp.abs(x))

    run(jax.jit(asserting(grad_fn, fn=fn)), np.array([0.0, 0.0, 2.0], np.float32))


def test_at_a_kink_a_slope_beyond_is_refused():
    def grad_fn(x):
        return jnp.where(x == 0, 1.5, jnp.sign(x))

    def fn(x):
        return jnp.sum(jnp.abs(x))

    refused(jax.jit(asserting(grad_fn, fn=fn)), np.array([0.0, 1.0, 2.0], np.float32))


@pytest.mark.parametrize("factor", [1.0, -2.0, 1.3])
def test_one_entry_without_a_derivative_excuses_no_other(factor):
    # JAX's own derivative is NaN in the row that is zero, and only there.
    def row_norms(x):
        return jnp.sum(jnp.linalg.norm(x, axis=-1))

    def gradient(x):
        length = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return factor * x / jnp.maximum(length, 1e-30)

    check = jax.jit(asserting(gradient, fn=row_norms))
    x = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    if factor == 1:
        run(check, x)
    else:
        assert "the gradient is off by" in refused(check, x)


def test_a_small_leaf_is_not_hidden_behind_a_large_one():
    def fn(p):
        return 1e6 * jnp.sum(p["large"] ** 2) + 1e-6 * jnp.sum(p["small"] ** 2)

    def grad_fn(p, factor):
        return {"large": 2e6 * p["large"], "small": factor * 2e-6 * p["small"]}

    def inside(x, factor=1.0):
        gradtest.assert_grad_matches(
            fn, lambda p: grad_fn(p, factor), {"large": x, "small": x}, rtol=1e-6
        )
        return x

    run(jax.jit(inside), X)
    message = refused(jax.jit(functools.partial(inside, factor=1.01)), X)
    assert "p['small']" in message


def test_an_unstable_formula_is_refused_for_its_rounding():
    def fn(x):
        return jnp.sum(jax.nn.softplus(x))

    def unstable(x):
        return jnp.exp(x) / (1 + jnp.exp(x))

    x = np.array([1.0, 95.0], np.float32)
    run(jax.jit(asserting(jax.nn.sigmoid, fn=fn)), x)
    message = refused(jax.jit(asserting(unstable, fn=fn)), x)
    assert "in its own precision the derivative is off itself in float64" in message


def test_what_has_no_rule_free_derivative_is_judged_by_differences():
    @jax.custom_vjp
    def root(a):
        low, high = jnp.zeros_like(a), jnp.maximum(a, 1.0)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = middle**2 > a
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        low, high = jax.lax.while_loop(
            lambda state: state[0] < 60,
            lambda state: (state[0] + 1, halve(0, state[1])),
            (0, (low, high)),
        )[1]
        return (low + high) / 2

    def inside(a, factor):
        def rooted(a):
            return jnp.sum(root(a))

        gradtest.assert_grad_matches(rooted, lambda a: factor / (2 * jnp.sqrt(a)), a)
        return a

    root.defvjp(lambda a: (root(a), root(a)), lambda r, g: (g / (2 * r),))
    a = np.array([2.0, 3.0], np.float32)
    run(jax.jit(functools.partial(inside, factor=1.0)), a)
    refused(jax.jit(functools.partial(inside, factor=1.1)), a)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_precision_is_checked_in_float64(dtype):
    def scaled(factor):
        @jax.custom_vjp
        def gelu(x):
            return jax.nn.gelu(x)

        def bwd(x, g):
            return (factor * jax.vjp(jax.nn.gelu, x)[1](g)[0],)

        gelu.defvjp(lambda x: (gelu(x), x), bwd)
        return gelu

    def inside(x, factor):
        gradtest.assert_autodiff_matches(scaled(factor), x)
        return x

    x = jnp.asarray(X, dtype)
    run(jax.jit(functools.partial(inside, factor=1.0)), x)
    refused(jax.jit(functools.partial(inside, factor=1.05)), x)


def test_operations_that_are_lowered_by_tracing_keep_their_float64():
    # Their lowering makes constants of the operand's dtype: argmax, logistic, igamma.
    def fn(x):
        best = x[jnp.argmax(x)]
        return best * jnp.sum(jax.nn.sigmoid(x)) * jax.scipy.special.gammainc(2.5, best)

    def inside(x):
        gradtest.assert_autodiff_matches(fn, x)
        return x

    run(jax.jit(inside), X)


def test_complex_gradients_follow_jax():
    def fn(z):
        return jnp.sum(jnp.abs(z) ** 2 * jnp.real(z))

    def conjugate(z):
        return jnp.conj(jax.grad(fn)(z))

    z = np.array([1 + 2j, 0.5 - 1j], np.complex64)
    run(jax.jit(asserting(jax.grad(fn), fn=fn)), z)
    refused(jax.jit(asserting(conjugate, fn=fn)), z)


def test_it_works_in_64_bits_as_well():
    with jax.enable_x64(True):
        x = X.astype(np.float64)
        run(jax.jit(asserting(right)), x)
        refused(jax.jit(asserting(lambda x: right(x) * (1 + 1e-5))), x)
