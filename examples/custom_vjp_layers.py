"""Flax layers with derivatives of their own, and the audit of each.

Four functions have a `jax.custom_vjp`: two to save memory, two because the derivative
they have is not the one they should train with. Of the first two gradtest asserts that
the rule is the function's derivative; of the others, that it is what is declared in
`INTENTIONS`. Each layer is there as a Linen and as an NNX module.

Run with `python examples/custom_vjp_layers.py`. It exits with 0 where all are right.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import gradtest

PyTree = Any
Residuals = tuple[jax.Array, ...]

EPSILON = 1e-6
LEVELS = 8
REVERSAL = 0.5


# RMSNorm: x / rms(x) * scale. One number a row is kept in place of what autodiff keeps.


def _inverse_rms(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)


@jax.custom_vjp
def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * _inverse_rms(x) * scale


def _rms_norm_fwd(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Residuals]:
    inverse = _inverse_rms(x)
    return x * inverse * scale, (x, inverse, scale)


def _rms_norm_bwd(kept: Residuals, g: jax.Array) -> Residuals:
    x, inverse, scale = kept
    normed, pulled = x * inverse, g * scale
    # Along x itself the norm undoes every change.
    radial = normed * jnp.mean(pulled * normed, axis=-1, keepdims=True)
    batch_axes = tuple(range(x.ndim - 1))
    return inverse * (pulled - radial), jnp.sum(g * normed, axis=batch_axes)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


# SwiGLU: (swish(x G) * x U) D. The wide hidden layer is not kept but computed again.


def _hidden(x: jax.Array, gate: jax.Array, up: jax.Array) -> Residuals:
    opened, lifted = x @ gate, x @ up
    return opened, jax.lax.logistic(opened), lifted


@jax.custom_vjp
def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    opened, sigmoid, lifted = _hidden(x, gate, up)
    return (opened * sigmoid * lifted) @ down


def _swiglu_fwd(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> tuple[jax.Array, Residuals]:
    return swiglu(x, gate, up, down), (x, gate, up, down)


def _swiglu_bwd(args: Residuals, g: jax.Array) -> Residuals:
    x, gate, up, down = args
    opened, sigmoid, lifted = _hidden(x, gate, up)
    swish = opened * sigmoid
    d_hidden = g @ down.T
    d_lifted = d_hidden * swish
    d_opened = d_hidden * lifted * (sigmoid + swish * (1 - sigmoid))
    dx = d_opened @ gate.T + d_lifted @ up.T
    return dx, _outer(x, d_opened), _outer(x, d_lifted), _outer(swish * lifted, g)


def _outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """The cotangent of a kernel: a product summed over all batch axes."""
    return jnp.tensordot(x, g, axes=(tuple(range(x.ndim - 1)),) * 2)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# A quantiser: its derivative is zero, and it trains as if it were the identity.


@jax.custom_vjp
def quantise(x: jax.Array) -> jax.Array:
    return jnp.round(x * LEVELS) / LEVELS


quantise.defvjp(lambda x: (quantise(x), None), lambda _, g: (g,))


# Gradient reversal: what comes after it learns a task that what comes before unlearns.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reverse_gradient(x: jax.Array, strength: float) -> jax.Array:
    del strength
    return x


def _reverse_fwd(x: jax.Array, strength: float) -> tuple[jax.Array, None]:
    del strength
    return x, None


def _reverse_bwd(strength: float, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (-strength * g,)


reverse_gradient.defvjp(_reverse_fwd, _reverse_bwd)

# What each stands in for: a function whose derivative it has, or a product of its own.
INTENTIONS: dict[Any, Any] = {
    quantise: lambda x: x,
    reverse_gradient: gradtest.vjp(lambda primals, g: (-REVERSAL * g,)),
}


class LinenRMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:]))


class LinenSwiGLU(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, features = nn.initializers.lecun_normal(), x.shape[-1]
        gate = self.param("gate", init, (features, self.width))
        up = self.param("up", init, (features, self.width))
        return swiglu(x, gate, up, self.param("down", init, (self.width, features)))


class LinenNet(nn.Module):
    """Classifies; its second head is to find out a nuisance, its body to hide it."""

    features: int = 16
    classes: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.Dense(self.features, name="embed")(x)
        x = x + LinenSwiGLU(2 * self.features, name="mlp")(LinenRMSNorm(name="norm")(x))
        x = quantise(x)
        nuisance = nn.Dense(2, name="nuisance")(reverse_gradient(x, REVERSAL))
        return nn.Dense(self.classes, name="head")(x), nuisance


class NnxRMSNorm(nnx.Module):
    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...])


class NnxSwiGLU(nnx.Module):
    def __init__(self, features: int, width: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        self.gate = nnx.Param(init(rngs.params(), (features, width)))
        self.up = nnx.Param(init(rngs.params(), (features, width)))
        self.down = nnx.Param(init(rngs.params(), (width, features)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return swiglu(x, self.gate[...], self.up[...], self.down[...])


class NnxNet(nnx.Module):
    """The same network as `LinenNet`."""

    def __init__(self, inputs: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(inputs, 16, rngs=rngs)
        self.norm = NnxRMSNorm(16)
        self.mlp = NnxSwiGLU(16, 32, rngs)
        self.nuisance = nnx.Linear(16, 2, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embed(x)
        x = quantise(x + self.mlp(self.norm(x)))
        return self.head(x), self.nuisance(reverse_gradient(x, REVERSAL))


def _two_losses(outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    logits, nuisance = outputs
    return jnp.mean(jax.nn.logsumexp(logits, -1)) + jnp.mean(nuisance**2)


def linen_case() -> tuple[Callable[..., jax.Array], tuple[PyTree, jax.Array]]:
    """Returns a loss of the Linen network, and its arguments."""
    net, x = LinenNet(), jax.random.normal(jax.random.key(0), (8, 6))

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        return _two_losses(net.apply(params, x))

    return loss, (net.init(jax.random.key(1), x), x)


def nnx_case() -> tuple[Callable[..., jax.Array], tuple[PyTree, jax.Array]]:
    """Returns a loss of the NNX network, and its arguments."""
    graph, params = nnx.split(NnxNet(6, nnx.Rngs(2)), nnx.Param)
    x = jax.random.normal(jax.random.key(3), (8, 6))

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        return _two_losses(nnx.merge(graph, params)(x))

    return loss, (params, x)


def main() -> None:
    """Audits every rule of both networks, and prints what was found."""
    for make in (linen_case, nnx_case):
        loss, args = make()
        report = gradtest.assert_custom_rules_match(
            loss, *args, expect_differs=INTENTIONS
        )
        print(report, end="\n\n")


if __name__ == "__main__":
    main()
