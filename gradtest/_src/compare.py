"""The formula gap in reverse mode: the lifted claim against the truth, leaf by leaf.

`measured` is the judge and `exact` gives the detail: a few directions confirm the
exact derivative, which then speaks for every leaf and entry. Where the claim departs
from it, a difference quotient along the very entries in dispute decides which of the
two is right.
"""

from __future__ import annotations

import functools

import numpy as np

from gradtest._src import cancellation, diagnose, jaxprs, seeding
from gradtest._src.case import Case, norm, pair, pair_all
from gradtest._src.confirmation import (
    Confirmation,
    confirm,
    least_scale,
    relative,
    scale_of,
)
from gradtest._src.conventions import Convention, convention
from gradtest._src.diagnosis.questions import scene_of
from gradtest._src.differences import SETTLED_PART, SWAMPED, Slope
from gradtest._src.findings import Cause, Entry, Finding, Verdict
from gradtest._src.gaps import SILENT_NOTE, LeafGap, as_number, leaf_gap
from gradtest._src.kinks import NearbyGradients, sample_nearby
from gradtest._src.locate import locate_entry, measured_gradient
from gradtest._src.primal import value_trouble
from gradtest._src.symmetric import is_right_for_symmetric

# How many directions judge where differences alone can.
_DIRECTIONS = 3
# How many leaves in dispute are measured one by one.
_MOST_ALONE = 48


