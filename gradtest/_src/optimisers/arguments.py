"""What the assertion on updates asks of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

PyTree = Any


def require_steps(steps: Any) -> None:
    """Raises ValueError where a number of steps is none."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"`steps` must be an integer >= 1, got {steps!r}.")


def require_reference(reference: Callable[..., PyTree]) -> None:
    """Raises TypeError where a reference can't take params and gradients."""
    try:
        signature = inspect.signature(reference)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, [])
    except TypeError as error:
        raise TypeError(
            "`reference` must take two arguments, the params and the list of "
            f"gradients, got one that takes {signature}: {error}."
        ) from None


def require_scales(scales: Any) -> None:
    """Raises ValueError where sizes of gradients are none."""
    try:
        sound = all(0 < float(scale) < np.inf for scale in scales) and len(scales)
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(f"`scales` must be positive numbers, got {scales!r}.")
