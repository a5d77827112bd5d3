"""Hand-written products are accepted where right, refused with the cause where not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest.domains import normal

pytestmark = pytest.mark.core

vjp = gradtest.assert_vjp_matches
jvp = gradtest.assert_jvp_matches
hvp = gradtest.assert_hvp_matches
transpose = gradtest.assert_transpose_matches

_X = normal((4, 3))


class Pair(NamedTuple):
    w: object
    b: object


_PARAMS = {"w": normal((3, 2)), "b": normal(2), "step": jnp.int32(3), "none": None}


def layer(params, x):
    y = jnp.tanh(x @ params["w"] + params["b"])
    return {"y": y, "largest": jnp.argmax(y, axis=0), "square": jnp.sum(x**2)}


def layer_pull(args, cotangent, *, flip=1.0, lost=1.0, power=1):
    params, x = args
    y = jnp.tanh(x @ params["w"] + params["b"])
    d = cotangent["y"] ** power * (1 - y**2)
    assert cotangent["largest"].dtype == jax.dtypes.float0
    grads = {"w": x.T @ d, "b": flip * d.sum(0), "step": None, "none": None}
    return grads, d @ params["w"].T + lost * 2 * x * cotangent["square"]


def layer_push(args, tangents, *, flip=1.0, power=1):
    (params, x), (dparams, dx) = args, tangents
    assert dparams["step"].dtype == jax.dtypes.float0
    assert dparams["none"] is None
    y = jnp.tanh(x @ params["w"] + params["b"])
    inner = dx @ params["w"] + x @ dparams["w"] + flip * dparams["b"]
    square = jnp.sum(2 * x * dx**power)
    return {"y": (1 - y**2) * inner, "largest": None, "square": square}


def energy(params, x):
    return jnp.sum(jnp.sin(x @ params.w) * params.b)


def energy_product(args, tangents):
    return jax.jvp(jax.grad(energy, (0, 1)), args, tangents)[1]


_ENERGY = (Pair(normal((3, 2)), normal(2)), _X)
_MATRIX = jnp.arange(6.0).reshape(2, 3) - 2
_COMPLEX = _MATRIX + 1j * (_MATRIX[::-1] ** 2)


def jaxs_pull(fn):
    return lambda args, cotangent: jax.vjp(fn, *args)[1](cotangent)


def jaxs_push(fn):
    return lambda args, tangents: jax.jvp(fn, args, tangents)[1]


def jaxs_product(fn):
    return lambda args, tangents: jax.jvp(jax.grad(fn), args, tangents)[1]


def phase(z):
    return z * jnp.exp(1j * jnp.abs(z))


def by_number(x, n):
    return x**n


_BF16 = normal((8,), dtype=jnp.bfloat16)
_Z = normal((5,), dtype=jnp.complex64)

_RIGHT = {
    "a VJP of trees": lambda **options: vjp(layer, layer_pull, _PARAMS, _X, **options),
    "a JVP of trees": lambda **options: jvp(layer, layer_push, _PARAMS, _X, **options),
    "an HVP of a named tuple": lambda **options: hvp(
        energy, energy_product, *_ENERGY, **options
    ),
    "a VJP in bfloat16": lambda **options: vjp(
        jax.nn.gelu, jaxs_pull(jax.nn.gelu), _BF16, **options
    ),
    "a JVP in bfloat16": lambda **options: jvp(
        jax.nn.gelu, jaxs_push(jax.nn.gelu), _BF16, **options
    ),
    "a VJP of complex numbers": lambda **options: vjp(
        phase, jaxs_pull(phase), _Z, **options
    ),
    "a JVP of complex numbers": lambda **options: jvp(
        phase, jaxs_push(phase), _Z, **options
    ),
    "an HVP of complex numbers": lambda **options: hvp(
        lambda z: jnp.sum(jnp.abs(z) ** 4 + (z**3).real),
        jaxs_product(lambda z: jnp.sum(jnp.abs(z) ** 4 + (z**3).real)),
        _Z,
        **options,
    ),
    "a jitted VJP of a jitted function": lambda **options: vjp(
        jax.jit(jnp.tanh), jax.jit(jaxs_pull(jnp.tanh)), _X, **options
    ),
    "an integer argument as jax.vjp has it": lambda **options: vjp(
        by_number, jaxs_pull(by_number), normal(3), jnp.int32(2), **options
    ),
    "None for an integer argument": lambda **options: vjp(
        by_number, lambda args, g: (2 * args[0] * g, None), normal(3), 2, **options
    ),
    "a transpose": lambda **options: transpose(
        lambda x: _MATRIX @ x, lambda w: _MATRIX.T @ w, normal(3), **options
    ),
    "jax.linear_transpose of complex numbers": lambda **options: transpose(
        jnp.fft.fft, jax.linear_transpose(jnp.fft.fft, jnp.ones(5, jnp.complex64)),
        jax.ShapeDtypeStruct((5,), jnp.complex64), **options,
    ),
    "a transpose over the real numbers alone": lambda **options: transpose(
        jnp.real, lambda w: w.astype(jnp.complex64), _Z, **options
    ),
    "a transpose of trees": lambda **options: transpose(
        lambda x: (x["a"] + x["b"].sum(), 2 * x["b"]),
        lambda w: {"a": w[0], "b": w[0].sum() + 2 * w[1], "n": None},
        {"a": normal(2), "b": normal(3), "n": jnp.arange(2)}, **options,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _RIGHT)
def test_a_right_product_is_accepted(name):
    report = _RIGHT[name](trials=2, key=5)
    assert report.verdict is gradtest.Verdict.PASS
    assert report.smallest_seen < 1e-5


def _factor_in_b(args, tangents):
    grads, x = energy_product(args, tangents)
    return grads._replace(b=3 * grads.b), x


def _without_b(args, tangents):
    params, dx = tangents
    return energy_product(args, (params._replace(b=0 * params.b), dx))


# The function, a broken product, its arguments; the leaf and the cause.
_WRONG = {
    "a sign": (
        vjp, layer, lambda a, g: layer_pull(a, g, flip=-1.0), (_PARAMS, _X),
        "params['b']", "sign flipped",
    ),
    "a dropped term": (
        vjp, layer, lambda a, g: layer_pull(a, g, lost=0.0), (_PARAMS, _X),
        "x", "dropped term",
    ),
    "a factor in one of several terms": (
        vjp, layer, lambda a, g: layer_pull(a, g, lost=3.0), (_PARAMS, _X),
        "x", "constant factor",
    ),
    "a squared cotangent": (
        vjp, layer, lambda a, g: layer_pull(a, g, power=2), (_PARAMS, _X),
        "params['b']", "not linear in the cotangent",
    ),
    "a cotangent that is forgotten": (
        vjp, jnp.sum, lambda a, g: jnp.ones_like(a[0]), (_X,),
        "a", "not linear in the cotangent",
    ),
    "a cotangent that is divided by its size": (
        vjp, jnp.sin, lambda a, g: jnp.cos(a[0]) * g / jnp.linalg.norm(g) * 2, (_X,),
        "x", "not linear in the cotangent",
    ),
    "a transposed matrix": (
        vjp, jnp.linalg.det, lambda a, g: g * jnp.linalg.det(a[0])
        * jnp.linalg.inv(a[0]), (normal((3, 3)),),
        "a", "transposed",
    ),
    "a conjugate": (
        vjp, lambda z: jnp.sum(jnp.abs(z) ** 2), lambda a, g: 2 * g * a[0], (_Z,),
        "z", "conjugate",
    ),
    "leaves that changed places": (
        vjp, jnp.multiply, lambda a, g: (g * a[0], g * a[1]),
        (normal(3), normal(3)), "args[0]", "leaves swapped",
    ),
    "a sign in forward mode": (
        jvp, layer, lambda a, t: layer_push(a, t, flip=-1.0), (_PARAMS, _X),
        "params['b']", "sign flipped",
    ),
    "a squared tangent": (
        jvp, layer, lambda a, t: layer_push(a, t, power=2), (_PARAMS, _X),
        "result['square']", "not linear in the tangent",
    ),
    "a product of two tangents": (
        jvp, jnp.multiply, lambda a, t: t[0] * a[1] + a[0] * t[1] + t[0] * t[1],
        (normal(3), normal(3)), "result", "not linear in the tangent",
    ),
    "a conjugate in forward mode": (
        jvp, jnp.square, lambda a, t: 2 * jnp.conj(a[0] * t[0]), (_Z,),
        "x", "conjugate",
    ),
    "a factor in a Hessian": (
        hvp, energy, _factor_in_b, _ENERGY, "params.b", "constant factor",
    ),
    "a dropped term of a Hessian": (
        hvp, energy, _without_b, _ENERGY, "params.w", "dropped term",
    ),
    "the gradient in place of the Hessian": (
        hvp, energy, lambda a, t: jax.grad(energy, (0, 1))(*a), _ENERGY,
        "params.b", "not linear in the tangent",
    ),
    "a sign in a transpose": (
        transpose, lambda x: _MATRIX @ x, lambda w: -_MATRIX.T @ w, (normal(3),),
        "x", "sign flipped",
    ),
    "an adjoint in place of a transpose": (
        transpose, lambda z: _COMPLEX @ z, lambda w: jnp.conj(_COMPLEX.T) @ w,
        (normal(3, dtype=jnp.complex64),), "z", "conjugate",
    ),
    "a transpose that adds a constant": (
        transpose, lambda x: _MATRIX @ x, lambda w: _MATRIX.T @ w + 1, (normal(3),),
        "x", "not linear in the cotangent",
    ),
    "an affine function": (
        transpose, lambda x: _MATRIX @ x + 1, lambda w: _MATRIX.T @ w, (normal(3),),
        "result", "not linear",
    ),
    "a square": (
        transpose, jnp.square, lambda w: 2 * w, (normal(3),), "result", "not linear",
    ),
    "a norm, which is linear along each ray": (
        transpose, lambda x: jnp.abs(x), lambda w: w, (normal(3),), "result",
        "not linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _WRONG)
def test_a_broken_product_is_refused_with_the_leaf_and_the_cause(name):
    assertion, fn, product, args, leaf, cause = _WRONG[name]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assertion(fn, product, *args)
    finding = caught.value.report.leaf(leaf)
    assert finding.verdict is gradtest.Verdict.FAIL
    assert finding.cause.name == cause
    headline = str(caught.value).splitlines()[0]
    assert fn.__name__ in headline
    assert f"{leaf} (" in headline


def test_only_the_broken_leaf_is_refused():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        vjp(layer, lambda a, g: layer_pull(a, g, flip=-1.0), _PARAMS, _X)
    wrong = [f.name for f in caught.value.report.findings if f.verdict.name != "PASS"]
    assert wrong == ["params['b']"]


def test_a_wrong_entry_of_a_tangent_is_named_in_the_result():
    def push(args, tangents):
        return (jnp.cos(args[0]) * tangents[0]).at[2].multiply(1.01)

    with pytest.raises(gradtest.GradientMismatch) as caught:
        jvp(jnp.sin, push, normal(5))
    report = caught.value.report
    assert report.leaf("x").entry.index == (2,)
    assert "\n  tangent of result[2]: claimed" in str(caught.value)


def test_a_small_mistake_beside_a_large_result_is_seen():
    def fn(x):
        return {"large": 1e6 * jnp.sum(x**2), "small": jnp.sin(x)}

    def push(args, tangents, factor=1.0):
        (x,), (t,) = args, tangents
        return {"large": 2e6 * jnp.sum(x * t), "small": factor * jnp.cos(x) * t}

    jvp(fn, push, normal(3))
    with pytest.raises(gradtest.GradientMismatch):
        jvp(fn, lambda a, t: push(a, t, factor=1.001), normal(3))


@pytest.mark.parametrize("assertion", [vjp, jvp])
def test_a_product_that_loses_its_accuracy_is_refused(assertion):
    def product(args, seed):
        (x,), g = args, seed[0] if isinstance(seed, tuple) else seed
        return g * jnp.cos(x.astype(jnp.bfloat16)).astype(jnp.float32)

    with pytest.raises(gradtest.GradientMismatch) as caught:
        assertion(jnp.sin, product, normal(5))
    causes = {f.cause.name for f in caught.value.report.findings if f.cause}
    assert causes == {"downcast"}


def test_at_a_kink_any_slope_between_its_sides_is_right():
    x = jnp.array([0.0, 1.0, -2.0])
    for slope in (0.0, 0.5, 1.0):
        vjp(jax.nn.relu, lambda a, g, s=slope: g * jnp.heaviside(a[0], s), x)
    with pytest.raises(gradtest.GradientMismatch):
        vjp(jax.nn.relu, lambda a, g: g * jnp.heaviside(a[0], -1.0), x)


def test_beside_a_kink_a_wrong_tangent_is_refused():
    x = jnp.array([0.0, 1.0, -2.0])
    for at_zero in (0.0, 0.5, 1.0):
        jvp(jax.nn.relu, lambda a, t, s=at_zero: t[0] * jnp.heaviside(a[0], s), x)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        jvp(jax.nn.relu, lambda a, t: -t[0] * jnp.heaviside(a[0], 0.5), x)
    assert caught.value.report.leaf("x").entry.index == (1,)


def test_a_product_of_a_function_with_auxiliary_data_takes_its_result_alone():
    def fn(x):
        return jnp.sum(jnp.sin(x)), {"x": x}

    vjp(fn, lambda a, g: g * jnp.cos(a[0]), _X, has_aux=True)
    jvp(fn, lambda a, t: jnp.sum(jnp.cos(a[0]) * t[0]), _X, has_aux=True)
    hvp(fn, lambda a, t: -jnp.sin(a[0]) * t[0], _X, has_aux=True)


def test_what_is_held_has_zeros_for_tangents():
    def push(args, tangents):
        return tangents[0] * args[1] + 1e6 * tangents[1]

    jvp(jnp.multiply, push, normal(3), jnp.ones(3), argnums=0)


def test_an_excluded_leaf_may_be_wrong_and_is_listed():
    report = vjp(
        layer, lambda a, g: layer_pull(a, g, flip=-1.0), _PARAMS, _X,
        exclude=("params['b']",),
    )  # fmt: skip
    assert "params['b'] (excluded)" in report.unchecked
