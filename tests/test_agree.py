"""Two implementations of one function agree, or the leaf where they don't is named."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import gradtest
from gradtest.domains import normal, positive

pytestmark = pytest.mark.core

agree = gradtest.assert_grads_agree

_PARAMS = {"scale": normal(8), "bias": normal(8)}
_X = normal((4, 8))


def norm_plain(params, x):
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return y * params["scale"] + params["bias"]


@jax.custom_vjp
def norm_fused(params, x):
    return _norm_forward(params, x)[0]


def _norm_forward(params, x):
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((x**2).mean(-1, keepdims=True) - mean**2 + 1e-6)
    y = (x - mean) * inverse
    return y * params["scale"] + params["bias"], (params, y, inverse)


def _norm_backward(kept, g):
    params, y, inverse = kept
    d = g * params["scale"]
    dx = d - d.mean(-1, keepdims=True) - y * (d * y).mean(-1, keepdims=True)
    return {"scale": (g * y).sum(0), "bias": g.sum(0)}, dx * inverse


norm_fused.defvjp(_norm_forward, _norm_backward)


def variant_of_fused(backward=_norm_backward, forward=_norm_forward):
    @jax.custom_vjp
    def fused(params, x):
        return _norm_forward(params, x)[0]

    fused.defvjp(forward, backward)
    return fused


def norm_linen(params, x):
    return nn.LayerNorm().apply({"params": params}, x)


def norm_half(params, x):
    half = jax.tree_util.tree_map(lambda p: p.astype(jnp.bfloat16), (params, x))
    return norm_plain(*half)


def gelu_half(x):
    return jax.nn.gelu(x.astype(jnp.bfloat16), approximate=False).astype(x.dtype)


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


_RIGHT = {
    "a fused kernel and plain code": lambda: agree(norm_fused, norm_plain, _PARAMS, _X),
    "a reference with a rule of its own": lambda: agree(
        norm_plain, norm_fused, _PARAMS, _X
    ),
    "a module and plain code": lambda: agree(norm_linen, norm_plain, _PARAMS, _X),
    "bfloat16 and float32": lambda: agree(norm_half, norm_plain, _PARAMS, _X),
    "float32 and bfloat16": lambda: agree(norm_plain, norm_half, _PARAMS, _X),
    "constants rounded to bfloat16": lambda: agree(gelu_half, gelu, _X),
    "another formula": lambda: agree(
        jax.nn.softplus, lambda x: jnp.log1p(jnp.exp(x)), normal(9), trials=2
    ),
    "complex numbers": lambda: agree(
        lambda z: (z * jnp.conj(z)).real, lambda z: jnp.abs(z) ** 2,
        normal(5, dtype=jnp.complex64),
    ),
    "results that are no floats": lambda: agree(
        lambda x: {"sum": x.sum(), "n": x.argmax()},
        lambda x: {"sum": jnp.ones(8) @ x, "n": jnp.int32(0)},
        normal(8),
    ),
    "a jitted function, with auxiliary data": lambda: agree(
        jax.jit(lambda x: (jnp.sum(x * x), x)), lambda x: (jnp.sum(x**2), None),
        normal(8), has_aux=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _RIGHT)
def test_implementations_of_one_function_agree(name):
    assert _RIGHT[name]().verdict is gradtest.Verdict.PASS


def _flipped(kept, g):
    grads, dx = _norm_backward(kept, g)
    return {**grads, "bias": -grads["bias"]}, dx


def _without_mean(kept, g):
    params, y, inverse = kept
    d = g * params["scale"]
    grads, _ = _norm_backward(kept, g)
    return grads, (d - y * (d * y).mean(-1, keepdims=True)) * inverse


def _squared(kept, g):
    grads, dx = _norm_backward(kept, g)
    return {**grads, "scale": (g**2).sum(0)}, dx


def _doubled_value(params, x):
    y, kept = _norm_forward(params, x)
    return 2 * y, kept


# What is under test, the leaf, the cause and the first words of the message.
_WRONG = {
    "a rule's sign": (
        variant_of_fused(_flipped), "params['bias']", "sign flipped",
        "the gradient of fused is not the reference's at params['bias'] (float32[8]).",
    ),
    "a rule's missing term": (
        variant_of_fused(_without_mean), "x", "missing term",
        "the gradient of fused is not the reference's at x (float32[4, 8]).",
    ),
    "a rule that squares its cotangent": (
        variant_of_fused(_squared), "params['scale']", "not linear in the cotangent",
        "the gradient of fused is not the reference's at params['scale'] (float32[8]).",
    ),
    "a rule's value": (
        variant_of_fused(forward=_doubled_value), "result", "values differ",
        "fused and the reference differ in value: result (float32[4, 8]).",
    ),
    "another constant": (
        lambda params, x: nn.LayerNorm(epsilon=1e-3).apply({"params": params}, x),
        "result", "values differ",
        "<lambda> and the reference differ in value: result (float32[4, 8]).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _WRONG)
def test_what_differs_is_refused_with_the_leaf_and_the_cause(name):
    fn, leaf, cause, headline = _WRONG[name]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        agree(fn, norm_plain, _PARAMS, _X)
    assert caught.value.report.leaf(leaf).cause.name == cause
    first, *_, last = str(caught.value).splitlines()
    assert first == f"assert_grads_agree failed: {headline}"
    assert last.startswith(
        f"  Replay: gradtest.assert_grads_agree({fn.__name__}, norm_plain, ..., key=0)"
    )


def test_values_are_compared_where_nothing_is_differentiated_too():
    rule = jax.custom_vjp(lambda x: 2 * jnp.sin(x))
    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    with pytest.raises(gradtest.GradientMismatch) as caught:
        agree(rule, jnp.sin, normal(3))
    assert caught.value.report.leaf("result").cause.name == "values differ"


def test_half_precision_does_not_hide_a_wrong_factor():
    def wrong(params, x):
        return norm_half({**params, "scale": 1.05 * params["scale"]}, x)

    with pytest.raises(gradtest.GradientMismatch):
        agree(wrong, norm_plain, _PARAMS, _X)


def test_a_gradient_that_loses_its_accuracy_is_refused():
    rule = jax.custom_vjp(jnp.log)
    rule.defvjp(
        lambda x: (jnp.log(x), x),
        lambda x, g: (g / x.astype(jnp.bfloat16).astype(jnp.float32),),
    )
    with pytest.raises(gradtest.GradientMismatch) as caught:
        agree(rule, jnp.log, positive(5))
    (finding,) = caught.value.report.findings
    assert finding.cause.name == "downcast"


def test_the_report_says_what_was_compared():
    report = agree(norm_plain, norm_fused, _PARAMS, _X)
    assert report.subject == "norm_plain"
    assert report.notes[0] == (
        "compared with the values and the gradient of norm_fused; its custom rules "
        "were left out, their functions were entered"
    )


def _not_differentiable(x):
    return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * y, x)


_SLIPS = {
    "a reference that can't be called": (
        (jnp.sin, 3), TypeError, "`reference` must be callable, got 3."
    ),
    "a function that can't be called": (
        (3, jnp.sin), TypeError, "`fn` must be callable, got 3."
    ),
    "other shapes": (
        (jnp.sum, jnp.sin), TypeError,
        "`fn` must return the shapes and kinds of numbers of `reference`: wanted "
        "float32[3] for result, got float32[].",
    ),
    "other trees": (
        (lambda x: {"y": x}, lambda x: {"y": x, "z": x}), TypeError,
        "`fn` must return a tree like that of `reference`: it lacks result['z'].",
    ),
    "complex and real": (
        (lambda x: x + 0j, jnp.sin), TypeError,
        "`fn` must return the shapes and kinds of numbers of `reference`: wanted "
        "float32[3] for result, got complex64[3].",
    ),
    "a reference without floats": (
        (jnp.sin, lambda x: 3), TypeError,
        "`reference` must return a float or complex array (or a tree with one), got a "
        "int: there is nothing to differentiate.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _SLIPS)
def test_a_slip_is_named(name):
    functions, kind, message = _SLIPS[name]
    with pytest.raises(kind) as caught:
        agree(*functions, jnp.ones(3))
    assert str(caught.value) == message


def test_a_function_without_a_gradient_is_a_slip():
    with pytest.raises(ValueError, match="`fn` must have a gradient, but JAX finds"):
        agree(_not_differentiable, jnp.sin, jnp.ones(3))


@pytest.mark.core
def test_results_without_a_gradient_are_listed_as_not_compared():
    report = gradtest.assert_grads_agree(
        lambda x: (x**2, jnp.argmax(x)),
        lambda x: (x * x, jnp.argmin(x)),
        jnp.array([1.0, 3.0, 2.0]),
    )
    assert any(line.startswith("result[1]: int32") for line in report.unchecked)
