"""Assertions called on traced values: checks in the program, as Chex makes them."""

import functools
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec

import gradtest

X = np.array([0.5, 1.0, 1.5], np.float32)


def loss(x):
    return jnp.sum(jnp.sin(x) * x)


def right(x):
    return jnp.cos(x) * x + jnp.sin(x)


def wrong(x):
    return jnp.cos(x) * x - jnp.sin(x)


def asserting(grad_fn, *, fn=loss, **keywords):
    """Returns a function that asserts, and returns its argument."""

    def inside(x):
        assert gradtest.assert_grad_matches(fn, grad_fn, x, **keywords) is None
        return x

    return inside


def run(fn, *args):
    return chex.chexify(fn, async_check=False)(*args)


def refused(fn, *args):
    with pytest.raises(
        AssertionError, match=r"^\[Chex\] chexify assertion 'assert_"
    ) as caught:
        run(fn, *args)
    return str(caught.value)


# --- the semantics --------------------------------------------------------------


@pytest.mark.core
def test_a_right_gradient_is_accepted_under_jit():
    np.testing.assert_array_equal(run(jax.jit(asserting(right)), X), X)


@pytest.mark.core
def test_a_wrong_gradient_is_refused_with_leaf_gap_and_allowance():
    message = refused(jax.jit(asserting(wrong)), X)
    assert message.startswith(
        "[Chex] chexify assertion 'assert_grad_matches' failed: x: the gradient is off "
        "by 1.4 "
    )
    assert "allowed are 2" in message
    assert "; along the true one it is " in message


def test_the_factor_of_a_gradient_that_is_a_multiple_of_the_true_one_is_told():
    message = refused(jax.jit(asserting(lambda x: -right(x))), X)
    assert "off by 2 of its norm" in message
    assert "along the true one it is -1 times as large" in message


def test_checkify_alone_returns_the_error():
    error, _ = checkify.checkify(jax.jit(asserting(wrong)))(X)
    with pytest.raises(
        checkify.JaxRuntimeError, match=r"^\[Chex\] chexify assertion 'assert_grad_"
    ):
        error.throw()
    error, _ = checkify.checkify(jax.jit(asserting(right)))(X)
    assert error.get() is None


def test_without_checkify_jax_says_that_nothing_makes_the_check():
    with pytest.raises(ValueError, match="not functionalized"):
        jax.jit(asserting(right))(X)


@pytest.mark.parametrize("grad_fn", [right, wrong])
def test_the_assertion_is_transparent_to_differentiation(grad_fn):
    def value(x):
        return jnp.sum(asserting(grad_fn)(x) ** 2)

    gradient = jax.jit(jax.grad(value))
    if grad_fn is wrong:
        refused(gradient, X)
    else:
        np.testing.assert_allclose(run(gradient, X), 2 * X)


_TRANSFORMED = {
    "vmap": lambda fn: jax.vmap(fn),
    "jit of vmap": lambda fn: jax.jit(jax.vmap(fn)),
    "scan": lambda fn: jax.jit(
        lambda xs: jax.lax.scan(lambda carry, x: (carry, fn(x)), 0.0, xs)[1]
    ),
    "map": lambda fn: lambda xs: jax.lax.map(fn, xs),
    "remat": lambda fn: jax.jit(jax.vmap(jax.checkpoint(fn))),
    "grad": lambda fn: jax.vmap(jax.grad(lambda x: jnp.sum(fn(x)))),
    "jacfwd": lambda fn: jax.jit(jax.vmap(jax.jacfwd(fn))),
}


@pytest.mark.parametrize("name", _TRANSFORMED)
def test_each_example_is_checked_under(name):
    rows = np.stack([X, X + 1, X + 2])
    transform = _TRANSFORMED[name]
    run(transform(asserting(right)), rows)

    def wrong_above_two(x):
        return right(x) * jnp.where(x[0] > 2, 1.001, 1.0)

    message = refused(transform(asserting(wrong_above_two)), rows)
    assert "off by 0.001" in message or "off by 0.0009" in message


