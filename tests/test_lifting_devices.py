"""Regions over several devices are lifted: rebuilt around their lifted bodies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.lifted import Row, assert_lifted, in_float64, lift

pytestmark = pytest.mark.devices


def _mesh(shape, names, kind):
    count = int(np.prod(shape))
    return jax.make_mesh(
        shape, names, devices=jax.devices()[:count], axis_types=(kind,) * len(shape)
    )


_P = jax.sharding.PartitionSpec
_AUTO, _EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
_ROWS = np.sin(np.arange(32, dtype=np.float32)).reshape(8, 4)


def _center(x):
    total = lax.psum(jnp.sum(jnp.sin(x)), "x")
    return jnp.exp(x) - total / 7


def _center_whole(x):
    return jnp.exp(x) - jnp.sum(jnp.sin(x)) / 7


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [_AUTO, _EXPLICIT])
def test_shard_map_is_lifted(kind, check_vma):
    mesh = _mesh((4,), ("x",), kind)
    fn = jax.shard_map(
        _center, mesh=mesh, in_specs=_P("x"), out_specs=_P("x"), check_vma=check_vma
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(_ROWS, _P("x"))
        found, islands = lift(fn, x)
    assert not islands
    np.testing.assert_allclose(
        found[0], in_float64(_center_whole, _ROWS)[0], rtol=1e-12
    )


def test_a_partial_manual_shard_map_is_lifted():
    mesh = _mesh((2, 2), ("x", "y"), _AUTO)
    fn = jax.shard_map(
        _center, mesh=mesh, in_specs=_P("x"), out_specs=_P("x"), axis_names={"x"}
    )
    assert_lifted(Row("shard_map", jax.jit(fn), (_ROWS,), _center_whole))


def test_a_shard_map_in_a_loop_is_lifted():
    mesh = _mesh((4,), ("x",), _AUTO)
    region = jax.shard_map(_center, mesh=mesh, in_specs=_P("x"), out_specs=_P("x"))

    def loop(fn, x):
        return lax.fori_loop(0, 2, lambda _, y: jnp.tanh(fn(y)), x)

    assert_lifted(
        Row(
            "shard_map",
            functools.partial(loop, region),
            (_ROWS,),
            functools.partial(loop, _center_whole),
        )
    )


def test_collectives_are_lifted():
    mesh = _mesh((4,), ("x",), _AUTO)

    def local(x):
        gathered = lax.all_gather(x, "x", tiled=True)
        shifted = lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
        scattered = lax.psum_scatter(gathered, "x", tiled=True)
        return shifted + scattered + lax.pmax(x, "x") * lax.axis_index("x")

    fn = jax.shard_map(
        local, mesh=mesh, in_specs=_P("x"), out_specs=_P("x"), check_vma=False
    )
    found, islands = lift(fn, _ROWS)
    wanted = in_float64(fn, _ROWS)
    assert not islands
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_pmap_is_lifted():
    fn = jax.pmap(
        lambda x: lax.pmean(jnp.sin(x), "x"), axis_name="x", devices=jax.devices()[:4]
    )
    x = _ROWS.reshape(4, 2, 4)
    (found,), islands = lift(fn, x)
    assert not islands
    wanted = np.sin(x.astype(float)).mean(0, keepdims=True).repeat(4, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_sharding_constraints_are_lifted():
    mesh = _mesh((4,), ("x",), _AUTO)
    sharding = jax.sharding.NamedSharding(mesh, _P("x"))

    def fn(x):
        return jnp.sin(lax.with_sharding_constraint(x, sharding)) * 2

    assert_lifted(Row("constraint", fn, (_ROWS,), lambda x: 2 * jnp.sin(x)))
