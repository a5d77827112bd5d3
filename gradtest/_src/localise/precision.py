"""The step at which a right formula loses its accuracy in working precision."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.case import norm
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.localise.steps import Constant, Slot, Step
from gradtest._src.localise.target import Target

Found = tuple[Step | None, str, float]
_NARROWING = ("convert_element_type", "reduce_precision")


def coarse_step(target: Target) -> Found:
    """Returns the step where most of the accuracy is lost, with the evidence.

    Every value is computed twice: in float64, and as the program does. A step loses
    what its result is off by, beyond what its operands are.
    """
    steps = target.steps
    try:
        work, wide = _values(target)
    except Exception:  # whatever does not run by itself
        return None, "", 0.0
    feeding = target.feeding(range(len(target.claimed)))
    best: tuple[float, Step | None, str] = (0.0, None, "")
    for i in sorted(feeding):
        step = steps.steps[i]
        if not step.results or not steps.is_floating(step.results[0]):
            continue
        here = _off(work, wide, step.results[0])
        before = max(
            (_off(work, wide, atom) for atom in step.operands
             if not isinstance(atom, Constant) and steps.is_floating(atom)),
            default=0.0,
        )  # fmt: skip
        if not np.isfinite(here) and np.isfinite(before):
            return step, "its result is not finite here, and finite in float64", 0.9
        eps = _eps(steps.types[step.results[0]].dtype)
        if eps > 1e-3 and step.name in _NARROWING:
            here *= 4  # what rounds is guiltier than what the rounded value does
        loss = here / max(before, 1e-9)
        if here > 0 and loss > best[0] and here > 1e-7:
            best = (
                loss,
                step,
                _says(step, steps.types[step.results[0]].dtype, here, before),
            )
    return best[1], best[2], 0.6


def _says(step: Step, dtype: Any, here: float, before: float) -> str:
    if step.name in _NARROWING:
        return f"its value is rounded to {np.dtype(dtype).name} here"
    return f"its result is off by {here:.1g} of its size, what it takes by {before:.1g}"


def _off(work: dict[Slot, Any], wide: dict[Slot, Any], slot: Slot) -> float:
    """Returns how far a value is off, relative to its size in float64."""
    near, true = np.asarray(widen(work[slot])), np.asarray(widen(wide[slot]))
    size = norm(true)
    if not np.isfinite(near).all() and np.isfinite(true).all():
        return np.inf
    gap = norm(near - true)
    return gap / size if size else float(gap > 0)


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def _values(target: Target) -> tuple[dict[Slot, Any], dict[Slot, Any]]:
    """Returns every value in working precision, and in float64."""
    case, steps = target.case, target.steps
    held = case.program.held(case.point)
    arguments = [*case.point.moving, *held, *case.seed]
    with execution.working_precision():
        _, work = steps.run(Evaluator(wide=False), list(map(jnp.asarray, arguments)))
    return work, values_in_float64(target)


def values_in_float64(target: Target) -> dict[Slot, Any]:
    """Returns every value inside of a claim, in float64."""
    case = target.case
    arguments = [*case.point.moving, *case.program.held(case.point), *target.seed]
    with execution.float64():
        return target.steps.run(Evaluator(), [widen(a) for a in arguments])[1]
