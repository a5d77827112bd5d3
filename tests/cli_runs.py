"""A folder with a model, and the command line run in it."""

import pytest

from gradtest._src.cli import main

MODEL = """
import jax
import jax.numpy as jnp
from gradtest.domains import normal


def right(x, y=2.0):
    return jnp.sum(jnp.sin(x) * y)


def right_args():
    return normal(4), 2.0


def right_grad(x, y):
    return jnp.cos(x) * y


def wrong_grad(x, y):
    return -jnp.cos(x) * y


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))
doubled_args = [normal(3)]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
straight_through_args = [normal(3)]


def identity(x):
    return x


def beside(x):
    return jnp.sum(x**2) + jnp.sum(jax.lax.stop_gradient(doubled(x)))


@jax.custom_jvp
def leaky(x):
    return jnp.where(x > 0, x, 0.1 * x)


@leaky.defjvp
def _(primals, tangents):  # right for positive numbers alone
    return leaky(*primals), tangents[0]


leaky_args = [jnp.array([0.5, 1.0, 2.0])]


def undefined(x):
    return jnp.sum(jnp.sqrt(x))


undefined_args = (-jnp.ones(3),)


def with_defaults(x=0.5):
    return jax.nn.relu(x)


def pair():
    return right, right_args()


def nothing():
    return None


def needy(weights, x):
    return weights * x


def raising(x):
    raise KeyError("planted")


def mistyped(x):
    return x @ jnp.ones((7, 2))


def asserting(x):
    assert x.ndim == 7, "planted"
    return x


raising_args = mistyped_args = asserting_args = [normal(3)]
lonely = normal(3)
number = 3


class Model:
    @staticmethod
    def loss(x):
        return jnp.cos(x)

    loss_args = [normal(3)]
"""


@pytest.fixture(name="run")
def _run(tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder with model.py: code, stdout and stderr."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(list(arguments))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run
