"""Programs over several accelerators, judged on the CPU's devices; see `machine`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import gradtest
from tests.accelerator.machine import (
    accelerators,
    devices_line,
    needs_several,
    platform,
)

pytestmark = needs_several

_P = jax.sharding.PartitionSpec
_W = np.cos(np.arange(12, dtype=np.float32)).reshape(4, 3)


def _batch():
    rows = 4 * len(accelerators())
    return np.sin(np.arange(4 * rows, dtype=np.float32)).reshape(rows, 4)


def _local_loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def _mesh():
    return jax.make_mesh((len(accelerators()),), ("data",), axis_types=(AxisType.Auto,))


def _in_shard_map(w, x):
    def local(w, x):
        return lax.psum(_local_loss(w, x), "data")

    return jax.shard_map(
        local, mesh=_mesh(), in_specs=(_P(), _P("data")), out_specs=_P()
    )(w, x)


def _in_pmap(w, x):
    count = len(accelerators())
    mapped = jax.pmap(
        lambda w, x: lax.pmean(count * _local_loss(w, x), "i"),
        axis_name="i",
        in_axes=(None, 0),
    )
    return mapped(w, x.reshape(count, -1, x.shape[-1]))[0]


def _in_sharded_jit(w, x):
    return _local_loss(
        w, lax.with_sharding_constraint(x, NamedSharding(_mesh(), _P("data")))
    )


_WAYS = [_in_shard_map, _in_pmap, _in_sharded_jit]


@pytest.mark.parametrize("loss", _WAYS)
def test_a_right_gradient_passes_over_all_devices(loss):
    report = gradtest.assert_autodiff_matches(loss, _W, _batch())
    count = len(accelerators())
    line = devices_line(report)
    assert line.startswith(f"devices: truth on {count} devices of ")
    assert f"claim on {count} devices of {platform()}" in line


@pytest.mark.parametrize("loss", _WAYS)
def test_a_gradient_too_large_by_the_number_of_devices_is_refused(loss):
    count = len(accelerators())

    def gradient(w, x):
        return count * jax.grad(_local_loss)(w, x)

    with pytest.raises(gradtest.GradientMismatch, match=f"{count} times too large"):
        gradtest.assert_grad_matches(loss, gradient, _W, _batch())


def test_arguments_that_are_spread_stay_where_they_are():
    layout = NamedSharding(_mesh(), _P("data"))
    x = jax.device_put(_batch(), layout)
    w = jax.device_put(_W, NamedSharding(_mesh(), _P()))
    gradtest.assert_autodiff_matches(_local_loss, w, x)
    assert x.sharding == layout


def test_a_variant_is_checked_on_every_device():
    report = gradtest.assert_autodiff_matches(
        _local_loss, _W, _batch(), variant=_replicated
    )
    assert any(f"{len(accelerators())} devices" in note for note in report.notes)


def _replicated(fn):
    """Runs a function on every device, as Chex's pmap variant does."""
    count = len(accelerators())

    def on_all(*args):
        return jax.pmap(fn)(*jax.tree.map(lambda x: jnp.stack([x] * count), args))

    return on_all
