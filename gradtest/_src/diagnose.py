"""What kind of mistake a gap is: one small function for each cause.

A cause is named only on evidence in the numbers, and every cause says what to do next.
The functions are tried in the order of `_CAUSES`; the first that recognises the leaf
speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gradtest._src.differences import Slope
from gradtest._src.findings import Cause

# How closely a gradient must fit a pattern before the pattern is named.
FIT = 1e-4
# Constant factors that have a usual reason, in words.
_FACTORS = {
    2.0: "2",
    3.0: "3",
    4.0: "4",
    np.pi: "pi",
    2 * np.pi: "2 pi",
}

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


def not_finite(claimed: np.ndarray) -> Cause:
    """Names a gradient that is NaN or infinite beside a finite value."""
    count = int((~np.isfinite(claimed)).sum())
    kind = "NaN" if np.isnan(claimed).any() else "infinite"
    return Cause(
        f"{kind} gradient",
        f"{count} of {claimed.size} entries are {kind} although the value is finite",
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
        return _zero(claimed, np.ones_like(claimed), FIT)  # type: ignore[return-value]
    ratio = claim / measured if measured else np.inf
    return Cause(
        "different",
        f"along a random direction it claims {claim:.6g}, measured is {measured:.6g} "
        f"(ratio {ratio:.6g})",
        "compare the rule with the function's own derivative, term by term",
    )


def leaf_cause(
    claimed: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    leaf: int,
    rtol: float,
    fit: float = FIT,
) -> Cause:
    """Returns the likeliest cause of one leaf's gap.

    Args:
      claimed: Claimed gradients of all leaves, not only this one.
      truth: True gradients of all leaves.
      leaf: Which one to explain.
      rtol: The relative gap that the check allows.
      fit: How closely the claim must fit a pattern; more than its own rounding.
    """
    size = float(np.linalg.norm(truth[leaf].ravel()))
    gap = float(np.linalg.norm((claimed[leaf] - truth[leaf]).ravel()))
    if size:
        # A pattern must explain most of the gap to be its cause.
        fit = min(fit, gap / size / 10)
    for recognise in _CAUSES:
        cause = recognise(claimed[leaf], truth[leaf], fit)
        if cause is not None:
            return cause
    swapped = _swapped(claimed, truth, leaf, fit)
    return swapped or _where_it_differs(claimed[leaf], truth[leaf], rtol)


def _fits(claimed: np.ndarray, pattern: np.ndarray, fit: float) -> bool:
    scale = float(np.linalg.norm(pattern.ravel()))
    return scale > 0 and float(np.linalg.norm((claimed - pattern).ravel())) <= (
        fit * scale
    )


def _zero(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    if claimed.any() or not truth.any():
        return None
    return Cause(
        "zero gradient",
        "the claimed gradient is zero in every entry, the true one is not",
        "return this leaf's cotangent from the rule; look for a missing term, a "
        "stop_gradient, or zeros_like",
    )


def _should_be_zero(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    if truth.any() or not claimed.any():
        return None
    return Cause(
        "gradient where none is",
        "the true gradient is zero in every entry: the function does not depend on it",
        "return zeros for this leaf",
    )


def _sign(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    if not _fits(claimed, -truth, fit):
        return None
    return Cause(
        "sign flipped",
        f"the sign is flipped: claimed = -1 x true in {all_entries(claimed)}",
        "negate the result",
    )


def _factor(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    factor = factor_between(claimed, truth)
    if factor is None or not _fits(claimed, factor * truth, fit):
        return None
    if _one_entry(truth, factor, fit):
        return None
    word = _factor_words(abs(factor), truth, fit)
    sign = "with its sign flipped and " if factor < 0 else ""
    return Cause(
        "constant factor",
        f"it is {sign}{word} in {all_entries(claimed)}",
        f"multiply by {1 / factor:.6g}; look for a missing or doubled factor, or a "
        "sum where a mean is",
    )


def factor_between(found: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the real factor that fits two arrays best; None where there is none."""
    scale = float(np.sum(np.abs(truth) ** 2))
    if not scale:
        return None
    return float(np.sum(found * np.conj(truth)).real) / scale or None


