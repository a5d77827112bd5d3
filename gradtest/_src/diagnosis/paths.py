"""Causes that are a path of the program too little: a value taken for a constant.

The true derivative is a sum over paths from an argument to the results. Each value on
the way is faded out in turn, and so is each operand: what goes missing is what flows
through it, and a gap that is a multiple of that has its reason there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gradtest._src import dataflow, execution, jaxprs
from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import (
    Clues,
    coefficient,
    independent,
    likelihood,
    times,
)
from gradtest._src.findings import Cause
from gradtest._src.lifting import Evaluator, Recorder, is_inexact, widen
from gradtest._src.program import Values, derivative
from gradtest._src.rules import shorten

if TYPE_CHECKING:
    from gradtest._src.case import Case
    from gradtest._src.jaxprs import Eqn

# Programs of more places than these, or with larger gradients, are not taken apart.
_MOST_PLACES = 160
_MOST_ENTRIES = 50_000
# So many different parts are tried two at a time.
_MOST_IN_PAIRS = 24
# By what a term may be off, of two that are.
_LOST, _FLIPPED = -1.0, -2.0
_SIMPLE = (-2.0, -1.5, -1.0, -0.5, 0.5, 1.0)
# What moves numbers around carries nothing of its own.
_PLAIN = frozenset(
    ["broadcast_in_dim", "reshape", "transpose", "convert_element_type", "squeeze",
     "expand_dims", "stop_gradient", "copy", "copy_p", "slice", "rev"]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What flows through one place of the program.

    Attributes:
      words: The place in words, with its line.
      gradients: What it contributes to the gradient of each leaf.
      is_operand: Whether the place is one operand, and not a result.
    """

    words: str
    gradients: Values
    is_operand: bool = False


def missing_path(clues: Clues) -> Cause | None:
    """The gap is a multiple of what flows through one place, or two."""
    asked = clues.scene.questions
    entries = independent(clues.gap)
    if asked is None or not entries:
        return None
    parts = [part for part in asked.parts() if norm(part.gradients[clues.leaf]) > 0]
    best: tuple[float, float, Part] | None = None
    for part in parts:
        term = part.gradients[clues.leaf]
        ratio = _ratio(clues, term)
        if not ratio or not clues.explains(ratio * term):
            continue
        free = 0 if ratio in (_LOST, _FLIPPED) else 1
        closeness = clues.closeness(ratio * term)
        sure = likelihood(closeness, entries, free, len(parts))
        # Of like parts the last value is nearest to the result, and easiest to find.
        is_better = best is None or sure > best[0] + 1e-9
        is_like = best is not None and abs(sure - best[0]) <= 1e-9
        if is_better or (is_like and best and part.is_operand <= best[2].is_operand):
            best = sure, ratio, part
    if best is not None and best[0] >= 0.9:
        return _one(clues, *best)
    return _two(clues, parts) if entries > 1 else None


def _ratio(clues: Clues, term: np.ndarray) -> float:
    """Returns how much of a term is in the gap: what a usual slip leaves, or any."""
    ratio = coefficient(clues.gap, term)
    near = max(1e-6, 10 * clues.fit)
    return next((r for r in (_LOST, _FLIPPED) if abs(ratio - r) < near), ratio)


def _one(clues: Clues, sure: float, ratio: float, part: Part) -> Cause:
    if ratio == _LOST:
        return Cause(
            "missing term",
            f"it lacks exactly what flows through {part.words}, as if that were a "
            "constant",
            "add the term that comes from there: differentiate it as well",
            0.95 * sure,
        )
    if ratio == _FLIPPED:
        return Cause(
            "sign flipped in a term",
            f"what flows through {part.words} comes with its sign flipped, the rest "
            "is right",
            "negate that term",
            0.95 * sure,
        )
    rest = clues.closeness(ratio * part.gradients[clues.leaf])
    return Cause(
        "factor in a term",
        f"what flows through {part.words} comes {times(1 + ratio, rest)} times, the "
        "rest is right",
        f"multiply that term by {times(1 / (1 + ratio), rest)}",
        0.93 * sure,
    )


def _two(clues: Clues, parts: Sequence[Part]) -> Cause | None:
    """Two parts are wrong at once: a mean and a variance, or both ways of a square."""
    different: list[Part] = []
    for part in reversed(parts):
        term = part.gradients[clues.leaf]
        if not any(clues.fits(term, p.gradients[clues.leaf]) for p in different):
            different.append(part)
    different = different[:_MOST_IN_PAIRS]
    entries = independent(clues.gap)
    for i, one in enumerate(different):
        for other in different[i + 1 :]:
            terms = [part.gradients[clues.leaf] for part in (one, other)]
            ratios = _simple_ratios(clues.gap, terms)
            if ratios is None:
                continue
            term = ratios[0] * terms[0] + ratios[1] * terms[1]
            tries = len(_SIMPLE) ** 2 * len(different) ** 2
            sure = likelihood(clues.closeness(term), entries, 0, tries)
            if clues.explains(term) and sure >= 0.9:
                return _both(one, other, ratios, 0.92 * sure)
    return None


