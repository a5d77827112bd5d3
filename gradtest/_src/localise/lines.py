"""The line of source that a wrong derivative comes from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.case import Case
from gradtest._src.findings import Finding, Gap, Line, Verdict
from gradtest._src.jaxprs import Place, RuleSource
from gradtest._src.localise import source as sources
from gradtest._src.localise.finite import first_not_finite
from gradtest._src.localise.naming import (
    BY_STRUCTURE,
    line_at,
    line_of,
    mended,
    return_line,
)
from gradtest._src.localise.precision import coarse_step
from gradtest._src.localise.reductions import collectives, only_reduction
from gradtest._src.localise.rewiring import taken_for_another
from gradtest._src.localise.scene import MOST_ENTRIES, Stage, relative_gap
from gradtest._src.localise.search import Search, Suspect, Take
from gradtest._src.localise.steps import Constant, Step
from gradtest._src.localise.target import Target
from gradtest._src.localise.ties import tied_step

# Programs of more equations are not searched.
_MOST_STEPS = 2000
# Steps that only pass values on.
_LAYOUT = frozenset(
    ["convert_element_type", "reshape", "squeeze", "expand_dims", "copy",
     "broadcast_in_dim", "transpose", "sharding_constraint", "copy_p", "pvary",
     "reduce_precision"]
)  # fmt: skip
# Causes that a mask mends, which is usually put on what is returned.
_MASKS = ("padded entries get gradient", "wrong on one branch")


def guilty_line(
    case: Case,
    findings: Sequence[Finding],
    source: RuleSource | None,
) -> Line | None:
    """Returns the line at which a claim parts from the truth.

    Args:
      case: The case that did not pass.
      findings: What was found of it.
      source: Where the custom rule under test was written, if it is one.

    Returns:
      The line; None where none is known.
    """
    if case.claim.is_apart:
        return only_reduction(case.claim.jaxpr)
    if case.claim.devices:
        return None
    wrong = [f for f in findings if f.verdict is Verdict.FAIL]
    gaps = {finding.gap for finding in wrong}
    if gaps.isdisjoint((Gap.FORMULA, Gap.VALUE)):
        if Gap.ROUNDING in gaps:
            return line_of(*coarse_step(Target(case, case.claim)))
        return return_line(source)
    forward = case.bench.forward
    is_forward = source is not None and source.kind == "custom_jvp"
    if all(finding.mode == "fwd" for finding in wrong):
        is_forward = True
    claim = forward if forward and is_forward else case.claim
    finder = _Finder(Target(case, claim, wrong), source)
    return finder.line()


class _Finder:
    """Finds the line of one claim."""

    def __init__(self, target: Target, source: RuleSource | None):
        self.target, self.source = target, source
        self.steps = target.steps

    def line(self) -> Line | None:
        """Returns the likeliest line."""
        if self.target.case.program.order > 1:
            return self._stopped() or self._tied() or self._by_structure()
        if not all(np.isfinite(result).all() for result in self.target.claimed):
            step, says = first_not_finite(self.target)
            return line_of(step, says, 0.9) or self._by_structure()
        if self.source is None and self.target.claim.is_autodiff:
            return self._tied()  # nothing in it is written by hand but rules
        if self._is_permuted():
            line = return_line(self.source, says="its results have changed places")
            return line or self._by_structure()
        suspects = self._suspects()
        line = None
        if not suspects or self._comes_from_forward(suspects[0]):
            line = self._taken_for_another()
        if line is None and suspects:
            line = self._summed(suspects) or self._proved(suspects)
        return line or self._tied() or self._by_structure()

    def _comes_from_forward(self, suspect: Suspect) -> bool:
        """Whether a step lacks a value of the forward pass, or has a wrong one."""
        if suspect.borrows is None:
            return False
        replaced, taken = suspect.borrows
        ranges = self._ranges("bwd")
        made = {
            slot: self._is_within(number, ranges)
            for number, step in enumerate(self.steps.steps)
            for slot in step.results
        }
        handed = not isinstance(replaced, Constant) and made.get(replaced) is False
        return handed or made.get(taken) is False

    def _is_permuted(self) -> bool:
        """Whether what is wrong is right in another order."""
        target = self.target
        if len(target.wrong) < 2 or target.truth is None:
            return False
        claimed = [target.claimed[i] for i in target.wrong]
        true = [target.truth[i] for i in target.wrong]
        return any(
            all(
                c.shape == t.shape and relative_gap([c], [t], [c]) <= 1e-6
                for c, t in zip(claimed, order, strict=True)
            )
            for order in itertools.islice(itertools.permutations(true), 200)
        )

    def _proved(self, suspects: list[Suspect]) -> Line | None:
        """Returns the line of the likeliest suspect."""
        places = [self._named(suspect.number) for suspect in suspects]
        lines = [place and (place.file, place.number) for place in places]
        same = sum(
            suspect.weight
            for suspect, line in zip(suspects, lines, strict=True)
            if line == lines[0]
        )
        share = same / sum(suspect.weight for suspect in suspects)
        return line_at(places[0], mended(suspects[0].says), 0.95 * share)

    def _step(self, number: int) -> Step:
        return self.steps.steps[number]

    def _is_within(self, number: int, ranges: list[tuple[str, range]]) -> bool:
        place = self._step(number).place
        return place is not None and any(place.within(*each) for each in ranges)

    def _named(self, number: int) -> Place | None:
        """Returns the line to name for a step.

        A function that the value is computed by as well is not to blame for how the
        derivative calls it.
        """
        place = self._step(number).place
        if place is None:
            return place
        ranges = self._ranges("fwd", "bwd", "jvp")
        own = [found for each in ranges if (found := place.within(*each))]
        bare = dataclasses.replace(place, callers=())
        is_others = any(bare.within(*each) for each in self._of_other_rules)
        is_shared = is_others or bare in self._of_function
        return own[0] if own and is_shared else place

    @functools.cached_property
    def _of_other_rules(self) -> list[tuple[str, range]]:
        """The lines of the rules that this one calls: they are audited apart."""
        own = self._ranges("fwd", "bwd", "jvp")
        eqns = jaxprs.walk(self.target.case.program.jaxpr)
        found = [
            (path, sources.function_lines(path, number))
            for eqn in eqns
            if eqn.primitive.name in jaxprs.CUSTOM_RULES
            for places in sources.parts(jaxprs.read_rule(eqn)).values()
            for path, number in places
        ]
        return [each for each in dict.fromkeys(found) if each[1] and each not in own]

    @functools.cached_property
    def _of_function(self) -> set[Place]:
        """The expressions, whoever calls them, that the function itself runs."""
        target = self.target
        ranges = self._ranges("fwd", "bwd", "jvp")
        eqns = jaxprs.walk(target.case.program.jaxpr)
        places = [jaxprs.users_place(eqn) for eqn in eqns]
        places += [self._step(i).place for i in target.feeding(range(self._values))]
        return {
            dataclasses.replace(place, callers=())
            for place in places
            if place and not any(place.within(*each) for each in ranges)
        }

    @property
    def _values(self) -> int:
        """How many of the claim's results are those of the function."""
        target = self.target
        is_forward = target.claim.mode == "fwd"
        found = target.case.program.outputs if is_forward else target.case.leaves
        return len(target.claimed) - len(found)

    # --- what numbers prove ------------------------------------------------------

    def _suspects(self) -> list[Suspect]:
        """Returns the steps that an edit proves to be at fault."""
        target = self.target
        candidates = [
            i
            for i in sorted(target.feeding(target.wrong))
            if self._step(i).results
            and self.steps.is_floating(self._step(i).results[0])
        ]
        if not candidates or not self._is_searchable():
            return []
        stage = Stage(target.case, target.claim, self.steps, candidates)
        assert target.truth is not None
        try:
            here = target.point, target.seed, target.truth
            takes = [
                Take(stage.scene(*at), at[0], at[1])
                for at in (here, target.elsewhere())
                if at is not None
            ]
        except Exception:  # whatever differentiating a claim may raise
            return []
        return Search(stage, takes).suspects()

    def _is_searchable(self) -> bool:
        """Whether every entry has a truth, and the program is not too large."""
        target = self.target
        if target.truth is None or len(self.steps.steps) > _MOST_STEPS:
            return False
        entries = sum(
            int(np.prod(aval.shape))
            for aval in self.steps.types
            if hasattr(aval, "shape")
        )
        results = (*target.truth, *target.claimed)
        return entries <= MOST_ENTRIES and all(np.isfinite(r).all() for r in results)

    def _summed(self, suspects: list[Suspect]) -> Line | None:
        """Returns the line of a sum over devices, where their number is the factor."""
        for suspect in suspects:
            for number in sorted(self.target.feeding(self.target.wrong)):
                for eqn, size in collectives(self._step(number).eqn):
                    factors = (1 / size, 1 / size**2, size, size**2)
                    if suspect.factor is None or size == 1:
                        continue
                    if any(abs(suspect.factor / f - 1) < 1e-6 for f in factors):
                        place = jaxprs.users_place(eqn)
                        says = f"the factor is the number of devices, {size}"
                        return line_at(place, says, 0.8)
        return None

    def _taken_for_another(self) -> Line | None:
        """Returns the line of `fwd` that hands residuals in the wrong places."""
        ranges = self._ranges("bwd")
        numbers = range(len(self.steps.steps))
        backward = {i for i in numbers if self._is_within(i, ranges)}
        if not backward or not self._is_searchable():
            return None
        found = taken_for_another(self.target, backward)
        if found is None:
            return None
        says = mended(found.says)
        ranges = self._ranges("fwd")
        for number, step in enumerate(self.steps.steps):
            if found.slot in step.results and self._is_within(number, ranges):
                return line_at(self._named(number), says, 0.7)
        line = return_line(self.source, in_value=True)
        return line and dataclasses.replace(line, says=says, likelihood=0.7)

    def _tied(self) -> Line | None:
        """Returns the line that is not smooth here, where no rule is at fault."""
        if self.source is not None or self.target.truth is not None:
            return None
        step, says = tied_step(self.target)
        return line_of(step, says, 0.6)

    # --- what the program's structure suggests ------------------------------------

    def _stopped(self) -> Line | None:
        """Returns the line of a `stop_gradient` in what is differentiated once more."""
        for step in self.steps.steps:
            if step.name == jaxprs.STOP_GRADIENT and self._is_in_rule(step.place):
                return line_at(
                    step.place, "what is stopped here has a derivative of its own", 0.7
                )
        return None

    def _is_in_rule(self, place: Place | None) -> bool:
        if place is None:
            return False
        ranges = self._ranges()
        return not ranges or any(place.within(*each) for each in ranges)

    def _ranges(self, *parts: str) -> list[tuple[str, range]]:
        """Returns the lines of the rule's hand-written parts, where they are known."""
        if self.source is None:
            return []
        return [
            (path, lines)
            for part, places in sources.parts(self.source).items()
            if not parts or part in parts
            for path, number in places
            if (lines := sources.function_lines(path, number))
        ]

    def _by_structure(self) -> Line | None:
        """Returns the last line that what is wrong, and it alone, is computed on."""
        target = self.target
        if not target.wrong:
            return return_line(self.source)
        in_value = any(i < self._values for i in target.wrong)
        ranges = self._ranges(*(("fwd", "jvp") if in_value else ("bwd", "jvp")))

        def feeding(output: int) -> set[int]:
            found = target.feeding([output])
            if not ranges:
                return found
            return {i for i in found if self._is_within(i, ranges)}

        each = [feeding(i) for i in target.wrong]
        if ranges and not all(each):
            return self._zeros() or return_line(self.source, in_value)
        others = [
            feeding(i) for i in range(len(target.claimed)) if i not in target.wrong
        ]
        right = set().union(*others)
        shared, some = set.intersection(*each), set().union(*each)
        for chosen in (shared - right, some - right, shared, some):
            solid = [i for i in chosen if self._step(i).name not in _LAYOUT]
            if chosen:
                place = self._named(max(solid or chosen))
                says = "what is wrong is computed here last"
                line = self._unmasked(place)
                return line or line_at(place, says, BY_STRUCTURE)
        return return_line(self.source, in_value)

    def _unmasked(self, place: Place | None) -> Line | None:
        """Returns the line that returns what should be masked, if that is another."""
        found = return_line(self.source)
        masks = any(f.cause and f.cause.name in _MASKS for f in self.target.findings)
        if not masks or place is None or found is None:
            return None
        if found.file != place.file or found.number <= place.number:
            return None
        says = "what is wrong is returned here as it is"
        return dataclasses.replace(found, says=says)

    def _zeros(self) -> Line | None:
        """Returns the line that makes the zeros which are returned as they are."""
        target = self.target
        if any(target.claimed[i].any() for i in target.wrong) or self.source is None:
            return None
        for path, number in sources.parts(self.source).get("bwd", ()):
            found = sources.zeros_line(path, number)
            if found is not None:
                place = Place(path, found, function="bwd")
                return line_at(place, "zeros are made here", 0.5)
        return None
