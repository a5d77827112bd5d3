"""What each public loss of Optax promises of its reduction, and how that is asked."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import losses

NONE = types.MappingProxyType({"reduction": "none"})


@dataclasses.dataclass(frozen=True)
class Promise:
    """One promise of one loss.

    Attributes:
      loss: The public name.
      says: What is promised.
      fn: The loss as a function of `args`.
      args: What it is asked at.
      options: Options of `assert_loss_reduction`.
    """

    loss: str
    says: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.loss}: {self.says}"


def _normal(seed: int, *shape: int) -> jax.Array:
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(drawn, jnp.float32)


_X, _Y, _Z = _normal(0, 3, 4), _normal(1, 3, 4), _normal(2, 3, 4)
_SOFT = jax.nn.softmax(_Y)
_LOG = jax.nn.log_softmax(_X)
_BINARY = jnp.array([[0.0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 0]])
_SIGNS = 2 * _BINARY - 1
_CLASSES = jnp.array([2, 0, 3])
_KEPT = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]], bool)
_ELEMENT = "one value for each entry"
_ROW = "one value for each row"


def _each_entry(name: str, *targets: Any) -> Promise:
    fn = getattr(losses, name)
    return Promise(name, _ELEMENT, fn, (_X, *targets), {**NONE, "axis": (0, 1)})


def _each_row(name: str, *args: Any, says: str = _ROW) -> Promise:
    return Promise(name, says, getattr(losses, name), args, NONE)


def _kept_only(name: str, predictions: Any, targets: Any) -> Promise:
    """Entries of a row that `where` leaves out are as if they were not there."""
    fn = getattr(losses, name)

    def kept(i: int, x: Any) -> Any:
        places = np.flatnonzero(_KEPT[i])
        if np.ndim(targets) == 2:
            return fn(x[i, places], targets[i, places])
        return fn(x[i, places], int(np.sum(places < int(targets[i]))))

    return Promise(
        name,
        "`where` leaves entries of a row out",
        lambda x: fn(x, targets, where=_KEPT),
        (predictions,),
        {**NONE, "per_example": kept},
    )


# Labels are among the classes that are kept.
_KEPT_CLASSES = np.array([1, 3, 2])
_IMAGES = _normal(3, 2, 3, 2, 4)
_DICE = jax.nn.one_hot(jnp.arange(12).reshape(2, 3, 2) % 4, 4)
_MASKS = jnp.asarray(np.arange(12).reshape(2, 6) % 3 == 0, jnp.float32)


def _of_classes(reduction: str) -> Promise:
    def each(i: int, x: Any) -> Any:
        return losses.dice_loss(x, _DICE, reduction="none")[:, i]

    return Promise(
        "dice_loss",
        f"reduction={reduction!r} over the classes",
        lambda x: losses.dice_loss(x, _DICE, reduction=reduction),
        (_IMAGES,),
        {"reduction": reduction, "axis": 3, "per_example": each},
    )


def _weighed_by_rarity(i: int, x: Any) -> Any:
    """The plain formula of the generalised Dice loss of one batch entry."""
    counts = jnp.sum(_DICE, axis=(0, 1, 2))
    weights = 1 / (counts**2 + 1e-7)
    weights = weights / jnp.mean(weights)
    found = jax.nn.softmax(x[i])
    both = jnp.sum(found * _DICE[i], axis=(0, 1))
    every = jnp.sum(found, axis=(0, 1)) + jnp.sum(_DICE[i], axis=(0, 1))
    return jnp.mean(weights * (1 - (both + 1) / (every / 2 + 1)))


_SPEECH = _normal(4, 3, 4, 3)
_SPEECH_PADDING = jnp.array([[0.0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
_TEXT = jnp.array([[1, 2], [2, 0], [1, 1]])
_TEXT_PADDING = jnp.array([[0.0, 0], [0, 1], [0, 0]])


def _ctc(x: Any, padding: Any, text: Any, text_padding: Any) -> Any:
    return losses.ctc_loss_with_forward_probs(x, padding, text, text_padding)[0]


_PAIRED = np.array([0, 0, 1, 1])
_EMBEDDED = _normal(5, 4, 3)


def _one_pair(i: int, x: Any) -> Any:
    """The plain formula of NT-Xent for an anchor with one other of its label."""
    unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    score = unit @ unit[i] / 0.07
    others = [j for j in range(4) if _PAIRED[j] != _PAIRED[i]]
    (partner,) = (j for j in range(4) if j != i and _PAIRED[j] == _PAIRED[i])
    every = jnp.stack([score[partner], *(score[j] for j in others)])
    return jax.nn.logsumexp(every) - score[partner]


_LISTS = np.array([True, False, True])


def _ranked(x: Any, y: Any, where: Any) -> Any:
    return losses.ranking_softmax_loss(x, y, where=jnp.broadcast_to(where, x.shape))


def _ranked_kept(i: int, x: Any) -> Any:
    places = np.flatnonzero(_KEPT[i])
    return losses.ranking_softmax_loss(x[i, places], _SOFT[i, places])


PROMISES = [
    Promise(
        "binary_dice_loss",
        "one value for each batch entry",
        losses.binary_dice_loss,
        (_normal(6, 2, 6), _MASKS),
        NONE,
    ),
    _each_row("convex_kl_divergence", _LOG, _SOFT),
    _kept_only("convex_kl_divergence", _LOG, _SOFT),
    _each_row("cosine_distance", _X, _Y),
    _kept_only("cosine_distance", _X, _Y),
    _each_row("cosine_similarity", _X, _Y),
    _kept_only("cosine_similarity", _X, _Y),
    _each_row("ctc_loss", _SPEECH, _SPEECH_PADDING, _TEXT, _TEXT_PADDING),
    Promise(
        "ctc_loss_with_forward_probs",
        "one loss for each row",
        _ctc,
        (_SPEECH, _SPEECH_PADDING, _TEXT, _TEXT_PADDING),
        NONE,
    ),
    _each_row("dice_loss", _IMAGES, _DICE, says="one value for each batch entry"),
    _of_classes("mean"),
    _of_classes("sum"),
    _each_row("generalized_kl_divergence", _LOG, _SOFT),
    _kept_only("generalized_kl_divergence", _LOG, _SOFT),
    _each_entry("hinge_loss", _SIGNS),
    _each_entry("huber_loss", _Y),
    _each_row("kl_divergence", _LOG, _SOFT),
    _kept_only("kl_divergence", _LOG, _SOFT),
    _each_row("kl_divergence_with_log_targets", _LOG, jnp.log(_SOFT)),
    _kept_only("kl_divergence_with_log_targets", _LOG, jnp.log(_SOFT)),
    _each_entry("l2_loss", _Y),
    _each_entry("log_cosh", _Y),
    Promise(
        "make_fenchel_young_loss",
        _ROW,
        losses.make_fenchel_young_loss(jax.nn.logsumexp),
        (_X, _SOFT),
        NONE,
    ),
    Promise(
        "multiclass_generalized_dice_loss",
        "the mean over classes and batch, weighed by the whole batch",
        lambda x: losses.multiclass_generalized_dice_loss(x, _DICE),
        (_IMAGES,),
        {"per_example": _weighed_by_rarity},
    ),
    _each_row("multiclass_hinge_loss", _X, _CLASSES),
    _each_row("multiclass_perceptron_loss", _X, _CLASSES),
    _each_row("multiclass_sparsemax_loss", _X, _CLASSES),
    Promise(
        "ntxent",
        "the mean over pairs of one label",
        lambda x: losses.ntxent(x, _PAIRED),
        (_EMBEDDED,),
        {"per_example": _one_pair},
    ),
    _each_entry("perceptron_loss", _SIGNS),
    _each_row("poly_loss_cross_entropy", _X, _SOFT),
    _kept_only("poly_loss_cross_entropy", _X, _SOFT),
    Promise(
        "ranking_softmax_loss",
        "the mean over lists",
        losses.ranking_softmax_loss,
        (_X, _SOFT),
        {},
    ),
    Promise(
        "ranking_softmax_loss",
        "reduce_fn=jnp.sum",
        lambda x, y: losses.ranking_softmax_loss(x, y, reduce_fn=jnp.sum),
        (_X, _SOFT),
        {"reduction": "sum"},
    ),
    Promise(
        "ranking_softmax_loss",
        "reduce_fn=None",
        lambda x, y: losses.ranking_softmax_loss(x, y, reduce_fn=None),
        (_X, _SOFT),
        NONE,
    ),
    Promise(
        "ranking_softmax_loss",
        "lists that `where` leaves out do not count",
        _ranked,
        (_X, _SOFT),
        {"where": _LISTS[:, None]},
    ),
    Promise(
        "ranking_softmax_loss",
        "`where` leaves entries of a list out",
        lambda x: losses.ranking_softmax_loss(x, _SOFT, where=_KEPT),
        (_X,),
        {"per_example": _ranked_kept},
    ),
    _each_row("safe_softmax_cross_entropy", _X, _SOFT),
    _each_entry("sigmoid_binary_cross_entropy", _BINARY),
    _each_entry("sigmoid_focal_loss", _BINARY),
    _each_row("smooth_labels", _SOFT, 0.1),
    _kept_only("softmax_cross_entropy", _X, _SOFT),
    _each_row("softmax_cross_entropy", _X, _SOFT),
    _each_row("softmax_cross_entropy_with_integer_labels", _X, _CLASSES),
    _kept_only("softmax_cross_entropy_with_integer_labels", _X, _KEPT_CLASSES),
    _each_entry("sparsemax_loss", _BINARY),
    _each_entry("squared_error", _Y),
    _each_row("triplet_margin_loss", _X, _Y, _Z),
]


def public_losses() -> set[str]:
    """Returns the public names of `optax.losses`."""
    return {
        name
        for name, value in vars(losses).items()
        if not name.startswith("_")
        and callable(value)
        and not inspect.isclass(value)
        and not isinstance(value, types.ModuleType)
    }
