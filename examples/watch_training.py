"""Watches a training whose hand-written derivative goes wrong on the way.

A network is trained with `hard_tanh`, a layer with a derivative of its own. Its rule
forgets that the layer is flat where it saturates. At first nothing saturates, so every
gradient is right, and so would be any test on fresh weights. Then the training moves
the weights, and the watcher stops it at the first check at which the rule is wrong:

    watch at step 20 failed: the gradient of loss is wrong at params['b1'] ...

Run with `python examples/watch_training.py`. It exits with 0 where the wrong rule was
caught, and the right one trained through.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradtest

PyTree = Any
Layer = Callable[[jax.Array], jax.Array]

STEPS = 200
EVERY = 5


@jax.custom_vjp
def hard_tanh(x: jax.Array) -> jax.Array:
    """Its rule is wrong: it passes the cotangent on where the layer is flat."""
    return jnp.clip(x, -1, 1)


@jax.custom_vjp
def right_hard_tanh(x: jax.Array) -> jax.Array:
    """The same with the right rule."""
    return jnp.clip(x, -1, 1)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.clip(x, -1, 1), x


def _everywhere(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g,)


def _where_not_saturated(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g * (jnp.abs(x) < 1),)


hard_tanh.defvjp(_forward, _everywhere)
right_hard_tanh.defvjp(_forward, _where_not_saturated)


def hidden(params: PyTree, x: jax.Array) -> jax.Array:
    """What goes into the layer."""
    return x @ params["w1"] + params["b1"]


def make_loss(layer: Layer) -> Callable[..., jax.Array]:
    """Returns the mean squared error of a network with this layer."""

    def loss(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        found = layer(hidden(params, x)) @ params["w2"]
        return jnp.mean((found - y) ** 2)

    return loss


def training(
    loss: Callable[..., jax.Array], steps: int = STEPS
) -> Iterator[tuple[int, PyTree, tuple[jax.Array, jax.Array]]]:
    """Trains; yields each step's number, parameters and batch before it is made."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": 0.1 * jax.random.normal(keys[0], (4, 16)),
        "b1": jnp.zeros(16),
        "w2": 0.3 * jax.random.normal(keys[1], (16,)),
    }
    optimiser = optax.adam(1e-2)
    state = optimiser.init(params)

    @jax.jit
    def update(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimiser.update(jax.grad(loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        x = jax.random.normal(jax.random.fold_in(keys[2], step), (32, 4))
        batch = x, jnp.sign(x[:, 0]) + x[:, 1]
        yield step, params, batch
        params, state = update(params, state, batch)


def train(layer: Layer, every: int = EVERY) -> gradtest.Watcher:
    """Trains a network with this layer, watched.

    Raises:
      gradtest.GradientMismatch: The gradient is wrong at a step where it was checked.
    """
    loss = make_loss(layer)
    watcher = gradtest.watch(loss, every=every)
    for step, params, batch in training(loss):
        watcher(step, params, batch)
    return watcher


def main(argv: list[str] | None = None) -> int:
    """Trains with both rules, prints what the watcher says, returns the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=EVERY)
    every = parser.parse_args(argv).every
    try:
        train(hard_tanh, every)
    except gradtest.GradientMismatch as error:
        print(error)
    else:
        print("The wrong rule was not caught.")
        return 1
    print(f"\nWith the right rule: {train(right_hard_tanh, every).summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
