"""A job of two processes with four devices each, as the checks here find it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradtest

RANK = jax.process_index()
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
ROWS = np.sin(np.arange(64, dtype=np.float32)).reshape(16, 4)
PARAMS = {"w": np.linspace(-1, 1, 4).astype(np.float32), "b": np.float32(0.3)}


def over_all(value, *axes):
    """Lays a value over the devices of both processes, split along these axes."""
    value = np.asarray(value)
    sharding = NamedSharding(MESH, P(*axes))
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def replicated(tree):
    """Puts a copy of a tree on every device of both processes."""
    return jax.tree.map(over_all, tree)


def loss(params, x):
    """The loss of a small network, over the whole batch."""
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def gradient(params, x):
    """Its gradient by hand."""
    y = jnp.tanh(x @ params["w"] + params["b"])
    d = 2 * y * (1 - y**2) / y.size
    return {"w": x.T @ d, "b": jnp.sum(d)}


def doubled(params, x):
    """Its gradient, twice too large at one leaf."""
    right = gradient(params, x)
    return {"w": 2 * right["w"], "b": right["b"]}


def from_all(number):
    """Returns a number of each process."""
    return multihost_utils.process_allgather(np.asarray(number)).tolist()


def mismatch_everywhere(check):
    """Asserts that a check raises on both processes, with one message; returns it."""
    with pytest.raises(gradtest.GradientMismatch) as raised:
        check()
    message = str(raised.value)
    digests = from_all(np.uint32(zlib.crc32(message.encode())))
    assert digests[0] == digests[1], message
    assert raised.value.report.verdict is gradtest.Verdict.FAIL
    return message
