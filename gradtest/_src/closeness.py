"""Two trees of gradients compared as they came, each leaf against its own norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from gradtest._src import diagnose, execution
from gradtest._src.compare import leaf_gap
from gradtest._src.findings import Cause, Entry, Finding, Gap, Verdict
from gradtest._src.lifting import is_inexact

PyTree = Any

# Rounding in the last place grows along a sum; sign and factor stay far above this.
_UNITS_IN_THE_LAST_PLACE = 128
_COARSEST_RTOL = 1 / 16
# An entry stands out as wrong from about 100 times this part of itself.
_FINEST_PATTERN = 1e-3
# Of how many wrong leaves the cause is looked for, those farthest off.
_MOST_EXPLAINED = 48
_UNNAMED = Cause(
    "different",
    "it is not the reference's",
    "see first to the leaves that are farther off",
    0.3,
)
_FLOAT32_EPS = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree of gradients.

    Attributes:
      name: Its path, after the name of the tree.
      value: The leaf as it came.
      dtype: Its dtype as JAX sees it; None where it has none.
    """

    name: str
    value: Any
    dtype: Any

    @property
    def kind(self) -> str:
        """What can be compared: "real", "complex", or "none" for all other leaves."""
        if self.dtype is None or not is_inexact(self.dtype):
            return "none"
        return "complex" if jnp.issubdtype(self.dtype, jnp.complexfloating) else "real"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; () where it is no array."""
        return tuple(jnp.shape(self.value)) if self.kind != "none" else ()

    def __str__(self) -> str:
        if self.dtype is None:
            return "None" if self.value is None else type(self.value).__name__
        dtype = dtypes.float0 if self.dtype == dtypes.float0 else self.dtype
        name = "float0" if dtype == dtypes.float0 else str(dtype)
        return f"{name}{list(np.shape(self.value))}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The findings on two trees, and the leaves that hold no gradient."""

    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


def compare(claimed: PyTree, reference: PyTree, rtol: float | None) -> Comparison:
    """Compares two trees of gradients.

    Raises:
      ValueError: No leaf of either tree holds a gradient.
    """
    alike = pair_leaves(claimed, reference)
    findings = _Judge(alike.pairs, rtol).findings()
    return Comparison((*alike.findings, *findings), alike.unchecked)


@dataclasses.dataclass(frozen=True)
class Alike:
    """The leaves of two trees that can be compared, and what is said of the others."""

    pairs: tuple[tuple[Leaf, Leaf], ...]
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


def pair_leaves(claimed: PyTree, reference: PyTree) -> Alike:
    """Pairs the leaves of two trees; no value of them is looked at.

    Raises:
      ValueError: No leaf of either tree holds a gradient.
    """
    ours, theirs = _leaves("claimed", claimed), _leaves("reference", reference)
    findings = _tree_findings(claimed, reference, ours, theirs)
    pairs, unchecked = [], []
    for path, one in ours.items():
        if path not in theirs:
            continue
        other = theirs[path]
        if one.kind == other.kind == "none":
            unchecked.append(f"{one.name} ({one}: holds no gradient)")
        elif one.kind != other.kind or one.shape != other.shape:
            findings.append(_unlike(one, other))
        elif not np.prod(one.shape):
            unchecked.append(f"{one.name} ({one}: has no entries)")
        else:
            pairs.append((one, other))
    if not findings and not pairs:
        raise ValueError(
            "`claimed` and `reference` hold no gradient: wanted a float or complex "
            f"array, got {', '.join(unchecked[:4]) or 'empty trees'}."
        )
    return Alike(tuple(pairs), tuple(findings), tuple(unchecked))


def _leaves(tree: str, value: PyTree) -> dict[Any, Leaf]:
    flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is None)
    leaves = {}
    for path, leaf in flat:
        name = tree + jax.tree_util.keystr(path)
        leaves[jax.tree_util.keystr(path)] = Leaf(name, leaf, _dtype(leaf))
    return leaves


