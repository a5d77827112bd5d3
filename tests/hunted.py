"""Pairs of functions for hunts: right ones, and twins that fail where few tests look.

Each twin is right at the arguments beside it, and at ordinary points like them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Twins:
    """A right function, a wrong one, and arguments at which both are right."""

    right: Callable[..., Any]
    wrong: Callable[..., Any]
    args: tuple[Any, ...]


TWINS: dict[str, Twins] = {}


def _drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def _positive(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).uniform(0.5, 2, shape), jnp.float32)


def _rule(
    primal: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a function with a rule: `backward(arguments, cotangent)` is its bwd."""

    @jax.custom_vjp
    def fn(*args: Any) -> Any:
        return primal(*args)

    fn.defvjp(lambda *args: (primal(*args), args), backward)
    return fn


def _pair(
    name: str,
    primal: Callable[..., Any],
    right: Callable[..., Any],
    wrong: Callable[..., Any],
    *args: Any,
) -> None:
    TWINS[name] = Twins(_rule(primal, right), _rule(primal, wrong), args)


def _autodiff(primal: Callable[..., Any]) -> Callable[..., Any]:
    return lambda args, g: jax.vjp(primal, *args)[1](g)


def _no_tangent(array: jax.Array) -> np.ndarray:
    return np.zeros(np.shape(array), jax.dtypes.float0)


# --- entries that repeat, or are masked -----------------------------------------------


def _embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


_pair(
    "an embedding that keeps one of the gradients of an index that is there twice",
    _embed,
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].add(g), _no_tangent(r[1])),
    lambda r, g: (jnp.zeros_like(r[0]).at[r[1]].set(g), _no_tangent(r[1])),
    _drawn(0, 7, 3),
    jnp.array([1, 4, 2, 5]),
)


def _masked_softmax(x: jax.Array, mask: jax.Array) -> jax.Array:
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, x, -1e9), -1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, x - top, 0.0)), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)


def _masked_softmax_backward(r: Any, g: jax.Array) -> Any:
    p = _masked_softmax(*r)
    return p * (g - (p * g).sum(-1, keepdims=True)), _no_tangent(r[1])


_pair(
    "a masked softmax whose backward pass forgets the mask",
    _masked_softmax,
    _masked_softmax_backward,
    lambda r, g: _masked_softmax_backward((r[0], jnp.ones_like(r[1])), g),
    _drawn(1, 3, 4),
    jnp.ones((3, 4), bool),
)


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1)


_pair(
    "a masked mean that divides by all entries in its backward pass",
    _masked_mean,
    lambda r, g: (g * r[1] / jnp.maximum(r[1].sum(), 1), _no_tangent(r[1])),
    lambda r, g: (g * r[1] / r[1].size, _no_tangent(r[1])),
    _drawn(2, 6),
    jnp.ones(6, bool),
)


def _sum_of_lengths(x: jax.Array, lengths: jax.Array) -> jax.Array:
    inside = jnp.arange(x.shape[1]) < lengths[:, None]
    return (x**2 * inside).sum(1)


def _lengths_backward(off: int) -> Callable[..., Any]:
    def backward(r: Any, g: jax.Array) -> Any:
        x, lengths = r
        inside = jnp.arange(x.shape[1]) < lengths[:, None] + off
        return 2 * x * inside * g[:, None], _no_tangent(lengths)

    return backward


_pair(
    "a sum over lengths that is one too long in its backward pass",
    _sum_of_lengths,
    _lengths_backward(0),
    _lengths_backward(1),
    _drawn(3, 3, 5),
    jnp.array([5, 5, 5]),
)


def _segment_mean(x: jax.Array, ids: jax.Array) -> jax.Array:
    total = jnp.zeros(4, x.dtype).at[ids].add(x)
    count = jnp.zeros(4, x.dtype).at[ids].add(1.0)
    return (total / jnp.maximum(count, 1)).sum() + (total**2 / (count + 1)).sum()


def _segments_backward(r: Any, g: jax.Array) -> Any:
    x, ids = r
    dx = jax.grad(_segment_mean)(x, ids) * g
    count = jnp.zeros(4, x.dtype).at[ids].add(1.0)
    return dx * jnp.where((count == 0).any(), 0.5, 1.0), _no_tangent(ids)


_pair(
    "a mean of groups that is halved where a group is empty",
    _segment_mean,
    _autodiff(_segment_mean),
    _segments_backward,
    _drawn(4, 8),
    jnp.array([0, 1, 2, 3, 0, 1, 2, 3]),
)

# --- ties and order -------------------------------------------------------------------


def _row_max(x: jax.Array) -> jax.Array:
    return x.max(-1)


_pair(
    "a maximum that gives every tied entry the whole gradient",
    _row_max,
    _autodiff(_row_max),
    lambda r, g: (jnp.where(r[0] == r[0].max(-1, keepdims=True), g[:, None], 0.0),),
    _drawn(5, 3, 5),
)


