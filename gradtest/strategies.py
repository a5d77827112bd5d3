"""The domains as Hypothesis strategies, for property tests of one's own.

Each function has the name and the arguments of one of `gradtest.domains`, and returns a
strategy for its arrays. All that is drawn lies inside of the domain; special points are
among it: zeros, ties, the ends, duplicate indices, empty masks. Examples shrink towards
constant arrays of simple numbers.

Needs Hypothesis: `pip install 'gradtest[hunt]'`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from gradtest import domains as _domains
from gradtest._src.hunting import choosing as _choosing
from gradtest._src.hunting import kinds as _kinds
from gradtest._src.hunting.choosing import SearchStrategy

__all__ = [
    "arguments",
    "arrays",
    "away_from",
    "integers",
    "invertible",
    "masks",
    "normal",
    "one_hot",
    "orthogonal",
    "positive",
    "simplex",
    "spd",
    "uniform",
    "unit_interval",
]

PyTree = Any
_Parameters = ParamSpec("_Parameters")
# Domains whose last axis has at least one entry.
_NOT_EMPTY = ("simplex", "one_hot")


def arrays(
    domain: _domains.Domain, sizes: Mapping[str, int] | None = None
) -> SearchStrategy[np.ndarray]:
    """Returns a strategy for the arrays of a domain.

    Args:
      domain: One of `gradtest.domains`.
      sizes: Sizes of its named axes; one that is missing is drawn as well: 0, 1, 2, 3,
        odd, powers of two and one off.

    Returns:
      A strategy for NumPy arrays of the domain's dtype (its 32-bit form, where
      `jax_enable_x64` is off).

    Raises:
      TypeError: `domain` is no domain, or a size no integer.
      ValueError: A size is negative, or leaves the domain empty.

    Example:
      >>> from hypothesis import given
      >>> from gradtest import domains, strategies
      >>> @given(strategies.arrays(domains.normal(("batch", 4)), sizes={"batch": 2}))
      ... def test_shape(x):
      ...     assert x.shape == (2, 4)
      >>> test_shape()
    """
    if not isinstance(domain, _domains.Domain):
        raise TypeError(f"`domain` must be a gradtest.domains entry, got {domain!r}.")
    known = dict(sizes or {})
    domain.sized_shape(known)
    missing = [a for a in dict.fromkeys(domain.shape) if isinstance(a, str)]
    missing = [name for name in missing if name not in known]
    if not missing:
        return _of_sizes(domain, known)
    return _choosing.sizes(missing, _never_empty([domain])).flatmap(
        lambda drawn: _of_sizes(domain, {**known, **drawn})
    )


def arguments(*args: PyTree) -> SearchStrategy[tuple[Any, ...]]:
    """Returns a strategy for the arguments of a function, whose named sizes agree.

    Args:
      *args: Trees of `gradtest.domains` entries and `jax.ShapeDtypeStruct`; all else
        in them stays as it is.

    Returns:
      A strategy for tuples like `args`, with an array in place of each domain.

    Example:
      >>> from hypothesis import given
      >>> from gradtest import domains, strategies
      >>> batch = domains.normal(("batch", 4)), domains.integers("batch", 0, 10)
      >>> @given(strategies.arguments(*batch))
      ... def test_sizes_agree(args):
      ...     images, labels = args
      ...     assert len(images) == len(labels)
      >>> test_sizes_agree()
    """
    leaves, tree = jax.tree_util.tree_flatten(args, is_leaf=lambda x: x is None)
    leaves = [_as_domain(leaf) for leaf in leaves]
    found = [leaf for leaf in leaves if isinstance(leaf, _domains.Domain)]
    names = [a for domain in found for a in domain.shape if isinstance(a, str)]

    def at_sizes(sizes: Mapping[str, int]) -> SearchStrategy[tuple[Any, ...]]:
        drawn = [
            _of_sizes(leaf, sizes)
            if isinstance(leaf, _domains.Domain)
            else _choosing.just(leaf)
            for leaf in leaves
        ]
        return _choosing.together(drawn).map(
            lambda values: jax.tree_util.tree_unflatten(tree, values)
        )

    unique = list(dict.fromkeys(names))
    return _choosing.sizes(unique, _never_empty(found)).flatmap(at_sizes)


def masks(shape: _domains.ShapeLike) -> SearchStrategy[np.ndarray]:
    """Returns a strategy for truth values: all true, all false, one of either, any.

    Args:
      shape: Sizes and names of the axes.
    """
    checked = _domains.normal(shape).shape
    return arrays(_kinds.mask(checked))


def _as_domain(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"`args` has a jax.ShapeDtypeStruct of dtype {leaf.dtype}: only float "
                "and complex ones can be drawn; use gradtest.domains.integers."
            )
        return _domains.normal(tuple(leaf.shape), dtype=leaf.dtype)
    return leaf


def _never_empty(found: list[_domains.Domain]) -> frozenset[str]:
    """Returns the names of axes that may not have size 0."""
    last = [d.shape[-1] for d in found if d.name in _NOT_EMPTY]
    negative = [
        d.shape[-1] for d in found if dict(d.parameters).get("det") == "negative"
    ]
    return frozenset(a for a in (*last, *negative) if isinstance(a, str))


def _of_sizes(
    domain: _domains.Domain, sizes: Mapping[str, int]
) -> SearchStrategy[np.ndarray]:
    shape = domain.sized_shape(sizes)
    dtype = np.dtype(dtypes.canonicalize_dtype(domain.dtype))
    return _choosing.arrays(dataclasses.replace(domain, shape=shape, dtype=dtype))


def _like(
    make: Callable[_Parameters, _domains.Domain],
) -> Callable[_Parameters, SearchStrategy[np.ndarray]]:
    """Returns a function of a domain's arguments that returns its strategy."""

    @functools.wraps(make)
    def strategy(
        *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> SearchStrategy[np.ndarray]:
        return arrays(make(*args, **kwargs))

    strategy.__module__ = __name__
    strategy.__annotations__ = {
        **make.__annotations__,
        "return": "SearchStrategy[np.ndarray]",
    }
    strategy.__doc__ = (
        f"Returns a strategy for the arrays of `gradtest.domains.{make.__name__}`, "
        "with its arguments."
    )
    return strategy


normal = _like(_domains.normal)
uniform = _like(_domains.uniform)
positive = _like(_domains.positive)
unit_interval = _like(_domains.unit_interval)
integers = _like(_domains.integers)
spd = _like(_domains.spd)
invertible = _like(_domains.invertible)
orthogonal = _like(_domains.orthogonal)
simplex = _like(_domains.simplex)
one_hot = _like(_domains.one_hot)
away_from = _like(_domains.away_from)
