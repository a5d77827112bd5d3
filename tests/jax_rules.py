"""The custom rules that JAX and Optax bring along, each with arguments to try.

One entry for every public function, at ordinary values and where its rule is
special: zeros, ties, saturation, masks, infinite logits. Those that turn out to call no
custom rule are entries as well, so that a new name, or a new rule, is noticed.
`flax_layers` has the layers of Flax.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import optax.losses as losses

from tests.zoo_entry import normal

Args = tuple[Any, ...]
Fn = Callable[..., Any]
Points = dict[str, Args]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function at one point.

    Attributes:
      name: As it is imported, such as "jax.nn.relu".
      point: What is special of the arguments.
      make: Returns `(fn, args)`.
      half: Whether the function takes bfloat16 here too.
    """

    name: str
    point: str
    make: Callable[[], tuple[Fn, Args]]
    half: bool = True

    @property
    def id(self) -> str:
        """The entry's name among the tests."""
        return f"{self.name}-{self.point}"

    def in_bfloat16(self) -> "Entry":
        """Returns the entry with every float32 array made bfloat16."""

        def make() -> tuple[Fn, Args]:
            fn, args = self.make()
            return fn, jax.tree.map(_halved, args)

        return dataclasses.replace(self, point=f"{self.point}-bfloat16", make=make)


def _halved(value: Any) -> Any:
    is_single = getattr(value, "dtype", None) == jnp.float32
    return value.astype(jnp.bfloat16) if is_single else value


def _at(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float32)


# --- points -------------------------------------------------------------------------

_INF = float("inf")
_ORDINARY = _at(-1.3, -0.4, 0.7, 2.1)
_POSITIVE = _at(0.3, 0.9, 1.7, 4.2)
_BETWEEN = _at(0.1, 0.35, 0.6, 0.93)
_LOGITS = normal(0, 3, 4)
_MASK = jnp.array(
    [[True, False, True, True], [False, True, True, False], [True, True, False, True]]
)

_ONE_ROW = _MASK.at[1].set(False)  # a row where nothing is left
_TIED = _at(1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 2.0, 2.0, -3.0, -3.0, -3.0, -3.0).reshape(
    3, 4
)
_CLASSES = jnp.array([2, 0, 3])
_ONE_HOT = jax.nn.one_hot(_CLASSES, 4)
_SOFT = jax.nn.softmax(normal(1, 3, 4))
_BINARY = (normal(2, 3, 4) > 0).astype(jnp.float32)


def _reals(**more: Args) -> Points:
    """Points on the real line, saturated ones included."""
    return {
        "ordinary": (_ORDINARY,),
        "zeros": (_at(0.0, -0.0, 1e-6, -1e-6),),
        "large": (_at(-100.0, -30.0, 30.0, 100.0),),
        **more,
    }


def _kinked(*kinks: float) -> Points:
    """Points on the real line and right at kinks."""
    return _reals(kinks=(_at(*kinks),))


def _logits(**more: Args) -> Points:
    """Rows of logits, among them ties, large ones and masked ones."""
    return {
        "ordinary": (_LOGITS,),
        "ties": (_TIED,),
        "large": (30 * _LOGITS,),
        **more,
    }


def _with(points: Points, *others: Any) -> Points:
    """Adds further arguments to those of every point."""
    return {name: (*args, *others) for name, args in points.items()}


# --- entries ------------------------------------------------------------------------


def _entries(module: Any, table: dict[str, Any]) -> Iterator[Entry]:
    """Makes entries of `{name: (function, points)}` or `{name: points}`.

    A function stands in where arguments are not to be differentiated or have to be
    passed by name; a name that this version lacks is left out.
    """
    for name, described in table.items():
        if not hasattr(module, name):
            continue
        fn, points = (
            described
            if isinstance(described, tuple)
            else (getattr(module, name), described)
        )
        for point, args in points.items():
            yield entry(f"{module.__name__}.{name}", point, fn, args)


def entry(name: str, point: str, fn: Fn, args: Args) -> Entry:
    return Entry(name, point, lambda: (fn, args))


