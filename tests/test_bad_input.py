"""A user's slip is a TypeError or ValueError that names the argument and the cure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest

pytestmark = pytest.mark.core

_X = jnp.arange(3.0)
_PARAMS = {"w": _X, "b": jnp.float32(2.0)}


def square_sum(x):
    return jnp.sum(x**2)


def double(x):
    return 2 * x


def loss(params):
    return jnp.sum(params["w"] ** 2) + params["b"] ** 2


@jax.custom_vjp
def reverse_only(x):
    return jnp.sum(jnp.sin(x))


reverse_only.defvjp(
    lambda x: (jnp.sum(jnp.sin(x)), x), lambda x, cotangent: (cotangent * jnp.cos(x),)
)


def doubling_loop(x):
    return jax.lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, 2 * state[1]), (0, x)
    )[1]


def _raises(error, message, call):
    with pytest.raises(error) as caught:
        call()
    # Not `match`, which sees the notes as well.
    assert str(caught.value) == message
    return caught.value


# What each call does wrong, as the end of a sentence; the error and its whole message.
_AUTODIFF = {
    "a NaN in the input": (
        lambda check: check(square_sum, _X.at[1].set(jnp.nan)),
        ValueError,
        "`x` must be finite where it is differentiated, got nan at index [1] (1 of 3 "
        "entries are not finite).",
    ),
    "an infinity deep in a tree": (
        lambda check: check(loss, {"w": _X.at[2].set(jnp.inf), "b": 1.0}),
        ValueError,
        "`params['w']` must be finite where it is differentiated, got inf at index [2] "
        "(1 of 3 entries are not finite).",
    ),
    "integers only": (
        lambda check: check(square_sum, jnp.arange(3)),
        ValueError,
        "`args` has no leaf to differentiate in argument 0: wanted a float or complex "
        "array, got x: int32[3].",
    ),
    "an empty tree": (
        lambda check: check(lambda params: jnp.float32(0), {}),
        ValueError,
        "`args` has no leaf to differentiate in argument 0: wanted a float or complex "
        "array, got an empty tree.",
    ),
    "an integer argument named in argnums": (
        lambda check: check(lambda x, n: n * x, _X, jnp.int32(2), argnums=(0, 1)),
        ValueError,
        "`args` has no leaf to differentiate in argument 1: wanted a float or complex "
        "array, got n: int32[].",
    ),
    "argnums out of range": (
        lambda check: check(square_sum, _X, argnums=1),
        ValueError,
        "`argnums` names argument 1, but the call has 1 argument: wanted -1 <= argnums "
        "< 1.",
    ),
    "argnums out of range from the end": (
        lambda check: check(lambda x, y: x + y, _X, _X, argnums=(0, -3)),
        ValueError,
        "`argnums` names argument -3, but the call has 2 arguments: wanted -2 <= "
        "argnums < 2.",
    ),
    "argnums that is no integer": (
        lambda check: check(square_sum, _X, argnums="x"),
        TypeError,
        "`argnums` must hold integers, got 'x'.",
    ),
    "a function that is not callable": (
        lambda check: check(3, _X),
        TypeError,
        "`fn` must be callable, got 3.",
    ),
    "a function that returns None": (
        lambda check: check(lambda x: None, _X),
        TypeError,
        "`fn` must return a float or complex array (or a tree with one), got None: "
        "there is nothing to differentiate.",
    ),
    "a function that returns integers": (
        lambda check: check(jnp.argmax, _X),
        TypeError,
        "`fn` must return a float or complex array (or a tree with one), got int32[]: "
        "there is nothing to differentiate.",
    ),
    "a function that returns a string": (
        lambda check: check(lambda x: {"name": "relu"}, _X),
        TypeError,
        "`fn` must return arrays, got a str at result['name'].",
    ),
    "has_aux without a pair": (
        lambda check: check(square_sum, _X, has_aux=True),
        TypeError,
        "`fn` must return a pair (result, auxiliary) when has_aux=True, got float32[].",
    ),
    "a mode that does not exist": (
        lambda check: check(square_sum, _X, modes=["forward"]),
        ValueError,
        "`modes` must be None or name some of ('rev', 'fwd'), got ['forward'].",
    ),
    "no mode at all": (
        lambda check: check(square_sum, _X, modes=()),
        ValueError,
        "`modes` must be None or name some of ('rev', 'fwd'), got ().",
    ),
    "a forward mode that a custom_vjp lacks": (
        lambda check: check(reverse_only, _X, modes=["fwd"]),
        ValueError,
        "`modes` asks for 'fwd', which the function does not support: a custom_vjp "
        "function has no forward-mode derivative",
    ),
    "an excluded leaf that is not there": (
        lambda check: check(loss, _PARAMS, exclude=["params['v']"]),
        ValueError,
        "`exclude` names \"params['v']\", which is no leaf of the arguments: there are "
        "params['b'], params['w'].",
    ),
    "a string for exclude": (
        lambda check: check(loss, _PARAMS, exclude="params"),
        TypeError,
        "`exclude` must be a sequence of leaf names, got the string 'params'; write "
        "exclude=('params',).",
    ),
    "everything excluded": (
        lambda check: check(loss, _PARAMS, exclude=["params"]),
        ValueError,
        "`exclude` leaves nothing to check: every leaf is excluded.",
    ),
    "no trials": (
        lambda check: check(square_sum, _X, trials=0),
        ValueError,
        "`trials` must be an integer >= 1, got 0.",
    ),
    "a fraction of trials": (
        lambda check: check(square_sum, _X, trials=2.0),
        ValueError,
        "`trials` must be an integer >= 1, got 2.0.",
    ),
    "an order of 3": (
        lambda check: check(square_sum, _X, order=3),
        ValueError,
        "`order` must be 1 or 2, got 3.",
    ),
    "a tolerance of 0": (
        lambda check: check(square_sum, _X, rtol=0),
        ValueError,
        "`rtol` must lie between 0 and 1, got 0.",
    ),
    "a rounding tolerance of 2": (
        lambda check: check(square_sum, _X, rounding_rtol=2.0),
        ValueError,
        "`rounding_rtol` must lie between 0 and 1, got 2.0.",
    ),
    "a string for a key": (
        lambda check: check(square_sum, _X, key="a"),
        TypeError,
        "`key` must be an integer, a `jax.random.key` or a `jax.random.PRNGKey`, got "
        "str: 'a'",
    ),
    "a variant that is not callable": (
        lambda check: check(square_sum, _X, variant="jit"),
        TypeError,
        "`variant` must be callable, got 'jit'.",
    ),
    "a draw of integers": (
        lambda check: check(square_sum, jax.ShapeDtypeStruct((3,), jnp.int32)),
        ValueError,
        "`x` is a jax.ShapeDtypeStruct of dtype int32: only float and complex ones can "
        "be drawn; use gradtest.domains.integers.",
    ),
}


@pytest.mark.parametrize("slip", _AUTODIFF)
def test_assert_autodiff_matches_explains(slip):
    call, error, message = _AUTODIFF[slip]
    _raises(error, message, lambda: call(gradtest.assert_autodiff_matches))


@pytest.mark.parametrize("slip", _AUTODIFF)
def test_check_raises_on_a_slip_as_well(slip):
    call, error, message = _AUTODIFF[slip]
    _raises(error, message, lambda: call(gradtest.check))


_HAND_WRITTEN = {
    "a gradient that is not callable": (
        lambda check: check(square_sum, 3, _X),
        TypeError,
        "`grad_fn` must be callable, got 3.",
    ),
    "a vector where a number is wanted": (
        lambda check: check(lambda x: x**2, double, _X),
        TypeError,
        "`fn` must return one real number to have a gradient, got result: float32[3]; "
        "use assert_autodiff_matches for other functions.",
    ),
    "a complex number where a real one is wanted": (
        lambda check: check(lambda x: 1j * jnp.sum(x), double, _X),
        TypeError,
        "`fn` must return one real number to have a gradient, got result: complex64[]; "
        "use assert_autodiff_matches for other functions.",
    ),
    "auxiliary data without has_aux": (
        lambda check: check(lambda x: (jnp.sum(x), {"seen": x}), double, _X),
        TypeError,
        "`fn` must return one real number to have a gradient, got result[0]: "
        "float32[], result[1]['seen']: float32[3]; use assert_autodiff_matches for "
        "other functions.",
    ),
    "another shape": (
        lambda check: check(
            loss, lambda p: {"w": jnp.sum(p["w"]), "b": p["b"]}, _PARAMS
        ),
        TypeError,
        "`grad_fn` must return the shape of the argument: wanted [3] for params['w'], "
        "got [] in grad_fn(...).",
    ),
    "None for a leaf": (
        lambda check: check(loss, lambda p: {"w": None, "b": p["b"]}, _PARAMS),
        TypeError,
        "`grad_fn` must return the shape of the argument: wanted [3] for params['w'], "
        "got None in grad_fn(...).",
    ),
    "another dtype": (
        lambda check: check(
            loss,
            lambda p: {"w": p["w"].astype(jnp.bfloat16), "b": p["b"]},
            _PARAMS,
        ),
        TypeError,
        "`grad_fn` must return the dtype of the argument: wanted float32 for "
        "params['w'], got bfloat16 in grad_fn(...).",
    ),
    "one tree for a tuple of argnums": (
        lambda check: check(square_sum, double, _X, argnums=(0,)),
        TypeError,
        "`grad_fn` must return a tuple with one tree for each of argnums=(0,), got "
        "float32[3].",
    ),
    "too few trees": (
        lambda check: check(
            lambda x, y: jnp.sum(x * y), lambda x, y: (y,), _X, _X, argnums=(0, 1)
        ),
        TypeError,
        "`grad_fn` must return 2 trees, one for each of `argnums`, got 1.",
    ),
}


@pytest.mark.parametrize("slip", _HAND_WRITTEN)
def test_assert_grad_matches_explains(slip):
    call, error, message = _HAND_WRITTEN[slip]
    _raises(error, message, lambda: call(gradtest.assert_grad_matches))


def test_another_tree_from_grad_fn_is_explained():
    with pytest.raises(TypeError, match="`grad_fn` must return a tree like") as caught:
        gradtest.assert_grad_matches(loss, lambda p: [p["w"], p["b"]], _PARAMS)
    assert "'w'" in str(caught.value)


def test_what_the_function_itself_raises_comes_through_with_a_note():
    def divides(x):
        return x / (1 // 0)

    error = _raises(
        ZeroDivisionError,
        "integer division or modulo by zero",
        lambda: gradtest.check(divides, _X),
    )
    assert "gradtest: raised by `fn` itself, while it was traced." in error.__notes__


def test_a_reverse_mode_that_a_loop_lacks_is_explained():
    with pytest.raises(
        ValueError, match="`modes` asks for 'rev', which the function does not support"
    ):
        gradtest.assert_autodiff_matches(doubling_loop, _X, modes=["rev"])
    report = gradtest.assert_autodiff_matches(doubling_loop, _X)
    assert report.modes == ("fwd",)
    assert any(line.startswith("rev: ") for line in report.unchecked)


def test_a_traced_value_is_explained():
    with pytest.raises(TypeError, match=r"^`x` is a traced value \(float32\[3\]\)"):
        jax.jit(lambda x: gradtest.check(square_sum, x))(_X)


def test_an_unknown_reaction_to_inconclusive_checks_is_explained():
    _raises(
        ValueError,
        "`inconclusive` must be 'raise' or 'warn', got 'ignore'.",
        lambda: gradtest.assert_autodiff_matches(square_sum, _X, inconclusive="ignore"),
    )


@pytest.mark.parametrize(
    ("fn", "args", "options"),
    [
        (lambda: jnp.float32(0), (), {}),
        (square_sum, (_X,), {"argnums": ()}),
        (square_sum, (jnp.zeros((0,)),), {}),
    ],
    ids=["no argument", "no argnums", "no entry"],
)
def test_nothing_to_check_is_never_a_pass(fn, args, options):
    with pytest.raises(ValueError):  # noqa: PT011  any text that names the argument
        gradtest.assert_autodiff_matches(fn, *args, **options)


def test_an_empty_leaf_beside_others_is_no_trouble():
    def fn(x, y):
        return jnp.sum(x**2) + jnp.sum(y)

    report = gradtest.assert_autodiff_matches(fn, _X, jnp.zeros((0, 3)))
    assert report.leaf("x").verdict is gradtest.Verdict.PASS


@pytest.mark.parametrize(
    "args",
    [
        ("mode", _X),
        (None, _X),
        (jnp.arange(2), _X),
        (jax.random.key(0), _X),
        (True, _X),
        (7, _X),
        (jnp.array([True]), _X),
    ],
    ids=["string", "None", "integers", "key", "bool", "int", "bools"],
)
def test_leaves_that_cannot_move_are_held(args):
    report = gradtest.assert_autodiff_matches(
        lambda held, x: jnp.sum(jnp.sin(x)), *args
    )
    assert [f.name for f in report.findings if f.mode == "rev"] == ["x"]


@pytest.mark.core
def test_a_call_inside_of_a_trace_is_told_to_leave_it():
    def traced(x):
        gradtest.check(jnp.sin, np.ones(3))
        return x

    with pytest.raises(TypeError, match=r"while JAX traces.*outside of jit"):
        jax.jit(traced)(1.0)
