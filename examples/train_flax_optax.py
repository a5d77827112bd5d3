"""Trains a Flax network of custom derivatives with Optax, and asserts its gradients.

The network reads handwritten digits (the data set comes with scikit-learn) with the
layers of `custom_vjp_layers.py`. Half of the images are dimmed; a second head is to
tell which, and gradient reversal keeps the body from letting it. Before the training,
halfway and after it each custom rule is audited at the values that reach it then, and
the gradient of the whole loss is checked: in float64, against the values of the loss.

Run with `python examples/train_flax_optax.py`. It exits with 0 where the network reads
more than 95 % of the digits that it was not trained on.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from custom_vjp_layers import (
    INTENTIONS,
    REVERSAL,
    LinenRMSNorm,
    LinenSwiGLU,
    quantise,
    reverse_gradient,
)
from rich.console import Console
from rich.progress import Progress
from sklearn import datasets

import gradtest

PyTree = Any
Batch = tuple[jax.Array, jax.Array, jax.Array]

BATCH = 64
EPOCHS = 20
TRAINED_ON = 1400
WANTED = 0.95
# Of a batch: a check costs a few times what it looks at, and needs no more than this.
CHECKED = 8


class DigitsNet(nn.Module):
    """Reads the digit, and is kept from seeing whether the image was dimmed."""

    features: int = 48

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.Dense(self.features, name="embed")(x)
        for n in range(2):
            normed = LinenRMSNorm(name=f"norm_{n}")(x)
            x = x + LinenSwiGLU(2 * self.features, name=f"mlp_{n}")(normed)
        x = quantise(LinenRMSNorm(name="norm")(x))
        dimmed = nn.Dense(2, name="dimmed")(reverse_gradient(x, REVERSAL))
        return nn.Dense(10, name="digit")(x), dimmed


def loss_fn(params: PyTree, images: jax.Array, *labels: jax.Array) -> jax.Array:
    """The cross-entropies of the digit and of the dimming, added."""
    outputs = DigitsNet().apply(params, images)
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        for logits, label in zip(outputs, labels, strict=True)
    ]
    return losses[0] + losses[1]


class Data(NamedTuple):
    """Images of 64 numbers between 0 and 1, digits, and whether an image is dimmed."""

    images: np.ndarray
    digits: np.ndarray
    dimmed: np.ndarray

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Yields one epoch, in random order; what fills no batch is left out."""
        order = rng.permutation(len(self.digits))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield tuple(jnp.asarray(part[chosen]) for part in self)


def load(rng: np.random.Generator) -> tuple[Data, Data]:
    """Returns the digits to train on and those to test with."""
    bunch = datasets.load_digits()
    order = rng.permutation(len(bunch.target))
    dimmed = rng.integers(0, 2, len(order))
    images = bunch.data / 16 * np.where(dimmed, 0.5, 1.0)[:, None]
    columns = (images.astype(np.float32), bunch.target, dimmed)
    first, rest = order[:TRAINED_ON], order[TRAINED_ON:]
    return Data(*(c[first] for c in columns)), Data(*(c[rest] for c in columns))


def assert_gradients(params: PyTree, batch: Batch, **options: Any) -> None:
    """Asserts that every rule, and the gradient by the parameters, is as declared.

    Args:
      params: The network's parameters.
      batch: Images, digits and dimmings; the first few are looked at.
      **options: Those of `gradtest.assert_autodiff_matches`, such as `variant`.

    Raises:
      gradtest.GradientMismatch: A rule or the gradient is wrong.
    """
    few = tuple(part[:CHECKED] for part in batch)
    gradtest.assert_custom_rules_match(
        loss_fn, params, *few, argnums=0, expect_differs=INTENTIONS
    )
    gradtest.assert_autodiff_matches(
        loss_fn, params, *few, argnums=0, expect_differs=INTENTIONS, **options
    )


def make_step(
    optimiser: optax.GradientTransformation,
) -> Callable[..., tuple[PyTree, PyTree, jax.Array]]:
    """Returns one training step, to be jitted: new parameters and state, and loss."""

    def step(
        params: PyTree, state: PyTree, *batch: jax.Array
    ) -> tuple[PyTree, PyTree, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def accuracy(params: PyTree, data: Data) -> float:
    """The part of the digits that are read right."""
    logits, _ = DigitsNet().apply(params, jnp.asarray(data.images))
    return float(np.mean(np.argmax(logits, -1) == data.digits))


def train(
    epochs: int = EPOCHS,
    *,
    seed: int = 0,
    checks: int = 3,
    console: Console | None = None,
) -> float:
    """Trains the network and asserts its gradients on the way.

    Args:
      epochs: How often each digit is seen.
      seed: Fixes the data's order and the first parameters.
      checks: How often gradients are asserted: at the start, and evenly up to the end.
      console: Where the progress bar is drawn, if it is a terminal.

    Returns:
      The accuracy on the digits that it was not trained on.

    Raises:
      gradtest.GradientMismatch: A gradient is wrong.
    """
    rng = np.random.default_rng(seed)
    training, testing = load(rng)
    params = DigitsNet().init(jax.random.key(seed), jnp.asarray(training.images[:1]))
    steps = epochs * (TRAINED_ON // BATCH)
    optimiser = optax.adamw(optax.cosine_decay_schedule(5e-3, steps))
    state, step = optimiser.init(params), jax.jit(make_step(optimiser))
    check_before = {round(n * epochs / max(checks - 1, 1)) for n in range(checks)}
    console = console or Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=epochs)
        for epoch in range(epochs + 1):
            batches = list(training.batches(rng))
            if epoch in check_before:
                progress.update(bar, description="checking gradients")
                assert_gradients(params, batches[0])
            if epoch == epochs:
                break
            for batch in batches:
                params, state, loss = step(params, state, *batch)
            progress.update(bar, advance=1, description=f"loss {float(loss):.3f}")
    return accuracy(params, testing)


def main(argv: list[str] | None = None) -> int:
    """Trains, prints the accuracy, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    reached = train(options.epochs, seed=options.seed)
    print(f"{reached:.1%} of the test digits read; every gradient is as declared.")
    return 0 if reached > WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