def _heads(seed: int) -> jax.Array:
    return normal(seed, 1, 3, 2, 4)


QKV = (_heads(3), _heads(4), _heads(5))
_CAUSAL = jnp.tril(jnp.ones((3, 3), bool))
MASKS = {
    "all true": jnp.ones((1, 1, 3, 3), bool),
    "causal": _CAUSAL[None, None],
    "one row false": _CAUSAL.at[1].set(False)[None, None],
    "all false": jnp.zeros((1, 1, 3, 3), bool),
}


def _attention(*args: Any) -> jax.Array:
    return jax.nn.dot_product_attention(*args[:3], mask=(*args, None)[3])


_WHERES: Points = {
    "ordinary": (_LOGITS, None),
    "ties": (_TIED, None),
    "large": (30 * _LOGITS, None),
    "where": (_LOGITS, _MASK),
    "where all false": (_LOGITS, _ONE_ROW),
}


def _masked(fn: Fn) -> Fn:
    """Puts minus infinity where the second argument is false, as masks do."""
    return lambda x, keep: fn(jnp.where(keep, x, -_INF))


def _softmax(x: jax.Array, where: Any) -> jax.Array:
    return jax.nn.softmax(x, where=where, axis=-1)


def _log_softmax(x: jax.Array, where: Any) -> jax.Array:
    return jax.nn.log_softmax(x, where=where, axis=-1)


def _logsumexp(x: jax.Array, where: Any) -> jax.Array:
    return jax.nn.logsumexp(x, where=where, axis=-1)


def _logmeanexp(x: jax.Array, where: Any) -> jax.Array:
    return jax.nn.logmeanexp(x, where=where, axis=-1)


NN = {
    "celu": _reals(),
    "dot_product_attention": (
        _attention,
        {
            "ordinary": QKV,
            "large": (30 * QKV[0], *QKV[1:]),
            **{name: (*QKV, mask) for name, mask in MASKS.items()},
        },
    ),
    "elu": _reals(),
    "gelu": (
        lambda x: (jax.nn.gelu(x), jax.nn.gelu(x, approximate=False)),
        _reals(),
    ),
    "glu": {"ordinary": (_LOGITS,), "large": (30 * _LOGITS,)},
    "hard_sigmoid": _kinked(-3.0, 3.0),
    "hard_silu": _kinked(-3.0, 3.0),
    "hard_swish": _kinked(-3.0, 3.0),
    "hard_tanh": _kinked(-1.0, 1.0),
    "identity": _reals(),
    "leaky_relu": _reals(),
    "log1mexp": {
        "ordinary": (_POSITIVE,),
        "small": (_at(1e-6, 1e-3, 0.1),),
        "at the switch": (_at(0.69314718, 0.6931, 0.6932),),
        "large": (_at(30.0, 80.0, 100.0),),
        "zero": (_at(0.0, 1.0),),
    },
    "log_sigmoid": _reals(),
    "log_softmax": (_log_softmax, _WHERES),
    "logmeanexp": (_logmeanexp, _WHERES),
    "logsumexp": (_logsumexp, _WHERES),
    "mish": _reals(),
    "one_hot": (lambda x: x * jax.nn.one_hot(_CLASSES, 4), {"ordinary": (_LOGITS,)}),
    "relu": _reals(),
    "relu6": _kinked(0.0, 6.0, 5.0),
    "selu": _reals(),
    "sigmoid": _reals(),
    "silu": _reals(),
    "soft_sign": _reals(),
    "softmax": (_softmax, _WHERES),
    "softplus": _reals(),
    "sparse_plus": _kinked(-1.0, 1.0),
    "sparse_sigmoid": _kinked(-1.0, 1.0),
    "squareplus": _reals(),
    "standardize": {"ordinary": (_LOGITS,), "constant": (jnp.ones((2, 3)),)},
    "swish": _reals(),
    "tanh": _reals(),
}
# What takes no array, or runs on NVIDIA's newest accelerators alone.
NN_ELSEWHERE = {
    "get_scaled_dot_general_config": "makes a configuration",
    "initializers": "draws parameters",
    "scaled_dot_general": "has kernels for accelerators only",
    "scaled_matmul": "has kernels for accelerators only",
}