def test_a_branch_that_is_not_taken_is_not_checked():
    def branching(x):
        return jax.lax.cond(x[0] > 9, asserting(wrong), asserting(right), x)

    run(jax.jit(branching), X)
    refused(jax.jit(branching), X + 9)


@pytest.mark.parametrize(
    "transform", [lambda fn: jax.jit(jax.vmap(fn)), jax.vmap], ids=["jit", "eagerly"]
)
def test_functions_may_close_over_traced_values(transform):
    def inside(x, grad_of):
        gradtest.assert_grad_matches(lambda w: loss(w * x), grad_of(x), jnp.ones(3))
        return x

    rows = np.stack([X, X + 1])

    def good(x):
        return lambda w: right(w * x) * x

    def bad(x):
        return lambda w: right(w * x)

    run(transform(functools.partial(inside, grad_of=good)), rows)
    refused(transform(functools.partial(inside, grad_of=bad)), rows)


def test_arguments_mix_traced_and_known_leaves_draws_keys_and_integers():
    def fn(params, batch, key, power, drawn):
        noise = jax.random.normal(key, batch["x"].shape)
        return jnp.sum((params["w"] * batch["x"] + noise) ** power) * drawn.sum()

    def inside(w, x, key, factor):
        params, batch = {"w": w, "frozen": None}, {"x": x, "index": np.arange(3)}
        drawn = gradtest.domains.positive((4,))
        args = (params, batch, key, 2, drawn)

        def grad_fn(*args):
            return jax.tree.map(lambda g: factor * g, jax.grad(fn)(*args))

        gradtest.assert_grad_matches(fn, grad_fn, *args, trials=2)
        return x

    key = jax.random.key(3)
    run(jax.jit(inside), X, X + 1, key, 1.0)
    message = refused(jax.jit(inside), X, X + 1, key, 1.01)
    assert "params['w']: the gradient is off by 0.01 " in message


def test_names_with_braces_are_told_as_they_are():
    def inside(x):
        gradtest.assert_grad_matches(
            lambda p: loss(p["{w}"]), lambda p: {"{w}": wrong(p["{w}"])}, {"{w}": x}
        )
        return x

    assert "p['{w}']: the gradient" in refused(jax.jit(inside), X)


# --- keywords -------------------------------------------------------------------


def test_a_custom_message_is_shown_with_traced_values_in_it():
    def inside(x):
        keywords = {
            "custom_message": "layer {} at {:.2f}",
            "custom_message_format_vars": ("{first}", x[0]),
        }
        return asserting(wrong, **keywords)(x)

    assert "[layer {first} at 0.50]" in refused(jax.jit(inside), X)


def test_a_custom_message_without_variables_is_shown_as_it_is():
    message = refused(jax.jit(asserting(wrong, custom_message="see {docs}")), X)
    assert "[see {docs}]" in message


def test_disabled_asserts_add_no_check():
    def disabled(x):
        report = gradtest.assert_grad_matches(loss, wrong, x)
        assert report.verdict is gradtest.Verdict.NOT_CHECKED
        return x

    chex.disable_asserts()
    try:
        np.testing.assert_array_equal(jax.jit(disabled)(X), X)
    finally:
        chex.enable_asserts()


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"variant": jax.jit}, "`variant` can't be used where .* traced values"),
        ({"exclude": ("y",)}, "`exclude` names 'y'"),
        ({"argnums": 3}, "`argnums` names argument 3"),
        ({"inconclusive": "never"}, "`inconclusive` must be 'raise' or 'warn'"),
        ({"rtol": 2}, "`rtol` must lie between 0 and 1"),
    ],
)
def test_slips_are_raised_while_tracing(keywords, match):
    with pytest.raises((TypeError, ValueError), match=match):
        jax.jit(asserting(right, **keywords))(X)


def test_a_gradient_of_another_shape_is_a_slip_as_outside():
    with pytest.raises(TypeError, match="`grad_fn` must return the shape of the arg"):
        jax.jit(asserting(lambda x: x[0]))(X)


def test_a_traced_key_of_the_check_is_refused():
    def inside(x, key):
        gradtest.assert_grad_matches(loss, right, x, key=key)
        return x

    with pytest.raises(TypeError, match=r"`key` must be .* got a traced value"):
        jax.jit(inside)(X, jax.random.key(0))