class FormulaJudge:
    """Judges one claim at one point; `findings` has one entry for each leaf."""

    def __init__(self, case: Case):
        self.case = case
        readings = case.readings
        self.claimed = readings.claimed
        self.exact, self.open = readings.exact_where_known()
        self.reference = self.claimed if self.exact is None else self.exact
        sizes = [case.contributions([np.nan_to_num(g) for g in self.claimed])]
        if self.reference is not self.claimed:
            sizes.append(case.contributions(self.reference))
        largest = float(np.max(sizes, initial=0.0))
        blind = case.is_faint(np.max(sizes, axis=0))
        self.faint = {int(i) for i in np.flatnonzero(blind)}
        self.floors = [
            case.rounding_noise(i) if i in self.faint else 0.0
            for i in range(len(blind))
        ]
        if case.bench.islands:
            self.floors = [
                max(floor, case.noise * largest / size)
                for floor, size in zip(self.floors, case.sizes, strict=True)
            ]
        self._beside = [largest / size for size in case.sizes]

    def findings(self) -> list[Finding]:
        """Returns the verdict on every leaf."""
        case = self.case
        trouble = value_trouble(case)
        if trouble:
            return [
                self._finding(i, Verdict.INCONCLUSIVE, cause=trouble)
                for i in range(len(case.leaves))
            ]
        broken = {i for i, c in enumerate(self.claimed) if not np.isfinite(c).all()}
        found = {i: self._not_finite(i) for i in broken}
        if broken:
            # A slope through a leaf without a gradient says nothing of the others.
            sound = [i for i in range(len(case.leaves)) if i not in broken]
            found |= {i: self._judge_leaf(i) for i in sound}
        else:
            found |= self._judge_sound()
        return [
            found[i] if i in broken else self._as_zero(i, self._by_convention(i, f))
            for i, f in sorted(found.items())
        ]

    def _as_zero(self, i: int, finding: Finding) -> Finding:
        """Accepts what is zero but for rounding, as differences show it."""
        if finding.verdict is Verdict.PASS or not cancellation.is_all(self.case, i):
            return finding
        return self._finding(i, Verdict.PASS, allowed=1.0, notes=(SILENT_NOTE,))

    def _by_convention(self, i: int, finding: Finding) -> Finding:
        """Accepts at a kink what JAX itself takes for the derivative there."""
        if finding.verdict is Verdict.FAIL:
            disputed = self._gap(i).disputed
            is_at_kink = self._nearby is not None and self._nearby.vary(i, disputed)
        else:
            is_at_kink = finding.cause is diagnose.KINK
        if not is_at_kink or self._convention is None:
            return finding
        gradient, rtol = self._convention
        if not np.isfinite(gradient[i]).all():
            return finding  # JAX has no number there either
        gap = leaf_gap(self.claimed[i], gradient[i], rtol=rtol, floor=self.floors[i])
        if gap.is_exceeded:
            return finding
        return self._finding(
            i,
            Verdict.PASS,
            size=gap.size,
            allowed=gap.allowed,
            notes=(_CONVENTION_NOTE,),
        )

    @functools.cached_property
    def _convention(self) -> Convention | None:
        return convention(self.case)

    def by_exact(self, i: int) -> Finding:
        """Judges one leaf by the exact derivative alone, which is confirmed."""
        if not np.isfinite(self.claimed[i]).all():
            return self._not_finite(i)
        gap = self._gap(i)
        if gap.is_exceeded:
            return self._wrong(i, gap, notes=(_DECLARED_NOTE,))
        return self._finding(
            i,
            Verdict.PASS,
            size=gap.size,
            allowed=gap.allowed,
            notes=(_DECLARED_NOTE,),
        )

    # --- the usual way: a few directions for all leaves ---------------------------

    def _judge_sound(self) -> dict[int, Finding]:
        gaps = {i: self._gap(i) for i in range(len(self.claimed))}
        suspects = [i for i, gap in gaps.items() if gap.is_exceeded]
        suspects.sort(key=lambda i: -gaps[i].size)
        alone, others = suspects[:_MOST_ALONE], suspects[_MOST_ALONE:]
        found = {i: self._judge_suspect(i, gaps[i]) for i in alone}
        found |= self._judge_together(others, gaps)
        trusted = list(self.reference)
        for i in suspects:
            trusted[i] = self.claimed[i]
        rest = [i for i in gaps if i not in found]
        found |= self._confirm(rest, gaps, trusted)
        return found

    def _confirm(
        self, leaves: list[int], gaps: dict[int, LeafGap], trusted: list[np.ndarray]
    ) -> dict[int, Finding]:
        """Lets differences confirm the leaves on which exact and claim agree."""
        case = self.case
        contributions = case.contributions(trusted)
        for i in range(len(contributions)):
            if i not in leaves or i in self.faint:
                contributions[i] = 0.0
        found: dict[int, Finding] = {}
        for bucket in case.buckets(contributions):
            members = [i for i in bucket if i in leaves]
            if not members:
                continue
            is_known = self.exact is not None and self.open.isdisjoint(members)
            count = 1 if is_known else _DIRECTIONS
            confirmation = confirm(case, members, contributions, trusted, count)
            for i in members:
                if confirmation is not None:
                    found[i] = self._confirmed(i, gaps[i], confirmation)
                    continue
                found[i] = self._judge_leaf(i)
                if i in self.faint and found[i].verdict is Verdict.INCONCLUSIVE:
                    found[i] = self._judge_faint(i, gaps[i])
        return found

    def _confirmed(self, i: int, gap: LeafGap, confirmation: Confirmation) -> Finding:
        """A pass; without an exact derivative its numbers are those of the slopes."""
        size, allowed = gap.size, gap.allowed
        if self.exact is None or i in self.open:
            size, allowed = confirmation.numbers[i]
        notes: tuple[str, ...] = (_KINK_NOTE,) if confirmation.is_kink else ()
        if gap.is_silent:
            notes += (SILENT_NOTE,)
        elif i in self.faint:
            notes += (_FAINT_NOTE,)
        return self._finding(i, Verdict.PASS, size=size, allowed=allowed, notes=notes)

    def _judge_faint(self, i: int, gap: LeafGap) -> Finding:
        """Judges by the exact derivative alone what differences can't see."""
        if self.exact is None and not gap.is_silent:
            return self._finding(
                i, Verdict.INCONCLUSIVE, judged_by="measured", cause=diagnose.FAINT
            )
        if gap.is_exceeded:
            at_kink = self._nearby is not None and self._nearby.varying(i)
            if at_kink:
                return self._judge_at_kink(i, gap)
            if cancellation.sets_apart(self.case, i):
                return self._as_far_as_seen(i, gap)
            return self._wrong(i, gap, notes=(_FAINT_NOTE,))
        note = SILENT_NOTE if gap.is_silent else _FAINT_NOTE
        return self._finding(
            i, Verdict.PASS, size=gap.size, allowed=gap.allowed, notes=(note,)
        )

    # --- one leaf alone -------------------------------------------------------------

    def _judge_leaf(self, i: int) -> Finding:
        """Measures one leaf along random directions against the claim."""
        case = self.case
        claimed = [np.nan_to_num(c) for c in self.claimed]
        contribution = float(case.contributions(claimed)[i])
        best = (0.0, np.inf)
        for k in range(_DIRECTIONS):
            direction = case.direction(i, f"leaf {k}")
            slope = case.measure({i: direction}, max(contribution, least_scale(case)))
            predicted = pair(self.claimed[i], direction)
            scale = scale_of(case, contribution, slope)
            allowed = case.rtol * scale + 3 * slope.error
            distance = slope.distance(predicted)
            if distance > allowed:
                return self._departs(i, direction, slope, allowed)
            if allowed > SWAMPED * scale > 0:
                return self._finding(
                    i,
                    Verdict.INCONCLUSIVE,
                    size=distance / scale,
                    allowed=allowed / scale,
                    judged_by="measured",
                    cause=diagnose.noisy(slope, scale),
                )
            seen = relative(distance, allowed, predicted, scale)
            best = min(best, seen, key=lambda pair: pair[1])
        return self._finding(
            i, Verdict.PASS, size=best[0], allowed=best[1], judged_by="measured"
        )

    def _departs(
        self, i: int, direction: np.ndarray, slope: Slope, allowed: float
    ) -> Finding:
        """The claim is off the measured slope: wrong, or the value is approximate."""
        case = self.case
        claimed = pair(self.claimed[i], direction)
        distance = slope.distance(claimed)
        unit = abs(slope.value) or abs(claimed)
        gap = {
            "size": distance / unit,
            "allowed": allowed / unit,
            "judged_by": "measured",
        }
        # Along a line a meeting of pieces can look smooth; their gradients still vary.
        if slope.is_kink or (self._nearby is not None and self._nearby.varying(i)):
            return self._judge_at_kink(i, self._gap(i))
        if self._loop_explains(i, direction, slope, distance):
            return self._finding(
                i, Verdict.INCONCLUSIVE, cause=diagnose.LOOSE_SOLVER, **gap
            )
        agrees = self.exact is not None and not self._gap(i).is_exceeded
        if agrees and cancellation.explains(case, i, direction, slope):
            return self._as_far_as_seen(i, self._gap(i))
        nearest = min(abs(rung - claimed) for rung in slope.rungs)
        unsettled = slope.error > SETTLED_PART * distance or nearest < distance / 4
        if agrees and unsettled:
            cause = diagnose.noisy(slope, unit)
            return self._finding(i, Verdict.INCONCLUSIVE, cause=cause, **gap)
        if self._is_right_for_symmetric(i):
            return self._symmetric_pass(i)
        measured = measured_gradient(case, i, self.claimed[i])
        if measured is not None:
            truth = [*self.claimed[:i], measured, *self.claimed[i + 1 :]]
            entry = leaf_gap(self.claimed[i], measured, rtol=case.rtol, floor=0).entry
            cause = self._cause(truth, i, 1e-6)
        else:
            entry = locate_entry(case, i, self.claimed[i])
            cause = diagnose.slope_cause(self.claimed[i], claimed, slope.value)
        return self._finding(i, Verdict.FAIL, cause=cause, entry=entry, **gap)

    def _cause(self, truth: list[np.ndarray], i: int, rtol: float) -> Cause:
        """Names a cause at first sight; what it takes to look closer is put off."""
        if cancellation.is_all_of_truth(self.case, i, truth[i]):
            truth = [*truth[:i], np.zeros_like(truth[i]), *truth[i + 1 :]]

        def closely() -> tuple[Cause, ...]:
            return diagnose.leaf_causes(self.claimed, truth, i, rtol, scene=self._scene)

        cause = diagnose.at_first_sight(self.claimed, truth, i, rtol)
        place = (self.case.claim.mode, self.case.leaves[i].name)
        self.case.later[place] = cause, closely
        return cause

    @functools.cached_property
    def _scene(self) -> diagnose.Scene:
        return scene_of(self.case)

    def _symmetric_pass(self, i: int) -> Finding:
        return self._finding(
            i,
            Verdict.PASS,
            allowed=self.case.rtol,
            judged_by="measured",
            notes=(_SYMMETRIC_NOTE,),
        )

    def _is_right_for_symmetric(self, i: int) -> bool:
        if self.exact is None:
            return False
        return is_right_for_symmetric(
            self.case, i, self.claimed, self.exact[i], self.floors[i]
        )

    def _loop_explains(
        self, i: int, direction: np.ndarray, slope: Slope, distance: float
    ) -> bool:
        """Whether loops that stop too early can be the reason of a gap.

        Then the slope moves by a like amount when each loop takes one more step. A loop
        that counts is no reason, nor is one whose values move out of all proportion.
        """
        case = self.case
        if not jaxprs.has_loop_on_floats(case.program.jaxpr):
            return False
        further = case.measure({i: direction}, abs(slope.value), overrun=1)
        change = abs(further.value - slope.value)
        return not change < distance / 10 and not change > SWAMPED * abs(slope.value)

    # --- claim and exact derivative in dispute --------------------------------------

    def _judge_suspect(self, i: int, gap: LeafGap) -> Finding:
        """Measures along the entries in dispute to learn which of the two is right."""
        case = self.case
        if i in self.faint:
            return self._judge_faint(i, gap)
        if self._is_right_for_symmetric(i):
            return self._symmetric_pass(i)
        difference = self.claimed[i] - self.reference[i]
        direction = self._disputing(i, gap)
        separation = pair(difference, direction)
        slope = case.measure({i: direction}, separation)
        if slope.is_kink:
            return self._judge_at_kink(i, gap)
        tolerance = 3 * slope.error + SWAMPED * separation
        if tolerance > separation / 2:
            if cancellation.sets_apart(case, i):
                return self._as_far_as_seen(i, gap)
            drowned = bool(case.is_faint(np.array([separation]))[0])
            if drowned and norm(difference) > case.rounding_noise(i):
                return self._wrong(i, gap, notes=(_FAINT_NOTE,))
            return self._finding(
                i,
                Verdict.INCONCLUSIVE,
                size=gap.size,
                allowed=gap.allowed,
                entry=gap.entry,
                cause=diagnose.noisy(slope, separation),
            )
        if slope.distance(pair(self.reference[i], direction)) <= tolerance:
            return self._wrong(i, gap)
        if slope.distance(pair(self.claimed[i], direction)) <= tolerance:
            return self._judge_leaf(i)
        return self._departs(i, direction, slope, tolerance)

    def _judge_together(
        self, leaves: list[int], gaps: dict[int, LeafGap]
    ) -> dict[int, Finding]:
        """Judges many suspects by one slope, along all their entries in dispute.

        Where it is not what the reference predicts, each is judged by itself.
        """
        plain = [
            i
            for i in leaves
            if i not in self.faint and not self._is_right_for_symmetric(i)
        ]
        directions = {i: self._disputing(i, gaps[i]) for i in plain}
        differences = [self.claimed[i] - self.reference[i] for i in range(len(gaps))]
        separation = pair_all(differences, directions)
        found: dict[int, Finding] = {}
        if plain and self.exact is not None:
            slope = self.case.measure(directions, separation)
            tolerance = 3 * slope.error + SWAMPED * separation
            predicted = pair_all(self.reference, directions)
            is_clear = not slope.is_kink and tolerance <= separation / 2
            if is_clear and slope.distance(predicted) <= tolerance:
                found = {i: self._wrong(i, gaps[i]) for i in plain}
        rest = [i for i in leaves if i not in found]
        return found | {i: self._judge_suspect(i, gaps[i]) for i in rest}

    def _disputing(self, i: int, gap: LeafGap) -> np.ndarray:
        """Draws a direction along a leaf's entries in dispute.

        Of random sizes, and of signs that set the two predictions as far apart as can
        be.
        """
        case = self.case
        difference = self.claimed[i] - self.reference[i]
        generator = seeding.generator(
            case.key, "dispute", case.trial, case.leaves[i].name
        )
        sizes = case.sizes[i] * (0.5 + generator.random(difference.shape))
        safe = np.where(difference == 0, 1, np.abs(difference))
        return sizes * gap.disputed * np.conj(difference) / safe

    def _as_far_as_seen(self, i: int, gap: LeafGap) -> Finding:
        noise = self.case.evaluation_noise(i) / (norm(self.reference[i]) or 1.0)
        return self._finding(
            i, Verdict.PASS, size=gap.size, allowed=noise, notes=(_NOISE_NOTE,)
        )

    def _wrong(self, i: int, gap: LeafGap, **extra: object) -> Finding:
        cause = extra.get("cause") or self._cause(self.reference, i, self.case.rtol)
        fields = {
            "size": gap.size,
            "allowed": gap.allowed,
            "entry": gap.entry,
            "cause": cause,
        } | extra
        return self._finding(i, Verdict.FAIL, **fields)

    def _judge_at_kink(self, i: int, gap: LeafGap) -> Finding:
        """Accepts what lies between the gradients on the sides of the kink."""
        numbers = {"size": gap.size, "allowed": gap.allowed, "entry": gap.entry}
        nearby = self._nearby
        if nearby is None:
            return self._finding(
                i, Verdict.INCONCLUSIVE, cause=diagnose.KINK, **numbers
            )
        if not nearby.accepts_each(i, self.claimed[i], strictly=gap.is_exceeded):
            truth = list(self.claimed)
            truth[i] = nearby.nearest(i, self.claimed[i])
            gap = leaf_gap(
                self.claimed[i], truth[i], rtol=self.case.rtol, floor=self.floors[i]
            )
            cause = self._cause(truth, i, self.case.rtol)
            return self._wrong(i, gap, cause=cause, notes=(_KINK_NOTE,))
        if gap.is_exceeded and not nearby.accepts_together(i, self.claimed[i]):
            return self._wrong(i, gap, cause=diagnose.TIES)
        note = f"{_KINK_NOTE} (entries at it: {nearby.varying(i)})"
        return self._finding(i, Verdict.PASS, allowed=self.case.rtol, notes=(note,))

    @functools.cached_property
    def _nearby(self) -> NearbyGradients | None:
        pairs = zip(self.claimed, self.reference, strict=True)
        return sample_nearby(self.case, [c - r for c, r in pairs])

    def _gap(self, i: int) -> LeafGap:
        return leaf_gap(
            self.claimed[i],
            self.reference[i],
            rtol=self.case.rtol,
            floor=self.floors[i],
            beside=self._beside[i],
        )

    def _not_finite(self, i: int) -> Finding:
        claimed = self.claimed[i]
        index = tuple(int(n) for n in np.argwhere(~np.isfinite(claimed))[0])
        truth = None if self.exact is None else as_number(self.exact[i][index])
        return self._finding(
            i,
            Verdict.FAIL,
            size=np.inf,
            allowed=self.case.rtol,
            entry=Entry(index, as_number(claimed[index]), truth),
            cause=diagnose.not_finite(claimed, self._scene),
        )

    def _finding(self, i: int, verdict: Verdict, **fields: object) -> Finding:
        case, leaf = self.case, self.case.leaves[i]
        judged_by = "measured" if self.exact is None else "exact"
        return Finding(
            leaf.name,
            leaf.shape,
            np.dtype(leaf.dtype).name,
            verdict,
            mode=case.claim.mode,
            order=case.program.order,
            trial=case.trial,
            **({"judged_by": judged_by} | fields),  # type: ignore[arg-type]
        )


_SYMMETRIC_NOTE = (
    "right for symmetric changes of this symmetric matrix; the function reads a part "
    "of it, and to single entries the gradient does not apply"
)
_DECLARED_NOTE = (
    "with the products that expect_differs declares; differences confirmed the rest"
)
_FAINT_NOTE = "too faint for differences: judged by rule-free autodiff alone"
_NOISE_NOTE = "so small that float64 itself rounds it by as much"
_CONVENTION_NOTE = (
    "at a kink: it is what JAX takes for the derivative there (0 for relu at 0)"
)
_KINK_NOTE = "at a kink: gradients between those of its sides are accepted"
