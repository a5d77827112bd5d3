"""What an update loses in its own dtypes, beside what the reference loses there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import diagnose, rounding, seeding
from gradtest._src.case import norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.lifting import widen
from gradtest._src.optimisers.lifted import JITTERS
from gradtest._src.optimisers.training import Both, Trajectory
from gradtest._src.optimisers.trees import Values

_SHAKES = 3
# An entry in so many may stand at a threshold, such as a sign's, and is not judged.
_AT_THRESHOLDS = 20


def judge_rounding(
    found: dict[int, Finding],
    both: Both,
    worked: Trajectory,
    grads: Sequence[Values],
    rounding_rtol: float | None,
    stored: Sequence[Any] = (),
) -> dict[int, Finding]:
    """Completes findings that passed with what the last step's params lose.

    Args:
      found: One for each checked leaf, by its place among the params.
      both: The transformation and its reference.
      worked: The checked params after each step, in their own dtypes.
      grads: The gradients of each step.
      rounding_rtol: Allowed relative gap; None measures what is to be allowed.
      stored: Dtypes of the state, which may be narrower on purpose.
    """
    eps = _spacing(both, stored)
    if eps <= float(np.finfo(np.float64).eps):
        return found
    begin = [np.asarray(widen(both.start.params.values[i])) for i in found]
    lifted = both.claimed(both.start.params.values, grads)[-1]
    gaps = [_trimmed(w - c) for w, c in zip(worked[-1], lifted, strict=True)]
    sizes = [norm(c - p) for c, p in zip(lifted, begin, strict=True)]
    relative = rounding_rtol or rounding.floor(eps, None)
    allowed = [
        relative * size + both.steps * eps * norm(p)
        for size, p in zip(sizes, begin, strict=True)
    ]
    if any(not gap <= limit for gap, limit in zip(gaps, allowed, strict=True)):
        losses = _measured(both, grads, lifted, eps)
        allowed = [
            max(limit, rounding.FACTOR * loss)
            for limit, loss in zip(allowed, losses, strict=True)
        ]
    judged = {}
    for place, (i, finding) in enumerate(found.items()):
        unit = sizes[place] or 1.0
        numbers = (gaps[place] / unit, allowed[place] / unit)
        judged[i] = dataclasses.replace(finding, rounding=numbers)
        if not gaps[place] <= allowed[place]:
            causes = diagnose.unstable(
                worked[-1][place] - begin[place], lifted[place] - begin[place],
                is_narrower=False, dtype=finding.dtype,
            )  # fmt: skip
            cause, *others = map(_of_update, causes)
            judged[i] = dataclasses.replace(
                judged[i], verdict=Verdict.FAIL, gap=Gap.ROUNDING, size=numbers[0],
                allowed=numbers[1], cause=cause, other_causes=tuple(others),
            )  # fmt: skip
    return judged


def _spacing(both: Both, stored: Sequence[Any]) -> float:
    """Returns the spacing of the coarsest dtype of params, gradients and state."""
    start = both.start
    dtypes = [
        tree.leaves[i].dtype
        for tree in (start.params, start.grads)
        for i in tree.floats
    ]
    return max(float(jnp.finfo(dtype).eps) for dtype in (*dtypes, *stored))


def _of_update(cause: Cause) -> Cause:
    says = cause.says.replace("plain autodiff", "the reference")
    return dataclasses.replace(cause, says=says)


def _trimmed(gap: np.ndarray) -> float:
    """Norm of a difference, but for the few entries that are farthest off."""
    size = np.where(np.isfinite(gap), np.abs(gap), np.inf).ravel()
    if size.size >= 4 and np.isfinite(size).all():
        size = np.sort(size)[: size.size - max(1, size.size // _AT_THRESHOLDS)]
    return norm(size)


def _measured(
    both: Both, grads: Sequence[Values], lifted: Values, eps: float
) -> list[float]:
    """Returns what the reference loses, or what operands an ulp off change.

    Every operation's result counts as an operand: a formula may cancel.
    """
    params = both.start.params.values
    most = [0.0] * len(lifted)
    own, wide = both.in_own_dtype(grads), both.true(params, grads)[-1]
    if own is not None:
        most = [norm(a - b) for a, b in zip(own[-1], wide, strict=True)]
    floats = set(both.start.grads.floats)
    for k in range(_SHAKES):
        draws = seeding.generator(k, "shaken")
        shaken = [
            [
                widen(value) * (1 + eps * draws.standard_normal(np.shape(value)))
                if i in floats
                else value
                for i, value in enumerate(step)
            ]
            for step in grads
        ]
        rounded = eps * draws.uniform(-1, 1, JITTERS)
        for moved in (
            both.claimed(params, shaken)[-1],
            both.jittered(rounded, params, grads)[-1],
        ):
            most = [
                max(m, norm(a - b)) for m, a, b in zip(most, moved, lifted, strict=True)
            ]
    return [loss if np.isfinite(loss) else 0.0 for loss in most]