def _dtype(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value.dtype
    return jnp.result_type(value) if isinstance(value, float | complex) else None


# --- trees that are not alike -----------------------------------------------------


def _tree_findings(
    claimed: PyTree, reference: PyTree, ours: dict[Any, Leaf], theirs: dict[Any, Leaf]
) -> list[Finding]:
    found = [
        _tree_finding(leaf, f"`claimed` has {leaf} here, `reference` has nothing")
        for path, leaf in ours.items()
        if path not in theirs
    ]
    found += [
        _tree_finding(leaf, f"`reference` has {leaf} here, `claimed` has nothing")
        for path, leaf in theirs.items()
        if path not in ours
    ]
    structures: list[Any] = [
        jax.tree_util.tree_structure(tree, is_leaf=lambda x: x is None)
        for tree in (claimed, reference)
    ]
    if not found and structures[0] != structures[1]:
        says = f"`claimed` is {structures[0]}, `reference` is {structures[1]}"
        found.append(
            Finding("claimed", (), "", Verdict.FAIL, Gap.TREE, cause=_other_tree(says))
        )
    return found


def _other_tree(says: str) -> Cause:
    return Cause("other tree", says, "return a tree like the arguments, leaf for leaf")


def _tree_finding(leaf: Leaf, says: str) -> Finding:
    return Finding(
        leaf.name, leaf.shape, "", Verdict.FAIL, Gap.TREE, cause=_other_tree(says)
    )


def _unlike(claimed: Leaf, reference: Leaf) -> Finding:
    """Says that two leaves at one place can't be compared."""
    return Finding(
        claimed.name, claimed.shape, "", Verdict.FAIL, Gap.TREE,
        cause=Cause(
            "other leaf",
            f"`claimed` has {claimed} here, `reference` has {reference}",
            "return a cotangent of the argument's shape and kind for every leaf",
        ),
    )  # fmt: skip


# --- leaves that are alike --------------------------------------------------------


def allowances(eps: float) -> tuple[float, float, float]:
    """Returns relative tolerance, noise of the tree, and noise beside an exact zero.

    A small leaf has noise of the largest one's terms. Half precision's would hide a
    mistake in it: that much is allowed only beside an exact zero.

    Args:
      eps: Spacing of the coarser dtype.
    """
    rtol = min(_UNITS_IN_THE_LAST_PLACE * eps, _COARSEST_RTOL)
    return rtol, min(eps, _FLOAT32_EPS), eps


class _Judge:
    """Compares pairs of leaves in float64."""

    def __init__(self, pairs: Sequence[tuple[Leaf, Leaf]], rtol: float | None):
        self._pairs = pairs
        self._rtol = rtol
        self._scene = diagnose.Scene(names=tuple(c.name for c, _ in pairs))
        self._claimed = [_float64(c) for c, _ in pairs]
        self._reference = [_float64(r) for _, r in pairs]
        sizes = [_root_mean_square(reference) for reference in self._reference]
        self._largest = max((s for s in sizes if np.isfinite(s)), default=0.0)

    def findings(self) -> list[Finding]:
        """Returns the verdict on every pair."""
        found = [self._judge(i) for i in range(len(self._pairs))]
        wrong = [i for i, finding in enumerate(found) if finding.cause is _UNNAMED]
        wrong.sort(key=lambda i: -found[i].strain)
        for i in wrong[:_MOST_EXPLAINED]:
            found[i] = self._explained(i, found[i])
        return found

    def _explained(self, i: int, finding: Finding) -> Finding:
        """Names what is wrong with a leaf.

        All leaves are looked at, for a gradient may stand at another leaf's place.
        """
        rtol, _ = self._allowances(i, is_zero=False)
        cause, *others = diagnose.leaf_causes(
            self._claimed,
            self._reference,
            i,
            min(rtol, _FINEST_PATTERN),
            max(diagnose.FIT, rtol / 8),  # half precision rounds a pattern too
            self._scene,
        )
        return dataclasses.replace(finding, cause=cause, other_causes=tuple(others))

    def _judge(self, i: int) -> Finding:
        claimed, reference = self._claimed[i], self._reference[i]
        rtol, floor = self._allowances(i, is_zero=not reference.any())
        if not np.isfinite(claimed).all():
            return self._not_finite(i, Verdict.FAIL, claimed, "claimed", rtol)
        if not np.isfinite(reference).all():
            return self._not_finite(
                i, Verdict.INCONCLUSIVE, reference, "reference", rtol
            )
        gap = leaf_gap(claimed, reference, rtol=rtol, floor=floor)
        if not gap.is_exceeded:
            return self._finding(i, Verdict.PASS, size=gap.size, allowed=gap.allowed)
        return self._finding(
            i, Verdict.FAIL, size=gap.size, allowed=gap.allowed, entry=gap.entry,
            cause=_UNNAMED,
        )  # fmt: skip

    def _allowances(self, i: int, *, is_zero: bool) -> tuple[float, float]:
        """Returns the relative tolerance, and the norm below which all is noise."""
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in self._pairs[i])
        rtol, noise, noise_beside_zero = allowances(eps)
        noise = noise_beside_zero if is_zero else noise
        count = np.prod(self._pairs[i][0].shape)
        return self._rtol or rtol, noise * self._largest * float(count) ** 0.5

    def _not_finite(
        self, i: int, verdict: Verdict, values: np.ndarray, whose: str, rtol: float
    ) -> Finding:
        bad = ~np.isfinite(values)
        kind = "NaN" if np.isnan(values).any() else "infinite"
        index = tuple(int(n) for n in np.argwhere(bad)[0])
        claimed, reference = (a[index] for a in (self._claimed[i], self._reference[i]))
        cause = Cause(
            f"{kind} gradient" if whose == "claimed" else f"{kind} reference",
            f"{int(bad.sum())} of {bad.size} entries of `{whose}` are {kind}",
            "NaN and inf are close to nothing: see where they come from with "
            "assert_grads_finite",
        )
        return self._finding(
            i, verdict, size=np.inf, allowed=rtol, cause=cause,
            entry=Entry(index, claimed.item(), reference.item()),
        )  # fmt: skip

    def _finding(self, i: int, verdict: Verdict, **fields: Any) -> Finding:
        claimed, reference = self._pairs[i]
        notes: tuple[str, ...] = ()
        if claimed.dtype != reference.dtype:
            notes = (f"the reference is {reference.dtype}",)
        return Finding(
            claimed.name, claimed.shape, np.dtype(claimed.dtype).name, verdict,
            Gap.CLOSE, judged_by="reference", notes=notes, **fields,
        )  # fmt: skip


def _float64(leaf: Leaf) -> np.ndarray:
    return execution.to_host(leaf.value)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.abs(values) ** 2)))
