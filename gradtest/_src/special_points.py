"""The special points inside of each domain.

Half of all mistakes in gradients are right at a random point. They show at exact zeros,
ties, saturation, at the ends of a domain, at duplicate indices and empty masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from gradtest._src.domain import Domain

# Turns an ordinary draw into a special point; None where its shape has none.
Make = Callable[[np.ndarray], np.ndarray | None]


def special_points(domain: Domain, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the special points of a domain by name, each like an ordinary draw.

    Args:
      domain: The domain.
      drawn: An ordinary draw, from which entries that are not special are taken.
    """
    table = _TABLES[domain.name](domain)
    return _distinct(table, drawn)


def special_values(given: np.ndarray) -> dict[str, np.ndarray]:
    """Returns special points like an array that came without a domain.

    Floats are taken for any real or complex numbers, integers for indices from 0, or
    the smallest given, to the largest, truth values for a mask.
    """
    if given.dtype == np.bool_:
        table: Mapping[str, Make] = _MASKS
    elif np.issubdtype(given.dtype, np.integer):
        if not given.size:
            return {}
        table = _indices(min(0, int(given.min())), int(given.max()) + 1)
    else:
        table = _numbers(given.dtype)
    return _distinct(table, given)


def _distinct(table: Mapping[str, Make], drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Makes the points; leaves out those that are the draw itself, or each other."""
    found: dict[str, np.ndarray] = {}
    if not drawn.size:
        return found
    wide = drawn.astype(_wide(drawn.dtype))
    for name, make in table.items():
        with np.errstate(all="ignore"):  # of arrays that hold infinities
            point = make(wide)
        if point is None or np.isnan(point).any():
            continue
        point = np.asarray(point).astype(drawn.dtype).reshape(drawn.shape)
        if _same(point, drawn) or any(_same(point, other) for other in found.values()):
            continue
        found[name] = point
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other))


def _wide(dtype: np.dtype) -> np.dtype:
    if dtype == np.bool_ or np.issubdtype(dtype, np.integer):
        return dtype
    is_complex = np.issubdtype(dtype, np.complexfloating)
    return np.dtype(np.complex128 if is_complex else np.float64)


# --- numbers --------------------------------------------------------------------------


def _with_entry(x: np.ndarray, value: float) -> np.ndarray:
    """Returns the array with one entry, in its middle, replaced."""
    flat = x.ravel().copy()
    flat[flat.size // 2] = value
    return flat.reshape(x.shape)


def _tied(x: np.ndarray, pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
    """Returns the array with its extreme along the last axis there twice."""
    if not x.ndim or x.shape[-1] < 2:
        return None
    at = np.expand_dims(pick(x), -1)
    extreme = np.take_along_axis(x, at, -1)
    tied = x.copy()
    np.put_along_axis(tied, (at + 1) % x.shape[-1], extreme, -1)
    return tied


def _sorted(x: np.ndarray, step: int = 1) -> np.ndarray | None:
    return np.sort(x, axis=-1)[..., ::step] if x.ndim and x.shape[-1] > 1 else None


def _equal(x: np.ndarray) -> np.ndarray | None:
    return np.full_like(x, x.ravel()[0]) if x.size > 1 else None


def _repeated_rows(x: np.ndarray) -> np.ndarray | None:
    if x.ndim < 2 or x.shape[0] < 2:
        return None
    return np.broadcast_to(x[:1], x.shape)


def _saturated(x: np.ndarray, size: float) -> np.ndarray | None:
    """Returns rows of which one entry towers over the others."""
    if not x.ndim or x.shape[-1] < 2:
        return None
    rows = np.full_like(x, -size)
    rows[..., 0] = size
    return rows


def _zero_row(x: np.ndarray) -> np.ndarray | None:
    if x.ndim < 2 or x.shape[0] < 2:
        return None
    rows = x.copy()
    rows[0] = 0
    return rows


_ORDER: dict[str, Make] = {
    "a tie at the maximum": lambda x: _tied(x, lambda y: np.argmax(y, -1)),
    "a tie at the minimum": lambda x: _tied(x, lambda y: np.argmin(y, -1)),
    "all equal": _equal,
    "sorted": _sorted,
    "sorted downwards": lambda x: _sorted(x, -1),
    "equal rows": _repeated_rows,
}


def _sign(x: np.ndarray) -> np.ndarray:
    return np.where(np.real(x) < 0, -1.0, 1.0)


def _reals(dtype: np.dtype) -> dict[str, Make]:
    limits = jnp.finfo(dtype)
    tiny, large = float(limits.tiny), float(limits.max) ** 0.5 / 4
    return {
        "one zero": lambda x: _with_entry(x, 0.0),
        "a row of zeros": _zero_row,
        "all zero": np.zeros_like,
        **_ORDER,
        "all negative": lambda x: -np.abs(x),
        "all positive": np.abs,
        "whole numbers": lambda x: np.round(2 * x),
        "ten times as large": lambda x: 10 * x,
        "tiny (1e-8)": lambda x: 1e-8 * x,
        "smallest normal": lambda x: tiny * _sign(x),
        "large": lambda x: large * x / max(float(np.max(np.abs(x))), 1e-300),
        "at 30 and -30": lambda x: 30 * _sign(x),
        "at 100 and -100": lambda x: 100 * _sign(x),
        "one of 30 in rows of -30": lambda x: _saturated(x, 30.0),
        "one of 100 in rows of -100": lambda x: _saturated(x, 100.0),
    }


def _numbers(dtype: np.dtype) -> dict[str, Make]:
    if not np.issubdtype(dtype, np.complexfloating):
        return _reals(dtype)
    return {
        "one zero": lambda x: _with_entry(x, 0.0),
        "all zero": np.zeros_like,
        "all equal": _equal,
        "real": lambda x: np.real(x) + 0j,
        "imaginary": lambda x: 1j * np.imag(x),
        "as much imaginary as real": lambda x: (1 + 1j) * np.abs(x),
        "negative": lambda x: -np.abs(x) + 0j,
        "tiny (1e-8)": lambda x: 1e-8 * x,
        "large": lambda x: float(jnp.finfo(dtype).max) ** 0.5 / 4 * x / np.abs(x).max(),
    }


def _between(low: float, high: float) -> dict[str, Make]:
    """Returns the points of an interval: its ends, its zero, and ties."""
    inside: dict[str, Make] = {
        f"one {low:g}": lambda x: _with_entry(x, low),
        f"one {high:g}": lambda x: _with_entry(x, high),
        f"all {low:g}": lambda x: np.full_like(x, low),
        f"all {high:g}": lambda x: np.full_like(x, high),
        "the middle": lambda x: np.full_like(x, (low + high) / 2),
        **_ORDER,
    }
    if low < 0 < high:
        inside |= {
            "one zero": lambda x: _with_entry(x, 0.0),
            "all zero": np.zeros_like,
        }
    if low <= 0 < high:
        inside["tiny (1e-8)"] = lambda x: np.minimum(1e-8, high) * np.ones_like(x)
    return inside


def _positive(dtype: np.dtype) -> dict[str, Make]:
    limits = jnp.finfo(dtype)
    return {
        "all one": np.ones_like,
        **_ORDER,
        "tiny (1e-8)": lambda x: 1e-8 * x,
        "smallest normal": lambda x: np.full_like(x, float(limits.tiny)),
        "large": lambda x: float(limits.max) ** 0.5 / 4 * x / x.max(),
    }


# --- indices and masks ----------------------------------------------------------------


def _indices(low: int, high: int) -> dict[str, Make]:
    return {
        "all the first index": lambda x: np.full_like(x, low),
        "all the last index": lambda x: np.full_like(x, high - 1),
        "an index twice": _tied_first,
        "all one index": _equal,
        "sorted": _sorted,
        "sorted downwards": lambda x: _sorted(x, -1),
        "first and last": lambda x: np.where(
            np.arange(x.size).reshape(x.shape) % 2, high - 1, low
        ),
    }


def _tied_first(x: np.ndarray) -> np.ndarray | None:
    if x.size < 2:
        return None
    flat = x.ravel().copy()
    flat[1] = flat[0]
    return flat


def _one_true(x: np.ndarray) -> np.ndarray:
    flat = np.zeros(x.size, x.dtype)
    flat[x.size // 2] = True
    return flat


_MASKS: dict[str, Make] = {
    "all true": np.ones_like,
    "all false": np.zeros_like,
    "one true": _one_true,
    "one false": lambda x: ~_one_true(x),
}


def _classes(x: np.ndarray, which: int) -> np.ndarray:
    rows = np.zeros_like(x)
    rows[..., which] = 1
    return rows


_ONE_HOT: dict[str, Make] = {
    "all in the first class": lambda x: _classes(x, 0),
    "all in the last class": lambda x: _classes(x, -1),
}

_SIMPLEX: dict[str, Make] = {
    "a corner": lambda x: _classes(x, 0),
    "the centre": lambda x: np.full_like(x, 1 / x.shape[-1]),
    "an edge": lambda x: _on_edge(x),
    "near a corner": lambda x: 1e-6 * x + (1 - 1e-6) * _classes(x, 0),
    "a tie at the maximum": lambda x: _normalised(_ORDER["a tie at the maximum"](x)),
}


def _on_edge(x: np.ndarray) -> np.ndarray | None:
    """Returns probabilities of which one is zero."""
    if x.shape[-1] < 2:
        return None
    rows = x.copy()
    rows[..., -1] = 0
    return _normalised(rows)


def _normalised(rows: np.ndarray | None) -> np.ndarray | None:
    return None if rows is None else rows / rows.sum(axis=-1, keepdims=True)


# --- matrices -------------------------------------------------------------------------


def _eye(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.eye(x.shape[-1]), x.shape)


def _diagonal(values: Callable[[int], np.ndarray]) -> Make:
    def make(x: np.ndarray) -> np.ndarray | None:
        if x.shape[-1] < 2:
            return None
        return np.broadcast_to(np.diag(values(x.shape[-1])), x.shape)

    return make


def _twice_one(count: int) -> np.ndarray:
    """Returns eigenvalues of which the first two are equal."""
    values = np.linspace(1.0, 2.0, count)
    values[1] = values[0]
    return values


def _nearly_zero(count: int) -> np.ndarray:
    values = np.linspace(1.0, 2.0, count)
    values[0] = 1e-4
    return values


def _shifted(x: np.ndarray) -> np.ndarray | None:
    """Returns the permutation that moves every axis on by one."""
    if x.shape[-1] < 2:
        return None
    return np.broadcast_to(np.roll(np.eye(x.shape[-1]), 1, axis=0), x.shape)


def _reflection(x: np.ndarray) -> np.ndarray:
    diagonal = np.ones(x.shape[-1])
    diagonal[:1] = -1
    return np.broadcast_to(np.diag(diagonal), x.shape)


_SPD: dict[str, Make] = {
    "the identity": _eye,
    "diagonal": _diagonal(lambda n: np.linspace(1.0, 2.0, n)),
    "an eigenvalue twice": _diagonal(_twice_one),
    "nearly singular": _diagonal(_nearly_zero),
    "small (1e-4)": lambda x: 1e-4 * x,
    "large (1e4)": lambda x: 1e4 * x,
}
_ORTHOGONAL: dict[str, Make] = {
    "the identity": _eye,
    "a permutation": _shifted,
    "a reflection": _reflection,
}


def _invertible(domain: Domain) -> dict[str, Make]:
    sign = dict(domain.parameters).get("det", "any")
    points = {
        "the identity": _eye,
        "a singular value twice": _diagonal(_twice_one),
        "nearly singular": _diagonal(_nearly_zero),
        "a permutation": _shifted,
        "a reflection": _reflection,
        "large (1e4)": lambda x: 1e4 * x,
    }
    if sign == "any":
        return points

    def fits(make: Make) -> Make:
        def checked(x: np.ndarray) -> np.ndarray | None:
            point = make(x)
            if point is None:
                return None
            signs = np.sign(np.linalg.det(point))
            return point if np.all(signs == (1 if sign == "positive" else -1)) else None

        return checked

    return {name: fits(make) for name, make in points.items()}


def _full_of(number: float) -> Make:
    return lambda x: np.full_like(x, number)


def _away(domain: Domain) -> dict[str, Make]:
    """Returns points on both sides of what is kept away from, at the margin."""
    parameters = dict(domain.parameters)
    kinks, margin = parameters["values"], 1.01 * parameters["margin"]
    points: dict[str, Make] = {}
    for kink in kinks:
        for side, end in (("below", kink - margin), ("above", kink + margin)):
            if all(abs(end - other) >= parameters["margin"] for other in kinks):
                points[f"just {side} {kink:g}"] = _full_of(end)
    return {**points, **_ORDER}


_TABLES: dict[str, Callable[[Domain], Mapping[str, Make]]] = {
    "normal": lambda domain: _numbers(domain.dtype),
    "uniform": lambda domain: _between(*(end for _, end in domain.parameters)),
    "positive": lambda domain: _positive(domain.dtype),
    "unit_interval": lambda domain: _between(0.0, 1.0),
    "integers": lambda domain: _indices(*(end for _, end in domain.parameters)),
    "spd": lambda domain: _SPD,
    "invertible": _invertible,
    "orthogonal": lambda domain: _ORTHOGONAL,
    "simplex": lambda domain: _SIMPLEX,
    "one_hot": lambda domain: _ONE_HOT,
    "away_from": _away,
}