_GAMMA: Points = {
    "ordinary": (_POSITIVE,),
    "small": (_at(1e-3, 0.02, 0.1),),
    "large": (_at(12.0, 30.0),),
    "negative": (_at(-0.5, -1.3, -2.7),),
}
_INSIDE: Points = {
    "ordinary": (_at(-0.7, -0.2, 0.4, 0.8),),
    "near the ends": (_at(-0.999, 0.999, 0.0),),
}
_UNIT: Points = {
    "ordinary": (_BETWEEN,),
    "near the ends": (_at(1e-4, 1e-2, 0.95, 0.99),),
}
_PAIRS: Points = {
    "ordinary": (_POSITIVE, _at(1.4, 0.2, 2.6, 0.8)),
    "one zero": (_at(0.0, 0.0, 0.5), _at(0.7, 1.3, 2.0)),
    "equal": (_POSITIVE, _POSITIVE),
}
_TAILS: Points = _reals(tails=(_at(-12.0, -6.0, -5.0, 5.0, 8.0),))

SPECIAL = {
    "bernoulli": (lambda x: x * special.bernoulli(4)[-1], {"ordinary": (_ORDINARY,)}),
    "bessel_jn": (
        lambda z: special.bessel_jn(z, v=3, n_iter=20),
        {"ordinary": (_POSITIVE,), "negative": (-_POSITIVE,)},
    ),
    "beta": {"ordinary": (_POSITIVE, _BETWEEN)},
    "betainc": {
        "ordinary": (_POSITIVE[:3], _at(0.7, 2.0, 3.1), _BETWEEN[:3]),
        "near the ends": (_at(2.0, 2.0), _at(3.0, 0.5), _at(1e-3, 0.999)),
    },
    "betaln": {"ordinary": (_POSITIVE, _BETWEEN)},
    "boxcox": {
        "ordinary": (_POSITIVE, _ORDINARY),
        "lambda zero": (_POSITIVE, _at(0.0, 0.0, 1e-4, 1.0)),
    },
    "boxcox1p": {
        "ordinary": (_POSITIVE, _ORDINARY),
        "lambda zero": (_POSITIVE, _at(0.0, 0.0, 1e-4, 1.0)),
        "x zero": (_at(0.0, 0.0), _at(0.5, 2.0)),
    },
    "comb": {"ordinary": (_at(4.5, 6.2), _at(1.3, 2.0))},
    "dawsn": _TAILS,
    "digamma": _GAMMA,
    "entr": {"ordinary": (_POSITIVE,), "zero": (_at(0.0, 1.0),)},
    "erf": _TAILS,
    "erfc": _TAILS,
    "erfcinv": {"ordinary": (2 * _BETWEEN,), "near the ends": (_at(1e-4, 1.999, 1),)},
    "erfcx": {
        "ordinary": (_at(-1.3, -0.4, 0.7, 1.1),),
        "tails": (_at(-3.0, 3.0, 5.0, 8.0),),
    },
    "erfinv": _INSIDE,
    "exp1": {"ordinary": (_POSITIVE,), "large": (_at(12.0, 30.0),)},
    "expi": {
        "ordinary": (_POSITIVE,),
        "negative": (-_POSITIVE,),
        "large": (_at(-30.0, 8.0, 17.0, 40.0),),
    },
    "expit": _reals(),
    "expn": (
        lambda x: special.expn(3, x),
        {"ordinary": (_POSITIVE,), "large": (_at(12.0, 30.0),)},
    ),
    "factorial": {"ordinary": (_POSITIVE,)},
    "fresnel": _reals(tails=(_at(-4.0, -1.6, 1.7, 5.0),)),
    "gamma": _GAMMA,
    "gammainc": {
        "ordinary": (_POSITIVE, _at(0.5, 1.2, 1.1, 3.0)),
        "large": (_at(20.0, 50.0), _at(25.0, 45.0)),
    },
    "gammaincc": {
        "ordinary": (_POSITIVE, _at(0.5, 1.2, 1.1, 3.0)),
        "large": (_at(20.0, 50.0), _at(25.0, 45.0)),
    },
    "gammaln": _GAMMA,
    "gammasgn": _GAMMA,
    "hyp1f1": {
        "ordinary": (_at(1.2, 0.7), _at(2.3, 1.9), _at(0.6, 1.5)),
        "equal": (_at(1.5, 2.0), _at(1.5, 2.0), _at(0.6, 1.1)),
        "a zero": (_at(0.0, 0.0), _at(1.5, 2.0), _at(0.6, 1.1)),
        "x zero": (_at(1.2, 0.7), _at(2.3, 1.9), _at(0.0, 0.0)),
    },
    "hyp2f1": {
        "ordinary": (_at(1.2, 0.7), _at(0.4, 1.1), _at(2.3, 1.9), _at(0.3, -0.4)),
        "x zero": (_at(1.2, 0.7), _at(0.4, 1.1), _at(2.3, 1.9), _at(0.0, 0.0)),
    },
    "i0": _reals(),
    "i0e": _reals(),
    "i1": _reals(),
    "i1e": _reals(),
    "kl_div": _PAIRS,
    "log_ndtr": _TAILS,
    "log_softmax": _logits(),
    "loggamma": _GAMMA,
    "logit": _UNIT,
    "logsumexp": (lambda x: special.logsumexp(x, axis=-1), _logits()),
    "multigammaln": (
        lambda a: special.multigammaln(a, 3),
        {"ordinary": (_at(1.5, 2.2, 7.0),)},
    ),
    "ndtr": _TAILS,
    "ndtri": _UNIT,
    "owens_t": {
        "ordinary": (_ORDINARY, _at(0.5, 1.7, -0.8, 0.2)),
        "h zero": (_at(0.0, 0.0, 0.0), _at(0.4, -2.0, 1.0)),
        "a zero": (_at(0.3, -1.2), _at(0.0, 0.0)),
        "a one": (_at(0.3, -1.2, 2.0), _at(1.0, 1.0, -1.0)),
        "large": (_at(4.0, 9.0, -30.0), _at(3.0, 0.1, 20.0)),
    },
    "poch": {
        "ordinary": (_POSITIVE, _at(1.4, 0.2, 2.6, 0.8)),
        "m zero": (_POSITIVE, _at(0.0, 0.0, 0.0, 0.0)),
        "negative": (_at(-0.5, -1.3), _at(0.7, 2.4)),
    },
    "polygamma": (
        lambda x: [special.polygamma(n, x) for n in (0, 1, 3)],
        {"ordinary": (_POSITIVE,), "small": (_at(0.02, 0.1),)},
    ),
    "rel_entr": _PAIRS,
    "sici": {
        "positive": (_POSITIVE,),
        "tails": (_at(3.9, 4.1, 12.0, 30.0),),
        "negative": (-_POSITIVE,),
        "large": (_at(-100.0, 100.0),),
    },
    "softmax": _logits(),
    "spence": {
        "ordinary": (_POSITIVE,),
        "switches": (_at(0.5, 1.0, 1.5, 1e-3),),
        "zero": (_at(0.0, 0.7),),
    },
    "sph_harm_y": (
        lambda theta, phi: special.sph_harm_y(
            jnp.array([2, 3]), jnp.array([1, 2]), theta, phi, n_max=3
        ),
        {"ordinary": (_at(0.4, 1.1), _at(0.7, 2.0))},
    ),
    "wofz": (
        lambda x, y: special.wofz(x + 1j * y),
        {
            "ordinary": (_ORDINARY, _at(0.3, 1.2, -0.5, 0.8)),
            "zero": (_at(0.0, 0.5), _at(0.0, 0.0)),
            "large": (_at(-9.0, 12.0), _at(5.0, 0.1)),
        },
    ),
    "xlog1py": {
        "ordinary": (_ORDINARY, _BETWEEN),
        "x zero": (_at(0.0, 0.0, 0.5), _at(0.7, -0.3, 2.0)),
        "y minus one": (_at(0.0, 1.0), _at(-1.0, 0.5)),
    },
    "xlogy": {
        "ordinary": (_ORDINARY, _BETWEEN),
        "x zero": (_at(0.0, 0.0, 0.5), _at(0.7, 1.3, 2.0)),
        "both zero": (_at(0.0, 1.0), _at(0.0, 0.5)),
    },
    "zeta": {
        "ordinary": (_at(1.5, 2.2, 3.1, 6.0), _POSITIVE),
        "large": (_at(1.1, 20.0), _at(12.0, 1.0)),
    },
}


