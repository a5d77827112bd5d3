"""Which part of a hand-written product is wrong: its seeds are handed over one by one.

A product sums what it makes of each item of its seed. A sum that is wrong looks like no
pattern where one term is; alone, that term shows its sign, its factor or its absence.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.lifting import widen
from gradtest._src.program import Values
from gradtest._src.truth import Readings

# Causes that a term by itself may show better.
_UNNAMED = (
    "different",
    "some entries wrong",
    "wrong at ties",
    "second order only",
    "dropped term",
    "missing term",
    "extra term",
    "factor in a term",
    "sign flipped in a term",
    "wrong slope",
)
_MOST_READ = 32


def explain_blocks(case: Case, findings: list[Finding]) -> list[Finding]:
    """Names the wrong term of a product, where the whole of it shows no pattern.

    Args:
      case: A reverse-mode claim that is not JAX's own.
      findings: What was found, one for each leaf; a product that is not linear in its
        seed is none of these.
    """
    places = {leaf.name: i for i, leaf in enumerate(case.leaves)}
    unnamed = [k for k, f in enumerate(findings) if f.name in places and _is_unnamed(f)]
    if not case.claim.by_hand or case.claim.is_autodiff or not unnamed:
        return findings
    if case.claim.mode != "rev" or case.readings.exact is None:
        return findings
    found = list(findings)
    blocks = _blocks(case)
    adjoint = _adjoint(case)
    for k in unnamed:
        i = places[found[k].name]
        cause = None
        if adjoint is not None and _fits(case.readings.claimed[i], adjoint[i]):
            cause = _ADJOINT
        cause = cause or _wrong_block(case, blocks, i)
        if cause is not None:
            found[k] = dataclasses.replace(found[k], cause=cause, other_causes=())
    return found


def _is_unnamed(finding: Finding) -> bool:
    return (
        finding.verdict is Verdict.FAIL
        and finding.gap is Gap.FORMULA
        and finding.cause is not None
        and finding.cause.name in _UNNAMED
    )


def _blocks(case: Case) -> list[Readings]:
    """Returns the readings for each item of the seed alone, if there are several."""
    if not 1 < len(case.seed) <= _MOST_READ:
        return []
    blocks = []
    for k in range(len(case.seed)):
        seed = [
            value if k == n else np.zeros_like(value)
            for n, value in enumerate(map(widen, case.seed))
        ]
        blocks.append(case.bench.read(case.point, seed=seed))
    return blocks


def _adjoint(case: Case) -> Values | None:
    """Returns the exact derivative with seed and result conjugated, where complex."""
    seed = [np.conj(widen(value)) for value in case.seed]
    if not any(np.iscomplexobj(value) for value in seed):
        return None
    exact = case.bench.read(case.point, seed=seed).exact
    return None if exact is None else [np.conj(e) for e in exact]


def _fits(claimed: np.ndarray, pattern: np.ndarray) -> bool:
    return norm(claimed - pattern) <= diagnose.FIT * norm(pattern)


def _wrong_block(case: Case, blocks: list[Readings], i: int) -> Cause | None:
    """Names what is wrong with the one term that is; None where there are several."""
    wrong = []
    for k, block in enumerate(blocks):
        if block.exact is None:
            return None
        floor = case.rtol * norm(case.readings.claimed[i])
        gap = leaf_gap(block.claimed[i], block.exact[i], rtol=case.rtol, floor=floor)
        if gap.is_exceeded:
            wrong.append(k)
    if len(wrong) != 1:
        return None
    (k,) = wrong
    block, exact = blocks[k], blocks[k].exact
    assert exact is not None
    name = case.program.outputs[k].name.removeprefix("gradient of ")
    of = f"the {case.claim.seed_name} of {name}"
    if not block.claimed[i].any():
        return Cause(
            "dropped term",
            f"the term that comes from {of} is missing, the others are right",
            "add that term",
        )
    cause = diagnose.leaf_cause(block.claimed, exact, i, case.rtol)
    return dataclasses.replace(
        cause, says=f"in the term that comes from {of}, {cause.says}"
    )


_ADJOINT = Cause(
    "conjugate",
    "it is the conjugate transpose, the adjoint of mathematics: JAX's convention has "
    "no conjugates",
    "take the transpose alone, as jax.linear_transpose and jax.vjp do",
)
