"""Gradients accumulated over micro-batches: a Flax training step that fits in memory.

A batch of sentences is too large for one pass, so a step takes it in micro-batches. The
sentences are padded and the last micro-batch is smaller, and the mean of the
micro-batches' means is then not the batch's mean: the network trains all the same, on
another loss. Two right steps are asserted to have the gradient of the full batch, and
so is `optax.MultiSteps`; three mistakes that are easy to make are refused.

Run with `python examples/accumulation.py`. It exits with 0 where the right ones pass
and the wrong ones are refused.
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
from rich.console import Console
from rich.table import Table

import gradtest
import gradtest.optax

PyTree = Any
Batch = dict[str, jax.Array]
# Takes the parameters and the whole batch; returns the gradients.
Accumulate = Callable[[PyTree, Batch], PyTree]

ROWS, MICRO, WORDS, VOCABULARY = 22, 8, 6, 12


class Tagger(nn.Module):
    """Tags each word of a sentence."""

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, 8)(words)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(3)(x)


def summed_loss(params: PyTree, batch: Batch) -> jax.Array:
    """The cross entropies of all words, padding left out, added."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        Tagger().apply(params, batch["words"]), batch["tags"]
    )
    return jnp.sum(jnp.where(batch["mask"], losses, 0))


def loss(params: PyTree, batch: Batch) -> jax.Array:
    """The mean over all words of the batch: what every step is to minimise."""
    return summed_loss(params, batch) / jnp.sum(batch["mask"])


def make_batch(rows: int = ROWS, *, padded: bool = True) -> Batch:
    """Draws sentences; the later ones are longer."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, VOCABULARY, (rows, WORDS))
    lengths = 1 + np.arange(rows) * WORDS // rows if padded else np.full(rows, WORDS)
    return {
        "words": jnp.asarray(words),
        "tags": jnp.asarray((words + words[:, :1]) % 3),
        "mask": jnp.asarray(np.arange(WORDS) < lengths[:, None]),
    }


def micro_batches(batch: Batch) -> list[Batch]:
    """Cuts a batch; the last micro-batch is smaller where it does not divide."""
    rows = len(batch["words"])
    return [
        jax.tree.map(lambda x, low=low: x[low : low + MICRO], batch)
        for low in range(0, rows, MICRO)
    ]


def added(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


# --- right --------------------------------------------------------------------------


def sums_and_count(params: PyTree, batch: Batch) -> PyTree:
    """Accumulates the gradient of the sum, and divides once by all words."""
    pieces = micro_batches(batch)
    total = added([jax.grad(summed_loss)(params, piece) for piece in pieces])
    return jax.tree.map(lambda g: g / jnp.sum(batch["mask"]), total)


def weighed_means(params: PyTree, batch: Batch) -> PyTree:
    """Weighs the gradient of each mean by the words that it is a mean of."""
    parts = []
    for piece in micro_batches(batch):
        weight = jnp.sum(piece["mask"]) / jnp.sum(batch["mask"])
        gradient = jax.grad(loss)(params, piece)
        parts.append(jax.tree.map(lambda g, w=weight: w * g, gradient))
    return added(parts)


# --- mistakes -----------------------------------------------------------------------


def mean_of_means(params: PyTree, batch: Batch) -> PyTree:
    """A mistake: micro-batches count alike, however many words they have."""
    pieces = micro_batches(batch)
    total = added([jax.grad(loss)(params, piece) for piece in pieces])
    return jax.tree.map(lambda g: g / len(pieces), total)


def remainder_dropped(params: PyTree, batch: Batch) -> PyTree:
    """A mistake: the loop goes over whole micro-batches alone."""
    whole = [piece for piece in micro_batches(batch) if len(piece["words"]) == MICRO]
    words = sum(jnp.sum(piece["mask"]) for piece in whole)
    total = added([jax.grad(summed_loss)(params, piece) for piece in whole])
    return jax.tree.map(lambda g: g / words, total)


def kept_in_bfloat16(params: PyTree, batch: Batch) -> PyTree:
    """A mistake: the accumulator is narrower than what is added to it."""
    total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bfloat16), params)
    for piece in micro_batches(batch):
        gradient = jax.grad(summed_loss)(params, piece)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)
    words = jnp.sum(batch["mask"])
    return jax.tree.map(lambda t, x: t.astype(x.dtype) / words, total, params)


RIGHT: dict[str, Accumulate] = {
    "sums, divided once": sums_and_count,
    "means, weighed by words": weighed_means,
}
MISTAKES: dict[str, Accumulate] = {
    "the mean of the micro-batches' means": mean_of_means,
    "the last micro-batch dropped": remainder_dropped,
    "an accumulator in bfloat16": kept_in_bfloat16,
}


@functools.cache
def initial_params() -> PyTree:
    return jax.jit(Tagger().init)(jax.random.key(0), make_batch()["words"])


def assert_accumulates(accumulate: Any, batch: Batch | None = None) -> gradtest.Report:
    """Asserts that what is accumulated is the gradient of the full batch.

    Args:
      accumulate: A function of the parameters and the batch, or a transformation.
      batch: The batch; None for one that does not divide, of padded sentences.

    Raises:
      gradtest.GradientMismatch: It is not.
    """
    return gradtest.optax.assert_accumulated_grads_match(
        accumulate,
        loss,
        initial_params(),
        make_batch() if batch is None else batch,
    )


def multi_steps() -> optax.MultiSteps:
    """Adam, after every third micro-batch; it averages their gradients alike."""
    return optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3)


def cause(error: gradtest.GradientMismatch) -> str:
    """Returns what the message says of the likeliest cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    (line,) = [line for line in lines if line.startswith("Likely cause: ")]
    return line.removeprefix("Likely cause: ")


def main() -> int:
    equal = make_batch(24, padded=False)
    rows: list[tuple[str, Any, Batch | None, bool]] = [
        *((name, each, None, True) for name, each in RIGHT.items()),
        ("optax.MultiSteps, equal micro-batches", multi_steps(), equal, True),
        *((name, each, None, False) for name, each in MISTAKES.items()),
        ("optax.MultiSteps, padded and uneven", multi_steps(), None, False),
    ]
    table, surprises = Table("accumulation", "verdict", "likely cause"), 0
    for name, accumulate, batch, is_right in rows:
        try:
            assert_accumulates(accumulate, batch)
        except gradtest.GradientMismatch as error:
            table.add_row(name, "FAIL", cause(error))
            surprises += is_right
        else:
            table.add_row(name, "PASS", "")
            surprises += not is_right
    Console().print(table)
    return int(surprises > 0)


if __name__ == "__main__":
    sys.exit(main())
