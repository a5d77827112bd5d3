"""A process that is killed in the middle of a check, and one that waits for it.

    dying.py WHEN [ADDRESS RANK HEARTBEAT]

It dies "tracing", while the other waits for its answer, or "running", while the two
compute together. With an address it joins the job by itself, as under another launcher.
"""

import os
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

import gradtest

when = sys.argv[1]
if sys.argv[2:]:
    address, rank, heartbeat = sys.argv[2:]
    jax.distributed.initialize(
        address, 2, int(rank), heartbeat_timeout_seconds=int(heartbeat)
    )
assert jax.process_count() == 2


def die():
    """Ends the second process, as nothing in it can see or hinder."""
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def loss(x):
    """The function under test."""
    return jnp.sum(jnp.sin(x))


def gradient(x):
    """Its gradient."""
    if when == "tracing":
        die()
    return jnp.cos(x)


mesh = jax.make_mesh((jax.device_count(),), ("data",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
rows = np.arange(8, dtype=np.float32)
batch = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
if when == "running":
    gradtest.assert_grad_matches(loss, gradient, batch)  # compiles
    threading.Timer(0.5, die).start()
print("the check begins", flush=True)
gradtest.assert_grad_matches(loss, gradient, batch, trials=1_000_000)
print("the check has ended", flush=True)
