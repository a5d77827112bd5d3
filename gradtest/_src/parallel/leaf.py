"""One leaf of a wrong gradient on several devices, and all its cause is read from."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from gradtest._src.case import norm
from gradtest._src.devices.copies import Copies
from gradtest._src.parallel.layout import Layout
from gradtest._src.parallel.parts import Parts
from gradtest._src.program import Values


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a wrong gradient, and all that its cause is read from.

    Attributes:
      index: Its place among the leaves that are checked.
      copies: What each device holds.
      truth: The full batch's gradient.
      layout: The devices.
      parts: The gradients of parts of the batch, where there is a batch.
      fit: How closely numbers must fit a pattern.
    """

    index: int
    copies: Copies
    truth: np.ndarray
    layout: Layout
    parts: Parts | None
    fit: float

    def fits(self, found: np.ndarray, pattern: np.ndarray) -> bool:
        """Whether an array is another one, as closely as numbers here can tell."""
        return norm(found - pattern) <= self.fit * norm(pattern) > 0

    @functools.cached_property
    def by_device(self) -> list[np.ndarray]:
        """What each device holds, in the devices' order."""
        held: dict[int, np.ndarray] = {}
        for value, devices in zip(self.copies.values, self.copies.holders, strict=True):
            held |= dict.fromkeys(devices, value)
        return [held[device] for device in sorted(held)]

    @property
    def agrees(self) -> bool:
        """Whether all devices hold the same but for rounding."""
        first = self.by_device[0]
        return all(
            norm(value - first) <= 1e-9 * (norm(first) or 1.0)
            for value in self.copies.values
        )

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices disagree; empty where unknown."""
        names = self.layout.spanning(len(self.by_device))
        if not names:
            return ()
        sizes = [self.layout.axes[name] for name in names]
        rows = np.reshape(self.by_device, (*sizes, -1))
        scale = np.max(np.abs(rows)) or 1.0
        return tuple(
            name
            for axis, name in enumerate(names)
            if np.max(np.abs(rows - np.take(rows, [0], axis))) > 1e-9 * scale
        )

    def over(self) -> str:
        """Names those axes as an argument of a reduction."""
        return " and ".join(map(repr, self.axes)) or "the devices' axis"

    def partial(self, count: int) -> Values | None:
        """Returns this leaf's gradient on each of so many parts of the batch."""
        if self.parts is None:
            return None
        gradients = self.parts.gradients(count)
        return gradients and [gradient[self.index] for gradient in gradients]
