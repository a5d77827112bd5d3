"""Assertions inside of `shard_map` regions where JAX tracks what varies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec

import gradtest

pytestmark = pytest.mark.devices

W = np.linspace(0.2, 1.3, 3, dtype=np.float32)
X = np.sin(np.arange(48.0, dtype=np.float32)).reshape(16, 3)
EVERYWHERE, SPREAD = PartitionSpec(), PartitionSpec("data")
# What varies over the devices: the data alone, the weights as well, or nothing.
SHARED_WEIGHTS = (EVERYWHERE, SPREAD)
ALL_SPREAD = (SPREAD, SPREAD)
ALL_SHARED = (EVERYWHERE, EVERYWHERE)


def mesh_of(shape=(8,), names=("data",)):
    assert jax.device_count() == 8
    return Mesh(np.array(jax.devices()).reshape(shape), names)


def outcome(check, specs, *, weights=W, mesh=None):
    """Returns the message of a check that is made inside of a region, or None."""

    def body(w, x):
        check(w, x)
        return x

    region = jax.shard_map(
        body, mesh=mesh or mesh_of(), in_specs=specs, out_specs=specs[1]
    )
    if specs[0] == SPREAD and weights is W:
        weights = np.tile(W, mesh.shape["data"] if mesh else 8)
    error, _ = checkify.checkify(jax.jit(region))(weights, X)
    return error.get()


def at_five(factor):
    """Returns the factor on the sixth device, and 1 on all others."""
    return jnp.where(lax.axis_index("data") == 5, factor, 1.0)


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def by_weights(w, x):
    y = jnp.tanh(x @ w)
    return x.T @ (2 * y * (1 - y**2))


def by_data(w, x):
    y = jnp.tanh(x @ w)
    return jnp.outer(2 * y * (1 - y**2), w)


def summed(w, x):
    return lax.psum(by_weights(w, x), "data")


def total(w, x):
    return lax.psum(loss(w, x), "data")


def mean(w, x):
    return lax.pmean(loss(w, x), "data")


# --- each assertion -----------------------------------------------------------------


def _autodiff(factor):
    @jax.custom_vjp
    def square(y):
        return y**2

    square.defvjp(lambda y: (y**2, y), lambda y, g: (2 * y * g * factor(),))
    return lambda w, x: jnp.sum(square(x @ w))


_ASSERTIONS = {
    "vjp": lambda factor, w, x: gradtest.assert_vjp_matches(
        lambda x: x**2, lambda args, g: (2 * args[0] * g * factor(),), x
    ),
    "jvp": lambda factor, w, x: gradtest.assert_jvp_matches(
        lambda w, x: x @ w,
        lambda args, t: factor() * (t[1] @ args[0] + args[1] @ t[0]),
        w,
        x,
        argnums=(0, 1),
    ),
    "hvp": lambda factor, w, x: gradtest.assert_hvp_matches(
        lambda x: jnp.sum(x**3), lambda args, t: (6 * args[0] * t[0] * factor(),), x
    ),
    "transpose": lambda factor, w, x: gradtest.assert_transpose_matches(
        lambda x: 3 * x, lambda g: 3 * g * factor(), x
    ),
    "the gradient by the data": lambda factor, w, x: gradtest.assert_grad_matches(
        loss,
        lambda w, x: (summed(w, x), by_data(w, x) * factor()),
        w,
        x,
        argnums=(0, 1),
    ),
    "autodiff": lambda factor, w, x: gradtest.assert_autodiff_matches(
        _autodiff(factor), w, x
    ),
    "agreement": lambda factor, w, x: gradtest.assert_grads_agree(
        _autodiff(factor), lambda w, x: jnp.sum((x @ w) ** 2), w, x
    ),
}


@pytest.mark.parametrize("name", _ASSERTIONS)
def test_what_is_wrong_on_the_sixth_device_alone_is_refused_by(name):
    check = _ASSERTIONS[name]
    assert outcome(lambda w, x: check(lambda: 1.0, w, x), SHARED_WEIGHTS) is None
    message = outcome(lambda w, x: check(lambda: at_five(1.01), w, x), SHARED_WEIGHTS)
    assert "[Chex] chexify assertion 'assert_" in message
    if name not in ("autodiff", "agreement"):  # those sum over the devices
        assert "at mapped index 5: " in message
        assert "at mapped index 4: " not in message
        assert "along the true one it is 1.01 times as large" in message


# --- what a gradient is, by the types of the arguments ------------------------------


_RIGHT = {
    "one device's loss": (loss, summed, SHARED_WEIGHTS),
    "as jax.grad has it": (loss, jax.grad(loss), SHARED_WEIGHTS),
    "the sum of all losses": (total, summed, SHARED_WEIGHTS),
    "the mean of all losses": (
        mean,
        lambda w, x: lax.pmean(by_weights(w, x), "data"),
        SHARED_WEIGHTS,
    ),
    "each device's own": (loss, by_weights, ALL_SPREAD),
    "each device's own part of the sum": (total, by_weights, ALL_SPREAD),
    "all devices alike": (loss, by_weights, ALL_SHARED),
    "what varies in type alone": (
        loss,
        lambda w, x: lax.pcast(summed(w, x), "data", to="varying"),
        SHARED_WEIGHTS,
    ),
}
_WRONG = {
    "not summed": (loss, by_weights, SHARED_WEIGHTS, "differs over 'data'"),
    "not summed, of the sum": (total, by_weights, SHARED_WEIGHTS, "differs over"),
    "a mean for a sum": (
        loss,
        lambda w, x: lax.pmean(by_weights(w, x), "data"),
        SHARED_WEIGHTS,
        "along the true one it is 0.125 times as large",
    ),
    "wrong before it is summed": (
        loss,
        lambda w, x: lax.psum(by_weights(w, x) * at_five(1.1), "data"),
        SHARED_WEIGHTS,
        "w: the gradient is off by",
    ),
    "wrong after it is summed": (
        loss,
        lambda w, x: summed(w, x) * at_five(1.001),
        SHARED_WEIGHTS,
        "its gradient is one: the sum of what each device makes of it",
    ),
    "summed for each device's own": (
        loss,
        summed,
        ALL_SPREAD,
        "w: the gradient is off by",
    ),
    "summed of all alike": (
        loss,
        lambda w, x: lax.psum(
            lax.pcast(by_weights(w, x), "data", to="varying"), "data"
        ),
        ALL_SHARED,
        "along the true one it is 8 times as large",
    ),
    "wrong on one of all alike": (
        loss,
        lambda w, x: by_weights(w, x) * at_five(2.0),
        ALL_SHARED,
        "differs over 'data'",
    ),
}


@pytest.mark.parametrize("name", _RIGHT)
def test_a_gradient_is_right_by_the_types_of_the_arguments(name):
    fn, grad_fn, specs = _RIGHT[name]
    check = lambda w, x: gradtest.assert_grad_matches(fn, grad_fn, w, x)  # noqa: E731
    assert outcome(check, specs) is None


@pytest.mark.parametrize("name", _WRONG)
def test_a_gradient_is_wrong_by_the_types_of_the_arguments(name):
    fn, grad_fn, specs, says = _WRONG[name]
    check = lambda w, x: gradtest.assert_grad_matches(fn, grad_fn, w, x)  # noqa: E731
    assert says in outcome(check, specs)


def test_the_leaf_that_is_wrong_is_blamed_and_not_the_one_beside_it():
    def check(w, x):
        gradtest.assert_grad_matches(
            mean,
            lambda w, x: (lax.pmean(by_weights(w, x), "data"), by_data(w, x)),
            w,
            x,
            argnums=(0, 1),
        )

    blamed = re.findall(r"failed: (\w+): the", outcome(check, SHARED_WEIGHTS))
    assert blamed == ["x"] * 8


def test_transposes_and_second_derivatives_of_shared_weights_are_sums():
    def hessian(w, t, x):
        return jax.jvp(lambda w: by_weights(w, x), (w,), (t,))[1]

    def check(reduce, w, x):
        gradtest.assert_transpose_matches(lambda w: x @ w, lambda g: reduce(x.T @ g), w)
        gradtest.assert_hvp_matches(
            lambda w: loss(w, x), lambda a, t: (reduce(hessian(a[0], t[0], x)),), w
        )

    def over_devices(value):
        return lax.psum(value, "data")

    assert outcome(lambda w, x: check(over_devices, w, x), SHARED_WEIGHTS) is None
    message = outcome(lambda w, x: check(lambda v: v, w, x), SHARED_WEIGHTS)
    assert "w: the transpose differs over 'data'" in message


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_what_has_no_rule_free_derivative_is_judged_by_sums_of_differences(factor):
    @jax.custom_vjp
    def root(a):
        def step(state):
            return state[0] + 1, (state[1] + a / state[1]) / 2

        start = (0, jnp.ones_like(a))
        return lax.while_loop(lambda state: state[0] < 20, step, start)[1]

    root.defvjp(lambda a: (root(a),) * 2, lambda y, g: (factor * g / (2 * y),))

    def check(w, x):
        fn = lambda w, x: jnp.sum(root(1 + (x @ w) ** 2))  # noqa: E731
        gradtest.assert_autodiff_matches(fn, w, x)

    message = outcome(check, SHARED_WEIGHTS)
    if factor == 1.0:
        assert message is None
    else:
        assert "along one direction is 2 times the measured one" in message


@pytest.mark.parametrize(("axes", "is_right"), [("model", True), (("data",), False)])
def test_of_two_axes_the_shared_one_is_summed_over(axes, is_right):
    mesh = mesh_of((4, 2), ("data", "model"))
    specs = (SPREAD, PartitionSpec(("data", "model")))

    def check(w, x):
        gradtest.assert_grad_matches(
            loss, lambda w, x: lax.psum(by_weights(w, x), axes), w, x
        )

    message = outcome(check, specs, mesh=mesh)
    assert (message is None) == is_right


def test_functions_whose_results_vary_otherwise_are_not_compared():
    with pytest.raises(TypeError, match=r"varies over the mesh axes \[\], that of"):
        outcome(
            lambda w, x: gradtest.assert_grads_agree(total, loss, w, x),
            SHARED_WEIGHTS,
        )
