"""What the user chose of a check, and whether it makes sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import seeding, session
from gradtest._src.intentions import Intentions, check_intentions

MODES = ("rev", "fwd")
DEFAULT_RTOL = 2e-6


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chose; see the assertions for the meaning of each."""

    argnums: int | Sequence[int] | None = None
    has_aux: bool = False
    trials: int = dataclasses.field(default_factory=session.trials)
    key: Any = dataclasses.field(default_factory=session.key)
    order: int = 1
    modes: Sequence[str] | None = None
    rtol: float = DEFAULT_RTOL
    rounding_rtol: float | None = None
    exclude: Sequence[str] = ()
    variant: Callable[..., Any] | None = None
    expect_differs: Intentions | None = None
    hazards: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError where an option makes no sense."""
        seeding.describe(self.key)
        if type(self.trials) is not int or self.trials < 1:
            raise ValueError(f"`trials` must be an integer >= 1, got {self.trials!r}.")
        if type(self.order) is not int or self.order not in (1, 2):
            raise ValueError(f"`order` must be 1 or 2, got {self.order!r}.")
        for name in ("rtol", "rounding_rtol"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, float | int) or not 0 < value < 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")
        wrong = set(self.modes or ()) - set(MODES)
        if wrong or (self.modes is not None and not self.modes):
            raise ValueError(
                f"`modes` must be None or name some of {MODES}, got {self.modes!r}."
            )
        if not isinstance(self.hazards, bool):
            raise TypeError(f"`hazards` must be True or False, got {self.hazards!r}.")
        check_intentions(self.expect_differs)
        if self.variant is not None and not callable(self.variant):
            raise TypeError(f"`variant` must be callable, got {self.variant!r}.")
