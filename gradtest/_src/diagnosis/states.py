"""Causes that a state of the check itself gives: kinks, noise, ways of running."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gradtest._src.diagnosis.clues import Scene
from gradtest._src.diagnosis.conditions import where_in_words
from gradtest._src.diagnosis.modes import rounded_to
from gradtest._src.diagnosis.patterns import ZERO
from gradtest._src.differences import Slope
from gradtest._src.findings import Cause

KINK = Cause(
    "kink",
    "the function has a kink here, and along a random direction its sides can't be "
    "told apart from a mistake",
    "move the point off the kink (zeros, ties) or check its entries one at a time",
)
TIES = Cause(
    "ties counted together",
    "each tied entry alone may carry the gradient, but together they carry more, or "
    "less, than the function's slope when all of them move",
    "give the gradient to one of the tied entries, or share it among them",
)
LOOSE_SOLVER = Cause(
    "approximate value",
    "the derivative fits the value's definition but not its computed values: a loop "
    "in the program stops before the value is settled",
    "tighten the loop's tolerance, then check again",
)
FORWARD_VALUE = Cause(
    "forward value differs",
    "the rule's forward pass returns another value than the function it differentiates",
    "compute the same expression in the rule's fwd (or jvp) as in the function",
)
# Of a function that differentiates another one itself.
INNER_VALUE = Cause(
    "wrong derivative inside",
    "the function differentiates through a custom rule, and returns another value than "
    "with the derivative of the rule's own function",
    "audit the rules of what it differentiates: assert_custom_rules_match",
)
_DOWNCAST = Cause(
    "downcast",
    "the formula is right, but the rule computes in half precision what the function "
    "computes in full",
    "look for a cast to bfloat16 or float16 in the rule: compute in the dtype of the "
    "argument, and cast at the end at most",
    0.95,
)
SAMPLER = Cause(
    "sampler",
    "a random sampler (gamma, beta, Dirichlet, Student's t) depends on what is "
    "differentiated: its derivative is the distribution's, by design, and no "
    "difference of samples shows it",
    "hold the sampler's parameters, or check what is computed from the sample alone",
)
FAINT = Cause(
    "too faint",
    "the leaf adds so little to the value that rounding hides what it does, and there "
    "is no rule-free derivative to ask",
    "check the part of the function that depends on this leaf by itself",
)
OFF_BRANCH = Cause(
    "off the branch",
    "the function has a branch for this one point, with its value and without its "
    "derivative: there is no second derivative to compare with",
    "move the point off the value that the function treats apart, as in `where(x == 0`",
)
IMPURE = Cause(
    "impure function",
    "the function gives other results each time it is traced: it draws or reads "
    "something that is no argument",
    "pass random numbers, keys and data as arguments: then every trace sees the same",
)


def not_linear(factor: float) -> Cause:
    """Names a rule that is right for the cotangent 1 alone."""
    return Cause(
        "not linear in the cotangent",
        f"with the cotangent {factor:g} in place of 1 the result is not {factor:g} "
        "times as large",
        "multiply every term that the rule returns by its cotangent, once",
    )


def not_finite(claimed: np.ndarray, scene: Scene | None = None) -> Cause:
    """Names a gradient that is NaN or infinite beside a finite value.

    Args:
      claimed: The gradient.
      scene: What is known around it: it may tell at which values it is so.
    """
    bad = ~np.isfinite(claimed)
    count = int(bad.sum())
    nans = int(np.isnan(claimed).sum())
    kind = "NaN" if nans else "infinite"
    are = kind if nans in (0, count) else "NaN or infinite"
    where = where_in_words(bad, scene) if scene is not None else ""
    at = f", exactly where {where}" if where else ""
    return Cause(
        f"{kind} gradient",
        f"{count} of {claimed.size} entries are {are} although the value is finite{at}",
        "look for 0 * inf in an untaken `where` branch, sqrt or norm at 0, log of 0; "
        "guard the argument inside the branch, not only the result",
    )


def value_not_finite(output: str, value: np.ndarray) -> Cause:
    """Names a value that is not finite, so that nothing can be differenced."""
    bad = value[~np.isfinite(value)]
    kind = "NaN" if np.isnan(bad).any() else "infinite"
    return Cause(
        f"{kind} value",
        f"the value itself is {kind} ({output}, {bad.size} of {value.size} entries), "
        "so it has no derivative here",
        "choose a point inside the function's domain, or a gradtest.domains entry",
    )


def value_overflows(output: str, value: np.ndarray) -> Cause:
    """Names a value that is finite in float64 alone."""
    kind = "NaN" if np.isnan(value).any() else "infinite"
    return Cause(
        f"{kind} value in working precision",
        f"the value is finite in float64 but {kind} in its own dtype ({output}), so "
        "there is nothing that its gradient could be right about",
        "scale the point down, or make the function safe in its own dtype",
    )


def noisy(slope: Slope, scale: float) -> Cause:
    """Names a slope whose error hides what it should show."""
    part = 3 * slope.error / scale if scale else np.inf
    return Cause(
        "noise too high",
        f"differences of the value are uncertain by {part:.1g} of the slope "
        f"(step {slope.step:.0e})",
        "look for rounding, random or staircase steps in the function (round, floor, "
        "argmax, a loop's tolerance), or move the point",
    )


def slope_cause(claimed: np.ndarray, claim: float, measured: float) -> Cause:
    """Names the cause where only a measured slope speaks against the claim."""
    if not claimed.any():
        return ZERO
    ratio = claim / measured if measured else np.inf
    return Cause(
        "different",
        f"along a random direction it claims {claim:.6g}, measured is {measured:.6g} "
        f"(ratio {ratio:.6g})",
        "compare the rule with the function's own derivative, term by term",
    )


def solver_residual(transposed: bool, loose: bool) -> Cause:
    """Names a linear solver that does not solve its system."""
    name = "transpose_solve" if transposed else "solve"
    if loose:
        return Cause(
            "loose solver",
            f"`{name}` of a custom_linear_solve leaves a large residual: the value is "
            "approximate, or the solver is wrong",
            "tighten the solver's tolerance, then check again",
        )
    return Cause(
        "wrong solver",
        f"`{name}` of a custom_linear_solve does not solve its system",
        f"check `{name}`: A x = b must hold for what it returns"
        + (", with A transposed" if transposed else ""),
    )


def unstable(
    claimed: np.ndarray,
    lifted: np.ndarray,
    *,
    is_narrower: bool = False,
    dtype: str = "float32",
) -> tuple[Cause, ...]:
    """Names why a right formula loses accuracy in working precision.

    Args:
      claimed: What comes out in working precision.
      lifted: The same in float64.
      is_narrower: Whether the claim computes in half precision, and its function not.
      dtype: The dtype of the leaf.

    Returns:
      The causes that fit, the likelier first.
    """
    if not np.isfinite(claimed).all():
        overflow = Cause(
            "overflow in working precision",
            "the formula is right, but evaluated in its own dtype it gives NaN or inf",
            "rescale before exponentials, squares and divisions (subtract the "
            "maximum), and give roots, norms and quotients a case of their own at zero",
        )
        return (overflow,)
    place = np.unravel_index(int(np.argmax(np.abs(claimed - lifted))), claimed.shape)
    at = f" at [{', '.join(map(str, place))}]" if place else ""
    loses = Cause(
        "unstable arithmetic",
        "the formula is right, but evaluated in its own dtype it loses this accuracy "
        f"(worst{at}: {claimed[place]:.6g}, in float64 {lifted[place]:.6g}); plain "
        "autodiff at the same point does not",
        "keep residuals in the forward pass's precision; look for a downcast or a "
        "difference of nearly equal numbers",
        0.9,
    )
    narrow = rounded_to(claimed, lifted)
    if narrow is not None:
        return narrow, loses
    if not is_narrower:
        return (loses,)
    if dtype in ("bfloat16", "float16"):  # a cast at the end is as it should be
        return loses, dataclasses.replace(_DOWNCAST, likelihood=0.7)
    return _DOWNCAST, loses


def departs(check: str, says: str) -> Cause:
    """Names a rule that does not give the same in every way that JAX runs it."""
    name, remedy = _WAYS[check]
    return Cause(name, f"{says} it gives another result than by itself", remedy)


_WAYS: dict[str, tuple[str, str]] = {
    "repeat": (
        "not repeatable",
        "draw nothing and keep nothing inside of the rule: pass keys and state as "
        "arguments",
    ),
    "jit": (
        "wrong under jit",
        "use no Python state and no concrete values in the rule",
    ),
    "eager": (
        "wrong without jit",
        "take no other way where values are concrete: no isinstance(x, Tracer), no "
        "Python branches on values",
    ),
    "remat": (
        "wrong under remat",
        "the rule's fwd must give the same result each time that it is run",
    ),
    "linearize": (
        "wrong when linearised",
        "the tangent that the jvp rule returns must be linear in the tangents alone",
    ),
    "vmap": (
        "wrong under vmap",
        "look for reductions over all axes, sizes or axis names that count the batch, "
        "and for a custom_vmap or kernel whose batching is wrong",
    ),
    "scan": ("wrong inside scan", "use no Python state in the rule"),
    "symbolic zeros": (
        "wrong where an argument or result takes no part",
        "a symbolic zero stands for an array of zeros: handle it as one",
    ),
    "second order by differences": (
        "wrong second derivative",
        "let the rule's own derivative depend on its operands: look for a "
        "stop_gradient, or a constant, in its bwd or jvp",
    ),
    "second order by the cotangent": (
        "cotangent taken for a constant",
        "let the rule's own derivative depend on its cotangent: look for a "
        "stop_gradient of it, or for a step without derivative that it goes through in "
        "bwd",
    ),
    "linear": (
        "not linear in the cotangent",
        "multiply every term that the rule returns by its cotangent, once",
    ),
    "zero cotangent": (
        "not zero for a zero cotangent",
        "multiply every term that the rule returns by its cotangent",
    ),
}


def how_to_declare(names: Sequence[str], stand_in: str = "") -> str:
    """Says how a rule that differs on purpose is declared."""
    what = stand_in or "<its stand-in>"
    first = names[0]
    others = f" (or {', '.join(names[1:3])})" if len(names) > 1 else ""
    return (
        f"If {first}{others} differs on purpose: expect_differs={{{first!r}: {what}}}"
    )
