"""The differences of derivatives as traced numbers, and conditions made of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src.traced.readings import norm

# Of a message: how a derivative compares with the true one where it has its direction.
ALONG = "; along the true one it is {factor:.4g} times as large"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("wrong", "open", "numbers"),
    meta_fields=("text", "why"),
)
@dataclasses.dataclass(frozen=True)
class Condition:
    """What must hold at run time.

    Attributes:
      text: What is wrong where it does not; `{gap:.3g}` and its like show `numbers`.
      wrong: Whether it does not hold: a traced bool.
      open: Whether nothing can be said of it: a traced bool.
      why: Why nothing can be said then.
      numbers: Numbers of the text, traced, by name.
    """

    text: str
    wrong: Any
    open: Any = False
    why: str = ""
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TracedGap:
    """The difference of two derivatives of one leaf; see `gaps.LeafGap`.

    Attributes:
      factor: How large the one is along the other, as a multiple of it.
    """

    size: Any
    allowed: Any
    disputed: Any
    exceeded: Any
    factor: Any


def traced_gap(claimed: Any, truth: Any, *, rtol: Any, floor: Any) -> TracedGap:
    """Compares two derivatives norm-wise and by entry, as `gaps.leaf_gap` does."""
    difference = jnp.abs(claimed - truth)
    size, scale = norm(difference), norm(truth)
    allowed = rtol * scale + floor
    per_entry = 100 * rtol * jnp.abs(truth) + allowed / max(truth.size, 1) ** 0.5
    disputed = ~(difference <= per_entry)
    too_large = ~(size <= allowed)
    largest = jnp.max(difference, initial=0.0)
    disputed |= too_large & ~jnp.any(disputed) & (difference >= largest)
    unit = jnp.where(scale > floor, scale, 1.0)
    along = jnp.sum(jnp.real(claimed * jnp.conj(truth)))
    return TracedGap(
        size / unit,
        allowed / unit,
        disputed,
        too_large | jnp.any(disputed),
        along / jnp.where(scale > 0, scale**2, 1.0),
    )


def escaped(text: str) -> str:
    """Returns a text that `str.format` gives back as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def all_finite(values: Any) -> Any:
    """Whether every entry of every array is finite."""
    found = jnp.ones((), bool)
    for value in values:
        found &= jnp.all(jnp.isfinite(value))
    return found


def finite_part(value: Any) -> Any:
    """Returns an array with zeros where it is not finite."""
    return jnp.where(jnp.isfinite(value), value, 0)


def where_defined(defined: Any, conditions: list[Condition]) -> list[Condition]:
    """Asks conditions only where all values are finite; adds that these must be."""
    asked = [
        dataclasses.replace(
            condition, wrong=condition.wrong & defined, open=condition.open & defined
        )
        for condition in conditions
    ]
    return [*asked, Condition("", False, ~defined, "a value is not finite here")]
