"""Causes that are looked for closely only once a finding is known to stay a failure.

A gap may yet prove to be an approximation, or JAX's convention at a kink: then nothing
has to be explained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from gradtest._src.findings import Cause, Finding, Gap, Verdict

# By mode and name: the cause seen at first sight, and how to look again.
Later = dict[tuple[str, str], tuple[Cause, Callable[[], tuple[Cause, ...]]]]


def explain_leaves(later: Later, findings: Sequence[Finding]) -> list[Finding]:
    """Completes findings that stay failures with the causes that fit best.

    Args:
      later: What was put off where they were judged.
      findings: The findings; those with a cause of another kind keep it.
    """
    return [_explained(finding, later) for finding in findings]


def _explained(finding: Finding, later: Later) -> Finding:
    seen, look = later.get((finding.mode, finding.name), (None, None))
    stays = finding.verdict is Verdict.FAIL and finding.gap is Gap.FORMULA
    if look is None or not stays or finding.cause != seen:
        return finding
    cause, *others = look()
    return dataclasses.replace(finding, cause=cause, other_causes=tuple(others))
