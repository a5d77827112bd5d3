"""Domains as a hunt knows them: what lies inside, and which entries are special there.

Beside the public domains there are some that only come from arrays that were given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest import domains
from gradtest._src import samplers
from gradtest._src.domain import Domain
from gradtest._src.special_points import special_points, special_values

Shape = tuple[Any, ...]

# Domains whose entries are free of each other.
ENTRYWISE = frozenset(
    {
        "normal", "uniform", "positive", "nonnegative", "unit_interval", "open_unit",
        "integers", "mask", "flags", "away_from",
    }
)  # fmt: skip
# Domains of matrices that hold what lies between any two of them.
CONVEX = frozenset({"spd", "symmetric"})
# Domains around which each entry may go up or down by itself.
_ROWS = frozenset({"simplex", "open_simplex"})
MOVABLE = ENTRYWISE | _ROWS
# Domains of square matrices.
SQUARE = frozenset({"spd", "symmetric", "triangular", "orthogonal", "invertible"})
_SUM_ERROR = 64
_WELL_CONDITIONED = 1e5


# --- domains of arrays that were given ------------------------------------------------


def reals(shape: Shape, dtype: Any, scale: float = 1.0) -> Domain:
    """Returns any real or complex numbers of one scale."""
    return Domain("normal", shape, np.dtype(dtype), _scaled, (("scale", scale),))


def _scaled(
    generator: np.random.Generator, shape: Any, dtype: np.dtype, *, scale: float
) -> np.ndarray:
    return scale * samplers.normal(generator, shape, dtype)


def positives(shape: Shape, dtype: Any, scale: float = 1.0) -> Domain:
    """Returns positive numbers of one scale."""
    return Domain("positive", shape, np.dtype(dtype), _positive, (("scale", scale),))


def _positive(
    generator: np.random.Generator, shape: Any, dtype: np.dtype, *, scale: float
) -> np.ndarray:
    return scale * samplers.positive(generator, shape, dtype)


def nonnegatives(shape: Shape, dtype: Any, scale: float = 1.0) -> Domain:
    """Returns numbers of one scale of which some are zero, and none is negative."""
    parameters = (("scale", scale),)
    return Domain("nonnegative", shape, np.dtype(dtype), _nonnegative, parameters)


def _nonnegative(
    generator: np.random.Generator, shape: Any, dtype: np.dtype, *, scale: float
) -> np.ndarray:
    return np.maximum(_scaled(generator, shape, dtype, scale=scale), 0)


def open_unit(shape: Shape, dtype: Any) -> Domain:
    """Returns the unit interval without its ends."""
    return Domain("open_unit", shape, np.dtype(dtype), samplers.unit_interval)


def open_simplex(shape: Shape, dtype: Any) -> Domain:
    """Returns probabilities of which none is zero."""
    return Domain("open_simplex", shape, np.dtype(dtype), samplers.simplex)


def flags(shape: Shape, dtype: Any) -> Domain:
    """Returns numbers that are 0 or 1, each for itself: a mask in a number's dtype."""
    return Domain("flags", shape, np.dtype(dtype), _coins)


def mask(shape: Shape) -> Domain:
    """Returns truth values."""
    return Domain("mask", shape, np.dtype(bool), _coins)


def _coins(generator: np.random.Generator, shape: Any, dtype: np.dtype) -> np.ndarray:
    return generator.random(shape) < 0.6


def symmetric(shape: Shape, dtype: Any) -> Domain:
    """Returns symmetric (Hermitian) matrices of any signature."""
    return Domain("symmetric", shape, np.dtype(dtype), _symmetric)


def _symmetric(
    generator: np.random.Generator, shape: Any, dtype: np.dtype
) -> np.ndarray:
    drawn = samplers.normal(generator, shape, dtype)
    return (drawn + np.conj(np.swapaxes(drawn, -1, -2))) / 2


