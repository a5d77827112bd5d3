"""Slopes along one direction at many steps: the picture of a failed check."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradtest._src import seeding
from gradtest._src.case import Case, pair
from gradtest._src.differences import magnitude, weighted
from gradtest._src.findings import Ladder
from gradtest._src.gaps import leaf_gap
from gradtest._src.program import Values

# Relative to the leaf's own size.
_STEPS = tuple(10.0**-k for k in range(1, 10))
_FEWEST_STEPS = 3
# Without a true derivative: so many directions are tried, at this step.
_DIRECTIONS, _TRIED_AT = 3, 1e-5
# One-sided slopes this many times farther apart than noise sets them are apart.
_CLEAR = 8


def pulled_ladder(
    case: Case,
    leaf: int,
    claimed: np.ndarray,
    true: np.ndarray | None,
    *,
    is_open: bool = False,
) -> Ladder | None:
    """Measures along a direction of one leaf, against a claimed gradient.

    Args:
      case: In reverse mode.
      leaf: Which of the case's leaves.
      claimed: The leaf's claimed gradient.
      true: The true one, which the direction shall tell from it; None where it is not
        known: then differences say what the true slope is.
      is_open: Whether nothing was concluded: then no slope is said to be true.

    Returns:
      The slopes; None at a kink, and where claim or values are not finite.
    """
    if not np.isfinite(claimed).all():
        return None
    if true is not None:
        direction = _telling(case, leaf, claimed, true)
    else:
        direction = _farthest(case, leaf, claimed)
    slopes = pair(claimed, direction), None if true is None else pair(true, direction)
    return _ladder(case, {leaf: direction}, case.weights, *slopes, is_open=is_open)


def pushed_ladder(
    case: Case,
    leaf: int,
    output: int,
    claimed: np.ndarray,
    true: np.ndarray | None,
    *,
    is_open: bool = False,
) -> Ladder | None:
    """Measures along one leaf's tangent, against a claimed tangent of an output.

    Args:
      case: In forward mode.
      leaf: Which of the case's leaves.
      output: Which of the program's outputs.
      claimed: The output's claimed tangent.
      true: The true one; None where it is not known.
      is_open: Whether nothing was concluded: then no slope is said to be true.

    Returns:
      The slopes; None at a kink, and where claim or values are not finite.
    """
    if not np.isfinite(claimed).all():
        return None
    weights = [np.zeros_like(weight) for weight in case.weights]
    weights[output] = case.weights[output]
    if true is not None:
        weights[output] = _signs(case, claimed, true) * np.abs(weights[output])
    wide = case.tangents[leaf].dtype
    direction = np.asarray(case.seed[leaf]).astype(wide)
    slopes = (
        pair(claimed, weights[output]),
        None if true is None else pair(true, weights[output]),
    )
    return _ladder(case, {leaf: direction}, weights, *slopes, is_open=is_open)


def _telling(
    case: Case, leaf: int, claimed: np.ndarray, true: np.ndarray
) -> np.ndarray:
    """Returns a direction along the entries in dispute, which tells the two apart."""
    name = case.leaves[leaf].name
    generator = seeding.generator(case.key, "ladder", case.trial, name)
    sizes = case.sizes[leaf] * (0.5 + generator.random(claimed.shape))
    return sizes * _signs(case, claimed, true)


def _signs(case: Case, claimed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns the conjugate signs of the entries in dispute, zero for the others."""
    disputed = leaf_gap(claimed, true, rtol=case.rtol, floor=0).disputed
    difference = claimed - true
    if not disputed.any():
        disputed = np.ones(claimed.shape, bool)
    safe = np.where(difference == 0, 1, np.abs(difference))
    signs = np.where(difference == 0, 1, np.conj(difference) / safe)
    return disputed * signs


def _farthest(case: Case, leaf: int, claimed: np.ndarray) -> np.ndarray:
    """Returns the random direction along which claim and differences part most.

    They are the directions along which the leaf was judged.
    """
    found = []
    for k in range(_DIRECTIONS):
        direction = case.direction(leaf, f"leaf {k}")
        line = case.line({leaf: direction})
        ends = zip(line(-_TRIED_AT), line(_TRIED_AT), strict=True)
        slope = weighted([(b - a) / (2 * _TRIED_AT) for a, b in ends], case.weights)
        gap = abs(slope - pair(claimed, direction))
        found.append((gap if math.isfinite(gap) else -1.0, k, direction))
    return max(found, key=lambda each: each[:2])[2]


def _ladder(
    case: Case,
    directions: dict[int, np.ndarray],
    weights: Values,
    claimed: float,
    true: float | None,
    *,
    is_open: bool,
) -> Ladder | None:
    """Takes differences at every step; None where they can't be read."""
    base = case.readings.values
    ups, downs, steps = _differences(case.line(directions), base, weights)
    if len(steps) < _FEWEST_STEPS:
        return None
    slopes = (ups + downs) / (2 * steps)
    # Two units in the last place, or what the finest two slopes differ by.
    noise = 2 * case.noise * magnitude(base, weights)
    noise = max(noise, abs(slopes[-1] - slopes[-2]) * steps[-1])
    if _is_kinked((ups - downs) / steps, noise / steps):
        return None
    measured = true is None and not is_open
    if is_open:
        true = math.nan
    elif true is None:
        true = _best(slopes, noise / steps)
    return Ladder(
        steps,
        slopes,
        noise / steps,
        float(claimed),
        float(true),
        np.abs(ups - steps * claimed),
        np.abs(ups - steps * true),
        measured,
    )


def _differences(
    line: Callable[[float], Values], base: Values, weights: Values
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns f(h) - f(0), f(0) - f(-h) and h, wherever both are finite."""
    rows = []
    for step in _STEPS:
        low, high = line(-step), line(step)
        up = weighted([b - a for a, b in zip(base, high, strict=True)], weights)
        down = weighted([b - a for a, b in zip(low, base, strict=True)], weights)
        if math.isfinite(up) and math.isfinite(down):
            rows.append((up, down, step))
    ups, downs, steps = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return ups, downs, steps


def _is_kinked(jumps: np.ndarray, noise: np.ndarray) -> bool:
    """Whether the slopes of the two sides stay apart as the step shrinks.

    Of a smooth function they near each other as fast as the step shrinks.
    """
    clear = np.flatnonzero(np.abs(jumps) > _CLEAR * noise)
    if not clear.size or not clear[-1]:
        return False
    finest = int(clear[-1])
    return bool(abs(jumps[finest]) > abs(jumps[finest - 1]) / 2)


def _best(slopes: np.ndarray, noise: np.ndarray) -> float:
    """Returns the slope that its coarser neighbour agrees with best."""
    errors = np.abs(np.diff(slopes)) + noise[1:]
    return float(slopes[1 + int(np.argmin(errors))])
