"""Trainings to watch, and how the watcher is called in them."""

import jax
import jax.numpy as jnp
import optax

import gradtest

X = jax.random.normal(jax.random.key(7), (32, 8))
Y = jnp.sin(X.sum(1, keepdims=True))
BATCH = X, Y


def rule(value, slope):
    """Returns a function with a custom rule: its cotangent times `slope(x)`."""

    @jax.custom_vjp
    def layer(x):
        return value(x)

    layer.defvjp(
        lambda x: (value(x), x), lambda x, g: ((g * slope(x)).astype(x.dtype),)
    )
    return layer


def clipped(x):
    return jnp.clip(x, -3, 3)


right_clip = rule(clipped, lambda x: jnp.abs(x) < 3)
wrong_clip = rule(clipped, lambda x: jnp.ones_like(x))


def fresh_params(width=16):
    keys = jax.random.split(jax.random.key(3), 2)
    return {
        "w": 0.3 * jax.random.normal(keys[0], (8, width)),
        "b": jnp.zeros(width),
        "out": 0.1 * jax.random.normal(keys[1], (width, 1)),
    }


def loss_with(layer):
    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.mean((layer(hidden @ params["out"]) - y) ** 2)

    return loss


quiet = loss_with(right_clip)


def scaled(params, factor):
    return jax.tree.map(lambda leaf: factor * leaf, params)


def train(loss, params, steps, *, batch=lambda step: BATCH, rate=1e-2, **options):
    """Trains with Adam, watched; returns the watcher."""
    watcher = gradtest.watch(loss, **options)
    optimiser = optax.adam(rate)
    state = optimiser.init(params)

    @jax.jit
    def update(params, state, batch):
        gradient = jax.grad(loss)(params, batch)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        watcher(step, params, batch(step))
        params, state = update(params, state, batch(step))
    return watcher


def counts(watcher):
    state = watcher.state_dict()
    names = ("checks", "checks_in_full", "failures", "inconclusive")
    return tuple(int(state[name]) for name in names)


def square(params):
    return jnp.sum(params**2)


def steps_checked(watcher, steps):
    return [step for step in steps if watcher(step, jnp.ones(2)) is not None]
