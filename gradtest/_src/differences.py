"""Slopes by differences of values: independent of every derivative rule.

A function is known here by its values along a line, `line(t)`: lists of NumPy arrays
in float64 or complex128, weighted by cotangents into one real number. The central
difference D(h) = (phi(h) - phi(-h)) / 2h has error c2 h^2 + c4 h^4 + ... where phi is
smooth, and rounding noise of about eps |phi| / h everywhere.

No single step serves. Along a random direction a wide ReLU network crosses kinks at
every step above 1e-6 or so, while a badly scaled value drowns in noise below 1e-4. So
a ladder of steps is descended until two neighbours agree, and what they disagree by is
the error estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Values = list[np.ndarray]
Line = Callable[[float], Values]

# The usual two rungs; then one above them, for noise, and one below, for kinks; then
# the whole ladder.
_FIRST_PAIRS = ((3e-5, 3e-6), (3e-4, 3e-5), (3e-6, 3e-7))
_ALL_RUNGS = (3e-3, 3e-4, 3e-5, 3e-6, 3e-7, 3e-8, 3e-9, 3e-10, 3e-11)
# Values with float32 noise need steps that stand out of it.
_NOISY_RUNGS = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
# A rung pair that agrees to this part of the expected slope settles the matter.
_SETTLED = 1e-7
# Where the noise of the values has to be estimated: how many, and how far apart.
_NOISE_SAMPLES = 8
_SPACINGS = (1e-12, 1e-8, 1e-6)
_NOISY_SPACINGS = (1e-4,)
# How far apart, as a part of a step, where the noise is looked for at that step itself.
_LOCAL_SPACING = 1e-3
# A rung's error, as a part of the expected slope, that asks for no further search; and
# how sharp the slope of a staircase must be to be believed against flat finer rungs.
_CONVINCING, _STAIRCASE = 1e-4, 1e-2
# Where an error estimate hides more than this part of a slope, nothing is concluded.
SWAMPED = 0.05
# To contradict a gradient that autodiff confirms, a slope must be this much surer.
SETTLED_PART = 1e-3
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Slope:
    """A directional derivative with its error estimate.

    Attributes:
      value: The slope of the weighted values.
      error: Estimated absolute error of `value`; infinite where no step converged.
      step: The step that it was taken at.
      left: One-sided slope towards smaller t, right: towards larger t; they differ at
        a kink.
      outputs: The central difference of each output, unweighted.
      reach: Size of the one-sided slopes at the largest step: what the value does at
        all there, where the slope itself is zero.
      rungs: The slopes of all steps that were tried.
    """

    value: float
    error: float
    step: float
    left: float
    right: float
    outputs: Values
    reach: float
    rungs: tuple[float, ...]

    @property
    def is_kink(self) -> bool:
        """Whether the slope jumps at the base point."""
        return self.left != self.right

    def distance(self, slope: float) -> float:
        """Returns how far a claimed slope lies outside of [left, right], or 0."""
        low, high = min(self.left, self.right), max(self.left, self.right)
        return max(low - slope, slope - high, 0.0)


def weighted(values: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> float:
    """Returns the real inner product of values with cotangents, JAX's convention."""
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        total += float(np.sum((value * weight).real))
    return total


