"""Whole messages, compared with stored copies: what a user reads when a check fails."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import gradtest

pytestmark = pytest.mark.core

_X = jnp.array([0.5, 1.0, 1.5, 2.0])
_MATRIX = jnp.array([[2.0, 0.5], [-1.0, 3.0]])
_PARAMS = {"w": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "b": jnp.array([0.5, -0.5])}


def cube_sum(x):
    return jnp.sum(x**3)


def loss(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 3)


def weighted_sum(matrix):
    return jnp.sum(matrix * jnp.array([[1.0, 2.0], [3.0, 4.0]]))


def norm(x):
    return jnp.sqrt(jnp.sum(x**2))


def log_sum(x):
    return jnp.sum(jnp.log(x))


def _flipped():
    gradtest.assert_grad_matches(cube_sum, lambda x: -3 * x**2, _X)


def _factor_in_one_leaf():
    gradtest.assert_grad_matches(
        loss, lambda p: {"w": 2 * p["w"], "b": 6 * p["b"] ** 2}, _PARAMS
    )


def _several_leaves():
    gradtest.assert_grad_matches(
        loss, lambda p: {"w": 0 * p["w"], "b": 6 * p["b"] ** 2}, _PARAMS
    )


def _transposed():
    gradtest.assert_grad_matches(
        weighted_sum, lambda m: jnp.array([[1.0, 3.0], [2.0, 4.0]]), _MATRIX
    )


def _some_entries():
    @jax.custom_vjp
    def padded_sum(x):
        return jnp.sum(x[:6] ** 2)

    padded_sum.defvjp(
        lambda x: (jnp.sum(x[:6] ** 2), x), lambda x, cotangent: (2 * cotangent * x,)
    )
    gradtest.assert_autodiff_matches(padded_sum, jnp.arange(1.0, 9.0))


def _not_finite():
    gradtest.assert_autodiff_matches(norm, jnp.zeros(3), modes=["rev"])


def _no_value():
    gradtest.assert_autodiff_matches(log_sum, -_X)


def _solver():
    def solve(matrix, b):
        return lax.custom_linear_solve(
            lambda x: matrix @ x,
            b,
            solve=lambda _, rhs: jnp.linalg.inv(matrix) @ rhs,
            transpose_solve=lambda _, rhs: 1.5 * jnp.linalg.inv(matrix).T @ rhs,
        )

    gradtest.assert_autodiff_matches(solve, _MATRIX, jnp.ones(2), modes=["rev"])


def _overflow():
    @jax.custom_vjp
    def softplus(x):
        return jnp.sum(jnp.logaddexp(x, 0))

    def backward(x, cotangent):
        return (cotangent * jnp.exp(x) / (1 + jnp.exp(x)),)

    softplus.defvjp(lambda x: (jnp.sum(jnp.logaddexp(x, 0)), x), backward)
    gradtest.assert_autodiff_matches(softplus, jnp.array([1.0, 100.0]))


def _value():
    @jax.custom_vjp
    def mean_square(x):
        return jnp.mean(x**2)

    mean_square.defvjp(
        lambda x: (jnp.sum(x**2), x), lambda x, cotangent: (cotangent * x / 2,)
    )
    gradtest.assert_autodiff_matches(mean_square, _X)


def _second_order():
    @jax.custom_jvp
    def cube(x):
        return jnp.sum(x**3)

    cube.defjvps(
        lambda tangent, out, x: 3 * jnp.sum(lax.stop_gradient(x) ** 2 * tangent)
    )
    gradtest.assert_autodiff_matches(cube, _X, order=2, modes=["rev"])


def _last_trial():
    gradtest.assert_grad_matches(
        cube_sum,
        lambda x: 3 * jnp.abs(x) * x,
        jax.ShapeDtypeStruct((), jnp.float32),
        trials=4,
        key=4,
    )


# A long line of a message is continued by a backslash.
_MESSAGES = {
    "a flipped sign": (
        _flipped,
        """\
assert_grad_matches failed: the gradient of cube_sum is wrong at x (float32[4]).
  At: tests/test_messages.py:38 in <lambda>: gradtest.assert_grad_matches(cube_sum, \
lambda x: -3 * x**2, _X)  (with 3 in place of -3, the derivative is right)
  x[3]: claimed -12, true 12; relative gap 2, allowed 2e-06; judged by rule-free \
autodiff in float64, confirmed by differences.
  Likely cause: the sign is flipped: claimed = -1 x true in all 4 entries.
  Try: negate the result.
  Replay: gradtest.assert_grad_matches(cube_sum, ..., key=0)""",
    ),
    "a factor in one leaf": (
        _factor_in_one_leaf,
        """\
