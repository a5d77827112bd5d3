"""One gradient on 1, 2, 4 and 8 devices: mapped, in regions, and sharded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

import gradtest
from tests.test_variants_agree import refused, right, sine

pytestmark = pytest.mark.devices

_X = np.sin(np.arange(1, 9, dtype=np.float32))
_ON_DEVICES = ["pmap", "shard_map", "sharded jit"]
_P = jax.sharding.PartitionSpec


def agree(fn, *args, variants=_ON_DEVICES, **options):
    return gradtest.assert_variants_agree(fn, *args, variants=variants, **options)


def device_index():
    """Returns the index in whatever axis of devices there is, or None."""
    try:
        return lax.axis_index("devices")
    except NameError:
        return None


# --- right ones -------------------------------------------------------------------


def test_a_right_rule_agrees_everywhere():
    report = gradtest.assert_variants_agree(sine(right), _X)
    assert report.verdict is gradtest.Verdict.PASS
    checks = [finding.check for finding in report.findings]
    assert checks[:3] == ["repeat", "eager", "jit"]
    assert checks[-5:] == [
        "shard_map[8, check_vma=True, differentiated]",
        "shard_map[8, check_vma=False]",
        "shard_map[8, check_vma=False, replicated]",
        "shard_map[8, check_vma=False, differentiated]",
        "sharded jit[8, x axis 0]",
    ]
    for count in (1, 2, 4, 8):
        assert f"pmap[{count}]" in checks
        assert f"shard_map[{count}, check_vma=True]" in checks
    # What is left out to save time is told, and can be had.
    assert any("sharded jit[2, x axis 0]" in line for line in report.unchecked)
    report = agree(sine(right), _X, variants="sharded jit")
    assert [finding.check for finding in report.findings] == [
        "sharded jit[2, x axis 0]",
        "sharded jit[4, x axis 0]",
        "sharded jit[8, x axis 0]",
    ]


def test_any_number_of_devices_can_be_asked_for():
    report = agree(jnp.sin, _X, variants=["pmap[3]", "shard_map[5, check_vma=True]"])
    assert [finding.check for finding in report.findings] == [
        "pmap[3]",
        "shard_map[5, check_vma=True]",
    ]


class Net(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=self.dtype)(nn.relu(nn.Dense(16, dtype=self.dtype)(x)))
        return nn.Dense(8, dtype=self.dtype)(x).astype(jnp.float32)


_SOME = ["eager", "vmap", "scan[3]", "pmap[8]", "shard_map[8]", "sharded jit[8]"]


@pytest.mark.parametrize(
    ("dtype", "variants"), [(jnp.float32, None), (jnp.bfloat16, _SOME)]
)
def test_a_flax_model_agrees_everywhere(dtype, variants):
    model, x = Net(dtype), jax.random.normal(jax.random.key(0), (8, 4))
    params, labels = model.init(jax.random.key(1), x), jnp.arange(8)

    def loss(params, x, labels):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    report = agree(loss, params, x, labels, argnums=0, variants=variants)
    assert report.verdict is gradtest.Verdict.PASS
    checks = [finding.check for finding in report.findings]
    assert "vmap[3, params alone]" in checks
    assert "sharded jit[8, axis 0 of size 8]" in checks


def test_a_loop_that_check_vma_does_not_take_is_listed():
    def fn(x):
        return lax.scan(lambda c, v: (c + jnp.sin(v), c), jnp.zeros(()), x)[0]

    report = agree(fn, _X)
    assert report.verdict is gradtest.Verdict.PASS
    checks = [finding.check for finding in report.findings]
    assert "shard_map[8, check_vma=False]" in checks
    assert "shard_map[8, check_vma=True]" not in checks
    lines = [line for line in report.unchecked if "does not run there" in line]
    assert "shard_map[8, check_vma=True]" in lines[0]


def test_keys_constants_and_weak_types_agree():
    def fn(x, key, scale):
        noise = jax.random.normal(key, (8,), jnp.bfloat16)
        return {"y": x * scale + noise, "constant": jnp.ones(2)}

    x = jnp.asarray(_X, jnp.bfloat16)
    assert agree(fn, x, jax.random.key(0), 2.0).verdict is gradtest.Verdict.PASS


def test_arguments_that_lie_on_several_devices_are_taken_as_well():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(_X, jax.sharding.NamedSharding(mesh, _P("x")))
    report = agree(jnp.sin, x, variants=["eager", "jit", "pmap[8]", "donated"])
    assert report.verdict is gradtest.Verdict.PASS
    assert not x.is_deleted()


# --- broken ones ------------------------------------------------------------------


def test_a_gradient_that_is_wrong_on_one_device_is_named():
    def backward(x, g):
        index = device_index()
        wrong = 1.0 if index is None else jnp.where(index == 5, 2.0, 1.0)
        return (wrong * g * jnp.cos(x),)

    message, departs = refused(sine(backward), _X, variants=None)
    assert departs == [
        "pmap[8]",
        "shard_map[8, check_vma=True]",
        "shard_map[8, check_vma=True, replicated]",
        "shard_map[8, check_vma=True, differentiated]",
        "shard_map[8, check_vma=False]",
        "shard_map[8, check_vma=False, replicated]",
        "shard_map[8, check_vma=False, differentiated]",
    ]
    assert "under jax.pmap over 8 devices it is 2 times too large" in message
    assert "on device 5 alone: the other 7 are right" in message


@pytest.mark.parametrize(
    ("power", "words"),
    [(1, "2 times too large (the number"), (2, "4 times too large (the square of")],
)
def test_the_number_of_devices_is_named_as_the_factor(power, words):
    def backward(x, g):
        count = 1 if device_index() is None else lax.psum(1, "devices")
        return (count**power * g * jnp.cos(x),)

    message, departs = refused(sine(backward), _X, variants=_ON_DEVICES)
    assert departs[0] == "pmap[2]"
    assert "pmap[1]" not in departs
    assert f"{words}" in message
    assert "of devices)" in message


def test_an_axis_of_the_users_is_bound_by_a_variant_of_theirs():
    def backward(x, g):
        try:
            index = lax.axis_index("data")
        except NameError:
            index = 0
        return (jnp.where(index == 5, -1.0, 1.0) * g * jnp.cos(x),)

    mapped = functools.partial(jax.pmap, axis_name="data")
    message, departs = refused(sine(backward), _X, variants=["pmap", mapped])
    assert departs == ["pmap (2)"]
    assert "on device 5 alone" in message


def test_a_cotangent_that_does_not_vary_is_told_in_jax_own_words():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (jnp.full((8,), 2.0),))
    message, departs = refused(lambda x: double(x).sum(), _X, variants=_ON_DEVICES)
    assert departs[0] == "shard_map[1, check_vma=True]"
    assert not any("check_vma=False" in name for name in departs)
    assert "must produce an output with the same type as the args tuple" in message
    assert "jax.lax.pcast" in message


def test_a_partitioning_rule_that_reduces_a_shard_is_named_with_its_axis():
    @custom_partitioning
    def centred(x):
        return x - jnp.mean(x)

    def partition(mesh, arguments, result):
        sharding = arguments[0].sharding
        return mesh, lambda x: x - jnp.mean(x), sharding, (sharding,)

    centred.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arguments, _: arguments[0].sharding,
        sharding_rule="i -> i",
    )
    fn = jax.custom_vjp(lambda x: x - jnp.mean(x))
    fn.defvjp(lambda x: (fn(x), None), lambda _, g: (centred(g),))
    message, departs = refused(lambda x: jnp.sum(fn(x) ** 3), _X, variants=None)
    assert departs == ["sharded jit[8, x axis 0]"]
    assert "in working precision" in message
    assert "custom_partitioning" in message


# --- what does not apply ----------------------------------------------------------


def test_a_function_over_devices_of_its_own_runs_on_these():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(jnp.sin, mesh=mesh, in_specs=_P("x"), out_specs=_P("x"))
    report = gradtest.assert_variants_agree(fn, _X)
    assert report.verdict is gradtest.Verdict.PASS
    assert not any("pmap" in finding.check for finding in report.findings)
    assert "assert_parallel_grads_match" in report.unchecked[0]


def test_axes_that_do_not_divide_are_listed():
    report = agree(jnp.sin, np.ones(6, np.float32), variants=["sharded jit"])
    assert [f.check for f in report.findings] == ["sharded jit[2, x axis 0]"]
    assert report.unchecked == (
        "sharded jit[4]: no axis of any argument divides into 4",
        "sharded jit[8]: no axis of any argument divides into 8",
    )


class UnderPmapTest(chex.TestCase):
    @chex.variants(with_pmap=True)
    def test_a_chex_variant_sees_every_device(self):
        def backward(x, g):
            try:
                index = lax.axis_index("i")
            except NameError:
                index = 0
            return (jnp.where(index == 5, 2.0, 1.0) * g * jnp.cos(x),)

        message, departs = refused(sine(backward), _X, variants=self.variant)
        assert departs == ["chex variant with_pmap"]
        assert "on device 5 alone" in message
