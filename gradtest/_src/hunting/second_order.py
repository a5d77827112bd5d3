"""Second derivatives that nobody asked for: which of them count as wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradtest._src.findings import Finding, Gap

# They are plainly wrong where they are off by so much.
_PLAIN = 1e-3


def plain(found: Iterable[Finding], is_moderate: bool) -> list[Finding]:
    """Leaves out what is off in second order unless it is plainly wrong.

    Few programs take second derivatives: nobody asked for them.

    Args:
      found: What is wrong, in any order.
      is_moderate: Whether no entry of the point is large.
    """
    found = list(found)
    clear = [f for f in found if f.order > 1 and _is_plain(f)]
    is_wrong = is_moderate and any(f.mode == "rev" for f in clear)
    kept = clear if is_wrong else []
    return [f for f in found if f.order == 1 or f in kept]


def _is_plain(finding: Finding) -> bool:
    """Whether a finding is far off, and in an entry that can be named."""
    if finding.gap is not Gap.FORMULA or not _PLAIN <= finding.size < math.inf:
        return False
    entry = finding.entry
    if entry is None or entry.true is None or not math.isfinite(abs(entry.true)):
        return True
    return abs(entry.claimed - entry.true) > _PLAIN * abs(entry.true)
