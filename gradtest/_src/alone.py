"""The rules of a program, each audited by itself at the values that reach it."""

from __future__ import annotations

from gradtest._src import jaxprs, rules
from gradtest._src.audit import Audit, audit_rule
from gradtest._src.findings import Verdict, worst
from gradtest._src.inputs import Point
from gradtest._src.options import Options
from gradtest._src.program import Program
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rules import RuleUse

# So many rules are audited, users' own first: counted, not timed, so that every machine
# finds the same.
_MOST_RULES = 12

Alone = list[tuple[RuleUse, Audit]]


def audited(
    program: Program, point: Point, options: Options, anew: TracedAnew
) -> Alone:
    """Audits the rules that a program calls; none where it can't be run in steps."""
    try:
        uses = rules.find_rules(program, point, None)
    except Exception:  # what can't be run equation by equation
        return []
    uses.sort(key=lambda use: not jaxprs.is_users(use.source))
    return [(use, audit_rule(use, options, anew)) for use in uses[:_MOST_RULES]]


def right(found: Alone) -> frozenset[str]:
    """Returns the identities of the rules that passed wherever they were audited.

    To second order: what was not judged is not right.
    """
    passed: dict[str, bool] = {}
    for use, audit in found:
        verdict = worst(finding.verdict for finding in audit.findings)
        is_right = verdict is Verdict.PASS and audit.has_second_order
        rule = use.source.identity
        passed[rule] = passed.get(rule, True) and is_right
    return frozenset(rule for rule, is_right in passed.items() if is_right)
