"""A hundred functions of one operation each, in the interior of their smooth domain.

All are right, all are float32: they measure the cost of a small check, and what the
checker makes of ordinary gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.scipy import linalg, special

Fn = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class SingleOp:
    """A function and float32 arguments, as NumPy arrays, at which it is smooth."""

    name: str
    fn: Fn
    args: tuple[np.ndarray, ...]


def _uniform(low: float, high: float, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def _distinct(*shape: int, seed: int = 0) -> np.ndarray:
    """Values in random order, a quarter apart: no ties within any step."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size / 2 + 0.3) / 4
    order = np.random.default_rng(seed).permutation(size)
    return values[order].reshape(shape).astype(np.float32)


_REAL = _uniform(-2, 2, 3, 4)
_OTHER = _uniform(-2, 2, 3, 4, seed=1)
_POSITIVE = _uniform(0.5, 2, 3, 4)
_OTHER_POSITIVE = _uniform(0.5, 2, 3, 4, seed=1)
_UNIT = _uniform(-0.8, 0.8, 3, 4)
_PROBABILITY = _uniform(0.1, 0.9, 3, 4)
_APART = _distinct(3, 4)
_OTHER_APART = _APART[::-1, ::-1] + np.float32(0.1)
_ABOVE_ONE = _uniform(1.2, 3, 3, 4)
_SQUARE = _uniform(-0.3, 0.3, 4, 4) + 2 * np.eye(4, dtype=np.float32)
_DEFINITE = (_SQUARE + _SQUARE.T) / 2
_COLUMN = _uniform(-2, 2, 4, seed=2)
_TALL = _uniform(-1, 1, 5, 3) + np.eye(5, 3, dtype=np.float32)
_IMAGE = _uniform(-1, 1, 2, 6, 6, 3)
_KERNEL = _uniform(-1, 1, 3, 3, 3, 4, seed=1)
_APART_IMAGE = _distinct(2, 6, 6, 1)
_ROWS = np.array([2, 0, 0, 1])
_SEGMENTS = np.array([0, 2, 2])
_IS_CHOSEN = np.arange(12).reshape(3, 4) % 3 == 0


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _strided_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=layout
    )


