"""Forward mode alone: each leaf's tangent, pushed forward, against the truth.

As in reverse mode differences are the judge, and the exact derivative gives the detail
of an output where they confirm it, or where it is too faint for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gradtest._src import diagnose
from gradtest._src.case import Case, norm
from gradtest._src.diagnosis.questions import forward_scene
from gradtest._src.differences import SWAMPED, Slope, weighted
from gradtest._src.findings import Cause, Entry, Finding, Verdict
from gradtest._src.gaps import LeafGap, leaf_gap
from gradtest._src.primal import value_trouble
from gradtest._src.program import Values

# Beside a kink both sides' slopes of an entry are the exact one up to this part of it.
_SHARP = 1e-3
# Below this part of the output's value differences are blind to a tangent, ...
_FAINT = 1e-9
# ... and this part of it is what float64 loses of one that cancels.
_CANCELLED = 1e-13
_KINK_NOTE = "at a kink: slopes between those of its sides are accepted"
_FAINT_NOTE = "too faint for differences: judged by rule-free autodiff alone"


def judge_pushed(case: Case) -> list[Finding]:
    """Returns the verdict on every leaf of a forward-mode claim."""
    trouble = value_trouble(case)
    if trouble:
        return [
            _finding(case, i, Verdict.INCONCLUSIVE, cause=trouble)
            for i in range(len(case.leaves))
        ]
    return [_LeafJudge(case, i).finding() for i in range(len(case.leaves))]


class _Seen(NamedTuple):
    """The verdict on one output's tangent."""

    verdict: Verdict
    gap: LeafGap
    judged_by: str
    cause: Cause | None = None
    note: str = ""
    closely: Callable[[], tuple[Cause, ...]] | None = None


