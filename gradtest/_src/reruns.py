"""Whether a rule gives the same when it runs again, and when it runs without jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import diagnose, execution, jaxprs
from gradtest._src.agreement import agreed
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Entry, Finding, Gap, Verdict

# Operation by operation XLA rounds more often than in one program.
_EAGER_FACTOR = 4
# A rule of more operations takes longer to run one by one than that is worth.
_MOST_OPERATIONS = 400


def repeated(case: Case) -> Finding:
    """Runs a rule twice in its own precision: the same bits should come out."""
    lifted = case.readings.claimed
    once, again = (case.bench.read_working(case.point, lifted)[1] for _ in range(2))
    pairs = list(zip(once, again, strict=True))
    if all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
        return agreed(case, "repeated run", notes=("bit for bit",))
    level = max(
        float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) or 1)) for a, b in pairs
    )
    allowed = 64 * case.working_eps
    if level <= allowed:
        note = f"up to {level:.0e}"
        return agreed(case, "repeated run", size=level, allowed=allowed, notes=(note,))
    return agreed(
        case,
        "repeated run",
        verdict=Verdict.FAIL,
        size=level,
        allowed=allowed,
        cause=diagnose.departs("repeat", "run again"),
    )


def discrete(case: Case, function: Callable[..., list[Any]]) -> list[Finding]:
    """Compares the integer and bool results of a rule's fwd with its function's.

    They have no derivative, so nothing else looks at them.

    Args:
      case: The rule as a program.
      function: The rule's call, of the arguments of that program.
    """
    moving = [jnp.asarray(value) for value in case.point.moving]
    held = case.program.held(case.point)

    def results(*xs: Any) -> list[Any]:
        return function(*case.program.inputs.arguments(xs, held))

    if not any(map(_is_discrete, jax.eval_shape(results, *moving))):
        return []
    with execution.working_precision():
        plain = results(*moving)
        by_rule = jax.vjp(results, *moving)[0]
    for k, (one, other) in enumerate(zip(by_rule, plain, strict=True)):
        if _is_discrete(other) and not np.array_equal(one, other):
            index = tuple(int(i) for i in np.argwhere(np.asarray(one != other))[0])
            return [
                agreed(
                    case,
                    "value",
                    name=f"result[{k}]",
                    verdict=Verdict.FAIL,
                    gap=Gap.VALUE,
                    size=np.inf,
                    entry=Entry(index, float(one[index]), float(other[index])),
                    cause=diagnose.FORWARD_VALUE,
                )
            ]
    return []


def _is_discrete(value: Any) -> bool:
    kind = value.dtype
    return bool(jnp.issubdtype(kind, jnp.integer)) or kind == np.bool_


def eager(case: Case, findings: list[Finding]) -> list[Finding]:
    """Runs a rule without jit: it may look at its values, and go another way.

    Args:
      case: The rule as a program.
      findings: Those on its leaves, which know how far working precision may be off.
    """
    if sum(1 for _ in jaxprs.walk(case.claim.jaxpr)) > _MOST_OPERATIONS:
        return []
    moving = [jnp.asarray(value) for value in case.point.moving]
    held = case.program.held(case.point)
    try:
        with execution.working_precision():
            _, pull = jax.vjp(lambda *xs: case.program.call(xs, held), *moving)
            pulled = pull([jnp.asarray(value) for value in case.seed])
    except Exception as error:  # whatever the rule does with concrete values
        cause = Cause(
            "raises without jit",
            f"run without jit it raises {type(error).__name__}: {str(error)[:200]}",
            "write the rule so that it takes concrete values as well as traced ones",
        )
        return [agreed(case, "eager", verdict=Verdict.FAIL, cause=cause)]
    allowances = {
        f.name: f.rounding[1] for f in findings if f.rounding and f.order == 1
    }
    largest = max(map(norm, case.readings.claimed), default=0.0)
    for leaf, result, lifted in zip(
        case.leaves, execution.to_host(list(pulled)), case.readings.claimed, strict=True
    ):
        scale = norm(lifted) or largest
        allowed = _EAGER_FACTOR * allowances.get(leaf.name, 64 * case.working_eps)
        gap = norm(result - lifted)
        if not gap <= allowed * scale:
            return [
                agreed(
                    case,
                    "eager",
                    name=leaf.name,
                    verdict=Verdict.FAIL,
                    size=gap / scale if scale else np.inf,
                    allowed=allowed,
                    cause=diagnose.departs("eager", "run without jit"),
                )
            ]
    return [agreed(case, "eager")]
