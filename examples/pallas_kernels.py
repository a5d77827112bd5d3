"""Three Pallas kernels with hand-written backward passes, as training code has them.

Each is a `jax.custom_vjp` of two or more kernels: what the forward pass leaves behind,
the backward pass takes up. Nothing divides evenly: the last block of rows, classes or
positions reaches beyond its array, so what is read there has to be masked.

They are written for the order of a TPU, where the last axis of a grid runs first and
a step finds what the step before it left in scratch memory. Elsewhere they run in the
interpreter. Run with `python examples/pallas_kernels.py`: gradtest audits the rules of
all three, in float64 on a CPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import gradtest
from gradtest import domains

Ref = Any  # A block of memory that a kernel reads or writes.
Saved = tuple[Array, ...]

BLOCK = 8
EPSILON = 1e-6
# Stands for minus infinity, but can be subtracted from itself.
LEAST = -1e30


def call(
    kernel: Callable[..., None],
    like: Sequence[Any],
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[tuple[int, int]] = (),
) -> Callable[..., Sequence[Array]]:
    """Calls a kernel for results `like` these, with float32 scratch of these shapes."""
    return pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in like],
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        interpret=jax.default_backend() != "tpu",
    )


def one_each(rows: int) -> jax.ShapeDtypeStruct:
    """A column with one float32 number for each row, like statistics are kept in."""
    return jax.ShapeDtypeStruct((rows, 1), jnp.float32)


def positions(block: Array, shape: tuple[int, int], along: int) -> Array:
    """Returns where the entries of a block lie in the whole array, along one axis."""
    return block * BLOCK + lax.broadcasted_iota(jnp.int32, shape, along)


def load(ref: Ref, block: Array, length: int) -> Array:
    """Reads a block of rows in float32, with zeros where the array has ended."""
    rows = ref[...].astype(jnp.float32)
    return jnp.where(positions(block, rows.shape, 0) < length, rows, 0.0)


def clear(*refs: Ref) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def store(ref: Ref, value: Array) -> None:
    ref[...] = value.astype(ref.dtype)


# Softmax cross entropy: the classes are visited block by block, and the logarithm of
# the sum is kept for the backward pass.


def loss_kernel(
    logits_ref: Ref, labels_ref: Ref, loss_ref: Ref, total_ref: Ref,
    top: Ref, total: Ref, hit: Ref, *, classes: int,
) -> None:  # fmt: skip
    block, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(block == 0)
    def _() -> None:
        clear(total, hit)
        top[...] = jnp.full_like(top, LEAST)

    logits = logits_ref[...].astype(jnp.float32)
    at = positions(block, logits.shape, 1)
    logits = jnp.where(at < classes, logits, LEAST)
    highest = jnp.maximum(top[...], logits.max(axis=1, keepdims=True))
    summed = jnp.exp(logits - highest).sum(axis=1, keepdims=True)
    total[...] = total[...] * jnp.exp(top[...] - highest) + summed
    top[...] = highest
    own = jnp.where(at == labels_ref[...], logits, 0.0)
    hit[...] += own.sum(axis=1, keepdims=True)

    @pl.when(block == last)
    def _() -> None:
        total_ref[...] = top[...] + jnp.log(total[...])
        store(loss_ref, top[...] + jnp.log(total[...]) - hit[...])


def loss_grad_kernel(
    logits_ref: Ref, labels_ref: Ref, total_ref: Ref, cotangent_ref: Ref, grad_ref: Ref
) -> None:
    logits = logits_ref[...].astype(jnp.float32)
    softmax = jnp.exp(logits - total_ref[...])
    is_label = positions(pl.program_id(1), logits.shape, 1) == labels_ref[...]
    store(grad_ref, (softmax - is_label) * cotangent_ref[...].astype(jnp.float32))


TILE = pl.BlockSpec((BLOCK, BLOCK), lambda i, j: (i, j))
COLUMN = pl.BlockSpec((BLOCK, 1), lambda i, j: (i, 0))


def cross_entropy_forward(
    logits: Array, labels: Array, classes: int | None = None
) -> tuple[Array, Saved]:
    """Returns the losses and what the backward pass needs; `classes` of them count."""
    rows, width = logits.shape
    loss, total = call(
        functools.partial(loss_kernel, classes=width if classes is None else classes),
        [jax.ShapeDtypeStruct((rows, 1), logits.dtype), one_each(rows)],
        (pl.cdiv(rows, BLOCK), pl.cdiv(width, BLOCK)),
        [TILE, COLUMN],
        [COLUMN, COLUMN],
        [(BLOCK, 1)] * 3,
    )(logits, labels[:, None])
    return loss[:, 0], (logits, labels, total)


def cross_entropy_backward(saved: Saved, cotangent: Array) -> tuple[Array, None]:
    logits, labels, total = saved
    rows, width = logits.shape
    (grad,) = call(
        loss_grad_kernel,
        [logits],
        (pl.cdiv(rows, BLOCK), pl.cdiv(width, BLOCK)),
        [TILE, COLUMN, COLUMN, COLUMN],
        [TILE],
    )(logits, labels[:, None], total, cotangent[:, None])
    return grad, None


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> Array:
    """Softmax cross entropy of every row of logits[rows, classes] and its label."""
    return cross_entropy_forward(logits, labels)[0]


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)


# RMS normalization: the backward pass sums the weight's gradient over blocks of rows.


def norm_kernel(x_ref: Ref, weight_ref: Ref, y_ref: Ref, inverse_ref: Ref) -> None:
    x = x_ref[...].astype(jnp.float32)
    inverse = lax.rsqrt((x * x).mean(axis=1, keepdims=True) + EPSILON)
    inverse_ref[...] = inverse
    store(y_ref, x * inverse * weight_ref[...])


def norm_grad_kernel(
    x_ref: Ref, weight_ref: Ref, inverse_ref: Ref, cotangent_ref: Ref,
    x_grad_ref: Ref, weight_grad_ref: Ref, total: Ref, *, rows: int, mean_of: int,
) -> None:  # fmt: skip
    block, last = pl.program_id(0), pl.num_programs(0) - 1

    @pl.when(block == 0)
    def _() -> None:
        clear(total)

    inverse = load(inverse_ref, block, rows)
    normed = load(x_ref, block, rows) * inverse
    cotangent = load(cotangent_ref, block, rows)
    total[...] += (cotangent * normed).sum(axis=0, keepdims=True)
    through = cotangent * weight_ref[...].astype(jnp.float32)
    along = (through * normed).sum(axis=1, keepdims=True) / mean_of
    store(x_grad_ref, (through - normed * along) * inverse)

    @pl.when(block == last)
    def _() -> None:
        store(weight_grad_ref, total[...])


def norm_specs(width: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of rows, of the numbers kept for them, and of the one weight."""
    return (
        pl.BlockSpec((BLOCK, width), lambda i: (i, 0)),
        pl.BlockSpec((BLOCK, 1), lambda i: (i, 0)),
        pl.BlockSpec((1, width), lambda i: (0, 0)),
    )


