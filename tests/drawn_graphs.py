"""Programs to draw, and what tests read in their pictures."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

SUBJECTS = ("jaxpr", "gradient", "hlo", "optimized_hlo")
VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)


def labels(picture):
    """Returns the labels of nodes and boxes, as a reader sees them."""
    found = re.findall(r'\blabel="((?:[^"\\]|\\.)*)"', picture.dot)
    return [text.replace("\\n", "\n") for text in found]


def edges(picture):
    """Returns the first lines of the labels that each edge joins."""
    names = {}
    for name, text in re.findall(
        r'^ *(n\d+) \[.*?\blabel="([^"]*)"', picture.dot, re.M
    ):
        names[name] = text.split("\\n")[0]
    joined = re.findall(r"^ *(n\d+) -> (n\d+)", picture.dot, re.M)
    return {(names[source], names[target]) for source, target in joined}


@jax.custom_vjp
def right_square(x):
    return x * jnp.sin(x)


right_square.defvjp(
    lambda x: (right_square(x), x),
    lambda x, g: (g * (jnp.sin(x) + x * jnp.cos(x)),),
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(11)(nn.LayerNorm()(x))


@functools.cache
def transformer():
    tokens = jnp.ones((2, 4), int)
    params = jax.eval_shape(Transformer().init, jax.random.key(0), tokens)
    return (
        lambda params, tokens: Transformer().apply(params, tokens).mean(),
        params,
        tokens,
    )
