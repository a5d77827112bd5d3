"""Puts mutants in the place of rules, one after the other, and runs their tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gradtest._src.jaxprs import rule_objects
from gradtest._src.power import suite_items, suite_mutants, suite_seen
from gradtest._src.power.seen import SeenRule
from gradtest._src.power.suite_mutants import Mutant
from gradtest._src.power.suite_options import PowerOptions
from gradtest._src.power.suite_results import (
    CAUGHT,
    EQUIVALENT,
    MISFIT,
    SURVIVED,
    MutantResult,
    Results,
    RuleResult,
)
from gradtest._src.power.suite_seen import Observer, SeenObject

# Errors of scale that are tried by bisection, from a doubling down.
_ERRORS = tuple(10 ** (-half / 2) for half in range(15))


@dataclasses.dataclass(eq=False)
class _Target:
    """The rule objects of one name, and what is known of them."""

    key: str
    objects: list[Any]
    seen: list[SeenObject]
    looks: list[SeenRule] = dataclasses.field(default_factory=list)
    mutants: list[Mutant] = dataclasses.field(default_factory=list)
    items: list[pytest.Item] = dataclasses.field(default_factory=list)


class Trial:
    """All runs against mutants in one process."""

    def __init__(
        self,
        config: pytest.Config,
        options: PowerOptions,
        results: Results,
        before: Observer,
    ):
        self._options = options
        self._results = results
        self._before = before
        self._line = _ProgressLine(config)

    def run(self, items: list[pytest.Item]) -> None:
        """Fills in the results, as far as these tests go."""
        observer = Observer(self._options.module)
        seconds = self._run_alone(items, observer)
        targets = self._targets(observer)
        self._results.unreached = {
            key: told
            for key, told in suite_seen.rules_in_modules(self._options.module).items()
            if key not in self._results.rules
        }
        for target in targets:
            self._prepare(target, items, seconds)
        total = sum(len(target.mutants) for target in targets)
        try:
            done = 0
            for target in targets:
                for mutant in target.mutants:
                    self._line.show(f"mutant {done + 1} of {total}: {target.key}")
                    self._try(target, mutant)
                    done += 1
                self._line.show(f"the smallest error in {target.key}")
                self._results.rules[target.key].smallest = _smallest_seen(target)
        finally:
            self._line.clear()

    def _run_alone(
        self, items: list[pytest.Item], observer: Observer
    ) -> dict[pytest.Item, float]:
        """Runs each test as it is, to see what it reaches; returns its seconds."""
        seconds: dict[pytest.Item, float] = {}
        with observer.watching():
            for number, item in enumerate(items, 1):
                self._line.show(f"looking at test {number} of {len(items)}")
                observer.now(item.nodeid)
                rule_objects.clear_caches()
                is_green, took = suite_items.timed(item)
                if is_green:
                    seconds[item] = took
                else:
                    why = "it does not pass when it is run a second time"
                    self._results.left_out[item.nodeid] = why
        rule_objects.clear_caches()
        return seconds

    def _targets(self, observer: Observer) -> list[_Target]:
        """Returns the rules whose objects last from one run of a test to the next."""
        targets: dict[str, _Target] = {}
        for seen in observer.seen:
            rule = seen.reference()
            if rule is None or self._before.known(rule) is None:
                self._created(seen)
                continue
            target = targets.setdefault(seen.key, _Target(seen.key, [], []))
            target.objects.append(rule)
            target.seen.append(seen)
        for key, target in targets.items():
            first = target.seen[0]
            self._results.rules[key] = RuleResult(first.kind, first.where)
        return [targets[key] for key in sorted(targets)]

    def _created(self, seen: SeenObject) -> None:
        self._results.created[seen.key] = (seen.kind, seen.where.get("fun", "?"))

    def _prepare(
        self,
        target: _Target,
        items: Sequence[pytest.Item],
        seconds: dict[pytest.Item, float],
    ) -> None:
        """Finds a rule's mutants, and the tests that may catch them."""
        result = self._results.rules[target.key]
        for seen in target.seen:
            result.calling |= seen.calling
            result.tests |= seen.differentiating
        passing = [item for item in items if item in seconds]
        target.items = sorted(
            (item for item in passing if item.nodeid in result.tests),
            key=lambda item: seconds[item],
        )
        result.calling &= {item.nodeid for item in passing}
        result.tests &= {item.nodeid for item in passing}
        try:
            for rule, seen in zip(target.objects, target.seen, strict=True):
                result.trouble = rule_objects.trouble_with(rule)
                if result.trouble:
                    return
                target.looks += suite_mutants.looked_at(rule, seen.arguments.values())
            target.mutants = suite_mutants.mutants_of(
                target.looks, self._options.mutants
            )
        except (
            Exception
        ) as error:  # of the user's rule, at arguments it was called with
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            result.trouble = f"its derivative can't be traced by itself ({text})"

    def _try(self, target: _Target, mutant: Mutant) -> None:
        outcome = CAUGHT if _is_caught(target, mutant) else SURVIVED
        if mutant.misfits:
            outcome = MISFIT
        if outcome == SURVIVED and not mutant.second_order:
            outcome = EQUIVALENT if _is_right(target, mutant) else SURVIVED
        self._results.rules[target.key].mutants[mutant.key] = MutantResult(
            mutant.key,
            mutant.part,
            mutant.says,
            mutant.size,
            mutant.second_order,
            outcome,
        )


def _is_caught(target: _Target, mutant: Mutant) -> bool:
    with mutant.in_place(target.objects):
        return suite_items.any_caught(target.items)


def _is_right(target: _Target, mutant: Mutant) -> bool:
    from gradtest._src.power.suite_equivalence import is_equivalent

    return all(
        is_equivalent(rule, seen.arguments.values(), mutant)
        for rule, seen in zip(target.objects, target.seen, strict=True)
    )


def _smallest_seen(target: _Target) -> float | None:
    """Returns the smallest of some errors of scale that a test sees, by bisection."""
    if not target.items or not target.mutants:
        return None

    def is_seen(error: float) -> bool:
        return _is_caught(target, suite_mutants.scaling(target.looks, 1 + error))

    return bisected(_ERRORS, is_seen)


def bisected(errors: Sequence[float], is_seen: Callable[[float], bool]) -> float | None:
    """Returns the last of some falling numbers that is seen; None where none is."""
    low, high = 0, len(errors)  # before `low` all are seen, from `high` on none
    while low < high:
        middle = (low + high) // 2
        if is_seen(errors[middle]):
            low = middle + 1
        else:
            high = middle
    return errors[low - 1] if low else None


class _ProgressLine:
    """A line that is written over on a terminal, and nothing elsewhere."""

    def __init__(self, config: pytest.Config):
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        is_shown = getattr(reporter, "isatty", False) and config.get_verbosity() > -2
        self._reporter = reporter if is_shown else None
        if self._reporter is not None:
            self._reporter.ensure_newline()

    def show(self, text: str) -> None:
        """Shows how far the run is."""
        if self._reporter is not None:
            self._reporter.rewrite(f"gradtest power: {text}"[:100], erase=True)

    def clear(self) -> None:
        """Takes the line away."""
        if self._reporter is not None:
            self._reporter.rewrite("", erase=True)
