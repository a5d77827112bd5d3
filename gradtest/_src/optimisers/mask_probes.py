"""What a mask must keep out of a gradient: masked entries, and what stands in them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.case import Case
from gradtest._src.findings import Cause, Entry, Finding, Gap, Verdict
from gradtest._src.inputs import Leaf

if TYPE_CHECKING:
    from gradtest._src.optimisers.reduction_check import ReductionCheck

PyTree = Any
_DOUBLE_WHERE = (
    "put something harmless in masked entries before the loss is computed, and mask "
    "its result too: x = jnp.where(mask, x, 0), then jnp.where(mask, loss(x), 0)"
)


class MaskProbes:
    """Looks at masked entries: their gradient, NaN in them, and nothing but them.

    Attributes:
      notes: What came of it where it is no failure.
    """

    def __init__(self, check: ReductionCheck):
        self._check = check
        self._given: str = ""
        self.notes: list[str] = []

    def cleaned(self, args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """Returns the arguments with finite numbers in masked entries.

        They are the first kept example's; that NaN came there is remembered.
        """
        examples = self._check.examples
        if examples.mask is None:
            return args
        first = examples.indices()[np.flatnonzero(examples.kept())[0]]

        def clean(leaf: Any) -> Any:
            if not isinstance(leaf, np.ndarray | jax.Array) or not _is_float(leaf):
                return leaf
            values = np.asarray(leaf)
            bad = examples.masked_entries(leaf) & ~np.isfinite(values)
            if not bad.any():
                return leaf
            self._given = str(values[bad][0])
            donor = values
            for axis in examples.axes_of(leaf):
                at = int(first[examples.axes.index(axis)])
                donor = np.take(donor, [at], axis)
            return jnp.asarray(np.where(bad, donor, values), leaf.dtype)

        return tuple(
            jax.tree_util.tree_map(clean, arg) if examples.is_batched(place) else arg
            for place, arg in enumerate(args)
        )

    def masked_gradients(self, case: Case, found: list[Finding]) -> list[Finding]:
        """Asks that masked entries have a gradient of exactly zero."""
        if self._check.examples.mask is None:
            return []
        wrong = {f.name for f in found if f.verdict is Verdict.FAIL}
        cause = _INVERTED if self._is_inverted(case) else _LEAKS
        return [
            self._finding(case, leaf, cause, entry=entry, size=np.inf, gap=Gap.FORMULA)
            for leaf, entry in self._leaking(case)
            if leaf.name not in wrong
        ]

    def _is_inverted(self, case: Case) -> bool:
        """Whether masked entries have all of the gradient, and kept ones none."""
        return not any(
            np.any(np.where(self._masked(leaf, claimed), 0, claimed))
            for leaf, claimed in zip(case.leaves, case.readings.claimed, strict=True)
        )

    def _leaking(self, case: Case) -> list[tuple[Leaf, Entry]]:
        found = []
        for leaf, claimed in zip(case.leaves, case.readings.claimed, strict=True):
            if not self._check.examples.is_batched(leaf.argument):
                continue
            masked = self._check.examples.masked_entries(claimed) & (claimed != 0)
            if masked.any():
                index = tuple(int(i) for i in np.argwhere(masked)[0])
                found.append((leaf, Entry(index, claimed[index].item(), 0.0)))
        return found

    def findings(self, case: Case) -> list[Finding]:
        """Puts NaN into masked entries, and masks everything."""
        if self._check.examples.mask is None or case.trial:
            return []
        strict = self._check.chosen.strict_mask
        leak = self._leak_of_nan(case)
        empty = self._all_masked(case)
        found = []
        for cause, leaf, is_failure in (
            (leak and leak[0], leak and leak[1], strict or bool(self._given)),
            (empty and empty[0], empty and empty[1], strict),
        ):
            if cause is None or leaf is None:
                continue
            if is_failure:
                found.append(self._finding(case, leaf, cause, size=np.inf))
            else:
                self.notes.append(f"{cause.says} (strict_mask=True refuses that)")
        return found

    def _leak_of_nan(self, case: Case) -> tuple[Cause, Leaf] | None:
        clean = self._gradient(case, list(case.point.moving), None)
        if clean is None:
            return None
        for bad in (np.nan, np.inf):
            moving = [
                np.where(self._masked(leaf, value), bad, value).astype(leaf.dtype)
                for leaf, value in zip(case.leaves, case.point.moving, strict=True)
            ]
            gradients = self._gradient(case, moving, None)
            for leaf, found, wanted in zip(
                case.leaves, gradients or [], clean, strict=False
            ):
                if not np.isfinite(found).all() and np.isfinite(wanted).all():
                    return self._leaked(leaf, found, bad), leaf
        self.notes.append("NaN and inf in masked entries do not reach the gradient")
        return None

    def _leaked(self, leaf: Leaf, found: np.ndarray, bad: float) -> Cause:
        name = "NaN" if np.isnan(bad) else "inf"
        given = " (there is one in the arguments)" if self._given else ""
        return Cause(
            "masked NaN leaks",
            f"{name} in a masked entry{given} makes {int((~np.isfinite(found)).sum())} "
            f"of {found.size} entries of the gradient of {leaf.name} NaN or infinite: "
            "0 times it is NaN",
            _DOUBLE_WHERE,
        )

    def _all_masked(self, case: Case) -> tuple[Cause, Leaf] | None:
        where = np.asarray(self._check.chosen.where)
        empty = np.zeros(where.shape, where.dtype)
        gradients = self._gradient(case, list(case.point.moving), empty)
        for leaf, found in zip(case.leaves, gradients or [], strict=False):
            if not np.isfinite(found).all():
                says = (
                    "a mask that keeps nothing makes the gradient of "
                    f"{leaf.name} NaN: 0/0"
                )
                remedy = "divide by jnp.maximum(jnp.sum(mask), 1)"
                return Cause("NaN where all is masked", says, remedy), leaf
        if gradients is not None:
            zero = all(not np.any(found) for found in gradients)
            what = "zeros" if zero else "finite, but not zero"
            self.notes.append(f"a mask that keeps nothing has a gradient of {what}")
        return None

    def _masked(self, leaf: Leaf, value: Any) -> np.ndarray:
        if not self._check.examples.is_batched(leaf.argument):
            return np.zeros(np.shape(value), bool)
        return self._check.examples.masked_entries(np.asarray(value))

    def _gradient(self, case: Case, moving: Any, mask: Any) -> list[np.ndarray] | None:
        """Returns JAX's own gradient of the loss, in its own precision."""
        inputs, held = case.program.inputs, case.point.held

        def total(*values: Any) -> Any:
            result = self._check.call(*inputs.arguments(values, held), mask=mask)
            return jnp.sum(result)

        try:
            with execution.working_precision():
                found = jax.grad(total, tuple(range(len(moving))))(
                    *(jnp.asarray(value) for value in moving)
                )
        except TypeError:  # a complex result
            return None
        return [np.asarray(value).astype(_wide(value)) for value in found]

    def _finding(self, case: Case, leaf: Leaf, cause: Cause, **fields: Any) -> Finding:
        passed = Finding(
            leaf.name, leaf.shape, np.dtype(leaf.dtype).name, Verdict.FAIL,
            Gap.STRUCTURE, trial=case.trial, judged_by="the mask", cause=cause,
            check="mask",
        )  # fmt: skip
        return dataclasses.replace(passed, **fields)


_LEAKS = Cause(
    "masked entries have a gradient",
    "an entry that is masked has a gradient that is not zero",
    "mask each example's loss, jnp.where(mask, losses, 0), before it is reduced",
)
_INVERTED = Cause(
    "mask inverted",
    "masked entries have a gradient, and those that the mask keeps have none",
    "keep what the mask says is kept: True counts",
)


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _wide(value: Any) -> Any:
    is_complex = jnp.issubdtype(value.dtype, jnp.complexfloating)
    return np.complex128 if is_complex else np.float64