def _simple_ratios(
    gap: np.ndarray, terms: Sequence[np.ndarray]
) -> tuple[float, float] | None:
    """Returns the simple factors by which two terms make a gap up, if they do."""
    columns = np.stack([term.ravel() for term in terms], axis=1)
    if not (np.isfinite(columns).all() and np.isfinite(gap).all()):
        return None
    found = np.linalg.lstsq(columns, gap.ravel(), rcond=None)[0].real
    simple = np.asarray(_SIMPLE)
    nearest = [float(simple[np.argmin(np.abs(simple - ratio))]) for ratio in found]
    if max(abs(found - nearest)) > 1e-4:
        return None
    return nearest[0], nearest[1]


def _both(one: Part, other: Part, ratios: tuple[float, float], sure: float) -> Cause:
    if ratios == (-1.0, -1.0):
        return Cause(
            "missing term",
            f"it lacks exactly what flows through {other.words} and through "
            f"{one.words}, as if both were constants",
            "add the terms that come from there: differentiate them as well",
            sure,
        )
    return Cause(
        "factor in a term",
        f"what flows through {other.words} comes {1 + ratios[1]:g} times, and what "
        f"flows through {one.words} {1 + ratios[0]:g} times",
        "count each way through the function once: an argument that is used twice has "
        "two terms, which need not be alike",
        sure,
    )


# --- the parts --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """An equation, or one operand of it."""

    eqn: Eqn
    operand: int | None = None

    def __str__(self) -> str:
        line = shorten(jaxprs.call_site(self.eqn))
        at = f" ({line})" if line else ""
        name = f"`{self.eqn.primitive.name}`{at}"
        return name if self.operand is None else f"operand {self.operand} of {name}"


@jax.custom_jvp
def _faded(value: Any, scale: Any) -> Any:
    """Returns a value of which so much of the derivative is left."""
    return value


@_faded.defjvp
def _faded_jvp(primals: Any, tangents: Any) -> Any:
    (value, scale), (tangent, _) = primals, tangents
    return value, scale * tangent


class _Fading(Evaluator):
    """Lets less, or nothing, flow back through chosen places.

    Attributes:
      scales: How much flows back through each place: 1 for all of it.
      places: The numbers of the places, by the `id` of the equation and the operand.
    """

    scales: Any = None
    places: Mapping[tuple[int, int | None], int] = {}

    def fork(self, **changes: Any) -> Evaluator:
        """Returns an evaluator like this one, for a loop's body."""
        plain = super().fork(**changes)
        settings = {
            name: value
            for name, value in vars(plain).items()
            if name not in ("residual", "scales", "places")
        }
        return _fading(self.scales, self.places, **settings)

    def apply(self, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
        """Returns the results of one equation, faded where it is chosen."""
        operands = [
            self._fade(operand, (id(eqn), n)) for n, operand in enumerate(operands)
        ]
        results = super().apply(eqn, operands)
        return [self._fade(result, (id(eqn), None)) for result in results]

    def _fade(self, value: Any, place: tuple[int, int | None]) -> Any:
        if place not in self.places or not is_inexact(getattr(value, "dtype", None)):
            return value
        return _faded(value, self.scales[self.places[place]])


def _fading(scales: Any, places: Any, **settings: Any) -> _Fading:
    run = _Fading(**settings)
    run.scales, run.places = scales, places
    return run


def read_parts(case: Case) -> list[Part]:
    """Returns what flows through each place of a program; [] where it is too large."""
    places = _places(case)
    total = sum(np.size(value) for value in case.point.moving)
    if not 0 < len(places) <= _MOST_PLACES or total > _MOST_ENTRIES:
        return []
    program = case.program
    numbers = {(id(p.eqn), p.operand): n for n, p in enumerate(places)}
    settings = {
        "hoisted": {
            tracer: widen(value)
            for tracer, value in program.closed_over_values(case.point).items()
        },
        "solver_only": frozenset(dataflow.solver_only_stops(program.jaxpr)),
    }

    def gradients(moving: Any, held: Any, seed: Any, rows: Any) -> Any:
        def one(scales: Any) -> Values:
            run = _fading(scales, numbers, stops=Recorder(), **settings)
            return derivative(program.mathematics, run, moving, held, seed)[1]

        return jax.lax.map(one, rows)

    rows = np.vstack([np.ones(len(places)), 1 - np.eye(len(places))])
    arguments = [*case.bench.lifted_arguments(case.point), rows]
    compiled = execution.lifted(gradients, arguments)
    found = execution.to_host(compiled(*arguments))
    return [
        Part(
            str(place),
            [each[0] - each[1 + n] for each in found],
            place.operand is not None,
        )
        for n, place in enumerate(places)
    ]


def _places(case: Case) -> list[_Place]:
    found: list[_Place] = []
    seen: set[int] = set()
    for eqn in jaxprs.walk(case.program.jaxpr):
        name = eqn.primitive.name
        if id(eqn) in seen or name in _PLAIN or any(jaxprs.subprograms(eqn)):
            continue
        seen.add(id(eqn))
        if not any(map(jaxprs.is_floating, eqn.outvars)):
            continue
        operands = [
            n
            for n, atom in enumerate(eqn.invars)
            if jaxprs.is_floating(atom) and not jaxprs.is_literal(atom)
        ]
        if len(operands) > 1:
            found += [_Place(eqn, n) for n in operands]
        found.append(_Place(eqn))
    return found
