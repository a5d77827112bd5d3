"""Arrays that a check keeps of what did not pass, to look at and to draw."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

if typing.TYPE_CHECKING:
    from gradtest._src.findings import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class Ladder:
    """Slopes along one direction at many steps: how a difference sees two gradients.

    Attributes:
      steps: Lengths of the steps: float64[n], falling.
      slopes: Central differences of the value at each step: float64[n].
      noise: What rounding does to each of the slopes, estimated: float64[n].
      claimed: The slope that the claim has along the direction.
      true: The slope that is true: of the exact derivative where that was confirmed,
        else as differences measure it; NaN where nothing was concluded.
      remainders: |f(x + hv) - f(x) - h (claimed slope)| at each step: float64[n].
      true_remainders: The same of the true slope.
      measured: Whether differences measured the true slope: it is then no better than
        the noise.
    """

    steps: np.ndarray
    slopes: np.ndarray
    noise: np.ndarray
    claimed: float
    true: float
    remainders: np.ndarray
    true_remainders: np.ndarray
    measured: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Exhibit:
    """What a failed check keeps of one leaf, to look at and to draw.

    Attributes:
      name: The leaf's path in the user's names.
      claimed: The claimed derivative: float64 or complex128.
      true: The true one, of the same shape; None where it is not known by entries.
      mode: "rev" or "fwd".
      order: Order of the derivative.
      rule: The custom rule that was looked at by itself, if any.
      ladder: Slopes along a direction of this leaf; None where none were measured.
      of: What the arrays are, where not the derivative: "value", "tangent of out", ...
      start: Where the arrays begin in the whole, where they are a part of it.
      whole: The shape of the whole where the arrays are a part of it, around the entry
        that is farthest off; empty where they are all of it.
    """

    name: str
    claimed: np.ndarray
    true: np.ndarray | None
    mode: str = "rev"
    order: int = 1
    rule: Rule | None = None
    ladder: Ladder | None = None
    of: str = ""
    start: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether the arrays are a part of a larger one."""
        return bool(self.whole)
