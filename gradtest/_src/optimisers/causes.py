"""Why an update differs from its reference: what is tried, the likelier first."""

from __future__ import annotations

import dataclasses

from gradtest._src.diagnosis.table import ranked
from gradtest._src.findings import Cause
from gradtest._src.optimisers import carried, factors, sizes, terms
from gradtest._src.optimisers.wrong import Wrong

# The first that is sure ends the search; what needs another program comes later.
_LOOKS = (
    terms.none_at_all,
    factors.bias_correction,
    terms.weight_decay,
    carried.fresh_state,
    terms.at_another_size,
    carried.counters,
    sizes.by_size,
    factors.one_factor,
    carried.other_numbers,
    carried.stuck,
    terms.added_terms,
    terms.as_any_gradient,
)


# Where one of these is found, a factor of a single step tells no more.
_FACTORS = frozenset(
    ["threshold", "factor by size", "factor by step", "constant factor"]
)


def causes_of(wrong: Wrong) -> tuple[Cause, ...]:
    """Returns the causes that fit, the likeliest first; at least one."""
    found: list[Cause] = []
    for look in _LOOKS:
        if look is terms.as_any_gradient and _FACTORS & {c.name for c in found}:
            continue
        try:
            found += look(wrong)
        except Exception:  # a diagnosis must never hide the failure that it explains
            continue
        if any(cause.likelihood >= 0.9 for cause in found):
            break
    when = _when(wrong)
    told = ranked(found) or (_unexplained(wrong),)
    return tuple(dataclasses.replace(c, says=f"{when}: {c.says}") for c in told)


def _when(wrong: Wrong) -> str:
    """Says what the first wrong step tells by itself."""
    at = f" {wrong.run.says}" if wrong.run.says else ""
    if wrong.step:
        right = "step 1 is" if wrong.step == 1 else f"steps 1 to {wrong.step} are"
        return f"{right} right, step {wrong.step + 1} is wrong{at}"
    return f"wrong from the first step on{at}"


def _unexplained(wrong: Wrong) -> Cause:
    if wrong.step:
        return Cause(
            "state differs",
            "the formula of one step holds, what is kept between steps differs",
            "compare how moments and counters go from one step to the next",
            0.4,
        )
    return Cause(
        "formula differs",
        "no factor, term or counter explains it",
        "compare the formula of one step, term by term",
        0.1,
    )
