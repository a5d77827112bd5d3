"""Gradients around a kink, inside of a trace; see `kinks` for the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gradtest._src.kinks import DISTANCE, TOLERANCE
from gradtest._src.traced.gaps import all_finite
from gradtest._src.traced.readings import Bench, Readings, norm

Values = list[Any]
_PAIRS = 3


def nearby(bench: Bench, sizes: Values) -> list[Values]:
    """Returns how far points around are off, in pairs of opposite sides."""
    found = []
    for k in range(_PAIRS):
        step = [
            DISTANCE * size * bench.draw(f"kink {k}", i) for i, size in enumerate(sizes)
        ]
        if not k:  # of the first pair all entries move alike
            step = list(map(jnp.abs, step))
        found += [step, [-offset for offset in step]]
    return found


@dataclasses.dataclass(frozen=True)
class KinkSamples:
    """The exact gradients at points around, stacked by leaf: [samples, ...]."""

    samples: Values

    @classmethod
    def of(cls, around: Sequence[Readings]) -> KinkSamples | None:
        """Reads the exact gradients; None where there is none."""
        exact = [readings.exact for readings in around]
        found = [each for each in exact if each is not None]
        if not exact or len(found) < len(exact):
            return None
        return cls([jnp.stack(each) for each in zip(*found, strict=True)])

    def vary(self, leaf: int, entries: Any) -> Any:
        """Whether the samples differ in all of these entries of a leaf, and in any."""
        samples = self.samples[leaf]
        spread = jnp.max(jnp.abs(samples - samples[:1]), axis=0)
        largest = jnp.max(jnp.abs(samples), axis=0)
        usual = norm(largest) / max(largest.size, 1) ** 0.5
        varies = spread > TOLERANCE * jnp.maximum(largest, usual)
        return jnp.any(varies) & jnp.all(varies | ~entries)

    def accepts(self, leaf: int, claimed: Any, exact: Any, disputed: Any) -> Any:
        """Whether a claim lies between the samples where it departs from the exact.

        Each entry in dispute must be one that varies around, and lie between; and so
        must all of them together, weighted by the dispute.
        """
        samples = self.samples[leaf]
        each = jnp.ones((), bool)
        for part in (jnp.real, jnp.imag) if jnp.iscomplexobj(claimed) else (jnp.real,):
            low, high = part(samples).min(axis=0), part(samples).max(axis=0)
            largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
            usual = norm(largest) / max(largest.size, 1) ** 0.5
            slack = TOLERANCE * jnp.maximum(largest, usual)
            value = part(claimed)
            between = (value >= low - slack) & (value <= high + slack)
            same = jnp.abs(part(claimed - exact)) <= slack
            each &= jnp.all(~disputed | same | (between & (high - low > slack)))
        dispute = jnp.conj(claimed - exact)
        seen = jnp.sum(jnp.real(dispute[None] * samples).reshape(len(samples), -1), 1)
        value = jnp.sum(jnp.real(dispute * claimed))
        spread = seen.max() - seen.min()
        margin = spread + TOLERANCE * (jnp.max(jnp.abs(seen)) + jnp.abs(value))
        together = (value >= seen.min() - margin) & (value <= seen.max() + margin)
        varies = spread > TOLERANCE * jnp.max(jnp.abs(seen))
        return each & together & varies & all_finite([samples, claimed])
