"""The models that the benchmarks check."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any
Loss = Callable[[PyTree, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Size:
    width: int
    layers: int
    heads: int
    vocabulary: int


_SIZES = {
    "650k": _Size(width=128, layers=3, heads=4, vocabulary=256),
    "11m": _Size(width=384, layers=6, heads=6, vocabulary=512),
}
_BATCH, _LENGTH = 2, 32


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides each row by its root mean square; keeps no normalised copy of it."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def _rms_norm_fwd(
    x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rms_norm(x, scale), (x, scale)


def _rms_norm_bwd(
    kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, scale = kept
    inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    unit = x * inverse
    along = jnp.mean(g * scale * unit, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return inverse * (g * scale - unit * along), jnp.sum(g * unit, axis=rows)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class _RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, scale)


class _Block(nn.Module):
    size: _Size
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0])
        attend = nn.MultiHeadDotProductAttention(self.size.heads)
        x = x + attend(self.norm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.size.width)(self.norm()(x)))
        return x + nn.Dense(self.size.width)(hidden)


class _Decoder(nn.Module):
    size: _Size
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.size.vocabulary, self.size.width)(tokens)
        x = x + nn.Embed(_LENGTH, self.size.width)(jnp.arange(tokens.shape[1]))
        for _ in range(self.size.layers):
            x = _Block(self.size, self.norm)(x)
        return nn.Dense(self.size.vocabulary)(nn.LayerNorm()(x))


def transformer(
    params: Literal["650k", "11m"] = "650k", seed: int = 0, *, rules: bool = False
) -> tuple[Loss, PyTree, jax.Array]:
    """Makes a decoder that predicts each token from those before it.

    Args:
      params: How many parameters, roughly.
      seed: Draws the parameters and the tokens.
      rules: Whether its blocks normalise by `rms_norm`, a custom_vjp: two in each.

    Returns:
      `(loss, params, tokens)`: the mean cross-entropy `loss(params, tokens)`, float32
      parameters, and int32 tokens of shape (2, 32).
    """
    size = _SIZES[params]
    model = _Decoder(size, _RMSNorm if rules else nn.LayerNorm)
    key, token_key = jax.random.split(jax.random.key(seed))
    tokens = jax.random.randint(token_key, (_BATCH, _LENGTH), 0, size.vocabulary)

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits, targets = model.apply(params, tokens)[:, :-1], tokens[:, 1:]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(logits, targets).mean()

    return loss, jax.jit(model.init)(key, tokens), tokens


def another_point(params: PyTree, seed: int = 1) -> PyTree:
    """Moves every parameter a little, to a point of the same shapes and dtypes."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(moved)
