"""Data-parallel steps, right and wrong, each with what a failure must say.

A step takes the parameters and the full batch, as its loss does. `devices` is how many
it runs on; the mesh axis is "data", and beside it "model".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, WIDTH = 16, 3
PARAMS = {"w": jnp.arange(1.0, 4.0), "b": jnp.float32(0.5)}
BATCH = {
    "x": jnp.sin(jnp.arange(ROWS * WIDTH, dtype=jnp.float32)).reshape(ROWS, WIDTH),
    "y": jnp.cos(jnp.arange(ROWS, dtype=jnp.float32)),
}
# Of every four rows one, two, three or all count: no two devices have equal parts.
MASK = jnp.array([k % 4 <= k // 4 for k in range(ROWS)], jnp.float32)
MASKED = BATCH | {"mask": MASK}


def mesh_of(devices: int, model: int = 1) -> jax.sharding.Mesh:
    chosen = np.array(jax.devices()[: devices * model])
    if model == 1:
        return jax.sharding.Mesh(chosen, ("data",))
    return jax.sharding.Mesh(chosen.reshape(devices, model), ("data", "model"))


def loss(params, batch):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(error**2)


def summed_loss(params, batch):
    return loss(params, batch) * batch["x"].shape[0]


def masked_loss(params, batch):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.sum(batch["mask"] * error**2) / jnp.sum(batch["mask"])


def pmean(tree):
    return lax.pmean(tree, "data")


def psum(tree):
    return lax.psum(tree, "data")


def untouched(tree):
    return tree


def under_pmap(local: Callable[..., Any], devices: int, out_axes: int | None = 0):
    mapped = jax.pmap(
        local, axis_name="data", in_axes=(None, 0), out_axes=out_axes,
        devices=jax.devices()[:devices],
    )  # fmt: skip

    def step(params, batch):
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        return mapped(params, parts)

    return step


def under_shard_map(local: Callable[..., Any], devices: int, check_vma: bool):
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh_of(devices),
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def reduced(reduce: Callable[..., Any], of: Callable[..., Any] = loss):
    """The step of one device: the gradient on its part, reduced."""

    def local(params, batch):
        return reduce(jax.grad(of)(params, batch))

    return local


@dataclasses.dataclass(frozen=True)
class Step:
    """One step, what it is compared with, and what is wrong with it, if anything.

    Attributes:
      name: What the step is.
      make: Returns the step for a number of devices.
      says: What the message must hold, each a piece of text; empty for a right step.
        `{n}` and `{nn}` stand for the number of devices and its square.
      loss: The full batch's loss.
      batch: The batch.
    """

    name: str
    make: Callable[[int], Callable[..., Any]]
    says: tuple[str, ...] = ()
    loss: Callable[..., Any] = loss
    batch: Any = dataclasses.field(default_factory=lambda: BATCH)


_SUMMED = "already summed over the axis"
_MISSING = ("the {n} devices disagree", "their mean is the full batch's", "lax.pmean")

# The experiment: three reductions under three mappings.
REDUCTIONS = [
    Step("pmap, pmean", lambda n: under_pmap(reduced(pmean), n)),
    Step(
        "pmap, psum", lambda n: under_pmap(reduced(psum), n),
        ("{n} times too large", "the size of mesh axis 'data'"),
    ),
    Step("pmap, nothing", lambda n: under_pmap(reduced(untouched), n), _MISSING),
    Step(
        "shard_map, pmean", lambda n: under_shard_map(reduced(pmean), n, True),
        ("{n} times too large", "the size of mesh axis 'data'", _SUMMED),
    ),
    Step(
        "shard_map, psum", lambda n: under_shard_map(reduced(psum), n, True),
        ("{nn} times too large", "the square of the size of mesh axis 'data'", _SUMMED),
    ),
    Step(
        "shard_map, nothing", lambda n: under_shard_map(reduced(untouched), n, True),
        ("{n} times too large", "the size of mesh axis 'data'", _SUMMED),
    ),
    Step(
        "unchecked shard_map, pmean",
        lambda n: under_shard_map(reduced(pmean), n, False),
    ),
    Step(
        "unchecked shard_map, psum",
        lambda n: under_shard_map(reduced(psum), n, False),
        ("{n} times too large", "the size of mesh axis 'data'"),
    ),
    Step(
        "unchecked shard_map, nothing",
        lambda n: under_shard_map(reduced(untouched), n, False), _MISSING,
    ),
]  # fmt: skip


def _mean_loss_inside(n):
    def local(params, batch):
        return jax.value_and_grad(lambda p: pmean(loss(p, batch)))(params)

    return under_shard_map(local, n, True)


def _divided(n):
    def local(params, batch):
        return jax.tree.map(lambda g: g / n, jax.grad(loss)(params, batch))

    return under_shard_map(local, n, True)


def _with_loss(n):
    def local(params, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return value, pmean(gradients)

    return under_pmap(local, n)


def _with_aux(n):
    def local(params, batch):
        def with_aux(p, b):
            return loss(p, b), {"rows": b["x"].shape[0]}

        found = jax.value_and_grad(with_aux, has_aux=True)(params, batch)
        return pmean(found)

    return under_pmap(local, n)


def _sharded_jit(n):
    mesh = mesh_of(n)
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return jax.jit(
        jax.grad(loss), in_shardings=(replicated, split), out_shardings=replicated
    )


def _constrained(n):
    split = NamedSharding(mesh_of(n), P("data"))

    @jax.jit
    def step(params, batch):
        batch = jax.tree.map(lambda x: lax.with_sharding_constraint(x, split), batch)
        return jax.value_and_grad(loss)(params, batch)

    return step


def _masked(n):
    """Sums of errors and of rows, each reduced by itself."""

    def local(params, batch):
        total = psum(jnp.sum(batch["mask"]))

        def part(p):
            error = batch["x"] @ p["w"] + p["b"] - batch["y"]
            return jnp.sum(batch["mask"] * error**2) / total

        return psum(jax.grad(part)(params))

    return under_pmap(local, n)


def _accumulated(n):
    def local(params, batch):
        rows = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)

        def add(total, micro):
            gradients = jax.grad(loss)(params, micro)
            return jax.tree.map(jnp.add, total, gradients), None

        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
        return pmean(jax.tree.map(lambda g: g / 2, total))

    return under_pmap(local, n)


def _donating(n):
    mapped = jax.jit(under_shard_map(reduced(pmean), n, False), donate_argnums=(0, 1))
    return lambda params, batch: mapped(params, batch)


def _scattered(n):
    """A reduction by `psum_scatter` and `all_gather`, as optimiser sharding has it."""

    def local(params, batch):
        gradients = jax.grad(loss)(params, batch)

        def reduce(g):
            flat = jnp.resize(g.ravel(), (n * WIDTH,)) * (
                jnp.arange(n * WIDTH) < g.size
            )
            part = lax.psum_scatter(flat, "data", tiled=True) / n
            return lax.all_gather(part, "data", tiled=True)[: g.size].reshape(g.shape)

        return jax.tree.map(reduce, gradients)

    return under_shard_map(local, n, False)


RIGHT = [
    Step("mean of the loss inside of the gradient", _mean_loss_inside),
    Step("nothing but a division under check_vma", _divided),
    Step("each device's own loss beside the gradients", _with_loss),
    Step("a loss with auxiliary data", _with_aux),
    Step("sharded jit", _sharded_jit),
    Step("sharding constraints", _constrained),
    Step("sums over uneven masks", _masked, loss=masked_loss, batch=MASKED),
    Step("accumulated over micro-batches", _accumulated),
    Step("a step that donates its arguments", _donating),
    Step("scattered and gathered", _scattered),
    Step(
        "pmap that returns one device's",
        lambda n: under_pmap(reduced(pmean), n, out_axes=None),
    ),
    Step(
        "a sum over the batch",
        lambda n: under_pmap(reduced(psum, summed_loss), n), loss=summed_loss,
    ),
]  # fmt: skip


def _wrong_on(device: int, mapped: Callable[..., Any]):
    def make(n):
        def local(params, batch):
            gradients = pmean(jax.grad(loss)(params, batch))
            factor = jnp.where(lax.axis_index("data") == device % n, 1.5, 1.0)
            return jax.tree.map(lambda g: factor * g, gradients)

        return mapped(local, n)

    return make


def _mean_of_masked_means(n):
    return under_pmap(reduced(pmean, masked_loss), n)


def _first_alone(n):
    """Takes one device's gradients for all, as `unreplicate` does."""
    mapped = under_pmap(reduced(untouched), n)
    return lambda params, batch: jax.tree.map(lambda g: g[0], mapped(params, batch))