def _top_two(x: jax.Array) -> jax.Array:
    return jax.lax.top_k(x, 2)[0].sum()


_pair(
    "a sum of the two largest that counts every entry as large as the second",
    _top_two,
    _autodiff(_top_two),
    lambda r, g: (jnp.where(r[0] >= jax.lax.top_k(r[0], 2)[0][-1], g, 0.0),),
    _drawn(6, 7),
)


def _sorted(x: jax.Array) -> jax.Array:
    return jnp.sort(x) * jnp.arange(1.0, x.size + 1)


_pair(
    "a sort that forgets to turn its order round",
    _sorted,
    _autodiff(_sorted),
    lambda r, g: (g * jnp.arange(1.0, g.size + 1),),
    jnp.array([-1.0, 0.5, 1.2, 2.0, 3.5]),
)

# --- zeros ----------------------------------------------------------------------------


def _norms(x: jax.Array) -> jax.Array:
    square = (x**2).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


_pair(
    "a norm whose gradient is not finite at rows of zeros",
    _norms,
    _autodiff(_norms),
    lambda r, g: (g[..., None] * r[0] / _norms(r[0])[..., None],),
    _drawn(7, 4, 3),
)
_pair(
    "a product whose gradient divides by its entries",
    jnp.prod,
    _autodiff(jnp.prod),
    lambda r, g: (g * jnp.prod(r[0]) / r[0],),
    _drawn(8, 5),
)


def _logits_of(x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x) * x


_pair(
    "a swish that is flat at exactly zero",
    _logits_of,
    _autodiff(_logits_of),
    lambda r, g: (jnp.where(r[0] == 0, 0.0, jax.vjp(_logits_of, *r)[1](g)[0]),),
    _drawn(9, 2, 6),
)

# --- signs, saturation, ends ----------------------------------------------------------


def _leaky(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 0.1 * x)


_pair(
    "a leaky ramp whose slope is another one for negative numbers",
    _leaky,
    _autodiff(_leaky),
    lambda r, g: (jnp.where(r[0] > 0, g, 0.2 * g),),
    _positive(10, 6),
)


