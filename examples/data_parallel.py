"""One gradient on eight devices: a training step by pmap, shard_map and sharded jit.

A Flax network with Optax learns to score the letters of words. The batch is split over
the devices, and the words are padded, so that no two devices have as many letters. Each
step is asserted to have the gradient of the full batch; four mistakes that are easy to
make, and that train all the same, are refused.

Run with `python examples/data_parallel.py`: it simulates eight devices on a CPU. It
exits with 0 where the right steps pass, train alike, and the wrong ones are refused.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import gradtest

PyTree = Any
Batch = dict[str, jax.Array]
# Takes the parameters and the whole batch; returns the loss and its gradients.
Step = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]

DEVICES = 8
ROWS, LETTERS, ALPHABET = 64, 10, 26
AXIS = "data"


class Reader(nn.Module):
    """Scores the letters of each word."""

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        x = nn.Embed(ALPHABET, 16)(words)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[..., 0]


def summed_loss(params: PyTree, batch: Batch) -> jax.Array:
    """The squared errors of all letters, padding left out, added."""
    errors = Reader().apply(params, batch["words"]) - batch["scores"]
    return jnp.sum(batch["mask"] * errors**2)


def loss(params: PyTree, batch: Batch) -> jax.Array:
    """The mean over all letters of the batch: what every step is to minimise."""
    return summed_loss(params, batch) / jnp.sum(batch["mask"])


def make_batch(seed: int) -> Batch:
    """Draws words of 1 to 10 letters; later rows have longer words."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, ALPHABET, (ROWS, LETTERS))
    lengths = 1 + np.arange(ROWS) * LETTERS // ROWS
    return {
        "words": jnp.asarray(words),
        "scores": jnp.asarray(np.cos(words / 4), jnp.float32),
        "mask": jnp.asarray(np.arange(LETTERS) < lengths[:, None], jnp.float32),
    }


# --- the step of one device ---------------------------------------------------------


def sums_reduced(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Reduces errors and letters apart, after the gradient was taken."""
    letters = lax.psum(jnp.sum(batch["mask"]), AXIS)
    summed = jax.value_and_grad(summed_loss)(params, batch)
    return jax.tree.map(lambda part: lax.psum(part, AXIS) / letters, summed)


def loss_reduced(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """Reduces inside of the function that is differentiated, as check_vma wants it."""

    def whole_loss(params: PyTree) -> jax.Array:
        total = lax.psum(summed_loss(params, batch), AXIS)
        return total / lax.psum(jnp.sum(batch["mask"]), AXIS)

    return jax.value_and_grad(whole_loss)(params)


def means_averaged(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """A mistake: each device divides by its own letters."""
    return lax.pmean(jax.value_and_grad(loss)(params, batch), AXIS)


def nothing_reduced(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
    """A mistake: each device keeps the gradient of its own words."""
    return jax.value_and_grad(loss)(params, batch)


# --- how it is spread over devices --------------------------------------------------

Local = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))


def by_pmap(local: Local) -> Step:
    """One row of results for each device: gradtest looks at all of them."""
    mapped = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0))

    def step(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        def split(x: jax.Array) -> jax.Array:
            return x.reshape(DEVICES, -1, *x.shape[1:])

        return mapped(params, jax.tree.map(split, batch))

    return step


def by_shard_map(local: Local, *, check_vma: bool) -> Step:
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(),
            in_specs=(P(), P(AXIS)),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def by_sharded_jit() -> Step:
    """The full batch's gradient as it is written; XLA splits the work."""
    split = NamedSharding(mesh(), P(AXIS))
    return jax.jit(jax.value_and_grad(loss), in_shardings=(None, split))


RIGHT: dict[str, Callable[[], Step]] = {
    "pmap": lambda: by_pmap(sums_reduced),
    "shard_map": lambda: by_shard_map(loss_reduced, check_vma=True),
    "shard_map, check_vma=False": lambda: by_shard_map(sums_reduced, check_vma=False),
    "sharded jit": by_sharded_jit,
}
MISTAKES: dict[str, Callable[[], Step]] = {
    "each device's own mean, averaged": lambda: by_pmap(means_averaged),
    "no reduction": lambda: by_pmap(nothing_reduced),
    "no reduction, unseen without check_vma": lambda: by_shard_map(
        nothing_reduced, check_vma=False
    ),
    "reduced twice: by JAX under check_vma, and by hand": lambda: by_shard_map(
        sums_reduced, check_vma=True
    ),
}

# --- training -----------------------------------------------------------------------


def first_of_each(tree: PyTree) -> PyTree:
    """Takes one device's copy, where a step returns one for each."""
    return jax.tree.map(lambda x: x[0], tree)


def train(step: Step, params: PyTree, steps: int = 30) -> float:
    """Returns the loss after some steps of Adam."""
    tx = optax.adam(1e-2)
    state = tx.init(params)
    for seed in range(steps):
        value, gradients = step(params, make_batch(seed))
        if value.ndim:
            gradients = first_of_each(gradients)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return float(loss(params, make_batch(steps)))


def assert_step(step: Step, params: PyTree, **options: Any) -> gradtest.Report:
    """Asserts that a step has the gradient of the full batch.

    Args:
      step: The step.
      params: Where the gradient is looked at.
      **options: Those of `gradtest.assert_parallel_grads_match`.

    Raises:
      gradtest.GradientMismatch: It has not, or not on every device.
    """
    return gradtest.assert_parallel_grads_match(
        step, loss, params, make_batch(0), **options
    )


@functools.cache
def initial_params() -> PyTree:
    return jax.jit(Reader().init)(jax.random.key(0), make_batch(0)["words"])


def cause(error: gradtest.GradientMismatch) -> str:
    """Returns what the message says of the likeliest cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    (line,) = [line for line in lines if line.startswith("Likely cause: ")]
    return line.removeprefix("Likely cause: ")


def main() -> int:
    params = initial_params()
    console = Console()
    table = Table("step", "verdict", "loss after 30 steps", "likely cause")
    surprises = 0
    losses = []
    for name, make in RIGHT.items():
        losses.append(train(make(), params))
        verdict = assert_step(make(), params).verdict.value
        table.add_row(name, verdict, f"{losses[-1]:.4f}", "")
    table.add_section()
    for name, make in MISTAKES.items():
        trained = f"{train(make(), params):.4f}"
        try:
            assert_step(make(), params)
        except gradtest.GradientMismatch as error:
            table.add_row(name, "FAIL", trained, cause(error))
        else:
            table.add_row(name, "PASS", trained, "")
            surprises += 1
    console.print(table)
    return int(surprises > 0 or np.ptp(losses) > 1e-3)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sys.exit(main())
