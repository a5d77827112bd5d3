import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict, domains
from gradtest._src.report import legible

finite = gradtest.assert_grads_finite
flow = gradtest.assert_grads_flow

pytestmark = pytest.mark.core

VECTOR = jnp.array([1.0, -2.0, 3.0, 5.0])
COMPLEX = jnp.array([1.0 + 2.0j, -3.0 + 0.5j])


def report_of(assertion, *args, **options):
    """Returns the report, whether the assertion passes or not."""
    try:
        return assertion(*args, **options)
    except (gradtest.GradientMismatch, gradtest.GradientInconclusive) as error:
        return error.report


def test_a_finite_gradient_passes():
    report = finite(lambda p, n: jnp.sqrt(p["w"]) / n, {"w": VECTOR**2}, 3)
    assert report.verdict is Verdict.PASS
    assert report.leaf("p['w']").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_is_named_with_place_and_count(dtype):
    def safe_only_forward(p):
        return jnp.sum(jnp.where(p["w"] > 0, jnp.sqrt(p["w"]), 0)) + jnp.sum(p["b"])

    p = {"w": jnp.array([1.0, -1.0, 4.0, 0.0], dtype), "b": jnp.ones(3, dtype)}
    report = report_of(finite, safe_only_forward, p)
    assert report.leaf("p['b']").verdict is Verdict.PASS
    found = report.leaf("p['w']")
    assert found.verdict is Verdict.FAIL
    assert found.entry.index == (1,)
    counted = "2 of 4 entries are NaN although the value is finite: `sqrt` (line"
    assert found.cause.says.startswith(counted)
    assert "takes -1 at [1] and gives nan, and 0 * nan is NaN" in found.cause.says


def test_a_complex_gradient_is_judged():
    finite(lambda z: jnp.sum(jnp.abs(z)), COMPLEX)
    found = report_of(finite, lambda z: jnp.sum(jnp.sqrt(z).real), 0 * COMPLEX)
    assert found.verdict is Verdict.FAIL


def test_where_the_value_is_not_finite_nothing_is_concluded():
    with pytest.raises(gradtest.GradientInconclusive, match="the value itself is NaN"):
        finite(lambda x: jnp.sum(jnp.log(x)), VECTOR)
    with pytest.warns(UserWarning, match="the value itself is NaN"):
        finite(lambda x: jnp.sum(jnp.log(x)), VECTOR, inconclusive="warn")


def test_every_trial_is_judged():
    def spoilt_above(x):
        return jnp.sum(jnp.sqrt(jnp.where(x[0] > 0.9, 0, 1) * x[0]) + x)

    report = report_of(finite, spoilt_above, domains.uniform(3), trials=30)
    assert report.findings[0].verdict is Verdict.FAIL
    assert report.findings[0].trial > 0


def test_a_function_of_many_results_gets_random_cotangents():
    finite(lambda x: (jnp.exp(x), {"n": jnp.arange(3), "s": x * 1j}), VECTOR)
    with pytest.raises(gradtest.GradientMismatch):
        finite(lambda x: (jnp.exp(x), jnp.sqrt(x - x)), VECTOR)


def test_auxiliary_data_and_excluded_leaves_are_left_alone():
    def loss(p):
        return jnp.sum(p["a"]) + jnp.sum(jnp.sqrt(p["b"])), jnp.nan

    p = {"a": VECTOR, "b": 0 * VECTOR, "n": 3}
    report = finite(loss, p, has_aux=True, exclude=["p['b']"])
    assert report.unchecked == ("p['b'] (excluded)", "p['n'] (int: holds no gradient)")


def test_a_rule_that_makes_nan_is_caught():
    @jax.custom_vjp
    def norm(x):
        return jnp.sqrt(jnp.sum(x**2))

    norm.defvjp(lambda x: (norm(x), x), lambda x, g: (g * x / norm(x),))
    finite(norm, VECTOR)
    with pytest.raises(gradtest.GradientMismatch, match="NaN although the value"):
        finite(norm, 0 * VECTOR)


def test_the_message_of_a_gradient_that_is_not_finite():
    def length(x):
        return jnp.linalg.norm(x)

    with pytest.raises(gradtest.GradientMismatch) as caught:
        finite(length, jnp.zeros(3))
    line = length.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "assert_grads_finite failed: the gradient of length is not finite at x "
        "(float32[3]).\n"
        f"  At: {legible.path(__file__)}:{line} in length: "
        "return jnp.linalg.norm(x)  (the first number of the backward pass that is not "
        "finite is made here)\n"
        "  x[0]: nan.\n"
        "  Likely cause: 3 of 3 entries are NaN although the value is finite: `sqrt` "
        f"(line {line}) takes 0 and has no finite slope there, which `mul` turns to "
        "NaN.\n"
        "  Try: safe norm: `jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0)`, "
        "with s for the sum of squares (verified: with it the value is the same and "
        "the gradient finite).\n"
        "  Replay: gradtest.assert_grads_finite(length, ..., key=0)"
    )


# --- is there a gradient ---------------------------------------------------------


@jax.custom_vjp
def forgetful(w, x):
    return jnp.sum(w * x)


forgetful.defvjp(
    lambda w, x: (forgetful(w, x), (w, x)), lambda kept, g: (0 * kept[0], g * kept[0])
)


