"""Neural networks whose gradients are right, as their users write them.

Each `make(dtype)` returns `(loss, args)`. Flax modules compute in `dtype` and keep
float32 parameters where that is the custom; the others have everything in `dtype`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

Made = tuple[Callable[..., Any], tuple[Any, ...]]
PyTree = Any


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _integers(seed: int, shape: tuple[int, ...], below: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, below)


def _mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class _Cnn(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), dtype=self.dtype)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), dtype=self.dtype)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(32, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, dtype=self.dtype)(x)


def make_cnn(dtype: Any) -> Made:
    """Convolutions, ReLU and max pooling under a softmax cross-entropy."""
    model = _Cnn(dtype)
    images, labels = _normal(0, (4, 12, 12, 3)), _integers(1, (4,), 10)

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        return _mean_cross_entropy(model.apply(params, images), labels)

    return loss, (model.init(jax.random.key(2), images), images, labels)


class _Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm(dtype=self.dtype)(x)
        mask = nn.make_causal_mask(x[..., 0])
        attend = nn.MultiHeadDotProductAttention(4, dtype=self.dtype)
        x = x + attend(normed, mask=mask)
        hidden = nn.Dense(64, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(hidden))


class _Transformer(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(50, 32, dtype=self.dtype)(tokens)
        for _ in range(2):
            x = nn.remat(_Block)(self.dtype)(x)
        return nn.Dense(50, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


def make_transformer(dtype: Any) -> Made:
    """Two rematerialised decoder blocks over integer tokens, an argument of the loss.

    A key's bias moves every score alike, so its gradient is zero but for rounding.
    """
    model = _Transformer(dtype)
    tokens = _integers(3, (2, 12), 50)

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = model.apply(params, tokens[:, :-1]).astype(jnp.float32)
        return _mean_cross_entropy(logits, tokens[:, 1:])

    return loss, (model.init(jax.random.key(4), tokens), tokens)


def make_lstm(dtype: Any) -> Made:
    """An LSTM over ten steps: `nn.RNN` scans the cell."""
    model = nn.RNN(nn.OptimizedLSTMCell(8, dtype=dtype))
    x, y = _normal(5, (3, 10, 4), dtype), _normal(6, (3, 10, 8), dtype)
    params = model.init(jax.random.key(7), x)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model.apply(params, x) - y) ** 2)

    return loss, (jax.tree.map(lambda leaf: leaf.astype(dtype), params), x, y)


class _NormedMlp(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (16, 16):
            x = nn.Dense(width, dtype=self.dtype)(x)
            x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
            x = nn.Dropout(0.3, deterministic=False)(nn.tanh(x))
        return nn.Dense(3, dtype=self.dtype)(x)


def make_normed_mlp(dtype: Any) -> Made:
    """Batch normalisation in training mode, and dropout from a key argument.

    The gradients of the running statistics are exactly zero; those of the biases before
    a normalisation are zero but for rounding.
    """
    model = _NormedMlp(dtype)
    x, labels = _normal(8, (8, 5)), _integers(9, (8,), 3)
    keys = {"params": jax.random.key(10), "dropout": jax.random.key(11)}
    variables = model.init(keys, x)

    def loss(
        params: PyTree, stats: PyTree, x: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return _mean_cross_entropy(logits, labels)

    stats = variables["batch_stats"]
    return loss, (variables["params"], stats, x, labels, jax.random.key(12))


class _NnxMlp(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(5, 16, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.second = nnx.Linear(16, 3, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.swish(self.first(x)))


def make_nnx_mlp(dtype: Any) -> Made:
    """An NNX module, whose parameter state is the argument."""
    graph, params = nnx.split(_NnxMlp(dtype, nnx.Rngs(13)), nnx.Param)
    x, y = _normal(14, (6, 5), dtype), _normal(15, (6, 3), dtype)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    return loss, (params, x, y)


def make_wide_relu(dtype: Any) -> Made:
    """A million ReLU units: every direction crosses kinks at the usual steps."""
    batch, inputs, width, outputs = 256, 64, 4096, 8
    params = {
        "first": _normal(16, (inputs, width), dtype) / inputs**0.5,
        "bias": jnp.zeros((width,), dtype),
        "second": _normal(17, (width, outputs), dtype) / width**0.5,
    }
    x, y = _normal(18, (batch, inputs), dtype), _normal(19, (batch, outputs), dtype)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    return loss, (params, x, y)


def make_ctc_loss(dtype: Any) -> Made:
    """Connectionist temporal classification: a scan over log-probabilities."""
    labels = 1 + _integers(20, (2, 3), 5)
    no_padding, label_padding = jnp.zeros((2, 8)), jnp.zeros((2, 3))

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.ctc_loss(logits, no_padding, labels, label_padding).mean()

    return loss, (_normal(21, (2, 8, 6), dtype), labels)


def make_stopped_rnn(dtype: Any) -> Made:
    """A scanned RNN that stops a part of its recurrent gradient."""
    params = {"w": _normal(22, (6, 6), dtype) / 3, "u": _normal(23, (4, 6), dtype) / 2}
    inputs = _normal(24, (7, 3, 4), dtype)

    def loss(params: PyTree, inputs: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            stopped = jax.lax.stop_gradient(state)
            state = jnp.tanh(state @ params["w"] + x @ params["u"] + stopped / 4)
            return state, state

        start = jnp.zeros((3, 6), inputs.dtype)
        return jnp.mean(jax.lax.scan(step, start, inputs)[1] ** 2)

    return loss, (params, inputs)


def _regression(dtype: Any) -> tuple[PyTree, jax.Array, jax.Array]:
    params = {"w": _normal(25, (3, 4), dtype), "b": _normal(26, (4,), dtype)}
    return params, _normal(27, (8, 3), dtype), _normal(28, (8, 4), dtype)


def _regression_loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def make_pmapped_loss(dtype: Any) -> Made:
    """A loss averaged by `pmean` over four devices of a `pmap`."""
    params, x, y = _regression(dtype)

    @functools.partial(
        jax.pmap, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:4]
    )
    def parallel(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(_regression_loss(params, x, y), "data")

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return parallel(params, x, y)[0]

    return loss, (params, x.reshape(4, 2, 3), y.reshape(4, 2, 4))


def make_shard_mapped_loss(dtype: Any) -> Made:
    """A loss averaged by `pmean` over four devices of a `shard_map`."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=auto)
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
    )
    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(_regression_loss(params, x, y), "data")

    return loss, _regression(dtype)
