"""Functions that assert while they are traced, and what runs them as Chex does."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest

X = np.array([0.5, 1.0, 1.5], np.float32)


def loss(x):
    return jnp.sum(jnp.sin(x) * x)


def right(x):
    return jnp.cos(x) * x + jnp.sin(x)


def wrong(x):
    return jnp.cos(x) * x - jnp.sin(x)


def asserting(grad_fn, *, fn=loss, **keywords):
    """Returns a function that asserts, and returns its argument."""

    def inside(x):
        assert gradtest.assert_grad_matches(fn, grad_fn, x, **keywords) is None
        return x

    return inside


def run(fn, *args):
    return chex.chexify(fn, async_check=False)(*args)


def refused(fn, *args):
    with pytest.raises(
        AssertionError, match=r"^\[Chex\] chexify assertion 'assert_"
    ) as caught:
        run(fn, *args)
    return str(caught.value)