class _LeafJudge:
    """Judges what a claim makes of one leaf's tangent, the other leaves at rest."""

    def __init__(self, case: Case, leaf: int):
        self.case, self.leaf = case, leaf
        seed = [np.zeros_like(value) for value in case.seed]
        seed[leaf] = case.seed[leaf]
        readings = case.bench.read(case.point, seed=seed)
        self.claimed = readings.claimed
        self.exact, _ = readings.exact_where_known()
        wide = case.tangents[leaf].dtype
        self._direction = {leaf: np.asarray(case.seed[leaf]).astype(wide)}

    def finding(self) -> Finding:
        """Returns the verdict on the leaf: that of its worst output."""
        case = self.case
        for c in self.claimed:
            if not np.isfinite(c).all():
                cause = diagnose.not_finite(c)
                return self._finding(Verdict.FAIL, size=np.inf, cause=cause)
        slope = self._slope
        if slope.is_kink:
            return self._at_kink(slope)
        seen = [self._judge_output(i) for i in range(len(case.program.outputs))]
        worst = max(
            range(len(seen)), key=lambda i: (seen[i].verdict.severity, seen[i].gap.size)
        )
        return self._told(worst, seen[worst])

    @functools.cached_property
    def _slope(self) -> Slope:
        truth = self.claimed if self.exact is None else self.exact
        scale = max(norm_all(self.claimed), norm_all(truth))
        return self.case.measure(self._direction, scale)

    def _at_kink(self, slope: Slope) -> Finding:
        """Accepts what lies between the slopes of the two sides.

        The exact derivative is the truth for single entries that are at no kink: there
        differences from both sides confirm it.
        """
        sides = self.case.sides(self._direction, slope.step)
        for i, (claimed, (left, right)) in enumerate(
            zip(self.claimed, sides, strict=True)
        ):
            if self.exact is None:
                break
            exact, noise = self.exact[i], 3 * slope.error
            off = np.maximum(np.abs(left - exact), np.abs(right - exact))
            near = off <= noise + _SHARP * np.abs(exact)
            smooth = np.where(near, claimed, exact)
            floor = noise + _CANCELLED * norm(self.case.readings.values[i])
            gap = leaf_gap(smooth, exact, rtol=self.case.rtol, floor=floor)
            if gap.is_exceeded:
                seen = self._compared(claimed[near], exact[near], gap, "exact")
                return self._told(i, seen._replace(note=_KINK_NOTE))
        if slope.distance(weighted(self.claimed, self.case.weights)) <= 3 * slope.error:
            return self._finding(Verdict.PASS, notes=(_KINK_NOTE,))
        return self._finding(Verdict.INCONCLUSIVE, size=np.inf, cause=diagnose.KINK)

    def _judge_output(self, i: int) -> _Seen:
        """Judges the tangent of one output."""
        case, claimed = self.case, self.claimed[i]
        exact = None if self.exact is None else self.exact[i]
        value = norm(case.readings.values[i])
        slope = self._slope
        size = norm(claimed) if exact is None else max(norm(claimed), norm(exact))
        if size <= _FAINT * value:
            return self._judge_faint(i, value)
        wanted = SWAMPED * size
        if exact is not None and norm(claimed - exact) > case.rtol * size:
            wanted = min(wanted, norm(claimed - exact) / 4)
        if 3 * slope.error > wanted and len(self.claimed) > 1:
            slope = self._measured_alone(i, size)
        measured, noise = slope.outputs[i], 3 * slope.error
        if noise > SWAMPED * max(size, norm(measured)):
            gap = leaf_gap(claimed, measured, rtol=case.rtol, floor=noise)
            cause = diagnose.noisy(slope, size)
            return _Seen(Verdict.INCONCLUSIVE, gap, "measured", cause)
        allowed = case.rtol * norm(measured) + noise
        if exact is not None and norm(exact - measured) <= allowed:
            gap = self._gap(i, exact)
            # What lies within the noise of the differences can't be told from exact.
            if gap.is_exceeded and norm(claimed - exact) <= 2 * noise:
                cause = diagnose.noisy(slope, size)
                return _Seen(Verdict.INCONCLUSIVE, gap, "exact", cause)
            return self._compared(claimed, exact, gap, "exact")
        gap = leaf_gap(claimed, measured, rtol=case.rtol, floor=noise)
        return self._compared(claimed, measured, gap, "measured")

    def _measured_alone(self, i: int, scale: float) -> Slope:
        """Measures one output alone: the others' rounding may drown it."""
        weights = [
            weight if k == i else np.zeros_like(weight)
            for k, weight in enumerate(self.case.weights)
        ]
        return self.case.measure(self._direction, scale, weights=weights)

    def _judge_faint(self, i: int, value: float) -> _Seen:
        """Judges by the exact derivative alone what differences can't see."""
        claimed, rtol = self.claimed[i], self.case.rtol
        if self.exact is not None:
            exact = self.exact[i]
            gap = self._gap(i, exact)
            return self._compared(claimed, exact, gap, "exact", _FAINT_NOTE)
        measured = self._slope.outputs[i]
        noise = 3 * self._slope.error + _FAINT * value
        gap = leaf_gap(claimed, measured, rtol=rtol, floor=noise)
        if gap.is_exceeded:
            return self._compared(claimed, measured, gap, "measured")
        if claimed.any():
            return _Seen(Verdict.INCONCLUSIVE, gap, "measured", diagnose.FAINT)
        return _Seen(Verdict.PASS, gap, "measured")

    def _gap(self, i: int, exact: np.ndarray) -> LeafGap:
        """Compares an output's tangent with the exact one."""
        claimed, value = self.claimed[i], norm(self.case.readings.values[i])
        return leaf_gap(
            claimed,
            exact,
            rtol=self.case.rtol,
            floor=_CANCELLED * value,
            beside=max(norm(claimed), value),
        )

    def _compared(
        self,
        claimed: np.ndarray,
        truth: np.ndarray,
        gap: LeafGap,
        judged_by: str,
        note: str = "",
    ) -> _Seen:
        if not gap.is_exceeded:
            return _Seen(Verdict.PASS, gap, judged_by, note=note)
        case = self.case

        def closely() -> tuple[Cause, ...]:
            scene = forward_scene(case)
            return diagnose.leaf_causes([claimed], [truth], 0, case.rtol, scene=scene)

        cause = diagnose.at_first_sight([claimed], [truth], 0, case.rtol)
        return _Seen(Verdict.FAIL, gap, judged_by, cause, note, closely)

    def _told(self, i: int, seen: _Seen) -> Finding:
        """Returns the finding on the leaf that one output makes."""
        case, output = self.case, self.case.program.outputs[i]
        if seen.closely is not None and seen.cause is not None:
            place = ("fwd", case.leaves[self.leaf].name)
            case.later[place] = seen.cause, seen.closely
        notes: tuple[str, ...] = (seen.note,) if seen.note else ()
        if seen.verdict is not Verdict.PASS:
            notes += (f"seen in the tangent of {output.name}",)
        entry = None
        if seen.gap.entry is not None and seen.verdict is Verdict.FAIL:
            at = seen.gap.entry
            of = f"tangent of {output.name}"
            entry = Entry(at.index, at.claimed, at.true, of)
        return self._finding(
            seen.verdict,
            size=seen.gap.size,
            allowed=seen.gap.allowed,
            judged_by=seen.judged_by,
            entry=entry,
            cause=seen.cause,
            notes=notes,
        )

    def _finding(self, verdict: Verdict, **fields: object) -> Finding:
        return _finding(self.case, self.leaf, verdict, **fields)


def norm_all(values: Values) -> float:
    """Returns the norm of a list of arrays as one vector."""
    return float(np.sqrt(sum(norm(value) ** 2 for value in values)))


def _finding(case: Case, i: int, verdict: Verdict, **fields: object) -> Finding:
    leaf = case.leaves[i]
    return Finding(
        leaf.name,
        leaf.shape,
        np.dtype(leaf.dtype).name,
        verdict,
        mode="fwd",
        order=case.program.order,
        trial=case.trial,
        **({"allowed": case.rtol, "judged_by": "measured"} | fields),  # type: ignore[arg-type]
    )
