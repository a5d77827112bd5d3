"""The audit of one broken rule without its explanation, which takes most of its time.

What it refuses, `assert_custom_rules_match` refuses as well: it judges as that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import session
from gradtest._src.findings import Finding, Verdict
from gradtest._src.options import Options
from gradtest._src.power.subjects import Subject
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rule_check import RuleCheck
from gradtest._src.rules import RuleUse


def refused(
    uses: Sequence[RuleUse],
    anew: TracedAnew,
    options: Mapping[str, Any],
    subject: Subject,
    *,
    second_order: bool,
) -> str:
    """Returns what an audit finds wrong with a broken rule; empty if nothing.

    Args:
      uses: Its calls in the broken program.
      anew: Traces that program again.
      options: Those of `assert_custom_rules_match`.
      subject: The rule.
      second_order: Whether it is right but for its second derivative.
    """
    fields = {field.name for field in dataclasses.fields(Options)}
    chosen = {name: value for name, value in options.items() if name in fields}
    order = options.get("order", 2) if second_order else 1
    here = {"order": order, "exclude": (), "has_aux": False, "hazards": False}
    plain = Options(**session.with_defaults({**chosen, **here, "argnums": None}))
    with jax.transfer_guard("allow"), np.errstate(all="ignore"):
        for use in uses:
            for finding in RuleCheck(use, plain, anew).findings():
                if finding.verdict is Verdict.FAIL:
                    return _told(subject, finding)
    return ""


def _told(subject: Subject, finding: Finding) -> str:
    source, cause = subject.source, finding.cause
    why = f": {cause.says}" if cause is not None else ""
    return f"the {source.kind} rule of {source.name} is wrong at {finding.name}{why}"
