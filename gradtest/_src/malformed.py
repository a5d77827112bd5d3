"""Rules that are not of the form that JAX asks for: named, not traced back."""

from __future__ import annotations

import os
import re
import traceback

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.case import Case
from gradtest._src.findings import Cause, Finding, Gap, Verdict

_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
# What JAX says of a malformed rule, and what that means for its author.
_SLIPS: tuple[tuple[str, str, str], ...] = (
    (
        r"manual axis types do not match",
        "cotangent varies over a mesh axis",
        "sum it over the mesh axes that its argument does not vary over: jax.lax.psum",
    ),
    (
        r"bwd rule.* must produce an output with the same container",
        "wrong tree of cotangents",
        "return a tuple from bwd with one cotangent for each argument that is not in "
        "nondiff_argnums, each of the argument's tree",
    ),
    (
        r"bwd rule.* must produce an output with the same type",
        "wrong shape of a cotangent",
        "return each cotangent in the shape of its argument: sum over broadcast axes",
    ),
    (
        r"fwd rule .* must produce a pair",
        "malformed fwd",
        "return (result, residuals) from fwd, the result as the function returns it",
    ),
    (
        r"fwd rule|expected .* because the corresponding output of the differentiated",
        "malformed fwd",
        "return the function's own result from fwd: the same tree, shapes and dtypes",
    ),
    (
        r"[Ll]eaked|leaks or|[Ee]scaped|UnexpectedTracer",
        "leaks a traced value",
        "hand everything that bwd needs over as residuals, and keep nothing in globals "
        "or closures",
    ),
    (
        r"jvp rule|[Cc]ustom JVP rule",
        "malformed jvp",
        "return (result, tangent) from the jvp rule, the tangent in the result's shape "
        "and dtype",
    ),
)


def malformed(error: Exception) -> Cause:
    """Names what is wrong with a rule whose derivative can't even be traced."""
    text = str(error).strip()
    kind = type(error).__name__
    says = (f"{kind}: {_sentence(text)}" if text else kind) + _where(error)
    for pattern, name, remedy in _SLIPS:
        if re.search(pattern, f"{kind} {text}", re.DOTALL):
            return Cause(name, says, remedy)
    return Cause(
        "raises",
        f"differentiating it raises {says}",
        "mend what raises: the rule must accept traced values of these shapes",
    )


def not_transposable(error: Exception) -> Cause:
    """Names a rule whose tangent exists, but can't be pulled back."""
    return Cause(
        "can't be transposed",
        "it has a forward mode, but JAX can't pull its tangent back "
        f"({type(error).__name__})",
        "return a tangent that is linear in the tangents: products with them and sums, "
        "but no where, abs or maximum of them",
    )


def _sentence(text: str, most: int = 300) -> str:
    """Returns the beginning of a long message, up to the end of a clause."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line.rstrip(".")
    cut = max(line.rfind(mark, 0, most) for mark in (", ", ". ", "; ", ": "))
    return line[: cut if cut > 0 else most] + " ..."


def _where(error: Exception) -> str:
    """Names the last line of the user's own code that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not jaxprs.is_library(f.filename) and not f.filename.startswith(_OWN)
    ]
    if not own or own[-1].filename.startswith("<"):
        return ""
    return f" (at {own[-1].filename}:{own[-1].lineno})"


def dtype_findings(case: Case) -> list[Finding]:
    """Compares the dtypes of the claimed gradients with those of their leaves.

    JAX checks the shapes of what a rule returns, but not its dtypes: a float32
    cotangent of a bfloat16 argument passes, and promotes whatever it meets.
    """
    if case.claim.mode != "rev" or not case.claim.is_autodiff:
        return []
    leaves = case.leaves
    avals = case.claim.jaxpr.out_avals[-len(leaves) :]
    return [
        Finding(
            leaf.name,
            leaf.shape,
            np.dtype(leaf.dtype).name,
            Verdict.FAIL,
            Gap.STRUCTURE,
            case.claim.mode,
            case.program.order,
            case.trial,
            judged_by="the argument",
            cause=Cause(
                "wrong dtype of a cotangent",
                f"the gradient is {np.dtype(aval.dtype).name}, the argument is "
                f"{np.dtype(leaf.dtype).name}",
                "cast each cotangent to the dtype of its argument",
            ),
            check="structure",
        )
        for leaf, aval in zip(leaves, avals, strict=True)
        if aval.dtype != leaf.dtype
    ]