def _entropy(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _entropy_backward(r: Any, g: jax.Array) -> Any:
    x, y = r
    p = jax.nn.sigmoid(x)
    return g * (-y / p + (1 - y) / (1 - p)) * p * (1 - p), -g * x


_pair(
    "a cross entropy whose gradient is 0 / 0 where it saturates",
    _entropy,
    lambda r, g: (g * (jax.nn.sigmoid(r[0]) - r[1]), -g * r[0]),
    _entropy_backward,
    _drawn(11, 5),
    jnp.array([0.3, 0.6, 0.2, 0.9, 0.5]),
)


def _clipped(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -5, 5) ** 2


_pair(
    "a clip that lets the gradient pass outside of its ends",
    _clipped,
    _autodiff(_clipped),
    lambda r, g: (2 * jnp.clip(r[0], -5, 5) * g,),
    _drawn(12, 6),
)

# --- sizes ----------------------------------------------------------------------------


def _scaled(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x * w)


def _scaled_backward(rows: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    def backward(r: Any, g: jax.Array) -> Any:
        x, w = r
        inner = g * (1 - _scaled(x, w) ** 2)
        return inner * w, rows(inner * x)

    return backward


_pair(
    "a scale whose gradient is that of the first row of a batch",
    _scaled,
    _scaled_backward(lambda d: d.sum(0)),
    _scaled_backward(lambda d: d[0]),
    _drawn(13, 1, 4),
    _drawn(14, 4),
)
_pair(
    "a scale whose gradient leaves out what is behind the last whole block",
    _scaled,
    _scaled_backward(lambda d: d.sum(0)),
    _scaled_backward(lambda d: d[: max(4, len(d) // 4 * 4)].sum(0)),
    _drawn(15, 8, 3),
    _drawn(16, 3),
)
_pair(
    "a scale that does not reduce where there is one column",
    _scaled,
    _scaled_backward(lambda d: d.sum(0)),
    _scaled_backward(lambda d: d.sum(0) if d.shape[1] > 1 else d[-1]),
    _drawn(17, 5, 4),
    _drawn(18, 4),
)


def _folded(x: jax.Array) -> jax.Array:
    return (x * x[::-1]).sum()


def _folded_backward(r: Any, g: jax.Array) -> Any:
    (x,) = r
    gradient = 2 * g * x[::-1]
    return (gradient.at[x.size // 2].mul(0.5) if x.size % 2 else gradient,)


_pair(
    "a folded sum that counts the middle of odd lengths once",
    _folded,
    _autodiff(_folded),
    _folded_backward,
    _drawn(19, 4),
)


# --- second order, and rules deep inside ----------------------------------------------


def _gaussian(is_right: bool) -> Callable[..., Any]:
    @jax.custom_jvp
    def gaussian(x: jax.Array) -> jax.Array:
        return jnp.exp(-(x**2))

    @gaussian.defjvp
    def gaussian_jvp(primals: Any, tangents: Any) -> Any:
        (x,), (dx,) = primals, tangents
        y = gaussian(x)
        # Equal at first order for all x; at the second where all of them are equal.
        spread = jnp.where(jnp.all(x == x.ravel()[0]), jax.lax.stop_gradient(y), y)
        return y, -2 * x * (y if is_right else spread) * dx

    return gaussian


TWINS["a bump whose second derivative is wrong where all entries are equal"] = Twins(
    _gaussian(True), _gaussian(False), (_drawn(20, 4),)
)


def _network(is_right: bool) -> Callable[..., Any]:
    def plain(x: jax.Array) -> jax.Array:
        return jnp.where(x > 4, 4 + jnp.tanh(x - 4), x)

    def backward(r: Any, g: jax.Array) -> Any:
        right = jax.vjp(plain, *r)[1](g)[0]
        return (right if is_right else jnp.where(r[0] > 4, 0.0, right),)

    soft_ceiling = _rule(plain, backward)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        hidden = soft_ceiling(jnp.tanh(x @ params["w"]) + params["b"])
        return (hidden**2).mean()

    return loss


TWINS["a network with an activation that is wrong where it saturates"] = Twins(
    _network(True),
    _network(False),
    ({"w": _drawn(21, 3, 4), "b": jnp.zeros(4)}, _drawn(22, 5, 3)),
)


# --- right rules that are easily accused ----------------------------------------------

_SEGMENTS = 4  # as many as there are entries


def _segment_sizes(ids: jax.Array) -> jax.Array:
    return jnp.zeros(_SEGMENTS).at[ids].add(1.0)


def _segment_means(x: jax.Array, ids: jax.Array) -> jax.Array:
    sums = jnp.zeros((_SEGMENTS,), x.dtype).at[ids].add(x)
    return sums / jnp.maximum(_segment_sizes(ids), 1)


_pair(
    "a mean of a fixed number of segments that does not count those that share one",
    _segment_means,
    lambda r, g: ((g / jnp.maximum(_segment_sizes(r[1]), 1))[r[1]], None),
    lambda r, g: (g[r[1]], None),
    _drawn(23, 4),
    jnp.array([2, 0, 3, 1]),
)


def _products_backward(r: Any, g: jax.Array, most: int) -> Any:
    (x,) = r
    zeros = (x == 0).sum(-1, keepdims=True)
    rest = jnp.prod(jnp.where(x == 0, 1, x), -1, keepdims=True)
    others = jnp.where(zeros > 0, 0, rest / jnp.where(x == 0, 1, x))
    slope = jnp.where(zeros > most, 0, jnp.where(x == 0, rest, others))
    return (slope * g[:, None],)


_pair(
    "a product that takes a row of two zeros for one of one",
    lambda x: jnp.prod(x, -1),
    lambda r, g: _products_backward(r, g, 1),
    lambda r, g: _products_backward(r, g, 2),
    _drawn(24, 3, 4),
)


def _picked(logits: jax.Array, labels: jax.Array) -> jax.Array:
    rows = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(rows, labels[:, None], 1)[:, 0]


def _picked_backward(r: Any, g: jax.Array, last: int) -> Any:
    logits, labels = r
    classes = logits.shape[1]
    picked = jax.nn.one_hot(jnp.minimum(labels, classes - last), classes)
    return g[:, None] * (jax.nn.softmax(logits) - picked), None


_pair(
    "a cross entropy that never picks the last of several classes",
    _picked,
    lambda r, g: _picked_backward(r, g, 1),
    lambda r, g: _picked_backward(r, g, 2 if r[0].shape[1] > 3 else 1),
    _drawn(25, 4, 5),
    jnp.array([0, 1, 2, 3]),
)


def _smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
    classes = logits.shape[-1]
    wanted = jax.nn.one_hot(labels, classes) * 0.9 + 0.1 / classes
    return -(wanted * jax.nn.log_softmax(logits)).sum()


def _smoothed_backward(r: Any, g: jax.Array, over: int) -> Any:
    logits, labels = r
    classes = logits.shape[-1]
    wanted = jax.nn.one_hot(labels, classes) * 0.9 + 0.1 / max(classes, over)
    return (jax.nn.softmax(logits) - wanted) * g, None


_pair(
    "a smoothed cross entropy that is wrong for less than five classes",
    _smoothed,
    lambda r, g: _smoothed_backward(r, g, 1),
    lambda r, g: _smoothed_backward(r, g, 5),
    _drawn(26, 4, 5),
    jnp.array([0, 4, 2, 3]),
)