def test_check_wants_values():
    with pytest.raises(TypeError, match=r"`x` is a traced value .* outside"):
        jax.jit(lambda x: gradtest.check(loss, x))(X)


def test_excluded_leaves_are_not_checked():
    def inside(x):
        gradtest.assert_grad_matches(
            lambda p: loss(p["a"]) + loss(p["b"]),
            lambda p: {"a": right(p["a"]), "b": wrong(p["b"])},
            {"a": x, "b": x + 1},
            exclude=("p['b']",),
        )
        return x

    run(jax.jit(inside), X)


# --- what can't be concluded -----------------------------------------------------


def test_a_value_that_is_not_finite_concludes_nothing():
    def inside(x, **keywords):
        gradtest.assert_autodiff_matches(lambda x: jnp.log(x).sum(), x, **keywords)
        return x

    message = refused(jax.jit(inside), -X)
    assert "nothing can be concluded: a value is not finite here" in message
    run(jax.jit(functools.partial(inside, inconclusive="warn")), -X)


def test_a_nan_gradient_beside_a_finite_value_is_wrong():
    def inside(x):
        gradtest.assert_autodiff_matches(
            lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0).sum(), x, inconclusive="warn"
        )
        return x

    run(jax.jit(inside), X)
    assert "x: the gradient is NaN or infinite" in refused(jax.jit(inside), X - 0.5)


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


# --- state ------------------------------------------------------------------------


def test_nothing_traced_outlives_the_trace():
    def inside(x):
        gradtest.assert_autodiff_matches(lambda w: loss(w * x), jnp.ones(3))
        gradtest.assert_grads_flow(lambda w: loss(w * x), jnp.ones(3))
        gradtest.assert_grads_close(right(x), right(x))
        return asserting(right)(x)

    with jax.check_tracer_leaks():
        run(jax.jit(inside), X)
    gc.collect()
    traced = [o for o in gc.get_objects() if isinstance(o, jax.core.Tracer)]
    assert not traced


def test_settings_are_as_they_were_after_a_slip():
    with pytest.raises(TypeError):
        jax.jit(asserting(lambda x: x[0]))(X)
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(()).dtype == jnp.float32


# --- every device -----------------------------------------------------------------


def _over_devices(check_vma):
    def transform(fn):
        spec = PartitionSpec("data")
        mesh = Mesh(np.array(jax.devices()), ("data",))
        region = jax.shard_map(
            lambda rows: fn(rows[0])[None],
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=check_vma,
        )
        return jax.jit(region)

    return transform


_DEVICES = {
    "pmap": functools.partial(jax.pmap, axis_name="data"),
    "shard_map": _over_devices(True),
    "shard_map without check_vma": _over_devices(False),
}


@pytest.mark.devices
@pytest.mark.parametrize("name", _DEVICES)
def test_a_gradient_wrong_on_the_sixth_device_alone_is_caught_under(name):
    def wrong_on_one(x):
        is_wrong = jax.lax.axis_index("data") == 5
        return right(x) * jnp.where(is_wrong, 1.001, 1.0)

    transform = _DEVICES[name]
    rows = np.stack([X + i for i in range(jax.device_count())])
    run(transform(asserting(right)), rows)
    assert "off by 0.00" in refused(transform(asserting(wrong_on_one)), rows)


@pytest.mark.devices
@pytest.mark.parametrize("name", _DEVICES)
def test_functions_that_reduce_over_devices_are_judged_all_together_under(name):
    @jax.custom_vjp
    def doubled(x):
        return jnp.sin(x)

    doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))

    def inside(x, sine):
        gradtest.assert_autodiff_matches(
            lambda x: jax.lax.pmean(jnp.sum(sine(x)), "data") ** 2, x
        )
        return x

    transform = _DEVICES[name]
    rows = np.stack([X + i for i in range(jax.device_count())])
    run(transform(functools.partial(inside, sine=jnp.sin)), rows)
    refused(transform(functools.partial(inside, sine=doubled)), rows)
