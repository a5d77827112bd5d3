"""What two tests of one layer are worth: which broken rules each of them catches.

A layer divides rows by their length, with a derivative of its own. One test compares
the gradient with differences, at one point and with a loose tolerance, as many tests
do; the other asserts every rule. `gradtest.power` breaks the rule in some thirty ways,
one at a time, and runs both tests against each: the first lets wrong layers pass.

Run with `python examples/power.py`. It exits with 0 where the second test catches all.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradtest

Residuals = tuple[jax.Array, ...]


@jax.custom_vjp
def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides each row by its length, and scales each column."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * scale


def _forward(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Residuals]:
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / length * scale, (x / length, length, scale)


def _backward(kept: Residuals, g: jax.Array) -> Residuals:
    unit, length, scale = kept
    along = jnp.sum(g * scale * unit, axis=-1, keepdims=True)
    return (g * scale - unit * along) / length, jnp.sum(g * unit, axis=0)


normalise.defvjp(_forward, _backward)


def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cos(normalise(x, scale)))


def program() -> tuple[Any, tuple[jax.Array, jax.Array], dict[str, Any]]:
    """Returns the function, its arguments, and no options."""
    x = jax.random.normal(jax.random.key(0), (5, 3))
    return loss, (x, jnp.array([1.0, 0.5, 2.0])), {}


def assert_near_differences(fn: Any, x: jax.Array, scale: jax.Array) -> None:
    """A test as it is often written: three entries, one per cent and a bit."""
    gradient, step = np.asarray(jax.grad(fn)(x, scale)), 1e-2
    for column in range(3):
        moved = jnp.zeros_like(x).at[0, column].set(step)
        slope = (fn(x + moved, scale) - fn(x - moved, scale)) / (2 * step)
        np.testing.assert_allclose(gradient[0, column], slope, rtol=0.02, atol=1e-3)


def main() -> int:
    """Prints what each test is worth."""
    fn, args, _ = program()
    loose = gradtest.power(fn, *args, assertion=assert_near_differences)
    sharp = gradtest.power(fn, *args)
    print(loose)
    print()
    print(sharp)
    return 0 if sharp.rate == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
