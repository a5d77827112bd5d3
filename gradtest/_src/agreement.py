"""Whether a rule gives one derivative in every way that JAX may run it.

Each way is traced by itself, so that what a rule raises is told of that way alone;
then all of them are evaluated in float64 in one program and compared with the rule's
own derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import diagnose, execution, seeding
from gradtest._src.case import Case, norm
from gradtest._src.claims import refuse_strays
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.inputs import Point
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.program import Values
from gradtest._src.ways import (
    ALONG,
    BY_DIFFERENCES,
    EXAMPLES,
    WAYS,
    Claimed,
    Examples,
    Way,
    is_linearized,
    several,
)

# Float64 rounds the same sums in another order.
_FLOOR = 1e-12


def agreed(case: Case, check: str, **fields: Any) -> Finding:
    """Returns the finding on a check that a rule passed, but for the fields given."""
    passed = Finding(
        "all arguments",
        (),
        "",
        Verdict.PASS,
        Gap.AGREEMENT,
        case.claim.mode,
        trial=case.trial,
        allowed=case.rtol,
        judged_by="the rule itself",
        check=check,
    )
    return dataclasses.replace(passed, **fields)


def judge_ways(
    case: Case,
    points: Sequence[Point],
    renew: Callable[[], None],
    *,
    only: str | None = None,
    order: int = 1,
) -> tuple[list[Finding], list[str]]:
    """Compares every way to run a rule with its own derivative.

    Args:
      case: The rule as a program, its reverse-mode claim already judged.
      points: Values that reach the rule, the case's own first.
      renew: Prepares the rule for being differentiated in another way.
      only: The one check that is wanted; None for all.
      order: 2 for the derivative by the cotangent as well.

    Returns:
      One finding for each check, and the ways that JAX does not offer here.
    """
    if case.program.closed_over:
        points = points[:1]  # what the rule closes over has its values there
    examples = _examples(case, points)
    left_out = {BY_DIFFERENCES} - {only}
    if only is None and (order == 1 or case.program.as_functions):
        left_out.add(ALONG)
    ways, findings, unsupported = _trace_ways(case, examples, renew, only, left_out)
    raised = {finding.check for finding in findings}
    compared = _compare(case, examples, ways, only)
    findings += [finding for finding in compared if finding.check not in raised]
    return findings, unsupported


def _examples(case: Case, points: Sequence[Point]) -> Examples:
    """Stacks points; where there are too few, others near the first stand in."""
    moving, held, seeds = [], [], []
    for k in range(EXAMPLES):
        point = points[k % len(points)]
        # Smaller, so that zeros and signs stay and no domain is left upwards.
        scale = 1 - k / 16 if k >= len(points) else 1
        moving.append([(widen(v) * scale).astype(v.dtype) for v in point.moving])
        held.append(list(case.program.held(point)))
        seeds.append(case.seed if k == 0 else _another_seed(case, k))
    return Examples(_stack(moving), _stack(held), _stack(seeds))


def _another_seed(case: Case, k: int) -> Values:
    return [
        seeding.normal(
            seeding.generator(case.key, "another way", k, i), value.shape, value.dtype
        )
        for i, value in enumerate(case.seed)
    ]


def _stack(rows: list[list[Any]]) -> list[Any]:
    columns = zip(*rows, strict=True)
    return [jnp.stack([jnp.asarray(value) for value in column]) for column in columns]


def _trace_ways(
    case: Case,
    examples: Examples,
    renew: Callable[[], None],
    only: str | None,
    left_out: Collection[str],
) -> tuple[list[Way], list[Finding], list[str]]:
    ways: list[Way] = []
    findings: list[Finding] = []
    unsupported: list[str] = []
    arguments = (examples.moving, examples.held, examples.seed)
    for check, says, make, wanted in WAYS:
        if only not in (None, check) or check in left_out:
            continue
        if is_linearized(make) and case.bench.forward is None:
            continue
        try:
            with execution.user_code():
                for items, function, expected in several(case, make, wanted):
                    renew()
                    jaxpr = jax.make_jaxpr(function)(*arguments)
                    refuse_strays(jaxpr, case.program)
                    ways.append(Way(check, says, items, jaxpr, expected))
        except NotImplementedError as error:
            unsupported.append(f"{check}: {_first_line(error)}")
        except Exception as error:  # whatever the rule raises
            if check in (ALONG, BY_DIFFERENCES):  # few programs differentiate twice
                unsupported.append(f"{check}: {_first_line(error)}")
                continue
            findings.append(_raised(case, check, says, error))
    return ways, findings, unsupported


_LINEAR = (
    ("linear", "for 2.5 times one cotangent less another"),
    ("zero cotangent", "for a cotangent of zeros"),
)


def _linear(pulled: Claimed, examples: Examples) -> list[tuple[Values, Values]]:
    """Gradients for combined cotangents, and the same combinations of gradients."""
    xs, held, seed = examples.one(0)
    other = examples.one(1)[2]

    def combined(one: Values, another: Values) -> Values:
        return [2.5 * a - b for a, b in zip(one, another, strict=True)]

    one, another = pulled(xs, held, seed), pulled(xs, held, other)
    zero = pulled(xs, held, [0 * value for value in seed])
    return [
        (pulled(xs, held, combined(seed, other)), combined(one, another)),
        (zero, [0 * value for value in one]),
    ]


# --- the comparison -----------------------------------------------------------------


def _compare(
    case: Case, examples: Examples, ways: list[Way], only: str | None
) -> list[Finding]:
    count, claim = len(case.leaves), case.claim.jaxpr
    known = {
        tracer: widen(value)
        for tracer, value in case.program.closed_over_values(case.point).items()
    }
    # A declared product, such as a clipping, need not be linear.
    is_linear = case.program.as_functions is None and only is None

    def both(moving: Any, held: Any, seed: Any) -> Any:
        run, at = Evaluator(hoisted=known), Examples(moving, held, seed)

        def claimed(xs: Any, hs: Any, seeds: Any) -> Values:
            return run(claim, [*xs, *hs, *seeds])

        def pulled(xs: Any, hs: Any, seeds: Any) -> Values:
            return claimed(xs, hs, seeds)[-count:]

        pairs = [
            (run(way.jaxpr, [*moving, *held, *seed]), way.wanted(claimed, at))
            for way in ways
        ]
        return [*pairs, *(_linear(pulled, at) if is_linear else [])]

    parts = (examples.moving, examples.held, examples.seed)
    arguments = [[execution.at_home(widen(value)) for value in part] for part in parts]
    pairs = execution.to_host(execution.lifted(both, arguments)(*arguments))
    labels = [(way.check, way.says, way.names) for way in ways]
    names = tuple(leaf.name for leaf in case.leaves)
    labels += [(check, says, names) for check, says in _LINEAR if is_linear]
    found: dict[str, Finding] = {}
    for label, (results, wanted) in zip(labels, pairs, strict=True):
        finding = _judge(case, label, results, wanted)
        if finding.check not in found or finding.verdict is Verdict.FAIL:
            found[finding.check] = finding
    return list(found.values())


def _judge(
    case: Case, label: tuple[str, str, tuple[str, ...]], results: Values, wanted: Values
) -> Finding:
    check, says, names = label
    largest = max((norm(np.nan_to_num(w)) for w in wanted), default=0.0)
    for name, found, truth in zip(names, results, wanted, strict=True):
        alike = (found == truth) | (np.isnan(found) & np.isnan(truth))
        same = alike & ~np.isfinite(truth)
        found, truth = np.where(same, 0, found), np.where(same, 0, truth)
        gap = leaf_gap(found, truth, rtol=case.rtol, floor=_FLOOR * largest)
        if gap.is_exceeded or not np.isfinite(found - truth).all():
            return agreed(
                case,
                check,
                verdict=Verdict.FAIL,
                name=name,
                size=gap.size,
                allowed=gap.allowed,
                entry=gap.entry,
                cause=diagnose.departs(check, says),
            )
    return agreed(case, check)


def _raised(case: Case, check: str, says: str, error: Exception) -> Finding:
    cause = Cause(
        f"raises under {check}",
        f"{says} it raises {type(error).__name__}: {_first_line(error)}",
        "write the rule for traced values of any batch: no Python branches on values, "
        "nothing kept between calls",
    )
    return agreed(case, check, verdict=Verdict.FAIL, cause=cause)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
