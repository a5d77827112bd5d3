"""What is said of the equation that spoils a gradient, and of what mends it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.findings import Cause, Finding, Line
from gradtest._src.jaxprs import Place
from gradtest._src.lifting import is_inexact
from gradtest._src.localise.naming import line_at
from gradtest._src.nans.backward import Index, entry_of, is_finite
from gradtest._src.nans.search import Trail
from gradtest._src.nans.singular import SINGULAR
from gradtest._src.nans.tape import Event

OVERFLOW = "overflow in working precision"
_SURE = 0.95
_MADE_HERE = "the first number of the backward pass that is not finite is made here"
_VERIFIED = "verified: with it the value is the same and the gradient finite"
# What makes a derivative NaN where all operands are finite, of equations without guard.
_SINGULAR_AT = {
    "eigh": "equal eigenvalues",
    "eig": "equal eigenvalues",
    "svd": "equal or zero singular values",
    "qr": "a matrix without full rank",
    "householder_product": "a matrix without full rank",
    "cholesky": "a singular matrix",
    "lu": "a singular matrix",
    "triangular_solve": "a singular matrix",
}


def told(finding: Finding, trail: Trail) -> Finding:
    """Returns a finding with the equation, its line, and what mends it."""
    cause = finding.cause
    assert cause is not None
    place = trail.inside[0].line if trail.inside else None
    line = line_at(place or trail.origin.event.line, _MADE_HERE, _SURE)
    if line is None or _is_same(line, finding.line):
        line = finding.line
    remedy = _remedy(trail)
    if cause.name == OVERFLOW and not trail.remedies:
        remedy = cause.remedy
    alone = "" if trail.wide or cause.name == OVERFLOW else ", in its own dtype alone"
    says = f"{cause.says}: {_evidence(trail)}{alone}"
    return dataclasses.replace(
        finding, line=line, cause=Cause(cause.name, says, remedy, _SURE)
    )


def _is_same(line: Line, other: Line | None) -> bool:
    return other is not None and (line.file, line.number) == (other.file, other.number)


def _evidence(trail: Trail) -> str:
    """Says which equation makes the first number that is not finite, and how."""
    parts = [*(_inside_rule(trail) if trail.inside else _of_equation(trail))]
    if trail.is_infinite:
        parts.append("where the function's own slope is infinite")
    return ", ".join(parts)


def _inside_rule(trail: Trail) -> list[str]:
    assert trail.inside is not None
    eqn: Any = trail.origin.event.eqn
    name = jaxprs.read_rule(eqn).name
    return [f"inside of the rule of `{name}`, {_made(*trail.inside)}"]


def _of_equation(trail: Trail) -> list[str]:
    origin = trail.origin
    event, index = origin.root()
    made = _made(event, index)
    if event is not origin.event:
        other = _named(origin.event, event.line)
        by_zero = "multiplies that by 0: NaN" if origin.is_at_zero else "reads that"
        return [made, f"and the derivative of {other} {by_zero}"]
    if origin.turned is None or event.name in _SINGULAR_AT:
        return [made]
    if origin.turned is event:
        if not origin.is_at_zero:
            return [made]
        spoils = "nan" if _gives_nan(event, index) else "inf"
        return [made, f"and 0 * {spoils} is NaN in its derivative"]
    return [made, f"which {_named(origin.turned, event.line)} turns to NaN"]


def _made(event: Event, index: Index) -> str:
    """Says what an equation takes, and what becomes of it."""
    name, value = _named(event, None), _taken(event, index)
    at = f" at [{', '.join(map(str, index))}]" if index else ""
    if event.name in _SINGULAR_AT:
        return f"{name} has no finite derivative for {_SINGULAR_AT[event.name]}"
    if value is None:
        return f"{name} makes it"
    takes = "divides by" if event.name in ("div", "rem") else "takes"
    given = _given(event, index)
    if not is_finite(given):
        shown = f"{given.item():g}" if given.ndim == 0 else "what is not finite"
        return f"{name} {takes} {value}{at} and gives {shown}"
    return f"{name} {takes} {value}{at} and has no finite slope there"


def _given(event: Event, index: Index) -> np.ndarray:
    """Returns what an equation gives at an entry; all of it where there is none."""
    result = event.results[0].value
    entry = entry_of(result, index)
    return np.asarray(result) if entry is None else entry


def _gives_nan(event: Event, index: Index) -> bool:
    return bool(np.isnan(_given(event, index)).any())


def _taken(event: Event, index: Index) -> str | None:
    """Returns what an equation takes at an entry, as a number."""
    known = SINGULAR.get(event.name)
    operand = known[0].operand if known else 0
    if operand >= len(event.operands):
        return None
    value = event.operands[operand].value
    if not is_inexact(getattr(value, "dtype", None)):
        return None
    entry = entry_of(value, index)
    found = np.asarray(value) if entry is None else entry
    return f"{found.item():.6g}" if found.ndim == 0 else None


def _named(event: Event, beside: Place | None) -> str:
    """Names an equation and its line, where that is another than one told."""
    line = event.line
    if line is None or (beside is not None and beside.number == line.number):
        return f"`{event.name}`"
    return f"`{event.name}` (line {line.number})"


def _remedy(trail: Trail) -> str:
    """Says what to write in place of it, or that nothing proved right."""
    if trail.remedies:
        forms = dict.fromkeys(f"{each.name}: {each.code}" for each in trail.remedies)
        gives = ""
        if trail.is_infinite and trail.given is not None:
            gives = f"; it gives {trail.given:.3g} where the slope is infinite"
        return f"{'; and '.join(forms)} ({_VERIFIED}{gives})"
    event = trail.inside[0] if trail.inside else trail.origin.root()[0]
    rule: Any = trail.origin.event.eqn
    if trail.inside and jaxprs.is_users(jaxprs.read_rule(rule)):
        return (
            f"give the rule a case of its own for what `{event.name}` takes there: "
            "guard its operand, not only its result"
        )
    return (
        f"see what `{event.name}` takes there: no guarded form of it was found that "
        "keeps the value and fits the function's slope"
    )
