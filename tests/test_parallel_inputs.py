"""How steps and arguments may come, what is told of them, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradtest
from gradtest import domains
from tests.parallel_steps import (
    BATCH,
    PARAMS,
    loss,
    mesh_of,
    pmean,
    psum,
    reduced,
    under_pmap,
    under_shard_map,
)

pytestmark = pytest.mark.devices

check = gradtest.assert_parallel_grads_match
_RIGHT = reduced(pmean)


def _refused(step, *args, **options):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        check(step, *args, **options)
    return str(caught.value)


# --- several axes -------------------------------------------------------------------


def _over(axes, spec, local, check_vma=False):
    return jax.shard_map(
        local, mesh=mesh_of(4, 2), in_specs=(P(), spec), out_specs=P(),
        axis_names=set(axes), check_vma=check_vma,
    )  # fmt: skip


_BOTH = ("data", "model")


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_model_that_is_split_beside_the_batch(check_vma):
    params = {"w": jnp.arange(1.0, 5.0), "b": jnp.float32(0.5)}
    batch = {"x": jnp.sin(jnp.arange(64.0)).reshape(16, 4), "y": BATCH["y"]}
    split = {"w": P("model"), "b": P()}

    def local(params, batch):
        def whole_loss(p):
            error = lax.psum(batch["x"] @ p["w"], "model") + p["b"] - batch["y"]
            return lax.pmean(jnp.mean(error**2), "data")

        return jax.value_and_grad(whole_loss)(params)

    step = jax.shard_map(
        local, mesh=mesh_of(4, 2), check_vma=check_vma, out_specs=(P(), split),
        in_specs=(split, {"x": P("data", "model"), "y": P("data")}),
    )  # fmt: skip
    if check_vma:
        report = check(step, loss, params, batch)
        assert {finding.name for finding in report.findings} == {
            "params['b']", "params['w']",
        }  # fmt: skip
        return
    # Without check_vma the transpose of psum is psum: each device has another gradient.
    assert "devices disagree" in _refused(step, loss, params, batch)


def test_two_axes_that_split_the_batch():
    def local(params, batch):
        return lax.pmean(jax.grad(loss)(params, batch), _BOTH)

    check(_over(_BOTH, P(_BOTH), local), loss, PARAMS, BATCH)
    message = _refused(_over(_BOTH, P(_BOTH), local, True), loss, PARAMS, BATCH)
    assert "8 times too large" in message
    assert "the product of the sizes of mesh axes 'data' and 'model'" in message


def test_an_axis_that_is_not_reduced_is_named():
    step = _over(_BOTH, P(_BOTH), _RIGHT)
    message = _refused(step, loss, PARAMS, BATCH)
    assert "lax.pmean(gradients, 'model')" in message


def test_an_axis_that_is_summed_over_without_need_is_named():
    def local(params, batch):
        return lax.psum(_RIGHT(params, batch), "model")

    message = _refused(_over(_BOTH, P("data"), local), loss, PARAMS, BATCH)
    assert "2 times too large in its one entry" in message
    assert "the size of mesh axis 'model'" in message


def test_parameters_that_are_gathered_and_gradients_that_are_scattered():
    params = {"w": jnp.arange(1.0, 9.0), "b": jnp.ones(8)}
    batch = {"x": jnp.sin(jnp.arange(128.0)).reshape(16, 8), "y": BATCH["y"]}

    def whole(p, b):
        error = b["x"] @ p["w"] + jnp.sum(p["b"]) - b["y"]
        return jnp.mean(error**2)

    def make(scale):
        def local(params, batch):
            full = jax.tree.map(lambda p: lax.all_gather(p, "data", tiled=True), params)
            gradients = jax.grad(whole)(full, batch)
            return jax.tree.map(
                lambda g: lax.psum_scatter(g, "data", tiled=True) / scale, gradients
            )

        return jax.jit(
            jax.shard_map(
                local, mesh=mesh_of(8), in_specs=P("data"), out_specs=P("data")
            )
        )

    check(make(8), whole, params, batch)
    assert "8 times too large in all 8 entries" in _refused(
        make(1), whole, params, batch
    )


# --- where arguments lie, and what surrounds the step -------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arguments_that_lie_on_the_devices_already(kind):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(kind,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))

    def step(reduce):
        return jax.shard_map(
            reduced(reduce), mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
            check_vma=False,
        )  # fmt: skip

    check(jax.jit(step(pmean)), loss, params, batch)
    check(jax.jit(jax.value_and_grad(loss)), loss, params, batch)
    assert "4 times too large" in _refused(jax.jit(step(psum)), loss, params, batch)
    assert batch["x"].sharding == NamedSharding(mesh, P("data"))


def test_a_step_that_takes_its_mesh_from_around_it():
    def step(params, batch):
        return jax.shard_map(
            _RIGHT, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
        )(params, batch)

    check(step, loss, PARAMS, BATCH, mesh_of(4))
    check(jax.jit(step), loss, PARAMS, BATCH, mesh=mesh_of(8))
    with jax.set_mesh(mesh_of(4)):
        check(step, loss, PARAMS, BATCH)
    assert jax.sharding.get_abstract_mesh().empty


def test_arrays_that_a_step_donates_are_left_to_the_user():
    step = jax.jit(under_shard_map(_RIGHT, 4, False), donate_argnums=(0, 1))
    params, batch = jax.tree.map(jnp.copy, (PARAMS, BATCH))
    check(step, loss, params, batch)
    np.testing.assert_array_equal(params["w"], PARAMS["w"])
    np.testing.assert_array_equal(batch["x"], BATCH["x"])


def test_arguments_may_be_drawn():
    params = {"w": domains.normal(3), "b": jnp.float32(0.5)}
    batch = {
        "x": domains.normal((16, 3)),
        "y": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    report = check(under_pmap(_RIGHT, 4), loss, params, batch, trials=3)
    assert report.trials == 3
    message = _refused(under_pmap(reduced(psum), 4), loss, params, batch, trials=2)
    assert "4 times too large" in message


def test_a_batch_may_hold_keys_and_numbers():
    def dropped(params, batch):
        keep = jax.random.bernoulli(batch["key"], 0.5, (16, 3))
        return jnp.mean((batch["scale"] * (batch["x"] * keep) @ params["w"]) ** 2)

    batch = {"x": BATCH["x"], "key": jax.random.key(3), "scale": 2.0, "none": None}
    split = NamedSharding(mesh_of(8), P())
    check(
        jax.jit(jax.grad(dropped), in_shardings=(split, None)), dropped, PARAMS, batch
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_half_precision(dtype):
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCH))
    check(under_pmap(_RIGHT, 4), loss, params, batch)
    message = _refused(under_pmap(reduced(psum), 4), loss, params, batch)
    assert "4 times too large" in message


def test_a_wrong_custom_rule_inside_of_a_step_is_seen():
    @jax.custom_vjp
    def squared(x):
        return x**2

    squared.defvjp(lambda x: (x**2, x), lambda x, g: (3 * g * x,))

    def with_rule(params, batch):
        return jnp.mean(squared(batch["x"] @ params["w"] - batch["y"]))

    step = under_pmap(reduced(pmean, with_rule), 4)
    message = _refused(step, with_rule, {"w": PARAMS["w"]}, BATCH)
    assert "1.5 times too large" in message


# --- what is told -------------------------------------------------------------------


def test_a_loss_that_is_each_devices_own_is_a_note():
    def local(params, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return value, pmean(gradients)

    report = check(under_pmap(local, 4), loss, PARAMS, BATCH)
    assert any("only gradients are checked" in note for note in report.notes)
    assert "the step runs over 4 devices of axis 'data'" in report.notes


def test_a_step_on_one_device_says_so():
    report = check(jax.grad(loss), loss, PARAMS, BATCH)
    assert re.search(
        r"several devices: the step ran on one", " ".join(report.unchecked)
    )


def test_a_step_in_half_precision_beside_a_loss_in_full_is_named():
    def half(params, batch):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return loss(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch))

    step = under_pmap(reduced(pmean, half), 4)
    message = _refused(step, loss, PARAMS, BATCH)
    assert "computes in half precision what the loss computes in full" in message
    check(step, half, PARAMS, BATCH)


def test_custom_rules_of_the_loss_are_pointed_to():
    @jax.custom_vjp
    def cubed(x):
        return x**3

    cubed.defvjp(lambda x: (x**3, x), lambda x, g: (g * x,))

    def with_rule(params, batch):
        return jnp.mean(cubed(batch["x"] @ params["w"]))

    message = _refused(
        under_pmap(reduced(pmean, with_rule), 4), with_rule, {"w": PARAMS["w"]}, BATCH
    )
    assert "calls custom rules (cubed): assert_custom_rules_match" in message


def test_what_is_excluded_is_listed():
    def forgets(params, batch):
        gradients = jax.grad(loss)(params, batch)
        return {"w": pmean(gradients["w"]), "b": gradients["b"]}

    step = under_pmap(forgets, 4)
    report = check(step, loss, PARAMS, BATCH, exclude=("params['b']",))
    assert report.unchecked == ("params['b'] (excluded)",)


# --- what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        under_pmap(_RIGHT, 4),
        lambda p, b: under_shard_map(_RIGHT, 4, False)(p, b),
        lambda p, b: jax.jit(
            jax.grad(loss), in_shardings=(None, NamedSharding(mesh_of(4), P("data")))
        )(p, b),
    ],
    ids=["pmap", "shard_map", "jit"],
)
def test_a_batch_that_does_not_divide(step):
    batch = jax.tree.map(lambda x: x[:15], BATCH)
    with pytest.raises(ValueError, match=r"`batch` does not divide .* 15 rows"):
        check(step, loss, PARAMS, batch)


_BAD = {
    "a step that is no function": (
        (3, loss, PARAMS, BATCH), "`step` must be callable, got 3"
    ),
    "a loss that is no function": (
        (jax.grad(loss), None, PARAMS, BATCH), "`loss` must be callable, got None"
    ),
    "a mesh that is none": (
        (jax.grad(loss), loss, PARAMS, BATCH, "data"),
        r"`mesh` must be a jax.sharding.Mesh, got 'data'",
    ),
    "a loss of many numbers": (
        (jax.grad(loss), lambda p, b: b["x"] @ p["w"], PARAMS, BATCH),
        r"`loss` must return one real number.*float32\[16\]",
    ),
    "gradients of another tree": (
        (lambda p, b: p["w"], loss, PARAMS, BATCH),
        "`step` must return gradients like `params`, or a pair",
    ),
    "new parameters in place of a loss": (
        (lambda p, b: (p["w"], p), loss, PARAMS, BATCH),
        r"wanted one real number for the loss, .* got float32\[3\]",
    ),
    "gradients of other shapes": (
        (lambda p, b: {"w": p["w"][:2], "b": p["b"]}, loss, PARAMS, BATCH),
        r"wanted \[3\] or \[devices, 3\] for params\['w'\], got \[2\]",
    ),
    "an axis of devices on some": (
        (lambda p, b: {"w": p["w"][None], "b": p["b"]}, loss, PARAMS, BATCH),
        r"one leading axis of devices, or all without: got axes of lengths \[0, 1\]",
    ),
    "integer gradients": (
        (
            lambda p, b: jax.tree.map(lambda x: x.astype(int), p), loss, PARAMS, BATCH,
        ),
        r"float or complex gradients: wanted float32 for params\['b'\], got int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _BAD.values(), ids=_BAD)
def test_bad_input_is_named(case):
    args, says = case
    with pytest.raises(TypeError, match=says):
        check(*args)


def test_what_a_step_raises_comes_out_as_it_is():
    def step(params, batch):
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost") as caught:
        check(step, loss, PARAMS, BATCH)
    assert "gradtest: raised by `step` itself." in caught.value.__notes__


def test_traced_values_are_refused():
    step = jax.grad(loss)
    with pytest.raises(TypeError, match="`assert_parallel_grads_match` was called on"):
        jax.jit(lambda p: check(step, loss, p, BATCH))(PARAMS)
