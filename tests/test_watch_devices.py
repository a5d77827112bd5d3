"""A watched training over several devices: sharded, under shard_map, under pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradtest

pytestmark = pytest.mark.devices

COUNT = 8
X = jax.random.normal(jax.random.key(0), (32, 4))
BATCH = X, X.sum(1, keepdims=True)
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (4, 16)),
    "out": 0.1 * jnp.ones((16, 1)),
}


def _clip(slope):
    @jax.custom_vjp
    def clip(x):
        return jnp.clip(x, -3, 3)

    clip.defvjp(lambda x: (clip(x), x), lambda x, g: (g * slope(x),))
    return clip


right = _clip(lambda x: jnp.abs(x) < 3)
wrong = _clip(jnp.ones_like)


def _loss(layer, axis=None):
    def loss(params, batch):
        x, y = batch
        found = layer(jnp.tanh(x @ params["w"]) @ params["out"])
        value = jnp.mean((found - y) ** 2)
        return value if axis is None else jax.lax.pmean(value, axis)

    return loss


def _mesh():
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((COUNT,), ("data",), axis_types=(auto,))


def _laid(tree, *axes):
    sharding = NamedSharding(_mesh(), P(*axes))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)


def _stacked(tree):
    return jax.pmap(lambda leaf: leaf)(
        jax.tree.map(lambda leaf: jnp.stack([leaf] * COUNT), tree)
    )


def _shards(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(COUNT, -1, *leaf.shape[1:]), tree)


def _sharded(layer):
    return _loss(layer), _laid(PARAMS), _laid(BATCH, "data"), {}


def _split_params(layer):
    params = {
        "w": _laid(PARAMS["w"], None, "data"),
        "out": _laid(PARAMS["out"], "data"),
    }
    return _loss(layer), params, _laid(BATCH), {}


def _shard_mapped(layer):
    loss = jax.shard_map(
        _loss(layer, "data"), mesh=_mesh(), in_specs=(P(), P("data")), out_specs=P()
    )
    return loss, _laid(PARAMS), _laid(BATCH, "data"), {}


def _pmapped(layer):
    loss = jax.pmap(_loss(layer, "data"), axis_name="data")
    return loss, _stacked(PARAMS), _shards(BATCH), {}


def _unreplicated(layer):
    first = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    return _loss(layer), first(_stacked(PARAMS)), first(_shards(BATCH)), {}


def _broadcast(function):
    """Runs a function of whole arguments on every device."""

    def run(*args):
        return jax.pmap(function, axis_name="data")(*_stacked_plainly(args))

    return run


def _stacked_plainly(tree):
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * COUNT), tree)


def _under_variant(layer):
    return _loss(layer, "data"), PARAMS, BATCH, {"variant": _broadcast}


_WAYS = pytest.mark.parametrize(
    "make",
    [_sharded, _split_params, _shard_mapped, _pmapped, _unreplicated, _under_variant],
    ids=lambda make: make.__name__.strip("_"),
)


@_WAYS
def test_a_right_training_over_devices_passes_and_compiles_once(make):
    loss, params, batch, options = make(right)
    watcher = gradtest.watch(loss, every=1, **options)
    for step, factor in enumerate((1, 2, 20)):
        scaled = jax.tree.map(lambda leaf, f=factor: f * leaf, params)
        report = watcher(step, scaled, batch)
        assert report.verdict is gradtest.Verdict.PASS
        assert any(note.startswith("screened") for note in report.notes)
    assert "1 time" in watcher.summary()


@_WAYS
def test_a_wrong_rule_over_devices_is_caught_where_it_saturates(make):
    loss, params, batch, options = make(wrong)
    watcher = gradtest.watch(loss, every=1, **options)
    report = watcher(0, jax.tree.map(lambda leaf: 0.3 * leaf, params), batch)
    assert report.verdict is gradtest.Verdict.PASS
    with pytest.raises(gradtest.GradientMismatch) as caught:
        watcher(1, jax.tree.map(lambda leaf: 20 * leaf, params), batch)
    message = str(caught.value)
    assert message.startswith("watch at step 1 failed: the gradient of")
    assert "custom_vjp rule of clip" in message


def test_a_step_that_donates_its_shards_goes_on_after_each_check():
    loss, params, batch, _ = _sharded(right)
    params = jax.tree.map(lambda leaf: 1.0 * leaf, params)  # buffers of its own
    watcher = gradtest.watch(loss, every=2)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(params, batch):
        gradient = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    checked = []
    for step in range(5):
        checked += [step] if watcher(step, params, batch) else []
        params = update(params, batch)
    assert checked == [0, 2, 4]
    assert np.isfinite(float(loss(params, batch)))


def test_inside_of_a_mapped_program_it_says_where_it_belongs():
    watcher = gradtest.watch(_loss(right))

    def step(params, batch):
        watcher(0, params, batch)
        return params

    with pytest.raises(TypeError, match="call the watcher from the training loop"):
        jax.pmap(step)(_stacked(PARAMS), _shards(BATCH))
