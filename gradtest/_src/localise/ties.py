"""The step at which a program is not smooth: where equal values meet."""

from __future__ import annotations

import numpy as np

from gradtest._src.localise.precision import values_in_float64
from gradtest._src.localise.steps import Constant, Step
from gradtest._src.localise.target import Target

_CHOOSING = ("max", "min")
_ORDERING = ("sort", "reduce_max", "reduce_min", "argmax", "argmin", "top_k")


def tied_step(target: Target) -> tuple[Step | None, str]:
    """Returns the first step of users' that chooses between equal values."""
    try:
        values = values_in_float64(target)
    except Exception:  # whatever does not run by itself
        return None, ""
    for step in target.steps.steps:
        if step.place is None or not step.operands:
            continue
        operands = [
            np.asarray(a.value if isinstance(a, Constant) else values[a])
            for a in step.operands
        ]
        if step.name in _CHOOSING and (operands[0] == operands[1]).any():
            return step, f"its `{step.name}` chooses between equal values here"
        if step.name in _ORDERING and len(np.unique(operands[0])) < operands[0].size:
            return step, f"its `{step.name}` orders equal values here"
        if step.name in ("abs", "sign") and (operands[0] == 0).any():
            return step, f"its `{step.name}` is taken of 0 here"
    return None, ""