def triangular(shape: Shape, dtype: Any, lower: bool) -> Domain:
    """Returns triangular matrices, well conditioned."""
    parameters = (("lower", lower),)
    return Domain("triangular", shape, np.dtype(dtype), _triangular, parameters)


def _triangular(
    generator: np.random.Generator, shape: Any, dtype: np.dtype, *, lower: bool
) -> np.ndarray:
    drawn = 0.3 * samplers.normal(generator, shape, dtype)
    size = shape[-1]
    strict = np.tril(drawn, -1) if lower else np.triu(drawn, 1)
    signs = generator.choice([-1.0, 1.0], shape[:-1])
    diagonal = signs * generator.uniform(1.0, 2.0, shape[:-1])
    return strict + diagonal[..., None] * np.eye(size)


# --- their special points -------------------------------------------------------------


def specials(domain: Domain, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the special points of a domain by name, each like an ordinary draw."""
    if not drawn.size:
        return {}
    make = _SPECIALS.get(domain.name)
    found = special_points(domain, drawn) if make is None else make(drawn)
    return {name: array for name, array in found.items() if contains(domain, array)}


def _of(public: Callable[..., Domain]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns what makes the special points of a public domain, of any array."""
    return lambda x: special_points(public(x.shape, dtype=x.dtype), x)


def _of_nonnegative(x: np.ndarray) -> dict[str, np.ndarray]:
    return {
        name: np.abs(array)
        for name, array in special_values(x).items()
        if "-" not in name and "negative" not in name
    }


def _of_flags(x: np.ndarray) -> dict[str, np.ndarray]:
    found = special_values(x.astype(bool))
    return {name: array.astype(x.dtype) for name, array in found.items()}


def _of_matrices(x: np.ndarray) -> dict[str, np.ndarray]:
    found = special_points(domains.invertible(x.shape, dtype=x.dtype), x)
    found["all zero"] = np.zeros_like(x)
    return found


_SPECIALS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "open_unit": _of(domains.unit_interval),
    "open_simplex": _of(domains.simplex),
    "nonnegative": _of_nonnegative,
    "flags": _of_flags,
    "mask": special_values,
    "symmetric": _of_matrices,
    "triangular": _of_matrices,
}


# --- what lies inside -----------------------------------------------------------------


def contains(domain: Domain, array: np.ndarray) -> bool:
    """Whether an array of the domain's shape lies inside of it."""
    if not np.issubdtype(array.dtype, np.complexfloating):
        wide = array.astype(np.float64)
    else:
        wide = array.astype(np.complex128)
    if not np.isfinite(wide).all():
        return False
    if not wide.size:
        return True
    holds = _CONTAINS.get(domain.name)
    return holds is None or bool(holds(wide, domain))


def _parameters(domain: Domain) -> Mapping[str, Any]:
    return dict(domain.parameters)


def _within(x: np.ndarray, domain: Domain) -> bool:
    ends = _parameters(domain)
    low, high = np.array([ends["low"], ends["high"]]).astype(domain.dtype).astype(float)
    return bool(((x >= low) & (x <= high)).all())


def _is_index(x: np.ndarray, domain: Domain) -> bool:
    ends = _parameters(domain)
    return bool(((x >= ends["low"]) & (x < ends["high"])).all())


def _sums_to_one(x: np.ndarray, domain: Domain) -> bool:
    error = _SUM_ERROR * float(jnp.finfo(domain.dtype).eps)
    return bool((x >= 0).all() and (np.abs(x.sum(-1) - 1) <= error).all())


def _is_one_hot(x: np.ndarray, domain: Domain) -> bool:
    return bool(np.isin(x, (0, 1)).all() and (x.sum(-1) == 1).all())


def _adjoint(x: np.ndarray) -> np.ndarray:
    return np.conj(np.swapaxes(x, -1, -2))


def _is_symmetric(x: np.ndarray, domain: Domain) -> bool:
    error = 8 * float(jnp.finfo(domain.dtype).eps) * np.abs(x).max()
    return bool((np.abs(x - _adjoint(x)) <= error).all())


