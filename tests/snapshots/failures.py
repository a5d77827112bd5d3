"""A failure of each kind, for the whole reports that are stored beside this file."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

import gradtest

_X = jnp.array([0.5, 1.0, 1.5, 2.0])
_MATRIX = jnp.array([[2.0, 0.5], [-1.0, 3.0]])
_PARAMS = {"b": jnp.array([0.5, -0.5]), "w": jnp.array([[1.0, 2.0], [3.0, -1.0]])}
# What a page, a terminal or a file could take for its own.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src="http://example.invalid/x.png" onerror="alert(2)">',
    "</style></title></script><h1>injected</h1>",
    "javascript:alert(3)",
    "{{7*7}} &lt;b&gt; ${x} [bold]rich[/bold]",
    "two\nlines\tand \x1b[31mred\x1b[0m",
    "\u202eright to left",
    "n" * 5000,
)


def quadratic(x):
    return jnp.sum(x**2)


def loss(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 3)


def _formula():
    gradtest.assert_grad_matches(
        lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.cos(x) + x**2, _X
    )


def _factor():
    gradtest.assert_grad_matches(quadratic, lambda x: 6 * x, _X)


@jax.custom_vjp
def gated(x, gate):
    return x * jax.lax.logistic(gate)


def _gated_bwd(kept, cotangent):
    x, gate = kept
    slope = jax.lax.logistic(gate) * (1 - jax.lax.logistic(gate))
    return cotangent * jax.lax.logistic(gate), -cotangent * x * slope


gated.defvjp(lambda x, gate: (gated(x, gate), (x, gate)), _gated_bwd)


def _rule():
    def layer(x):
        return jnp.sum(gated(x, 2 * x) ** 2)

    gradtest.assert_custom_rules_match(layer, _X)


def _value():
    @jax.custom_vjp
    def mean_square(x):
        return jnp.mean(x**2)

    mean_square.defvjp(
        lambda x: (jnp.sum(x**2), x), lambda x, cotangent: (cotangent * x / 2,)
    )
    gradtest.assert_autodiff_matches(mean_square, _X)


def _rounding():
    @jax.custom_vjp
    def softplus(x):
        return jnp.sum(jnp.logaddexp(x, 0))

    def backward(x, cotangent):
        return (cotangent * jnp.exp(x) / (1 + jnp.exp(x)),)

    softplus.defvjp(lambda x: (jnp.sum(jnp.logaddexp(x, 0)), x), backward)
    gradtest.assert_autodiff_matches(softplus, jnp.array([1.0, 100.0]))


def _not_finite():
    def norm(x):
        return jnp.sqrt(jnp.sum(x**2))

    gradtest.assert_autodiff_matches(norm, jnp.zeros(3), modes=["rev"])


def _inconclusive():
    def log_sum(x):
        return jnp.sum(jnp.log(x))

    gradtest.assert_autodiff_matches(log_sum, -_X)


def _second_order():
    @jax.custom_jvp
    def cube(x):
        return jnp.sum(x**3)

    cube.defjvps(
        lambda tangent, out, x: 3 * jnp.sum(jax.lax.stop_gradient(x) ** 2 * tangent)
    )
    gradtest.assert_autodiff_matches(cube, _X, order=2, modes=["rev"])


def _several_leaves():
    gradtest.assert_grad_matches(
        loss, lambda p: {"b": 6 * p["b"] ** 2, "w": 0 * p["w"]}, _PARAMS
    )


def _transposed():
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    gradtest.assert_grad_matches(
        lambda matrix: jnp.sum(matrix * weights), lambda _: weights.T, _MATRIX
    )


def _complex():
    gradtest.assert_grad_matches(
        lambda z: jnp.sum(jnp.abs(z) ** 2), lambda z: 2 * z, _X + 1j
    )


def _variants():
    @custom_vmap
    def slope(x, cotangent):
        return cotangent * jnp.cos(x)

    @slope.def_vmap
    def _(size, batched, x, cotangent):
        return size * cotangent * jnp.cos(x), True

    @jax.custom_vjp
    def wave(x):
        return jnp.sin(x)

    wave.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (slope(x, cotangent),))
    gradtest.assert_variants_agree(
        lambda x: wave(x).sum(), jnp.zeros(8), variants=["jit", "vmap[3]"]
    )


def _close():
    gradtest.assert_grads_close(
        {"b": _X, "w": _MATRIX}, {"b": _X, "w": _MATRIX.at[1, 0].set(2.0)}
    )


def _other_tree():
    gradtest.assert_grads_close({"b": _X}, {"b": _X, "w": _MATRIX})


def _no_flow():
    gradtest.assert_grads_flow(lambda p: jnp.sum(p["w"]), _PARAMS)


def _hostile():
    def evil(params):
        return sum(jnp.sum(leaf**2) for leaf in params.values())

    evil.__name__ = "<i>evil</i>"
    gradtest.assert_grad_matches(
        evil,
        lambda params: jax.tree.map(lambda leaf: 3 * leaf, params),
        dict.fromkeys(HOSTILE, _X),
    )


_FAILURES: dict[str, Callable[[], None]] = {
    "formula": _formula,
    "factor": _factor,
    "rule": _rule,
    "value": _value,
    "rounding": _rounding,
    "not_finite": _not_finite,
    "inconclusive": _inconclusive,
    "second_order": _second_order,
    "several_leaves": _several_leaves,
    "transposed": _transposed,
    "complex": _complex,
    "variants": _variants,
    "close": _close,
    "other_tree": _other_tree,
    "no_flow": _no_flow,
    "hostile": _hostile,
}
NAMES = tuple(_FAILURES)


@functools.cache
def error_of(name: str) -> AssertionError:
    """Returns the error of the failure of this name."""
    try:
        _FAILURES[name]()
    except AssertionError as error:
        return error
    raise RuntimeError(f"the failure {name!r} passed")


def report_of(name: str) -> gradtest.Report:
    """Returns the report of the failure of this name."""
    return error_of(name).report  # type: ignore[attr-defined]