def loop_counted_by(limit, x):
    return jax.lax.while_loop(
        lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1]), (0, x)
    )


HALF = jnp.full(2, 6e-5, jnp.float16)
SILENT = {
    "not used at all": ("unused", lambda w, x: jnp.sum(x)),
    "used for a print": (
        "unused",
        lambda w, x: (jax.debug.print("{}", w), jnp.sum(x))[1],
    ),
    "used in a dead carry": (
        "unused",
        lambda w, x: jax.lax.scan(
            lambda c, e: ((c[0] + e, c[1] * e), None), (0.0, w[0]), x
        )[0][0],
    ),
    "stopped": (
        "behind stop_gradient",
        lambda w, x: jnp.sum(jax.lax.stop_gradient(w) * x),
    ),
    "stopped in a scan": (
        "behind stop_gradient",
        lambda w, x: jax.lax.scan(
            lambda c, e: (c + jax.lax.stop_gradient(e), None), jnp.sum(x), w
        )[0],
    ),
    "stopped in jit, remat and cond": (
        "behind stop_gradient",
        jax.jit(
            lambda w, x: jax.checkpoint(
                lambda v: jax.lax.cond(
                    x[0] > 0, lambda u: jnp.sum(jax.lax.stop_gradient(u)), jnp.sum, v
                )
            )(jax.lax.stop_gradient(w))
        ),
    ),
    "an index": (
        "behind a step without derivative",
        lambda w, x: x[jnp.argmax(w)],
    ),
    "a condition": (
        "behind a step without derivative",
        lambda w, x: jnp.sum(jnp.where(w > 0, x, -x)),
    ),
    "a conversion": (
        "behind a step without derivative",
        lambda w, x: jnp.sum(w.astype(int) * x),
    ),
    "rounded": ("behind a step without derivative", lambda w, x: jnp.sum(jnp.round(w))),
    "a loop's limit": (
        "behind a step without derivative",
        lambda w, x: loop_counted_by(w[0], jax.lax.stop_gradient(x[0]))[0] + jnp.sum(x),
    ),
    "dead units": (
        "dead ReLU",
        lambda w, x: jnp.sum(jax.nn.relu(-jnp.abs(w) - 1) + x),
    ),
    "masked": ("multiplied by zero", lambda w, x: jnp.sum(0 * w * x)),
    "lost": ("lost in a custom rule", lambda w, x: forgetful(w, x)),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_leaf_without_gradient_is_named_with_the_reason(case):
    cause, loss = SILENT[case]

    def whole_loss(params, x):
        return loss(params["silent"], x) + jnp.sum(params["heard"])

    params = {"silent": VECTOR, "heard": VECTOR}
    report = report_of(flow, whole_loss, params, VECTOR, trials=2)
    assert report.leaf("params['heard']").verdict is Verdict.PASS
    found = report.leaf("params['silent']")
    assert (found.verdict, found.cause.name) == (Verdict.FAIL, cause)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_a_leaf_with_any_gradient_passes(dtype):
    def loss(params):
        return jnp.sum(jnp.abs(params["w"][0])).astype(jnp.float32)

    flow(loss, {"w": jnp.ones(3, dtype)})


def test_a_gradient_in_one_trial_is_enough():
    params = {"w": domains.uniform((), -1, 1)}
    flow(lambda params: jax.nn.relu(params["w"]), params, trials=20)


def test_underflow_is_named():
    def loss(w):
        small = w**2 * jnp.float16(1e-3) * jnp.float16(1e-4)
        return jnp.sum(small).astype(jnp.float32)

    found = report_of(flow, loss, HALF).leaf("w")
    assert (found.verdict, found.cause.name) == (Verdict.FAIL, "underflow")


def test_frozen_leaves_can_be_excluded():
    params = {"w": VECTOR, "frozen": {"k": VECTOR, "b": VECTOR}, "step": jnp.int32(3)}
    report = flow(lambda p: jnp.sum(p["w"]), params, exclude=["p['frozen']"])
    assert report.unchecked == (
        "p['frozen']['b'] (excluded)",
        "p['frozen']['k'] (excluded)",
        "p['step'] (int32[]: holds no gradient)",
    )


def test_a_gradient_that_is_nan_is_not_taken_for_one():
    with pytest.raises(
        gradtest.GradientInconclusive, match="it can't be told from none"
    ):
        flow(lambda w: jnp.sum(jnp.sqrt(w - w)), VECTOR)
    with pytest.raises(gradtest.GradientInconclusive, match="the value itself is NaN"):
        flow(lambda w: jnp.sum(jnp.log(w)), VECTOR)


def test_the_message_of_a_leaf_without_gradient():
    def loss(params, x):
        return jnp.sum(params["w"] * x)

    with pytest.raises(gradtest.GradientMismatch) as caught:
        flow(loss, {"w": VECTOR, "forgotten": VECTOR, "too": VECTOR}, VECTOR)
    assert str(caught.value) == (
        "assert_grads_flow failed: no gradient of loss reaches params['forgotten'] "
        "(float32[4]).\n"
        "  Likely cause: the loss does not depend on it.\n"
        "  Try: use it in the loss, leave it out of the parameters, or name it in "
        "`exclude`.\n"
        "  Wrong as well: params['too']; right: 1.\n"
        "  Replay: gradtest.assert_grads_flow(loss, ..., key=0)"
    )