def _to_labels(*labels: Any) -> Points:
    """Logits beside labels that are not differentiated."""
    return _with(_logits(), *labels)


def _held(fn: Fn, *labels: Any) -> Fn:
    """Closes over labels, so that nothing asks for their derivative."""
    return lambda x: fn(x, *labels)


_SIGNS = 2 * _BINARY - 1
_CTC = normal(6, 2, 5, 3)
_PADDINGS = jnp.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], jnp.float32)
_TEXT = jnp.array([[1, 2], [2, 2]])
_TEXT_PADDINGS = jnp.array([[0, 0], [0, 1]], jnp.float32)


def _ctc(fn: Fn) -> tuple[Fn, Points]:
    def loss(logits: jax.Array) -> Any:
        return fn(logits, _PADDINGS, _TEXT, _TEXT_PADDINGS)

    return loss, {"ordinary": (_CTC,), "ties": (0 * _CTC,), "large": (30 * _CTC,)}


def _where_points(wheres: Points = _WHERES) -> Points:
    names = ("ordinary", "ties", "large", "where", "where all false")
    return {name: wheres[name] for name in names}


def _masked_loss(fn: Fn, labels: Any) -> tuple[Fn, Points]:
    return (lambda x, where: fn(x, labels, where=where), _where_points())