def rms_norm_forward(x: Array, weight: Array) -> tuple[Array, Saved]:
    rows, width = x.shape
    block, column, once = norm_specs(width)
    y, inverse = call(
        norm_kernel,
        [x, one_each(rows)],
        (pl.cdiv(rows, BLOCK),),
        [block, once],
        [block, column],
    )(x, weight[None])
    return y, (x, weight, inverse)


def rms_norm_backward(
    saved: Saved, cotangent: Array, mean_of: int | None = None
) -> tuple[Array, Array]:
    """Returns both gradients; the mean of the squares is one of `mean_of` entries."""
    x, weight, inverse = saved
    rows, width = x.shape
    block, column, once = norm_specs(width)
    x_grad, weight_grad = call(
        functools.partial(norm_grad_kernel, rows=rows, mean_of=mean_of or width),
        [x, weight[None]],
        (pl.cdiv(rows, BLOCK),),
        [block, once, column, block],
        [block, once],
        [(1, width)],
    )(x, weight[None], inverse, cotangent)
    return x_grad, weight_grad[0]


@jax.custom_vjp
def rms_norm(x: Array, weight: Array) -> Array:
    """Rows of x[rows, width] over their root mean square, times weight[width]."""
    return rms_norm_forward(x, weight)[0]


rms_norm.defvjp(rms_norm_forward, rms_norm_backward)