def _is_spd(x: np.ndarray, domain: Domain) -> bool:
    if not _is_symmetric(x, domain):
        return False
    eigenvalues = np.linalg.eigvalsh(x)
    return bool((eigenvalues[..., 0] > 1e-6 * eigenvalues[..., -1]).all())


def _is_triangular(x: np.ndarray, domain: Domain) -> bool:
    part = np.tril if _parameters(domain)["lower"] else np.triu
    diagonal = np.abs(np.diagonal(x, axis1=-2, axis2=-1))
    return bool(np.array_equal(part(x), x) and (diagonal > 1e-3).all())


def _is_orthogonal(x: np.ndarray, domain: Domain) -> bool:
    error = _SUM_ERROR * float(jnp.finfo(domain.dtype).eps)
    return bool(np.abs(x @ _adjoint(x) - np.eye(x.shape[-1])).max() <= error)


def _is_invertible(x: np.ndarray, domain: Domain) -> bool:
    if not (np.linalg.cond(x) < _WELL_CONDITIONED).all():
        return False
    wanted = _parameters(domain).get("det", "any")
    if wanted == "any":
        return True
    sign = 1 if wanted == "positive" else -1
    return bool((np.sign(np.linalg.det(x)) == sign).all())


def _is_away(x: np.ndarray, domain: Domain) -> bool:
    chosen = _parameters(domain)
    return all((np.abs(x - v) >= chosen["margin"]).all() for v in chosen["values"])


_CONTAINS: dict[str, Callable[[np.ndarray, Domain], bool]] = {
    "uniform": _within,
    "positive": lambda x, _: bool((x > 0).all()),
    "nonnegative": lambda x, _: bool((x >= 0).all()),
    "unit_interval": lambda x, _: bool(((x >= 0) & (x <= 1)).all()),
    "open_unit": lambda x, _: bool(((x > 0) & (x < 1)).all()),
    "integers": _is_index,
    "flags": lambda x, _: bool(np.isin(x, (0, 1)).all()),
    "simplex": _sums_to_one,
    "open_simplex": lambda x, d: bool((x > 0).all()) and _sums_to_one(x, d),
    "one_hot": _is_one_hot,
    "spd": _is_spd,
    "symmetric": _is_symmetric,
    "triangular": _is_triangular,
    "orthogonal": _is_orthogonal,
    "invertible": _is_invertible,
    "away_from": _is_away,
}


# --- special entries ------------------------------------------------------------------


def special_entries(domain: Domain) -> list[Any]:
    """Returns the special entries of a domain of free ones, the simple ones first."""
    if domain.name == "mask":
        return [False, True]
    if domain.name == "integers":
        ends = _parameters(domain)
        wanted = [0, ends["low"], ends["high"] - 1, ends["low"] + 1, -1]
    else:
        wanted = [*_entries(domain)]
    found: list[Any] = []
    for value in wanted:
        entry = np.asarray(value, domain.dtype)
        new = not any(entry.tobytes() == other.tobytes() for other in found)
        if new and contains(domain, entry):
            found.append(entry)
    return found


def _entries(domain: Domain) -> list[float]:
    limits = jnp.finfo(domain.dtype)
    tiny = float(limits.tiny)
    chosen = _parameters(domain)
    own: list[float] = []
    if domain.name == "uniform":
        low, high = chosen["low"], chosen["high"]
        own = [low, high, (low + high) / 2]
    if domain.name == "away_from":
        own = [
            v + s * 1.01 * chosen["margin"] for v in chosen["values"] for s in (1, -1)
        ]
    below_one = 1 - float(limits.eps)
    return [
        0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 3.0, 5.0, 10.0, *own, -0.0, below_one, 1e-8,
        -1e-8, tiny, -tiny, 30.0, -30.0, 100.0, -100.0,
    ]  # fmt: skip
