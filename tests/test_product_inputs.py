"""What products may be given: slips named, variants run, Chex's keywords heard."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict

pytestmark = pytest.mark.core

vjp = gradtest.assert_vjp_matches
jvp = gradtest.assert_jvp_matches
hvp = gradtest.assert_hvp_matches
transpose = gradtest.assert_transpose_matches
agree = gradtest.assert_grads_agree

_X = jnp.linspace(0.5, 1.5, 3)
_MATRIX = jnp.arange(6.0).reshape(2, 3)


def weighted(params, x):
    return jnp.sum(params["w"] * x**2) * params["n"]


def weighted_pull(args, g):
    params, x = args
    grads = {"w": g * x**2 * params["n"], "n": None}
    return grads, 2 * g * params["w"] * x * params["n"]


_PARAMS = {"w": _X, "n": jnp.int32(2)}


def cubes(x):
    return jnp.sum(x**3)


def _vjp(product, **options):
    return vjp(weighted, product, _PARAMS, _X, **options)


# The call, and the whole message of its TypeError.
_SLIPS = {
    "a product that can't be called": (
        lambda: vjp(jnp.sin, 3, _X), "`hand_written` must be callable, got 3.",
    ),
    "a function that can't be called": (
        lambda: jvp(3, jnp.sin, _X), "`fn` must be callable, got 3.",
    ),
    "a linear function that can't be called": (
        lambda: transpose(_MATRIX[0, 0], jnp.sin, _X),
        f"`linear_fn` must be callable, got {_MATRIX[0, 0]!r}.",
    ),
    "a transpose that can't be called": (
        lambda: transpose(jnp.negative, None, _X),
        "`transpose_fn` must be callable, got None.",
    ),
    "one tree for two arguments": (
        lambda: _vjp(lambda a, g: weighted_pull(a, g)[0]),
        "`hand_written` must return a tuple with one tree for each of params, x, got a "
        "dict.",
    ),
    "three trees for two arguments": (
        lambda: _vjp(lambda a, g: (*weighted_pull(a, g), g)),
        "`hand_written` must return a tuple with one tree for each of params, x, got a "
        "tuple of 3.",
    ),
    "a leaf too few": (
        lambda: _vjp(lambda a, g: ({"w": g * a[1]}, a[1])),
        "`hand_written` must return a tree like `params`, the argument it "
        "differentiates: it lacks params['n'] (in hand_written(...)[0]).",
    ),
    "a gradient of an integer": (
        lambda: _vjp(lambda a, g: ({"w": a[1], "n": g}, a[1])),
        "`hand_written` must return None or float0 for params['n']: int32[], which "
        "holds no gradient, got float32[] in hand_written(...)[0].",
    ),
    "None for a float": (
        lambda: _vjp(lambda a, g: ({"w": None, "n": None}, a[1])),
        "`hand_written` must return the shape of the argument: wanted [3] for "
        "params['w'], got None in hand_written(...)[0].",
    ),
    "another shape": (
        lambda: vjp(jnp.sin, lambda a, g: g[:2], _X),
        "`hand_written` must return the shape of the argument: wanted [3] for x, got "
        "[2] in hand_written(...).",
    ),
    "another dtype": (
        lambda: vjp(jnp.sin, lambda a, g: g.astype(jnp.bfloat16), _X),
        "`hand_written` must return the dtype of the argument: wanted float32 for x, "
        "got bfloat16 in hand_written(...).",
    ),
    "no array": (
        lambda: vjp(jnp.sin, lambda a, g: "g", _X),
        "`hand_written` must return arrays: wanted float32[3] for x, got a str in "
        "hand_written(...).",
    ),
    "the value beside the tangent": (
        lambda: jvp(jnp.sin, lambda a, t: (a[0], t[0]), _X),
        "`hand_written` must return arrays: wanted float32[3] for result, got a tuple "
        "of 2 in hand_written(...).",
    ),
    "a tangent of another tree": (
        lambda: jvp(lambda x: {"y": x}, lambda a, t: t, _X),
        "`hand_written` must return a tree like the result of `fn`, the tangent alone: "
        "it lacks result['y'] and it has result[0].",
    ),
    "a tangent of another shape": (
        lambda: jvp(jnp.sum, lambda a, t: t[0], _X),
        "`hand_written` must return the shape of the result: wanted [] for result, got "
        "[3] in hand_written(...).",
    ),
    "a Hessian of a vector": (
        lambda: hvp(jnp.sin, lambda a, t: t, _X),
        "`fn` must return one real number to have a Hessian, got result: float32[3]; "
        "use assert_jvp_matches for other functions.",
    ),
    "a transpose of another tree": (
        lambda: transpose(lambda x: _MATRIX @ x, lambda w: {"x": w}, _X),
        "`transpose_fn` must return a tree like `x`, the argument it differentiates: "
        "it lacks x and it has x['x'] (in transpose_fn(...)).",
    ),
    "a linear function of no floats": (
        lambda: transpose(lambda x: 3, lambda w: w, _X),
        "`linear_fn` must return a float or complex array (or a tree with one), got a "
        "int: there is nothing to differentiate.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _SLIPS)
def test_a_slip_is_named(name):
    call, message = _SLIPS[name]
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_hessian_that_nothing_can_measure_is_a_slip():
    def loop(x):
        return jax.lax.while_loop(lambda y: y < 9, lambda y: y * y, x)

    with pytest.raises(ValueError, match="`fn` must have a gradient without its"):
        hvp(loop, lambda a, t: t[0], 2.0)


def test_an_exception_says_whose_it_is():
    def raises(args, g):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        vjp(jnp.sin, raises, _X)
    assert "raised by `hand_written` itself" in caught.value.__notes__[0]


def test_one_argument_of_several_comes_bare_or_in_a_tuple():
    pull = weighted_pull
    for product in (
        lambda a, g: pull(a, g)[1],
        lambda a, g: (pull(a, g)[1],),
        lambda a, g: (None, pull(a, g)[1]),
    ):
        _vjp(product, argnums=1)
        _vjp(product, argnums=(1,))
    _vjp(lambda a, g: pull(a, g)[::-1], argnums=(1, 0))


def test_a_tuple_may_be_an_argument_itself():
    def fn(pair):
        return jnp.sum(pair[0] ** 2)

    def gradient(args, g):
        return (2 * g * args[0][0],)

    vjp(fn, gradient, (_X,))
    vjp(fn, lambda a, g: (gradient(a, g),), (_X,))
    hvp(fn, lambda a, t: (2 * t[0][0],), (_X,))


def test_a_bool_and_a_key_have_no_gradient():
    key = jax.random.key(0)

    def fn(x, on, key):
        return jnp.where(on, x, 0) + jax.random.normal(key, x.shape)

    vjp(fn, lambda a, g: (g, None, None), _X, jnp.array(True), key)
    vjp(fn, lambda a, g: jax.vjp(fn, *a)[1](g), _X, jnp.array(True), key)
    jvp(fn, lambda a, t: jax.jvp(fn, a, t)[1], _X, jnp.array(True), key)


_NAMES = {
    "assert_vjp_matches": functools.partial(vjp, jnp.sin, lambda a, g: -g, _X),
    "assert_jvp_matches": functools.partial(jvp, jnp.sin, lambda a, t: -t[0], _X),
    "assert_hvp_matches": functools.partial(hvp, cubes, lambda a, t: -t[0], _X),
    "assert_transpose_matches": functools.partial(
        transpose, lambda x: 2 * x, lambda w: w, _X
    ),
    "assert_grads_agree": functools.partial(agree, jnp.sin, jnp.cos, _X),
}
_each = pytest.mark.parametrize("name", _NAMES)


@_each
def test_the_keywords_of_chex_work(name):
    with pytest.raises(gradtest.GradientMismatch, match=f"^{name} failed: "):
        _NAMES[name]()
    with pytest.raises(KeyError) as caught:
        _NAMES[name](
            custom_message="layer {}",
            custom_message_format_vars=(3,),
            include_default_message=False,
            exception_type=KeyError,
        )
    (message,) = caught.value.args
    assert message.endswith("[layer 3]")
    assert f"{name} failed" not in message
    assert caught.value.report.verdict is Verdict.FAIL


@_each
def test_nothing_is_checked_where_chex_is_told_not_to(name):
    chex.disable_asserts()
    try:
        assert _NAMES[name]().verdict is Verdict.NOT_CHECKED
    finally:
        chex.enable_asserts()


@_each
def test_an_option_that_makes_no_sense_is_named(name):
    for option, value in (("trials", 0), ("rtol", 2.0), ("inconclusive", "hide")):
        with pytest.raises(ValueError, match=f"`{option}` must"):
            _NAMES[name](**{option: value})


def test_an_open_question_may_be_a_warning():
    with pytest.warns(UserWarning, match="nothing can be concluded") as caught:
        report = vjp(jnp.log, lambda a, g: g / a[0], -_X, inconclusive="warn")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert caught[0].filename == __file__


class VariantsTest(chex.TestCase):
    @chex.variants(
        with_jit=True,
        without_jit=True,
        with_device=True,
        without_device=True,
        with_pmap=True,
    )
    def test_products_run_under_variants(self):
        under = {"variant": self.variant}
        _vjp(weighted_pull, **under)
        jvp(jnp.sin, lambda a, t: jnp.cos(a[0]) * t[0], _X, **under)
        hvp(cubes, lambda a, t: 6 * a[0] * t[0], _X, **under)
        transpose(lambda x: _MATRIX @ x, lambda w: _MATRIX.T @ w, _X, **under)
        report = agree(jnp.tan, lambda x: jnp.sin(x) / jnp.cos(x), _X, **under)
        assert report.notes[1].startswith("run under chex variant")
        for name, wrong in _NAMES.items():
            with pytest.raises(gradtest.GradientMismatch, match=f"^{name} failed"):
                wrong(**under)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_functions_may_come_wrapped(self):
        pull = self.variant(lambda a, g: g * jnp.cos(a[0]))
        vjp(self.variant(jnp.sin), pull, _X)
        agree(self.variant(jnp.sin), jnp.sin, _X)