# Causal attention: no kernel ever holds all scores. The backward kernels make the
# probabilities anew from the kept logarithms of their sums.


def tile_scores(
    query: Array, key: Array, at: tuple[Array, Array], length: int
) -> tuple[Array, Array]:
    """Returns the scores of blocks of queries and keys, and which of them count."""
    scores = jnp.dot(query, key.T) * query.shape[1] ** -0.5
    row, column = positions(at[0], scores.shape, 0), positions(at[1], scores.shape, 1)
    seen = (column <= row) & (column < length)
    return jnp.where(seen, scores, LEAST), seen


def attention_kernel(
    query_ref: Ref, key_ref: Ref, value_ref: Ref, out_ref: Ref, total_ref: Ref,
    top: Ref, total: Ref, summed: Ref, *, length: int,
) -> None:  # fmt: skip
    at, last = (pl.program_id(0), pl.program_id(1)), pl.num_programs(1) - 1

    @pl.when(at[1] == 0)
    def _() -> None:
        clear(total, summed)
        top[...] = jnp.full_like(top, LEAST)

    @pl.when(at[1] <= at[0])
    def _() -> None:
        query, key = load(query_ref, at[0], length), load(key_ref, at[1], length)
        scores, _ = tile_scores(query, key, at, length)
        highest = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - highest)
        # What was summed so far was relative to the maximum so far.
        rescale = jnp.exp(top[...] - highest)
        total[...] = total[...] * rescale + weights.sum(axis=1, keepdims=True)
        value = load(value_ref, at[1], length)
        summed[...] = summed[...] * rescale + jnp.dot(weights, value)
        top[...] = highest

    @pl.when(at[1] == last)
    def _() -> None:
        store(out_ref, summed[...] / total[...])
        total_ref[...] = top[...] + jnp.log(total[...])


