"""What watching costs a training: `python -m benchmarks.watching`.

Two trainings of one model run side by side, a stretch of steps of the one and then of
the other, so that whatever else the machine does slows both alike. One of them calls
`gradtest.watch(loss, every=500)` before each step. Compiling is told apart.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradtest

PyTree = Any
Loss = Callable[[PyTree, PyTree], jax.Array]


@jax.custom_vjp
def soft_clip(x: jax.Array) -> jax.Array:
    """A layer with a derivative of its own, so that there is something to watch."""
    return 3 * jnp.tanh(x / 3)


def _soft_clip_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = soft_clip(x)
    return y, y


def _soft_clip_bwd(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g * (1 - (y / 3) ** 2),)


soft_clip.defvjp(_soft_clip_fwd, _soft_clip_bwd)


class MLP(nn.Module):
    """Three wide layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        x = x.reshape(len(x), -1)
        for _ in range(3):
            x = soft_clip(nn.relu(nn.Dense(512)(x)))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions with pooling, then a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        for features in (16, 32):
            x = soft_clip(nn.relu(nn.Conv(features, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Setting(NamedTuple):
    """A model with its batch size and the side of its images."""

    model: nn.Module
    batch: int
    side: int


SETTINGS = {"mlp": Setting(MLP(), 256, 28), "cnn": Setting(CNN(), 64, 28)}


class Training:
    """One training, with or without a watcher."""

    def __init__(self, setting: Setting, every: int | None):
        shape = (setting.batch, setting.side, setting.side, 1)
        self._batches = [
            (jax.random.normal(key, shape), jnp.arange(setting.batch) % 10)
            for key in jax.random.split(jax.random.key(0), 8)
        ]

        def loss(params: PyTree, batch: PyTree) -> jax.Array:
            images, labels = batch
            logits = setting.model.apply(params, images)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return each.mean()

        optimiser = optax.adam(1e-3)
        self.params = setting.model.init(jax.random.key(1), self._batches[0][0])
        self._state = optimiser.init(self.params)

        def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            gradient = jax.grad(loss)(params, batch)
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self.watcher = gradtest.watch(loss, every=every) if every else None
        self.number = 0
        self.longest = 0.0

    def prepare(self) -> float:
        """Compiles everything; returns the watcher's part of it, in seconds."""
        took = 0.0
        if self.watcher is not None:
            took = self.watcher.prepare(self.params, self._batches[0])
        self.run(2)
        return took

    def run(self, steps: int) -> float:
        """Makes so many steps; returns the seconds that they took."""
        start = time.perf_counter()
        for _ in range(steps):
            batch = self._batches[self.number % len(self._batches)]
            if self.watcher is not None:
                before = time.perf_counter()
                self.watcher(self.number, self.params, batch)
                self.longest = max(self.longest, time.perf_counter() - before)
            self.params, self._state = self._step(self.params, self._state, batch)
            self.number += 1
            # As a loop that reads its loss does: no steps are queued up.
            jax.block_until_ready(self.params)
        return time.perf_counter() - start


def _idle_call(training: Training) -> float:
    """Returns the microseconds that a call takes which does not check."""
    assert training.watcher is not None
    calls, batch = 100_000, training._batches[0]
    step = training.number // 500 * 500 + 1
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            training.watcher(step, training.params, batch)
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def measure(name: str, *, seconds: float, every: int, stretch: int) -> None:
    """Trains with and without the watcher and prints what it costs."""
    with_it, without = Training(SETTINGS[name], every), Training(SETTINGS[name], None)
    compiled = with_it.prepare()
    without.prepare()
    took = {with_it: 0.0, without: 0.0}
    turn = 0
    while took[without] < seconds or with_it.number % every != 2 % every:
        pair = (with_it, without) if turn % 2 else (without, with_it)
        for training in pair:
            took[training] += training.run(stretch)
        turn += 1
    steps = without.number - 2
    step = took[without] / steps
    checks = with_it.watcher.state_dict()["checks"]
    print(
        f"{name}: {steps} steps of {1e3 * step:.2f} ms; "
        f"without watching {took[without]:.1f} s, with watch(every={every}) "
        f"{took[with_it]:.1f} s: {took[with_it] / took[without] - 1:+.2%}"
    )
    print(
        f"  {int(checks)} checks; compiling, once and apart: {compiled:.1f} s; the "
        f"slowest call {1e3 * with_it.longest:.0f} ms; a call that does not check "
        f"{_idle_call(with_it):.2f} us"
    )
    start = time.perf_counter()
    for _ in range(3):
        for number in (0, every):
            with_it.watcher(number, with_it.params, with_it._batches[0])
    screen = (time.perf_counter() - start) / 6
    print(f"  a screen takes {1e3 * screen:.1f} ms: {screen / step:.1f} steps")


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--stretch", type=int, default=50, help="steps in a row")
    options = parser.parse_args()
    for name in options.models:
        measure(
            name,
            seconds=options.seconds,
            every=options.every,
            stretch=options.stretch,
        )


if __name__ == "__main__":
    main()