def _drops_rows(n):
    inner = under_pmap(reduced(pmean), n)

    def step(params, batch):
        kept = jax.tree.map(lambda x: x[: len(x) // n * n], batch)
        return inner(params, kept)

    return step


def _one_leaf_forgotten(n):
    def local(params, batch):
        gradients = jax.grad(loss)(params, batch)
        return {"w": pmean(gradients["w"]), "b": gradients["b"]}

    return under_pmap(local, n)


def _sharded_jit_of_a_sum(n):
    split = NamedSharding(mesh_of(n), P("data"))

    @jax.jit
    def step(params, batch):
        parts = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
        parts = jax.tree.map(lambda x: lax.with_sharding_constraint(x, split), parts)
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, parts)
        return jax.tree.map(lambda g: g.sum(axis=0), each)

    return step


def _one_part_lost(n):
    def local(params, batch):
        gradients = jax.grad(loss)(params, batch)
        counts = jnp.where(lax.axis_index("data") == 1, 0.0, 1.0)
        return pmean(jax.tree.map(lambda g: counts * g, gradients))

    return under_pmap(local, n)


def _guarded_mean(params, batch):
    """The mean of a part, 0 where all of it is masked."""
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.sum(batch["mask"] * error**2) / jnp.maximum(jnp.sum(batch["mask"]), 1)


# The last part of the batch is padding alone.
_PADDED = BATCH | {"mask": jnp.where(jnp.arange(ROWS) < 9, 1.0, 0.0)}
_ODD = jax.tree.map(lambda x: jnp.concatenate([x, x[:1] + 1]), BATCH)

WRONG = [
    Step(
        "one device wrong, pmap", _wrong_on(5, under_pmap),
        ("device ", "of {n} (counted from 0) is wrong", "1.5 times too large"),
    ),
    Step(
        "one device wrong, shard_map",
        _wrong_on(5, lambda f, n: under_shard_map(f, n, False)),
        ("device ", "of {n} (counted from 0) is wrong", "1.5 times too large"),
    ),
    Step(
        "mean of unequal masked means", _mean_of_masked_means,
        ("the mean of the gradients of {n} parts", "do not count alike", "lax.psum"),
        loss=masked_loss, batch=MASKED,
    ),
    Step(
        "one device's gradients for all", _first_alone,
        ("the first of {n} parts of the batch alone",),
    ),
    Step(
        "rows that do not divide are dropped", _drops_rows,
        ("the gradient of the first 16 of 17 rows",), batch=_ODD,
    ),
    Step(
        "a part that does not count",
        _one_part_lost,
        ("all parts of the batch but number 1 of {n}",),
    ),
    Step(
        "a part that is all masked",
        lambda n: under_pmap(reduced(pmean, _guarded_mean), n),
        ("the mean of the gradients of {n} parts", "do not count alike"),
        loss=masked_loss,
        batch=_PADDED,
    ),
    Step(
        "one leaf is not reduced", _one_leaf_forgotten,
        ("wrong at params['b']", *_MISSING),
    ),
    Step(
        "sharded jit that sums means", _sharded_jit_of_a_sum,
        ("{n} times too large", "the size of mesh axis 'data'"),
    ),
    Step(
        "the mean of a sum", lambda n: under_pmap(reduced(pmean, summed_loss), n),
        ("{n} times too small", "the size of mesh axis 'data'"), loss=summed_loss,
    ),
]  # fmt: skip