def _max_pool(x: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _mean_pool(x: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 4


def _eigenvalues(x: jax.Array) -> jax.Array:
    return jnp.linalg.eigvalsh((x + x.T) / 2)


def _cholesky(x: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky((x + x.T) / 2)


_TABLE: tuple[tuple[str, Fn, tuple[np.ndarray, ...]], ...] = (
    # Elementwise functions of one argument.
    ("sin", jnp.sin, (_REAL,)),
    ("cos", jnp.cos, (_REAL,)),
    ("tan", jnp.tan, (_UNIT,)),
    ("arcsin", jnp.arcsin, (_UNIT,)),
    ("arccos", jnp.arccos, (_UNIT,)),
    ("arctan", jnp.arctan, (_REAL,)),
    ("sinh", jnp.sinh, (_REAL,)),
    ("cosh", jnp.cosh, (_REAL,)),
    ("tanh", jnp.tanh, (_REAL,)),
    ("arcsinh", jnp.arcsinh, (_REAL,)),
    ("arccosh", jnp.arccosh, (_ABOVE_ONE,)),
    ("arctanh", jnp.arctanh, (_UNIT,)),
    ("exp", jnp.exp, (_REAL,)),
    ("exp2", jnp.exp2, (_REAL,)),
    ("expm1", jnp.expm1, (_REAL,)),
    ("log", jnp.log, (_POSITIVE,)),
    ("log2", jnp.log2, (_POSITIVE,)),
    ("log1p", jnp.log1p, (_POSITIVE,)),
    ("sqrt", jnp.sqrt, (_POSITIVE,)),
    ("rsqrt", lax.rsqrt, (_POSITIVE,)),
    ("cbrt", jnp.cbrt, (_POSITIVE,)),
    ("square", jnp.square, (_REAL,)),
    ("cube", lambda x: lax.integer_pow(x, 3), (_REAL,)),
    ("reciprocal", jnp.reciprocal, (_POSITIVE,)),
    ("abs", jnp.abs, (_APART,)),
    ("sinc", jnp.sinc, (_POSITIVE,)),
    # Elementwise functions of two arguments.
    ("add", jnp.add, (_REAL, _OTHER)),
    ("subtract", jnp.subtract, (_REAL, _OTHER[0])),
    ("multiply", jnp.multiply, (_REAL, _OTHER)),
    ("divide", jnp.divide, (_REAL, _OTHER_POSITIVE)),
    ("power", jnp.power, (_POSITIVE, _OTHER)),
    ("maximum", jnp.maximum, (_APART, _OTHER_APART)),
    ("minimum", jnp.minimum, (_APART, _OTHER_APART)),
    ("hypot", jnp.hypot, (_POSITIVE, _OTHER_POSITIVE)),
    ("arctan2", jnp.arctan2, (_REAL, _OTHER_POSITIVE)),
    ("logaddexp", jnp.logaddexp, (_REAL, _OTHER)),
    ("where", lambda x, y: jnp.where(_IS_CHOSEN, x, y), (_REAL, _OTHER)),
    ("clip", lambda x: jnp.clip(x, -1.0, 1.0), (_APART,)),
    # Activations.
    ("relu", nn.relu, (_APART,)),
    ("leaky_relu", nn.leaky_relu, (_APART,)),
    ("elu", nn.elu, (_APART,)),
    ("selu", nn.selu, (_APART,)),
    ("gelu", nn.gelu, (_REAL,)),
    ("sigmoid", nn.sigmoid, (_REAL,)),
    ("log_sigmoid", nn.log_sigmoid, (_REAL,)),
    ("softplus", nn.softplus, (_REAL,)),
    ("swish", nn.swish, (_REAL,)),
    ("glu", nn.glu, (_REAL,)),
    ("softmax", nn.softmax, (_REAL,)),
    ("log_softmax", nn.log_softmax, (_REAL,)),
    ("standardize", nn.standardize, (_REAL,)),
    # Special functions.
    ("erf", special.erf, (_REAL,)),
    ("erfc", special.erfc, (_REAL,)),
    ("erfinv", special.erfinv, (_UNIT,)),
    ("gammaln", special.gammaln, (_POSITIVE,)),
    ("digamma", special.digamma, (_POSITIVE,)),
    ("betaln", special.betaln, (_POSITIVE, _OTHER_POSITIVE)),
    ("logit", special.logit, (_PROBABILITY,)),
    ("entr", special.entr, (_PROBABILITY,)),
    ("xlogy", special.xlogy, (_REAL, _OTHER_POSITIVE)),
    ("ndtr", special.ndtr, (_REAL,)),
    ("log_ndtr", special.log_ndtr, (_REAL,)),
    ("i0e", special.i0e, (_POSITIVE,)),
    ("i1e", special.i1e, (_POSITIVE,)),
    # Reductions.
    ("sum", lambda x: jnp.sum(x, 0), (_REAL,)),
    ("mean", jnp.mean, (_REAL,)),
    ("var", lambda x: jnp.var(x, 1), (_REAL,)),
    ("std", lambda x: jnp.std(x, 1), (_REAL,)),
    ("prod", lambda x: jnp.prod(x, 1), (_POSITIVE,)),
    ("max", lambda x: jnp.max(x, 0), (_APART,)),
    ("min", lambda x: jnp.min(x, 1), (_APART,)),
    ("median", lambda x: jnp.median(x, 1), (_APART,)),
    ("logsumexp", lambda x: special.logsumexp(x, 1), (_REAL,)),
    ("norm", jnp.linalg.norm, (_REAL,)),
    # Running sums and products, differences, order.
    ("cumsum", lambda x: jnp.cumsum(x, 1), (_REAL,)),
    ("cumprod", lambda x: jnp.cumprod(x, 1), (_POSITIVE,)),
    ("cumlogsumexp", lambda x: lax.cumlogsumexp(x, 1), (_REAL,)),
    ("diff", jnp.diff, (_REAL,)),
    ("sort", jnp.sort, (_APART,)),
    # Indexing and shape.
    ("take", lambda x: x[_ROWS], (_REAL,)),
    ("slice", lambda x: x[1:, ::2], (_REAL,)),
    (
        "scatter_add",
        lambda x, y: jnp.asarray(x).at[_ROWS].add(y),
        (_REAL, _uniform(-1, 1, 4, 4)),
    ),
    ("scatter_set", lambda x, y: jnp.asarray(x).at[1].set(y), (_REAL, _COLUMN)),
    ("segment_sum", lambda x: jax.ops.segment_sum(x, _SEGMENTS, 4), (_REAL,)),
    ("concatenate", lambda x, y: jnp.concatenate([x, y]), (_REAL, _OTHER)),
    ("pad", lambda x: jnp.pad(x, ((1, 2), (0, 1))), (_REAL,)),
    ("tril", jnp.tril, (_SQUARE,)),
    # Linear algebra.
    ("matmul", jnp.matmul, (_REAL, _SQUARE)),
    ("outer", jnp.outer, (_REAL, _COLUMN)),
    ("inv", jnp.linalg.inv, (_SQUARE,)),
    ("det", jnp.linalg.det, (_SQUARE,)),
    ("slogdet", lambda x: jnp.linalg.slogdet(x)[1], (_SQUARE,)),
    ("solve", jnp.linalg.solve, (_SQUARE, _COLUMN)),
    ("solve_triangular", linalg.solve_triangular, (_SQUARE, _COLUMN)),
    ("cholesky", _cholesky, (_DEFINITE,)),
    ("eigvalsh", _eigenvalues, (_DEFINITE + np.diag(np.float32([0, 1, 2, 3])),)),
    # Convolutions and pooling.
    ("conv", _convolve, (_IMAGE, _KERNEL)),
    ("strided_conv", _strided_convolve, (_IMAGE, _KERNEL)),
    ("max_pool", _max_pool, (_APART_IMAGE,)),
    ("mean_pool", _mean_pool, (_IMAGE,)),
)

SINGLE_OPS: tuple[SingleOp, ...] = tuple(SingleOp(*row) for row in _TABLE)
