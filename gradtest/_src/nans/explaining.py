"""Adds to findings of gradients that are not finite what spoils them, and mends them.

Only after a failure: a check that passes pays nothing for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.findings import Finding, Verdict
from gradtest._src.inputs import Point
from gradtest._src.nans.search import Search
from gradtest._src.nans.wording import OVERFLOW, told
from gradtest._src.program import Program

CAUSES = ("NaN gradient", "infinite gradient", OVERFLOW)
# So many leaves are looked into.
_MOST_LEAVES = 3
_log = logging.getLogger("gradtest")


def explained(
    findings: Sequence[Finding], program: Program, point: Point, seed: Sequence[Any]
) -> list[Finding]:
    """Returns findings with the equation that spoils a gradient, and what mends it.

    Args:
      findings: Those of one point; others than gradients that are not finite stay.
      program: The function, of which JAX's own derivative is not finite.
      point: Its arguments.
      seed: The cotangents of its results.
    """
    places = {leaf.name: i for i, leaf in enumerate(program.inputs.moving)}
    chosen = [f for f in findings if _is_asked(f) and f.name in places]
    if not chosen or program.order > 1 or jaxprs.current_job() is not None:
        return list(findings)
    search = Search(program.jaxpr, point, program.held(point), seed)
    found: dict[int, Finding] = {}
    for finding in chosen[:_MOST_LEAVES]:
        entry = finding.entry
        index = entry.index if entry is not None and not entry.of else None
        try:
            trail = search.trail(places[finding.name], index)
        except Exception:  # a verdict is worth more than its explanation
            _log.debug("no equation was found", exc_info=True)
            break
        if trail is not None:
            found[id(finding)] = told(finding, trail)
    return [found.get(id(finding), finding) for finding in findings]


def _is_asked(finding: Finding) -> bool:
    cause = finding.cause
    return (
        finding.verdict is Verdict.FAIL
        and finding.mode == "rev"
        and cause is not None
        and cause.name in CAUSES
    )
