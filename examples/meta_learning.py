"""Learning where to start: gradients through the steps of an optimiser.

Each task is a sine wave of another phase. A network starts at the same parameters for
every task, takes five steps of Adam on a few points, and is judged on others; what is
trained is the start, and how fast each layer learns. Its gradient runs through the
steps, and so through the derivative of the activation's hand-written derivative.

That is where a mistake hides: `swish` below is right to train with, and `frozen_swish`
is as well, until something differentiates through the training. gradtest asserts the
first and refuses the second, naming the line.

Run with `python examples/meta_learning.py`. It exits with 0 where all is as it says.
"""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import gradtest
import gradtest.optax

Params = dict[str, jax.Array]
Task = dict[str, jax.Array]
Activation = Callable[[jax.Array], jax.Array]

STEPS = 5
HIDDEN = 16


# x * sigmoid(x), which keeps x alone for its backward pass.


@jax.custom_vjp
def swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _swish_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    gate = jax.nn.sigmoid(x)
    return (g * gate * (1 + x * (1 - gate)),)


swish.defvjp(lambda x: (swish(x), x), _swish_bwd)


# The same, but what it computes again is taken for a constant.


@jax.custom_vjp
def frozen_swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _frozen_swish_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    gate = jax.lax.stop_gradient(jax.nn.sigmoid(x))
    return (g * gate * (1 + x * (1 - gate)),)


frozen_swish.defvjp(lambda x: (frozen_swish(x), x), _frozen_swish_bwd)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A network that starts each task at the same parameters."""

    activation: Activation

    def start(self, key: jax.Array) -> Params:
        first, last = jax.random.split(key)
        return {
            "hidden": jax.random.normal(first, (2, HIDDEN)),
            "out": jax.random.normal(last, (HIDDEN,)) / HIDDEN**0.5,
        }

    def predict(self, params: Params, x: jax.Array) -> jax.Array:
        inputs = jnp.stack([x, jnp.ones_like(x)], axis=-1)
        return self.activation(inputs @ params["hidden"]) @ params["out"]

    def loss_to_learn(self, params: Params, task: Task) -> jax.Array:
        return self._error(params, task["phase"], task["seen"])

    def loss_to_judge(self, params: Params, task: Task) -> jax.Array:
        return self._error(params, task["phase"], task["unseen"])

    def _error(self, params: Params, phase: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean((self.predict(params, x) - jnp.sin(x + phase)) ** 2)

    def loss_after_steps(self, start: Params, log_rate: jax.Array, task: Task):
        params, tx = start, optimiser(log_rate)
        state = tx.init(params)
        for _ in range(STEPS):
            grads = jax.grad(self.loss_to_learn)(params, task)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return self.loss_to_judge(params, task)


def optimiser(log_rate: jax.Array) -> optax.GradientTransformation:
    return optax.adam(jnp.exp(log_rate))


def draw_task(key: jax.Array) -> Task:
    phase, seen, unseen = jax.random.split(key, 3)
    return {
        "phase": jax.random.uniform(phase, (), minval=0.0, maxval=jnp.pi),
        "seen": jax.random.uniform(seen, (8,), minval=-3.0, maxval=3.0),
        "unseen": jax.random.uniform(unseen, (8,), minval=-3.0, maxval=3.0),
    }


def assert_meta_gradient(learner: Learner) -> gradtest.Report:
    """Asserts the gradient at the start and at the rate, through the steps."""
    return gradtest.optax.assert_meta_grads_match(
        optimiser,
        learner.loss_to_learn,
        learner.loss_to_judge,
        learner.start(jax.random.key(0)),
        draw_task(jax.random.key(1)),
        steps=STEPS,
        hyper=jnp.log(0.05),
    )


def train(learner: Learner, rounds: int = 60, tasks: int = 8) -> list[float]:
    """Trains the start and the rate; returns the loss of each round."""
    meta = (learner.start(jax.random.key(0)), jnp.log(0.05))
    tx = optax.adam(1e-2)

    @jax.jit
    def update(meta, state, key):
        def mean_loss(meta):
            drawn = jax.vmap(draw_task)(jax.random.split(key, tasks))
            return jax.vmap(lambda task: learner.loss_after_steps(*meta, task))(
                drawn
            ).mean()

        loss, grads = jax.value_and_grad(mean_loss)(meta)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(meta, updates), state, loss

    state, losses = tx.init(meta), []
    for i in range(rounds):
        meta, state, loss = update(
            meta, state, jax.random.fold_in(jax.random.key(2), i)
        )
        losses.append(float(loss))
    return losses


def main() -> int:
    report = assert_meta_gradient(Learner(swish))
    print(report)
    losses = train(Learner(swish))
    print(f"\nmeta-training: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last\n")
    try:
        assert_meta_gradient(Learner(frozen_swish))
    except gradtest.GradientMismatch as error:
        print(error)
        return 0
    print("frozen_swish was not refused")
    return 1


if __name__ == "__main__":
    sys.exit(main())
