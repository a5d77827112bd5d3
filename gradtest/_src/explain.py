"""What a failure leaves to be looked at: its line of source, its arrays, its inputs.

Nothing of this runs for a check that passes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.case import Case
from gradtest._src.exhibits import exhibits_of, inputs_at
from gradtest._src.findings import (
    Cause,
    Exhibit,
    Finding,
    Gap,
    Line,
    Verdict,
    worst,
)
from gradtest._src.jaxprs import RuleSource
from gradtest._src.localise.branching import branching_line
from gradtest._src.localise.lines import guilty_line
from gradtest._src.localise.naming import is_proved, return_line
from gradtest._src.nans import explaining

# A cause less likely than this gives way to a line that is proved.
_UNSURE = 0.6
_MOST_OTHERS = 3
# Causes that say no more than that a gradient is wrong.
_UNKNOWN = ("different", "wrong slope")
_log = logging.getLogger("gradtest")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The findings of a check, and what there is to be looked at.

    Attributes:
      findings: Those that were given, with lines of source where one was found.
      exhibits: Arrays of the leaves that did not pass.
      inputs: The arguments at the point of the trial that did not pass, by leaf.
    """

    findings: list[Finding]
    exhibits: tuple[Exhibit, ...] = ()
    inputs: tuple[tuple[str, Any], ...] = ()


def explained(
    findings: Sequence[Finding],
    cases: Mapping[int, Case],
    source: RuleSource | None = None,
) -> Explanation:
    """Explains the findings of a check that did not pass; others stay as they are.

    Args:
      findings: What was found.
      cases: The first case of each order of derivative that did not pass.
      source: Where the custom rule under test was written, if it is one.
    """
    open_orders = [order for order in sorted(cases) if _of_order(findings, order)]
    if not open_orders:
        return Explanation(list(findings))
    case = cases[open_orders[0]]
    wrong = _of_order(findings, case.program.order)
    with np.errstate(all="ignore"):
        line = None
        if worst(f.verdict for f in wrong) is Verdict.FAIL:
            line = _line(case, wrong, source)
        lined = [
            _with_line(f, line) if f in wrong and f.verdict is Verdict.FAIL else f
            for f in findings
        ]
        return Explanation(
            _with_equations(case, lined),
            exhibits_of(case, wrong),
            inputs_at(case.program.inputs, case.point),
        )


def _with_equations(case: Case, findings: list[Finding]) -> list[Finding]:
    """Adds the equations that spoil a gradient, where JAX's own is not finite."""
    claim = case.claim
    if not claim.is_autodiff or claim.is_apart or claim.devices or claim.mode != "rev":
        return findings
    # The case is that of the point which gave the first trouble.
    hazard = next(f.hazard for f in findings if f.verdict is not Verdict.PASS)
    here = [i for i, finding in enumerate(findings) if finding.hazard == hazard]
    told = explaining.explained(
        [findings[i] for i in here], case.program, case.point, case.seed
    )
    by_place = dict(zip(here, told, strict=True))
    return [by_place.get(i, finding) for i, finding in enumerate(findings)]


def _with_line(finding: Finding, line: Line | None) -> Finding:
    """Adds the line; where nothing else is known, it is the cause."""
    cause = finding.cause
    if line is None or not is_proved(line) or finding.gap is not Gap.FORMULA:
        return dataclasses.replace(finding, line=line)
    others = finding.other_causes
    known = 0.0 if cause is None or cause.name in _UNKNOWN else cause.likelihood
    if known < min(line.likelihood, _UNSURE):
        others = (cause, *others) if known and cause else others
        code = f" (`{line.code}`)" if line.code else ""
        cause = Cause(
            "one line wrong",
            f"one change of line {line.number} makes up for all of it: {line.says}",
            f"change line {line.number}{code} in this way, if the mathematics agrees",
            line.likelihood,
        )
    return dataclasses.replace(
        finding, cause=cause, line=line, other_causes=others[:_MOST_OTHERS]
    )


def with_branches(
    findings: Sequence[Finding],
    case: Case | None,
    source: RuleSource,
    renew: Callable[[], None],
) -> list[Finding]:
    """Adds the lines at which a rule goes another way, where one way of it is wrong.

    Args:
      findings: Those on one rule.
      case: The rule as a program; None where it was not run.
      source: Where the rule was written.
      renew: Makes the rule's call new, before it is traced in another pattern.
    """

    def with_line(finding: Finding) -> Finding:
        departs = finding.verdict is Verdict.FAIL and finding.gap is Gap.AGREEMENT
        if case is None or finding.line is not None or not departs:
            return finding
        try:
            line = branching_line(case, finding.check, source, renew)
        except Exception:
            _log.debug("no line of source was found", exc_info=True)
            line = None
        return dataclasses.replace(finding, line=line or return_line(source))

    if jaxprs.current_job() is not None:
        return list(findings)
    return [with_line(finding) for finding in findings]


def _line(
    case: Case, findings: Sequence[Finding], source: RuleSource | None
) -> Line | None:
    if jaxprs.current_job() is not None:
        return None  # not every process need have failed, nor come here
    try:
        return guilty_line(case, findings, source)
    except Exception:  # a verdict is worth more than its explanation
        _log.debug("no line of source was found", exc_info=True)
        return None


def _of_order(findings: Sequence[Finding], order: int) -> list[Finding]:
    return [
        finding
        for finding in findings
        if finding.order == order and finding.verdict is not Verdict.PASS
    ]
