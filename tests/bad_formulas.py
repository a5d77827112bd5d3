"""Formulas whose gradient is not finite beside a finite value, and what mends each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ZERO = np.array([1.0, 0.0, 2.0])


@dataclasses.dataclass(frozen=True)
class Bad:
    """A formula whose gradient is not finite at a point.

    Attributes:
      fn: The formula.
      args: The point.
      equation: The primitive that spoils it.
      code: What its line of source holds.
      remedy: How the guarded form that mends it is called; empty where none does.
      infinite: Whether the formula's own slope is infinite there.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    equation: str
    code: str
    remedy: str = "double where"
    infinite: bool = False


def root(x):
    return jnp.sum(jnp.sqrt(x))


def masked_log(x):
    return jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))


def norm(x):
    return jnp.linalg.norm(x)


def rows(x):
    return jnp.sum(jax.vmap(jnp.linalg.norm)(x))


def by_product(x):
    return jnp.sqrt(x @ x)


def angle(x):
    return jnp.sum(jnp.arccos(x))


def quotient(x):
    return jnp.sum(jnp.where(x == 0, 1.0, x / x))


def sinc(x):
    return jnp.sum(jnp.where(x == 0, 1.0, jnp.sin(x) / x))


def zeroth_power(x, power):
    return jnp.sum(x**power)


def fraction_power(x):
    return jnp.sum(x**0.3)


def cube_root(x):
    return jnp.sum(jnp.cbrt(x))


def deviation(x):
    return jnp.std(x)


def entropy(x):
    return -jnp.sum(jnp.where(x > 0, x * jnp.log(x), 0.0))


def sigmoid(x):
    return jnp.sum(1 / (1 + jnp.exp(-x)))


def softplus(x):
    return jnp.sum(jnp.where(x < 50, jnp.log(1 + jnp.exp(x)), x))


def cross_entropy(x, labels):
    shares = jax.nn.softmax(x)
    return -jnp.sum(jnp.where(labels > 0, labels * jnp.log(shares), 0.0))


def cross_entropy_by_hand(x, labels):
    powers = jnp.exp(x - jnp.max(x))
    logs = jnp.log(powers / jnp.sum(powers))
    return -jnp.sum(jnp.where(labels > 0, labels * logs, 0.0))


def binary_cross_entropy(x, labels):
    return -jnp.sum(jnp.where(labels > 0, jnp.log(jax.nn.sigmoid(x)), 0.0))


def masked_sum_of_powers(x, mask):
    return jnp.sum(jnp.where(mask, jnp.log(jnp.sum(jnp.exp(x), axis=1)), 0.0))


def direction(x):
    return jnp.arctan2(x[0], x[1])


def masked_mean(x, mask):
    count = jnp.sum(mask)
    return jnp.where(count > 0, jnp.sum(x * mask) / count, 0.0)


def clipped_direction(x):
    return jnp.sum(x / jnp.maximum(jnp.sqrt(jnp.sum(x**2)), 1e-6)) * 0.0


def inverse_square(x):
    return jnp.sum(jnp.where(x == 0, 0.0, x**-2))


def bounded(x):
    return jnp.sum(jnp.where(jnp.abs(x) < 1, jnp.arctanh(x), 0.0))


def distances(x, others):
    return jnp.sum(jnp.sqrt(jnp.sum((x[:, None] - others[None]) ** 2, axis=-1)))


def share(x):
    return jnp.sum(jnp.where(x > 0, x / (x + jnp.abs(x)), 0.0))


def two_guards(x):
    return jnp.sum(jnp.sqrt(x)) + jnp.linalg.norm(x - x[0])


def scanned(x):
    return jax.lax.scan(lambda c, a: (c + jnp.sqrt(a), c * a), 0.0, x)[0]


def branching(x, flag):
    return jax.lax.cond(flag, lambda a: jnp.sum(jnp.sqrt(a)), lambda a: jnp.sum(a), x)


def counted(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: c + jnp.sqrt(x[i]), 0.0)


def rematerialised(x):
    return jax.checkpoint(lambda a: jnp.sum(jnp.sqrt(a)))(x)


def global_norm(x):
    return optax.global_norm({"w": x})


ZEROS = np.zeros(3)
LOGITS, LABELS = np.array([0.0, 200.0, 3.0]), np.array([0.0, 1.0, 0.0])
MASKED = np.array([[-200.0, -300.0], [1.0, 2.0]])