def magnitude(values: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> float:
    """Returns the sum of absolute terms of `weighted`: the scale of its rounding."""
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        total += float(np.sum(np.abs(value) * np.abs(weight)))
    return total


class _Ladder:
    """Central differences of one line at several steps, each evaluated once."""

    def __init__(self, line: Line, weights: Values, noise: float):
        self._line = line
        self._weights = weights
        self.noise = noise
        self._sides: dict[float, tuple[Values, Values]] = {}
        self._slopes: dict[float, float] = {}
        self._local: dict[float, float] = {}

    def sides(self, step: float) -> tuple[Values, Values]:
        """Returns the values at -step and +step."""
        if step not in self._sides:
            self._sides[step] = self._line(-step), self._line(step)
        return self._sides[step]

    def slope(self, step: float) -> float:
        """Returns the central difference; values are subtracted before weighting."""
        if step not in self._slopes:
            self._slopes[step] = weighted(self.outputs(step), self._weights)
        return self._slopes[step]

    def outputs(self, step: float) -> Values:
        """Returns the central difference of each output."""
        left, right = self.sides(step)
        return [(r - m) / (2 * step) for m, r in zip(left, right, strict=True)]

    def rounding(self, step: float) -> float:
        """Returns the error that noise in the values makes at this step."""
        return self.noise / step

    def sampled_noise(self, spacing: float, around: float = 0.0) -> float:
        """Estimates the noise of the weighted values from samples this far apart."""
        steps = spacing * (np.arange(_NOISE_SAMPLES) - _NOISE_SAMPLES // 2)
        values = [weighted(self._line(float(around + t)), self._weights) for t in steps]
        return computational_noise(values)

    def local_noise(self, step: float) -> float:
        """Estimates the noise of the weighted values where a step leads."""
        if step not in self._local:
            self._local[step] = 2 * self.sampled_noise(_LOCAL_SPACING * step, step)
        return self._local[step]

    def one_sided(self, step: float, base: Values) -> tuple[float, float]:
        """Returns the slopes from -step to 0 and from 0 to +step."""
        left, right = self.sides(step)
        down = [(b - m) / step for m, b in zip(left, base, strict=True)]
        up = [(r - b) / step for b, r in zip(base, right, strict=True)]
        return weighted(down, self._weights), weighted(up, self._weights)


def measure_slope(
    line: Line,
    weights: Sequence[np.ndarray],
    *,
    scale: float,
    base: Sequence[np.ndarray],
    is_noisy: bool = False,
) -> Slope:
    """Measures the slope of `weighted(line(t), weights)` at t = 0.

    Args:
      line: Values along the line; the direction's entries are of the order of the
        point's, so that t is a relative step.
      weights: One cotangent for each output.
      scale: The size that the slope is expected to have; sets what agreement of two
        steps is enough, never the value.
      base: The values at t = 0.
      is_noisy: Whether a part of the program runs in a narrower dtype: the noise of
        the values is then estimated first, and larger steps are taken.

    Returns:
      The slope with its error estimate. Its two sides are equal unless there is a kink.
    """
    weights = list(weights)
    noise = 2 * _EPS * magnitude(base, weights)
    ladder = _Ladder(line, weights, noise)
    for pair in () if is_noisy else _FIRST_PAIRS:
        coarse, fine = (ladder.slope(step) for step in pair)
        error = abs(coarse - fine) + ladder.rounding(pair[1])
        if error <= _SETTLED * max(scale, abs(fine)):
            return _with_sides(ladder, pair[1], pair, fine, error, list(base), scale)
    rungs = _NOISY_RUNGS if is_noisy else _ALL_RUNGS
    step, value, error = _descend(ladder, rungs, scale, is_noisy)
    return _with_sides(ladder, step, rungs, value, error, list(base), scale)


def _descend(
    ladder: _Ladder, rungs: Sequence[float], scale: float, is_noisy: bool
) -> tuple[float, float, float]:
    """Picks the best rung of the whole ladder, with the noise that is found there.

    Noise shows at the scale where it lives. A value that passes through numbers a
    billion times as large is a staircase with steps of 1e-7: flat, and so without any
    noise, at the finest rungs. So where no rung convinces, or the finest ones see
    nothing at all, the noise is looked for at coarser and coarser spacings. Where terms
    cancel that are singular at the point itself, as of `sin(x) / x` and its derivatives
    at 0, the noise differs from step to step, and is looked for at each.
    """
    slopes = [ladder.slope(step) for step in rungs]
    flat = [step for step in rungs if not any(d.any() for d in ladder.outputs(step))]
    noise = ladder.noise
    spacings = _NOISY_SPACINGS if is_noisy else _SPACINGS
    ladder.noise = max(ladder.noise, 2 * ladder.sampled_noise(spacings[0]))
    best = _best_rung(ladder, rungs)
    is_staircase = bool(flat) and any(slopes)
    if best[2] <= _CONVINCING * scale and not is_staircase:
        step, value, error = best
        if is_noisy or ladder.local_noise(step) <= _CONVINCING * scale * step:
            return best
        best = step, value, error + ladder.local_noise(step) / step
    kept = [step for step in rungs if step > max(flat, default=0.0)]
    for spacing in spacings[1:]:
        ladder.noise = max(ladder.noise, 2 * ladder.sampled_noise(spacing))
        coarser = _best_rung(ladder, kept) if len(kept) > 1 else best
        if is_staircase and coarser[2] <= _STAIRCASE * abs(coarser[1]):
            return coarser
        if coarser[2] < best[2]:
            best = coarser
    if is_noisy or best[2] <= _CONVINCING * scale:
        return best
    ladder.noise = noise
    uneven = _best_rung(ladder, rungs, is_uneven=True)
    return min(best, uneven, key=lambda rung: rung[2])


def _best_rung(
    ladder: _Ladder, rungs: Sequence[float], *, is_uneven: bool = False
) -> tuple[float, float, float]:
    """Picks the rung whose neighbours agree best, extrapolated or not.

    A coarse plateau of a kinked function can look flat and be wrong, so every
    candidate must also agree with the finer rungs to within their own noise. Noise that
    is uneven grows towards the point: that of a finer rung is no less.
    """
    slopes = [ladder.slope(step) for step in rungs]
    local = [ladder.local_noise(step) if is_uneven else 0.0 for step in rungs]
    best = (rungs[-1], slopes[-1], math.inf)
    for i in range(1, len(rungs)):
        grown = np.maximum.accumulate([ladder.noise, *local[i:]])[1:]
        rounding = grown / np.array(rungs[i:])
        for value, error in _candidates(slopes, rungs, i):
            finer = np.abs(value - np.array(slopes[i + 1 :])) - 4 * rounding[1:]
            error = float(max([error, *finer]) + rounding[0])
            if error < best[2]:
                best = (rungs[i], value, error)
    return best


def _candidates(
    slopes: Sequence[float], rungs: Sequence[float], i: int
) -> list[tuple[float, float]]:
    """Returns (value, error) at rung i: plain, and extrapolated by Richardson.

    Source: L. F. Richardson, "The approximate arithmetical solution by finite
    differences...", Phil. Trans. R. Soc. A 210 (1911).
    """
    plain = (slopes[i], abs(slopes[i] - slopes[i - 1]))
    if i < 2:
        return [plain]
    newer = richardson(slopes[i - 1], slopes[i], rungs[i - 1] / rungs[i])
    older = richardson(slopes[i - 2], slopes[i - 1], rungs[i - 2] / rungs[i - 1])
    return [plain, (newer, abs(newer - older))]


def richardson(coarse: float, fine: float, ratio: float) -> float:
    """Combines central differences at steps `ratio` h and h: cancels the h^2 term."""
    return (ratio**2 * fine - coarse) / (ratio**2 - 1)


def _with_sides(
    ladder: _Ladder,
    step: float,
    rungs: Sequence[float],
    value: float,
    error: float,
    base: Values,
    scale: float,
) -> Slope:
    """Completes a slope with its one-sided slopes, equal where there is no kink."""
    left, right = ladder.one_sided(step, base)
    jump = right - left
    floor = max(8 * ladder.rounding(step), 1e-6 * scale, 8 * error)
    if not (abs(jump) > floor and _persists(ladder, rungs, step, jump, base)):
        left = right = value
    reach = max(map(abs, ladder.one_sided(max(rungs), base)))
    tried = tuple(ladder.slope(rung) for rung in rungs)
    return Slope(value, error, step, left, right, ladder.outputs(step), reach, tried)


def _persists(
    ladder: _Ladder, rungs: Sequence[float], step: float, jump: float, base: Values
) -> bool:
    """Whether the slopes of the two sides stay apart as the step shrinks.

    Of a smooth function their difference is phi'' h: it falls with the step.
    """
    coarser = [rung for rung in rungs if rung > step]
    if not coarser:
        return False
    left, right = ladder.one_sided(min(coarser), base)
    ratio = min(coarser) / step
    return abs(jump) > 0.5 * abs(right - left) and abs(jump) * ratio > 2 * abs(
        right - left
    )


def computational_noise(values: Sequence[float]) -> float:
    """Estimates the noise of equally spaced values of a smooth function.

    Args:
      values: At least 7 values at small equal steps.

    Returns:
      The estimated standard deviation of the noise; 0 for exact values.

    Source: J. J. Moré and S. M. Wild, "Estimating Computational Noise", SIAM J. Sci.
      Comput. 33 (2011), section 3: the difference table's level k estimates the
      variance by gamma_k times its mean square, gamma_k = (k!)^2 / (2k)!.
    """
    differences = np.asarray(values, dtype=np.float64)
    levels: list[tuple[float, bool]] = []
    for k in range(1, len(values) - 1):
        differences = np.diff(differences)
        gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
        sigma = math.sqrt(gamma * float(np.mean(differences**2)))
        changes_sign = bool(differences.min() < 0 < differences.max())
        levels.append((sigma, changes_sign))
    for first, second, third in zip(levels, levels[1:], levels[2:], strict=False):
        trio = [first[0], second[0], third[0]]
        if first[1] and max(trio) <= 4 * min(trio):
            return first[0]
    return levels[-1][0]