def tile_grads(
    refs: Sequence[Ref], at: tuple[Array, Array], length: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Returns query, key, cotangent, probabilities and the gradient of the scores."""
    query_ref, key_ref, value_ref, *others = refs
    query, key = load(query_ref, at[0], length), load(key_ref, at[1], length)
    value = load(value_ref, at[1], length)
    cotangent, total, along = (load(ref, at[0], length) for ref in others)
    scores, seen = tile_scores(query, key, at, length)
    weights = jnp.where(seen, jnp.exp(scores - total), 0.0)
    grads = weights * (jnp.dot(cotangent, value.T) - along)
    return query, key, cotangent, weights, grads * query.shape[1] ** -0.5


def query_grad_kernel(*refs: Ref, length: int) -> None:
    *inputs, grad_ref, summed = refs
    at, last = (pl.program_id(0), pl.program_id(1)), pl.num_programs(1) - 1

    @pl.when(at[1] == 0)
    def _() -> None:
        clear(summed)

    @pl.when(at[1] <= at[0])
    def _() -> None:
        _, key, _, _, grads = tile_grads(inputs, at, length)
        summed[...] += jnp.dot(grads, key)

    @pl.when(at[1] == last)
    def _() -> None:
        store(grad_ref, summed[...])


def key_value_grad_kernel(*refs: Ref, length: int) -> None:
    """Here the grid's last axis, the one that is summed over, is that of queries."""
    *inputs, key_grad_ref, value_grad_ref, for_key, for_value = refs
    at, last = (pl.program_id(1), pl.program_id(0)), pl.num_programs(1) - 1

    @pl.when(at[0] == 0)
    def _() -> None:
        clear(for_key, for_value)

    @pl.when(at[1] <= at[0])
    def _() -> None:
        query, _, cotangent, weights, grads = tile_grads(inputs, at, length)
        for_key[...] += jnp.dot(grads.T, query)
        for_value[...] += jnp.dot(weights.T, cotangent)

    @pl.when(at[0] == last)
    def _() -> None:
        store(key_grad_ref, for_key[...])
        store(value_grad_ref, for_value[...])


def rows_of(width: int, axis: int) -> pl.BlockSpec:
    """Blocks of rows that follow one axis of the grid."""
    return pl.BlockSpec((BLOCK, width), lambda *at: (at[axis], 0))


def attention_forward(query: Array, key: Array, value: Array) -> tuple[Array, Saved]:
    length, width = query.shape
    blocks = pl.cdiv(length, BLOCK)
    out, total = call(
        functools.partial(attention_kernel, length=length),
        [query, one_each(length)],
        (blocks, blocks),
        [rows_of(width, 0), rows_of(width, 1), rows_of(width, 1)],
        [rows_of(width, 0), rows_of(1, 0)],
        [(BLOCK, 1), (BLOCK, 1), (BLOCK, width)],
    )(query, key, value)
    return out, (query, key, value, out, total)


def attention_backward(
    saved: Saved, cotangent: Array, query_blocks: int | None = None
) -> tuple[Array, Array, Array]:
    """Returns all gradients; keys and values sum theirs over `query_blocks` blocks."""
    query, key, value, out, total = saved
    length, width = query.shape
    blocks = pl.cdiv(length, BLOCK)
    product = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
    along = product.sum(axis=1, keepdims=True)
    inputs = (query, key, value, cotangent, total, along)

    def specs(own: int, other: int) -> list[pl.BlockSpec]:
        of_queries, of_keys = rows_of(width, own), rows_of(width, other)
        return [of_queries, of_keys, of_keys, of_queries, *[rows_of(1, own)] * 2]

    (query_grad,) = call(
        functools.partial(query_grad_kernel, length=length),
        [query],
        (blocks, blocks),
        specs(0, 1),
        [rows_of(width, 0)],
        [(BLOCK, width)],
    )(*inputs)
    key_grad, value_grad = call(
        functools.partial(key_value_grad_kernel, length=length),
        [key, value],
        (blocks, blocks if query_blocks is None else query_blocks),
        specs(1, 0),
        [rows_of(width, 0)] * 2,
        [(BLOCK, width)] * 2,
    )(*inputs)
    return query_grad, key_grad, value_grad


@jax.custom_vjp
def attention(query: Array, key: Array, value: Array) -> Array:
    """Causal attention of one head, float[length, width]; `jax.vmap` gives more."""
    return attention_forward(query, key, value)[0]


attention.defvjp(attention_forward, attention_backward)


# Three blocks, the last one with 3 rows, classes or positions.
LENGTH = 2 * BLOCK + 3


def losses(
    logits: Array, labels: Array, x: Array, weight: Array, *heads: Array
) -> tuple[Array, Array, Array]:
    """Calls each kernel once."""
    return cross_entropy(logits, labels), rms_norm(x, weight), attention(*heads)


def arguments() -> tuple[Any, ...]:
    """Where the kernels are checked: random numbers, drawn when they are needed."""
    labels = jnp.arange(LENGTH) % 5
    rows, head = domains.normal((LENGTH, 6)), domains.normal((LENGTH, 4))
    logits = domains.normal((LENGTH, 13))
    return logits, labels, rows, domains.normal(6), head, head, head


def main() -> None:
    """Audits the rules of all three kernels, and prints what was found."""
    # Kernels can't be differentiated a second time: their rules are checked to first.
    print(gradtest.assert_custom_rules_match(losses, *arguments(), order=1))


if __name__ == "__main__":
    main()
