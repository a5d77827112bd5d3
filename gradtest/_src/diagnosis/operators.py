"""Causes that are a matrix of the function in the wrong form, or in the wrong place."""

from __future__ import annotations

import numpy as np

from gradtest._src.diagnosis.clues import Clues, independent
from gradtest._src.findings import Cause

_MOST_SOURCES = 12
_LARGEST = 128
_WORST_CONDITION = 1e6


def misused(clues: Clues) -> Cause | None:
    """A square matrix argument was used untransposed, conjugated or not at all."""
    true, claimed = clues.true, clues.claimed
    if true.ndim < 2:
        return None
    sources = (*clues.scene.arguments, *clues.scene.outputs)
    for each in sources[:_MOST_SOURCES]:
        matrix = np.asarray(each.value)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            continue
        if matrix.dtype.kind not in "fc" or not 2 <= matrix.shape[0] <= _LARGEST:
            continue
        is_finite = np.isfinite(matrix).all()
        if not is_finite or not np.linalg.cond(matrix) < _WORST_CONDITION:
            continue
        found = _operator(clues, each.name, matrix, claimed, true)
        if found is not None:
            return found
    return None


def _operator(
    clues: Clues, name: str, matrix: np.ndarray, claimed: np.ndarray, true: np.ndarray
) -> Cause | None:
    length = matrix.shape[0]
    for is_right, axis in ((True, -1), (False, -2)):
        if true.shape[axis] != length or true.size <= length:
            continue
        for used, wanted, cause, how, remedy in _SLIPS:
            if cause == "factors commuted" and true.shape[-2:] != matrix.shape:
                continue
            # Claimed = rest x used and true = rest x wanted, with one rest.
            forms = _forms(matrix)
            rest = _times(true, np.linalg.inv(forms[wanted]), is_right)
            side = is_right if cause != "factors commuted" else not is_right
            supposed = _times(rest, forms[used], side)
            if clues.fits(claimed, supposed) and independent(claimed) > 2:
                return Cause(cause, how.format(name), remedy.format(name), 0.96)
    return None


def _forms(matrix: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "W": matrix,
        "W^T": matrix.T,
        "W*": np.conj(matrix),
        "W^H": np.conj(matrix.T),
        "1": np.eye(len(matrix), dtype=matrix.dtype),
    }


def _times(array: np.ndarray, matrix: np.ndarray, is_right: bool) -> np.ndarray:
    return array @ matrix if is_right else matrix @ array


_TRANSPOSE = (
    "transposed",
    "it is what the gradient would be with {} in place of its transpose, or the "
    "reverse",
    "transpose {} in the backward pass: what multiplies forwards is transposed back",
)
_CONJUGATE = (
    "conjugate",
    "it is what the gradient would be with {} conjugated",
    "take the transpose of {} alone, without a conjugate: JAX's convention has none",
)
_LEFT_OUT = (
    "missing factor",
    "true = claimed times the matrix {} (or its transpose)",
    "multiply by {}, or its transpose: the matrix is left out",
)
_TOO_MUCH = (
    "extra factor",
    "claimed = true times the matrix {} (or its transpose)",
    "multiply by {} once less",
)
_COMMUTED = (
    "factors commuted",
    "it is what the gradient would be with {} (or its transpose) multiplied from the "
    "other side",
    "keep the order of the matrix products with {}: they do not commute",
)
# What was used, what should have been, and what to call it.
_SLIPS: tuple[tuple[str, str, str, str, str], ...] = (
    ("W", "W^T", *_TRANSPOSE),
    ("W^T", "W", *_TRANSPOSE),
    ("W^H", "W^T", *_CONJUGATE),
    ("W*", "W", *_CONJUGATE),
    ("1", "W^T", *_LEFT_OUT),
    ("1", "W", *_LEFT_OUT),
    ("W", "1", *_TOO_MUCH),
    ("W^T", "1", *_TOO_MUCH),
    ("W^T", "W^T", *_COMMUTED),
    ("W", "W", *_COMMUTED),
)