BAD = {
    "sqrt at 0": Bad(root, (ZERO,), "sqrt", "jnp.sqrt(x)", infinite=True),
    "where with log": Bad(masked_log, (ZERO,), "log", "jnp.where(x > 0, jnp.log"),
    "norm at 0": Bad(norm, (ZEROS,), "sqrt", "jnp.linalg.norm(x)", "safe norm"),
    "norm of one row": Bad(rows, (np.eye(3)[:2] * [[1], [0]],), "sqrt",
                           "jax.vmap(jnp.linalg.norm)", "safe norm"),
    "root of x @ x": Bad(by_product, (ZEROS,), "sqrt", "x @ x", "safe norm"),
    "arccos at 1": Bad(angle, (np.array([1.0, 0.5]),), "acos", "jnp.arccos(x)",
                       infinite=True),
    "x / x": Bad(quotient, (ZERO,), "div", "x / x"),
    "sin(x) / x": Bad(sinc, (ZERO,), "div", "jnp.sin(x) / x"),
    "x ** 0.0": Bad(zeroth_power, (ZERO, np.zeros(3)), "pow", "x**power"),
    "x ** 0.3": Bad(fraction_power, (ZERO,), "pow", "x**0.3", infinite=True),
    "x ** -2": Bad(inverse_square, (ZERO,), "integer_pow", "x**-2", infinite=True),
    "cbrt at 0": Bad(cube_root, (ZERO,), "cbrt", "jnp.cbrt(x)", infinite=True),
    "std of constants": Bad(deviation, (np.ones(4),), "sqrt", "jnp.std(x)",
                            "safe standard deviation"),
    "x log x": Bad(entropy, (ZERO,), "log", "x * jnp.log(x)"),
    "sigmoid by hand": Bad(sigmoid, (np.array([-100.0, 0.5]),), "exp",
                           "1 / (1 + jnp.exp(-x))", "sigmoid"),
    "softplus by hand": Bad(softplus, (np.array([100.0, 0.5]),), "exp",
                            "jnp.log(1 + jnp.exp(x))", "softplus"),
    "log of softmax": Bad(cross_entropy, (LOGITS, LABELS), "log", "jnp.log(shares)",
                          "log_softmax"),
    "log of softmax by hand": Bad(cross_entropy_by_hand, (LOGITS, LABELS), "log",
                                  "jnp.log(powers", "log_softmax"),
    "log of sigmoid": Bad(binary_cross_entropy, (np.array([-200.0, 1.0]),
                                                 np.array([0.0, 1.0])),
                          "log", "jnp.log(jax.nn.sigmoid(x))", "log_sigmoid"),
    "log of a sum of powers": Bad(masked_sum_of_powers,
                                  (MASKED, np.array([False, True])), "log",
                                  "jnp.log(jnp.sum(jnp.exp(x)", "logsumexp"),
    "arctan2 at the origin": Bad(direction, (np.zeros(2),), "atan2",
                                 "jnp.arctan2", infinite=True),
    "mean over no entry": Bad(masked_mean, (np.ones(3), np.zeros(3)), "div",
                              "/ count"),
    "arctanh beyond a where": Bad(bounded, (np.array([1.0, 0.5]),), "atanh",
                                  "jnp.arctanh(x)"),
    "distances between points": Bad(
        distances,
        (np.ones((2, 3)), np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
        "sqrt",
        "jnp.sqrt(jnp.sum((x[:, None]",
        "safe norm",
    ),
    "a sum that cancels": Bad(
        share, (np.array([-1.0, 2.0, 3.0]),), "div", "x / (x + jnp.abs(x))"
    ),
    "two equations": Bad(two_guards, (np.ones(3) * [1, 0, 1],), "sqrt", "jnp.sqrt(x)",
                         infinite=True),
    "in scan": Bad(scanned, (ZERO,), "sqrt", "jnp.sqrt(a), c * a", infinite=True),
    "in jit": Bad(jax.jit(masked_log), (ZERO,), "log", "jnp.where(x > 0, jnp.log"),
    "in cond": Bad(branching, (ZERO, True), "sqrt", "jnp.sqrt(a)", infinite=True),
    "in fori_loop": Bad(counted, (ZERO,), "sqrt", "jnp.sqrt(x[i])", infinite=True),
    "in remat": Bad(rematerialised, (ZERO,), "sqrt", "jnp.sqrt(a)", infinite=True),
    "optax.global_norm": Bad(global_norm, (ZEROS,), "sqrt", "optax.global_norm",
                             "safe norm"),
}  # fmt: skip
