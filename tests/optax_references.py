"""Plain NumPy references of all of Optax's optimisers, from their papers and docs.

Each moves the params leaf by leaf through a list of gradients, in the dtype that they
come in. Where Optax departs from the paper, the reference is what Optax does, the
paper's own stands in `PAPERS`, and `DEPARTURES` says what differs.
"""

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

RATE = 0.1


def by_leaf(step_leaf):
    """Makes a reference of a function of one leaf and its gradients."""

    def reference(params, grads):
        return jax.tree.map(lambda p, *gs: step_leaf(np.asarray(p), gs), params, *grads)

    return reference


def _adam_like(direction, decay=0.0, rate=RATE):
    """Loops over m and v; `direction` returns what is subtracted, but for the rate."""

    def leaf(p, grads, b1=0.9, b2=0.999):
        m, v, memory = 0 * p, 0 * p, {}
        for t, g in enumerate(grads, 1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            p = p - rate * (direction(t, g, m, v, memory) + decay * p)
        return p

    return leaf


def _hats(t, m, v, b1=0.9, b2=0.999):
    return m / (1 - b1**t), v / (1 - b2**t)


def _adam(t, g, m, v, memory):
    m_hat, v_hat = _hats(t, m, v)
    return m_hat / (np.sqrt(v_hat) + 1e-8)


def _nadam(t, g, m, v, memory):
    # Dozat's look-ahead, with the constant decay that Optax takes.
    m_hat = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
    return m_hat / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def _amsgrad(t, g, m, v, memory):
    m_hat, v_hat = _hats(t, m, v)
    memory["most"] = np.maximum(memory.get("most", 0), v_hat)
    return m_hat / (np.sqrt(memory["most"]) + 1e-8)


def _radam(t, g, m, v, memory):
    m_hat, v_hat = _hats(t, m, v)
    longest = 2 / (1 - 0.999) - 1
    length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
    if length < 5:
        return m_hat
    top = (length - 4) * (length - 2) * longest
    bottom = (longest - 4) * (longest - 2) * length
    return np.sqrt(top / bottom) * m_hat / (np.sqrt(v_hat) + 1e-8)


def _lamb(p, grads):
    m, v = 0 * p, 0 * p
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = _hats(t, m, v)
        u = m_hat / (np.sqrt(v_hat) + 1e-6) + 0.01 * p
        p = p - RATE * _trust(p, u) * u
    return p


def _trust(p, u):
    size, step = np.linalg.norm(p), np.linalg.norm(u)
    return size / step if size and step else 1.0


def _adamax(decay):
    def leaf(p, grads):
        m, u = 0 * p, 0 * p
        for t, g in enumerate(grads, 1):
            m = 0.9 * m + 0.1 * g
            u = np.maximum(0.999 * u, np.abs(g) + 1e-8)
            p = p - RATE * (m / (1 - 0.9**t) / u + decay * p)
        return p

    return leaf


def _adabelief(p, grads):
    m, s = 0 * p, 0 * p
    for t, g in enumerate(grads, 1):
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
        m_hat, s_hat = _hats(t, m, s)
        p = p - RATE * m_hat / (np.sqrt(s_hat) + 1e-16)
    return p


def _adadelta(p, grads):
    squares, moves = 0 * p, 0 * p
    for g in grads:
        squares = 0.9 * squares + 0.1 * g**2
        u = np.sqrt(moves + 1e-6) / np.sqrt(squares + 1e-6) * g
        moves = 0.9 * moves + 0.1 * u**2
        p = p - RATE * u
    return p


def _adafactor(factored):
    def leaf(p, grads):
        v, rows, columns = 0 * p, 0, 0
        for t, g in enumerate(grads, 1):
            b, square = 1 - t**-0.8, g**2 + 1e-30
            if factored and p.ndim == 2:
                rows = b * rows + (1 - b) * square.mean(1, keepdims=True)
                columns = b * columns + (1 - b) * square.mean(0, keepdims=True)
                v = rows * columns / np.mean(rows)
            else:
                v = b * v + (1 - b) * square
            u = g / np.sqrt(v)
            u = u / max(1.0, np.sqrt(np.mean(u**2)))
            p = p - RATE * max(1e-3, np.sqrt(np.mean(p**2))) * u
        return p

    return leaf


def _adagrad(p, grads):
    total = 0 * p + 0.1
    for g in grads:
        total = total + g**2
        p = p - RATE * g / np.sqrt(total + 1e-7)
    return p


def _adan(mixed):
    def leaf(p, grads, b1=0.98, b2=0.92, b3=0.99):
        m, v, n, before = 0 * p, 0 * p, 0 * p, grads[0]
        for t, g in enumerate(grads, 1):
            d, before = g - before, g
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d
            n = b3 * n + (1 - b3) * (g + mixed * d) ** 2
            u = m / (1 - b1**t) + mixed * v / (1 - b2**t)
            p = p - RATE * u / (np.sqrt(n / (1 - b3**t) + 1e-8) + 1e-8)
        return p

    return leaf


def _fromage(p, grads):
    for g in grads:
        size, step = max(np.linalg.norm(p), 1e-6), max(np.linalg.norm(g), 1e-6)
        p = (p - RATE * size / step * g) / np.sqrt(1 + RATE**2)
    return p


def _lars(p, grads):
    v = 0 * p
    for g in grads:
        size, step = np.linalg.norm(p), np.linalg.norm(g)
        local = 0.001 * size / step if size and step else 1.0
        v = 0.9 * v + RATE * local * g
        p = p - v
    return p


def _lion(p, grads):
    m = 0 * p
    for g in grads:
        p = p - RATE * (np.sign(0.9 * m + 0.1 * g) + 1e-3 * p)
        m = 0.99 * m + 0.01 * g
    return p


def _novograd(p, grads):
    m = v = None
    for g in grads:
        square = np.sum(g**2)
        v = square if v is None else 0.25 * v + 0.75 * square
        scaled = g / (np.sqrt(v) + 1e-6) + 0.01 * p
        m = scaled if m is None else 0.9 * m + scaled
        p = p - RATE * m
    return p


def _optimistic(p, grads):
    before = grads[0]
    for g in grads:
        p, before = p - RATE * (2 * g - before), g
    return p


def _optimistic_adam(alpha, beta, rate):
    def direction(t, g, m, v, memory):
        r = _nadam(t, g, m, v, memory)
        before = memory.get("before", r)
        memory["before"] = r
        return (alpha + beta) * r - beta * before

    return _adam_like(direction, rate=rate)


def _rmsprop(p, grads):
    v = 0 * p
    for g in grads:
        v = 0.9 * v + 0.1 * g**2
        p = p - RATE * g / np.sqrt(v + 1e-8)
    return p


def _rprop(is_late):
    def leaf(p, grads):
        size, before = 0 * p + RATE, 0 * p
        for g in grads:
            same = np.sign(g * before)
            grown = np.clip(size * np.where(same > 0, 1.2, 0.5), 1e-6, 50)
            size = np.where(same == 0, size, grown)
            step = np.where(same < 0, 0, size * np.sign(g))
            p = p - (np.where(same < 0, 0, before) if is_late else step)
            before = step
        return p

    return leaf


def _sgd(p, grads, momentum=0.9):
    trace = 0 * p
    for g in grads:
        trace = g + momentum * trace
        p = p - RATE * (g + momentum * trace)
    return p


def _sign_sgd(p, grads):
    for g in grads:
        p = p - RATE * np.sign(g)
    return p


def _signum(p, grads):
    m = 0 * p
    for g in grads:
        m = 0.9 * m + 0.1 * g
        p = p - RATE * np.sign(m)
    return p


def _sm3(p, grads):
    covers, m = [np.zeros((1,) * i + (n,) + (1,) * (p.ndim - i - 1))
                 for i, n in enumerate(p.shape)], 0 * p  # fmt: skip
    for g in grads:
        v = g**2
        least = covers[0]
        for cover in covers[1:]:
            least = np.minimum(least, cover)
        v = v + least
        u = np.where(v > 0, g / np.sqrt(v + 1e-8), 0)
        m = 0.9 * m + 0.1 * u
        p = p - RATE * m
        axes = range(p.ndim)
        covers = [
            v.max(tuple(a for a in axes if a != axis), keepdims=True) for axis in axes
        ]
    return p


def _yogi(first):
    def leaf(p, grads):
        m, v = 0 * p + first, 0 * p + 1e-6
        for t, g in enumerate(grads, 1):
            m = 0.9 * m + 0.1 * g
            v = v - 0.001 * np.sign(v - g**2) * g**2
            m_hat, v_hat = _hats(t, m, v)
            p = p - RATE * m_hat / (np.sqrt(v_hat) + 1e-3)
        return p

    return leaf


# --- what looks at all leaves, or draws ----------------------------------------------


def _polyak(params, grads, value=0.05):
    for g in grads:
        square = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(g))
        step = min(value / square, 1.0)
        params = jax.tree.map(lambda p, g, step=step: p - step * g, params, g)
    return params