_DICE = normal(7, 2, 3, 4)
_DICE_TARGET = jax.nn.one_hot(jnp.array([[0, 3, 1], [2, 2, 1]]), 4)

LOSSES = {
    "binary_dice_loss": (
        _held(losses.binary_dice_loss, _BINARY),
        {"ordinary": (_LOGITS,), "large": (30 * _LOGITS,)},
    ),
    "convex_kl_divergence": {
        "ordinary": (jnp.log(_SOFT), _SOFT[::-1]),
        "zero targets": (jnp.log(_SOFT), _ONE_HOT),
    },
    "cosine_distance": {"ordinary": (_LOGITS, normal(8, 3, 4))},
    "cosine_similarity": {"ordinary": (_LOGITS, normal(8, 3, 4))},
    "ctc_loss": _ctc(losses.ctc_loss),
    "ctc_loss_with_forward_probs": _ctc(losses.ctc_loss_with_forward_probs),
    "dice_loss": (_held(losses.dice_loss, _DICE_TARGET), {"ordinary": (_DICE,)}),
    "generalized_kl_divergence": {"ordinary": (jnp.log(_SOFT), _SOFT[::-1])},
    "hinge_loss": {"ordinary": (_LOGITS, _SIGNS), "kinks": (_SIGNS, _SIGNS)},
    "huber_loss": {"ordinary": (_LOGITS, _SOFT)},
    "kl_divergence": {
        "ordinary": (jnp.log(_SOFT), _SOFT[::-1]),
        "zero targets": (jnp.log(_SOFT), _ONE_HOT),
    },
    "kl_divergence_with_log_targets": {
        "ordinary": (jnp.log(_SOFT), jnp.log(_SOFT[::-1]))
    },
    "l2_loss": {"ordinary": (_LOGITS, _SOFT)},
    "log_cosh": {"ordinary": (_LOGITS, _SOFT), "large": (30 * _LOGITS, 0 * _SOFT)},
    "make_fenchel_young_loss": (
        losses.make_fenchel_young_loss(jax.nn.logsumexp),
        {"ordinary": (_LOGITS, _SOFT)},
    ),
    "multiclass_generalized_dice_loss": (
        _held(losses.multiclass_generalized_dice_loss, _DICE_TARGET),
        {"ordinary": (_DICE,)},
    ),
    "multiclass_hinge_loss": _to_labels(_CLASSES),
    "multiclass_perceptron_loss": _to_labels(_CLASSES),
    "multiclass_sparsemax_loss": (
        _held(losses.multiclass_sparsemax_loss, _CLASSES),
        {
            "ordinary": (_LOGITS,),
            "large": (30 * _LOGITS,),
            "one left": (9 * jnp.eye(3, 4) + 0.1 * _LOGITS,),
        },
    ),
    "ntxent": (
        lambda x: losses.ntxent(x, jnp.array([0, 0, 1, 1])),
        {"ordinary": (normal(9, 4, 3),)},
    ),
    "perceptron_loss": {"ordinary": (_LOGITS, _SIGNS)},
    "poly_loss_cross_entropy": _masked_loss(losses.poly_loss_cross_entropy, _SOFT),
    "ranking_softmax_loss": (
        lambda x, where: losses.ranking_softmax_loss(x, _SOFT, where=where),
        _where_points(),
    ),
    "safe_softmax_cross_entropy": {
        "ordinary": (_LOGITS, _SOFT),
        "one hot": (_LOGITS, _ONE_HOT),
        "large": (30 * _LOGITS, _SOFT),
    },
    "sigmoid_binary_cross_entropy": (
        _held(losses.sigmoid_binary_cross_entropy, _BINARY),
        {"ordinary": (_LOGITS,), "ties": (0 * _LOGITS,), "large": (30 * _LOGITS,)},
    ),
    "sigmoid_focal_loss": (
        lambda x: losses.sigmoid_focal_loss(x, _BINARY, alpha=0.3),
        {"ordinary": (_LOGITS,), "ties": (0 * _LOGITS,), "large": (9 * _LOGITS,)},
    ),
    "smooth_labels": {"ordinary": (_ONE_HOT, 0.1)},
    "softmax_cross_entropy": _masked_loss(losses.softmax_cross_entropy, _SOFT),
    "softmax_cross_entropy_with_integer_labels": _masked_loss(
        losses.softmax_cross_entropy_with_integer_labels, _CLASSES
    ),
    "sparsemax_loss": (
        _held(losses.sparsemax_loss, _BINARY),
        {"ordinary": (_LOGITS,), "kinks": (_SIGNS,), "large": (30 * _LOGITS,)},
    ),
    "squared_error": {"ordinary": (_LOGITS, _SOFT)},
    "triplet_margin_loss": {"ordinary": (_LOGITS, normal(8, 3, 4), normal(9, 3, 4))},
}


def functions(module: Any) -> set[str]:
    """Returns the public names of a module of functions."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and callable(value)
        and not inspect.isclass(value)
    }


def _logits_with_infinities() -> list[Entry]:
    """Masked logits: minus infinity within a row, and a row of nothing else."""
    fns = {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
        "logmeanexp": lambda x: jax.nn.logmeanexp(x, axis=-1),
    }
    found = [
        entry(f"jax.nn.{name}", "minus infinity", _masked(fn), (_LOGITS, _MASK))
        for name, fn in fns.items()
    ]
    safe = losses.safe_softmax_cross_entropy
    labels = jnp.where(_MASK, _SOFT, 0)
    name = "optax.losses.safe_softmax_cross_entropy"
    masked = _masked(lambda x: safe(x, labels))
    return [*found, entry(name, "minus infinity", masked, (_LOGITS, _MASK))]


FUNCTIONS = [
    *_entries(jax.nn, NN),
    *_entries(special, SPECIAL),
    *_entries(losses, LOSSES),
    *_logits_with_infinities(),
]
