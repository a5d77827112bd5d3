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
from tests.in_trace import X, asserting, loss, refused, right, run, wrong

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