assert_grad_matches failed: the gradient of loss is wrong at params['b'] (float32[2]).
  At: tests/test_messages.py:43 in <lambda>: loss, lambda p: {"w": 2 * p["w"], "b": 6 \
* p["b"] ** 2}, _PARAMS  (with 3 in place of 6, the derivative is right)
  params['b'][0]: claimed 1.5, true 0.75; relative gap 1, allowed 2e-06; judged by \
rule-free autodiff in float64, confirmed by differences.
  Likely cause: it is 2 times too large in all 2 entries.
  Try: multiply by 0.5; look for a missing or doubled factor, or a sum where a mean is.
  Replay: gradtest.assert_grad_matches(loss, ..., key=0)""",
    ),
    "several leaves": (
        _several_leaves,
        """\
assert_grad_matches failed: the gradient of loss is wrong at params['b'] (float32[2]).
  Possibly at: tests/test_messages.py:49 in <lambda>: loss, lambda p: {"w": 0 * \
p["w"], "b": 6 * p["b"] ** 2}, _PARAMS  (what is wrong is computed here last)
  params['b'][0]: claimed 1.5, true 0.75; relative gap 1, allowed 2e-06; judged by \
rule-free autodiff in float64, confirmed by differences.
  Likely cause: it is 2 times too large in all 2 entries.
  Try: multiply by 0.5; look for a missing or doubled factor, or a sum where a mean is.
  Wrong as well: params['w'].
  Replay: gradtest.assert_grad_matches(loss, ..., key=0)""",
    ),
    "a transposed matrix": (
        _transposed,
        """\
assert_grad_matches failed: the gradient of weighted_sum is wrong at matrix \
(float32[2, 2]).
  matrix[0, 1]: claimed 3, true 2; relative gap 0.258, allowed 2e-06; judged by \
rule-free autodiff in float64, confirmed by differences.
  Likely cause: it is the transpose of the true gradient.
  Try: swap the last two axes.
  Replay: gradtest.assert_grad_matches(weighted_sum, ..., key=0)""",
    ),
    "some entries": (
        _some_entries,
        """\
assert_autodiff_matches failed: the gradient of padded_sum is wrong at x (float32[8]).
  Possibly at: tests/test_messages.py:65 in <lambda>: lambda x: (jnp.sum(x[:6] ** 2), \
x), lambda x, cotangent: (2 * cotangent * x,)  (what is wrong is computed here last)
  x[7]: claimed 16, true 0; relative gap 1.11, allowed 2e-06; judged by rule-free \
autodiff in float64, confirmed by differences.
  Likely cause: the custom_vjp rule of padded_sum (bwd at tests/test_messages.py:65) \
is wrong at x: 2 of 8 entries are wrong, within [6..7] (the last 2 entries): the true \
ones are zero; the others are right.
  Try: return zero for the entries that the function leaves out: apply its mask to the \
cotangent too.
  Or: 2 of 8 entries are wrong, within [6..7], exactly where x > 6, where the true \
ones are zero; the others are right.
  If padded_sum differs on purpose: expect_differs={'padded_sum': <its stand-in>}.
  Replay: gradtest.assert_autodiff_matches(padded_sum, ..., key=0)""",
    ),
    "a gradient that is not finite": (
        _not_finite,
        """\
assert_autodiff_matches failed: the gradient of norm is wrong at x (float32[3]).
  At: tests/test_messages.py:30 in norm: return jnp.sqrt(jnp.sum(x**2))  (the first \
result that is infinite is made here)
  x[0]: claimed nan.
  Likely cause: 3 of 3 entries are NaN although the value is finite: `sqrt` (line 30) \
takes 0 and has no finite slope there, which `integer_pow` turns to NaN.
  Try: safe norm: `jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0)`, with s for \
the sum of squares (verified: with it the value is the same and the gradient finite).
  Replay: gradtest.assert_autodiff_matches(norm, ..., key=0)""",
    ),
    "a value that is not finite": (
        _no_value,
        """\
assert_autodiff_matches failed: nothing can be concluded about log_sum at x \
(float32[4]).
  Reason: the value itself is NaN (result, 1 of 1 entries), so it has no derivative \
here.
  Try: choose a point inside the function's domain, or a gradtest.domains entry.
  Replay: gradtest.assert_autodiff_matches(log_sum, ..., key=0)""",
    ),
    "a wrong solver": (
        _solver,
        """\
assert_autodiff_matches failed: solve uses a linear solver that is wrong: \
transpose_solve.
  relative residual 0.5, allowed 1e-06.
  Likely cause: `transpose_solve` of a custom_linear_solve does not solve its system.
  Try: check `transpose_solve`: A x = b must hold for what it returns, with A \