def _lbfgs(params, grads):
    leaves, treedef = jax.tree.flatten(params)
    x = np.concatenate([np.ravel(leaf) for leaf in leaves])
    pairs, before = [], None
    for tree in grads:
        g = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        scale = min(1.0, 1 / np.linalg.norm(g))
        if before is not None:
            s, y = x - before[0], g - before[1]
            pairs.append((s, y, 1 / (y @ s)))
            scale = (y @ s) / (y @ y)
        q, alphas = g, []
        for s, y, rho in reversed(pairs):
            alphas.append(rho * (s @ q))
            q = q - alphas[-1] * y
        r = scale * q
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            r = r + s * (alpha - rho * (y @ r))
        before, x = (x, g), x - RATE * r
    parts = np.split(x, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return treedef.unflatten(
        [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def _noisy_sgd(params, grads):
    """The noise is drawn as Optax draws it: only its place and size are checked."""
    key = jax.random.key(7)
    for t, g in enumerate(grads, 1):
        key, own = jax.random.split(key)
        noise = optax.tree.random_like(own, g, sampler=jax.random.normal)
        size = (0.01 / t**0.55) ** 0.5
        params = jax.tree.map(
            lambda p, g, n, size=size: p - RATE * (g + size * n), params, g, noise
        )
    return params


@dataclasses.dataclass(frozen=True)
class Alias:
    """One of Optax's optimisers, made with other than default values where it tells.

    Attributes:
      make: Makes the transformation.
      reference: What it should do.
      source: Where its formula comes from.
      extra_args: Extra arguments of its `update`.
    """

    make: Callable[[], Any]
    reference: Callable[..., Any]
    source: str
    extra_args: Any = None


def _entry(name, step_leaf, source, **options):
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(optax, name)(RATE, **options)

    return Alias(make, by_leaf(step_leaf), source)


_ADAM = "Kingma and Ba, arXiv:1412.6980"
_OPTIMISTIC = "Daskalakis et al., arXiv:1711.00141, Algorithm 1"
ALIASES = {
    "adabelief": _entry("adabelief", _adabelief, "Zhuang et al., arXiv:2010.07468"),
    "adadelta": _entry("adadelta", _adadelta, "Zeiler, arXiv:1212.5701, Algorithm 1"),
    "adafactor": _entry("adafactor", _adafactor(False), "Shazeer and Stern, "
                        "arXiv:1804.04235, Algorithm 5"),
    "adagrad": _entry("adagrad", _adagrad, "Duchi et al., JMLR 12, 2011"),
    "adam": _entry("adam", _adam_like(_adam), f"{_ADAM}, Algorithm 1"),
    "adamax": _entry("adamax", _adamax(0), f"{_ADAM}, Algorithm 2; eps as in the docs"),
    "adamaxw": _entry("adamaxw", _adamax(0.01), f"{_ADAM}, with decoupled decay",
                      weight_decay=0.01),
    "adamw": _entry("adamw", _adam_like(_adam, 0.01), "Loshchilov and Hutter, "
                    "arXiv:1711.05101", weight_decay=0.01),
    "adan": _entry("adan", _adan(1 - 0.92), "Xie et al., arXiv:2208.06677"),
    "amsgrad": _entry("amsgrad", _adam_like(_amsgrad), "Reddi et al., ICLR 2018"),
    "fromage": _entry("fromage", _fromage, "Bernstein et al., arXiv:2002.03432"),
    "lamb": _entry("lamb", _lamb, "You et al., arXiv:1904.00962", weight_decay=0.01),
    "lars": _entry("lars", _lars, "You et al., arXiv:1708.03888"),
    "lbfgs": Alias(lambda: optax.lbfgs(RATE, linesearch=None), _lbfgs, "Nocedal and "
                   "Wright, Numerical Optimization, Algorithm 7.4"),
    "lion": _entry("lion", _lion, "Chen et al., arXiv:2302.06675"),
    "nadam": _entry("nadam", _adam_like(_nadam), "Dozat, 2016"),
    "nadamw": _entry("nadamw", _adam_like(_nadam, 0.01), "Dozat, 2016, with decoupled "
                     "decay", weight_decay=0.01),
    "noisy_sgd": Alias(lambda: optax.noisy_sgd(RATE, key=jax.random.key(7)),
                       _noisy_sgd, "Neelakantan et al., arXiv:1511.06807"),
    "novograd": _entry("novograd", _novograd, "Ginsburg et al., arXiv:1905.11286",
                       weight_decay=0.01),
    "optimistic_adam": _entry("optimistic_adam", _optimistic_adam(RATE, 0.05, 1.0),
                              _OPTIMISTIC, optimism=0.05),
    "optimistic_adam_v2": _entry("optimistic_adam_v2", _optimistic_adam(1, 1, RATE),
                                 _OPTIMISTIC),
    "optimistic_gradient_descent": _entry("optimistic_gradient_descent", _optimistic,
                                          "Mokhtari et al., arXiv:1901.08511"),
    "polyak_sgd": Alias(optax.polyak_sgd, _polyak, "Loizou et al., arXiv:2002.10542",
                        {"value": 0.05}),
    "radam": _entry("radam", _adam_like(_radam), "Liu et al., arXiv:1908.03265"),
    "rmsprop": _entry("rmsprop", _rmsprop, "Tieleman and Hinton, 2012; eps as in the "
                      "docs"),
    "rprop": _entry("rprop", _rprop(is_late=True), "Riedmiller and Braun, 1993; Igel "
                    "and Hüsken, 2003, iRprop-"),
    "sgd": _entry("sgd", _sgd, "Sutskever et al., ICML 2013", momentum=0.9,
                  nesterov=True),
    "sign_sgd": _entry("sign_sgd", _sign_sgd, "Bernstein et al., arXiv:1802.04434"),
    "signum": _entry("signum", _signum, "Bernstein et al., arXiv:1802.04434"),
    "sm3": _entry("sm3", _sm3, "Anil et al., arXiv:1901.11150, SM3-II"),
    "yogi": _entry("yogi", _yogi(1e-6), "Zaheer et al., NeurIPS 2018"),
}  # fmt: skip

FACTORED = _entry(
    "adafactor", _adafactor(True), "Shazeer and Stern, Algorithm 4",
    min_dim_size_to_factor=2,
)  # fmt: skip

# What the papers say, where Optax does something else.
PAPERS = {
    "adan": by_leaf(_adan(0.92)),
    "rprop": by_leaf(_rprop(is_late=False)),
    "yogi": by_leaf(_yogi(0.0)),
}
DEPARTURES = {
    "adan": "the paper mixes the gradients' difference in with the decay of its mean "
    "(0.92 in Optax's convention), Optax with one minus it (0.08)",
    "rprop": "each step is taken one step late: the first update is zero",
    "yogi": "the first moment begins at 1e-6, not 0: a zero gradient moves params",
}


def public_aliases():
    """Returns the names of all optimisers in Optax's module of aliases."""
    module = sys.modules[optax.adam.__module__]
    return sorted(
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and (
            isinstance(value, functools.partial)
            or getattr(value, "__module__", "") == module.__name__
        )
    )