def _one_entry(truth: np.ndarray, factor: float, fit: float) -> bool:
    """Whether a single number fits the factor, which proves nothing by itself.

    A factor must be a usual one to be named on one entry.
    """
    return truth.size == 1 and not any(
        abs(abs(factor) ** power / known - 1) < fit
        for known in _FACTORS
        for power in (1, -1)
    )


def _factor_words(factor: float, truth: np.ndarray, fit: float) -> str:
    """Returns how many times too large or too small, and what the number may be."""
    word = "large" if factor > 1 else "small"
    times = factor if factor > 1 else 1 / factor
    for size in sorted({truth.size, *truth.shape} - {0, 1}):
        if abs(times / size - 1) < fit and size not in _FACTORS:
            return f"{size} times too {word} (the size of the leaf or of an axis)"
    for known, words in _FACTORS.items():
        if abs(times / known - 1) < fit:
            return f"{words} times too {word}"
    return f"{times:.6g} times too {word}"


def _conjugate(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    if not np.iscomplexobj(truth) or not _fits(claimed, np.conj(truth), fit):
        return None
    return Cause(
        "conjugate",
        "it is the complex conjugate of the true gradient",
        "take the conjugate: JAX's gradient of a real function of z = x + iy is "
        "df/dx - i df/dy",
    )


def _transposed(claimed: np.ndarray, truth: np.ndarray, fit: float) -> Cause | None:
    if truth.ndim < 2 or truth.shape[-1] != truth.shape[-2]:
        return None
    turned = np.swapaxes(truth, -1, -2)
    for pattern, words in ((turned, ""), (-turned, " with its sign flipped")):
        if _fits(claimed, pattern, fit):
            return Cause(
                "transposed",
                f"it is the transpose of the true gradient{words}",
                "swap the last two axes" + (" and negate" if words else ""),
            )
    return None


def _swapped(
    claimed: Sequence[np.ndarray], truth: Sequence[np.ndarray], leaf: int, fit: float
) -> Cause | None:
    for other, pattern in enumerate(truth):
        if other == leaf or pattern.shape != claimed[leaf].shape:
            continue
        if _fits(claimed[leaf], pattern, fit) and _fits(
            claimed[other], truth[leaf], fit
        ):
            return Cause(
                "leaves swapped",
                "its gradient and another leaf's have changed places",
                "return the cotangents in the order of the arguments",
            )
    return None


def _where_it_differs(claimed: np.ndarray, truth: np.ndarray, rtol: float) -> Cause:
    scale = float(np.linalg.norm(truth.ravel())) / max(truth.size, 1) ** 0.5
    difference = np.abs(claimed - truth)
    wrong = difference > 100 * rtol * (np.abs(truth) + scale)
    if not wrong.any():
        wrong = difference > difference.max(initial=0.0) / 100
    count = int(wrong.sum())
    if 0 < count < truth.size:
        places = np.argwhere(wrong)
        ranges = ", ".join(
            f"{low}" if low == high else f"{low}..{high}"
            for low, high in zip(places.min(0), places.max(0), strict=True)
        )
        return Cause(
            "some entries wrong",
            f"{count} of {truth.size} entries {'is' if count == 1 else 'are'} wrong, "
            f"within [{ranges}]; the others are right",
            "look for masks, padding, ties, exact zeros or block edges at these places",
        )
    return Cause(
        "different",
        "it is no multiple, transpose or conjugate of the true gradient",
        "compare the rule with the function's own derivative, term by term",
    )


def all_entries(array: np.ndarray) -> str:
    """Names all entries of an array."""
    return "its one entry" if array.size == 1 else f"all {array.size} entries"


_CAUSES: tuple[Callable[[np.ndarray, np.ndarray, float], Cause | None], ...] = (
    _zero,
    _should_be_zero,
    _sign,
    _conjugate,
    _transposed,
    _factor,
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


def unstable(claimed: np.ndarray) -> Cause:
    """Names a right formula whose arithmetic loses it in working precision."""
    if not np.isfinite(claimed).all():
        return Cause(
            "overflow in working precision",
            "the formula is right, but evaluated in its own dtype it gives NaN or inf",
            "rescale before exponentials, squares and divisions (subtract the maximum)",
        )
    return Cause(
        "unstable arithmetic",
        "the formula is right, but evaluated in its own dtype it loses this accuracy; "
        "plain autodiff at the same point does not",
        "keep residuals in the forward pass's precision; look for a downcast or a "
        "difference of nearly equal numbers",
    )


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