transposed.
  Wrong as well: matrix, b.
  Replay: gradtest.assert_autodiff_matches(solve, ..., key=0)""",
    ),
    "an overflow": (
        _overflow,
        """\
assert_autodiff_matches failed: the gradient of softplus loses its accuracy at x \
(float32[2]).
  At: tests/test_messages.py:96 in backward: return (cotangent * jnp.exp(x) / (1 + \
jnp.exp(x)),)  (its result is not finite here, and finite in float64)
  Likely cause: the custom_vjp rule of softplus (bwd at tests/test_messages.py:95) is \
wrong at x: the formula is right, but evaluated in its own dtype it gives NaN or inf: \
inside of the rule of `softplus`, `exp` (line 96) takes 100 at [1] and gives inf.
  Try: rescale before exponentials, squares and divisions \
(subtract the maximum), and give roots, norms and quotients a case of their own at zero.
  Replay: gradtest.assert_autodiff_matches(softplus, ..., key=0)""",
    ),
    "another value": (
        _value,
        """\
assert_autodiff_matches failed: mean_square returns another value under \
differentiation: result (float32[]).
  At: tests/test_messages.py:108 in <lambda>: lambda x: (jnp.sum(x**2), x), lambda x, \
cotangent: (cotangent * x / 2,)  (with a mean in its place, the derivative is right)
  result: claimed 7.5, true 1.875; relative gap of the value 3, allowed 2e-06.
  Likely cause: the custom_vjp rule of mean_square (fwd at tests/test_messages.py:108) \
is wrong at result[0]: the rule's forward pass returns another value than the function \
it differentiates.
  Try: compute the same expression in the rule's fwd (or jvp) as in the function.
  Replay: gradtest.assert_autodiff_matches(mean_square, ..., key=0)""",
    ),
    "second order": (
        _second_order,
        """\
assert_autodiff_matches failed: the second derivative of cube is wrong at x \
(float32[4]).
  At: tests/test_messages.py:119 in <lambda>: lambda tangent, out, x: 3 * \
jnp.sum(lax.stop_gradient(x) ** 2 * tangent)  (what is stopped here has a derivative \
of its own)
  x[2]: claimed 0, true 17.2039; relative gap 1, allowed 2e-06; judged by rule-free \
autodiff in float64, confirmed by differences.
  Likely cause: the custom_jvp rule of cube (jvp at tests/test_messages.py:119) is \
wrong at x: the claimed gradient is zero in every entry, the true one is not.
  Try: let the rule's own derivative depend on this leaf: look for a stop_gradient, or \
a constant, in its bwd or jvp.
  Replay: gradtest.assert_autodiff_matches(cube, ..., key=0)""",
    ),
    "several trials": (
        _last_trial,
        """\
assert_grad_matches failed: the gradient of cube_sum is wrong at x (float32[]).
  Possibly at: tests/test_messages.py:127 in <lambda>: lambda x: 3 * jnp.abs(x) * x,  \
(what is wrong is computed here last)
  x: claimed -3.57169, true 3.57169; relative gap 2, allowed 2e-06; judged by \
rule-free autodiff in float64, confirmed by differences.
  Likely cause: the sign is flipped: claimed = -1 x true in its one entry.
  Try: negate the result.
  Replay: gradtest.assert_grad_matches(cube_sum, ..., key=4, trials=4)  # trial 0""",
    ),
}


@pytest.mark.parametrize("case", _MESSAGES)
def test_the_whole_message_is_as_stored(case):
    call, message = _MESSAGES[case]
    with pytest.raises(AssertionError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("case", _MESSAGES)
def test_a_message_has_two_to_eight_lines(case):
    assert 2 <= len(_MESSAGES[case][1].splitlines()) <= 8


def test_the_report_of_a_pass_says_what_was_checked():
    report = gradtest.assert_grad_matches(
        loss,
        lambda p: {"w": 2 * p["w"], "b": 0 * p["b"]},
        _PARAMS,
        exclude=["params['b']"],
    )
    text = str(report)
    assert text.startswith("PASS: assert_grad_matches(loss)")
    assert "params['w'] (float32[2, 2])" in text
    assert "smallest relative error that would have been seen: 2.0e-06" in text
    assert "checked: reverse mode, order 1, 1 trial" in text
    assert "not checked: params['b'] (excluded)" in text
    assert "replay" not in text


def test_a_leaf_that_is_not_there_is_named():
    report = gradtest.check(cube_sum, _X)
    with pytest.raises(KeyError, match="no leaf 'y' in the report; there are x"):
        report.leaf("y")
