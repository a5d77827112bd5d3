"""What a run of mutants against a suite has found, and how it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CAUGHT, SURVIVED, EQUIVALENT, MISFIT = "caught", "survived", "equivalent", "misfit"
# Of what several processes say of a mutant, the first of these holds.
_GRAVITY = (CAUGHT, EQUIVALENT, SURVIVED, MISFIT)
_ASIDE = {
    SURVIVED: "it shows in second derivatives only, and no test saw it",
    EQUIVALENT: "it is equivalent: the derivative is the same to 1e-12 where compared",
    MISFIT: "it could not be carried out",
}


@dataclasses.dataclass
class MutantResult:
    """What became of one mutant.

    Attributes:
      key: What tells it from the rule's other mutants.
      part: What was broken: "bwd", "fwd" or "jvp".
      says: What was different.
      size: The number of elements that `says` speaks of.
      second_order: Whether it only shows in derivatives of the derivative.
      outcome: "caught", "survived", "equivalent" (it is not wrong) or "misfit" (it
        could not be carried out).
    """

    key: str
    part: str
    says: str
    size: int
    second_order: bool
    outcome: str

    @property
    def counts(self) -> bool:
        """Whether it is to be counted: not where no first derivative shows it."""
        return self.outcome == CAUGHT or (
            self.outcome == SURVIVED and not self.second_order
        )

    def include(self, other: MutantResult) -> None:
        """Adds what another process has found of it."""
        self.outcome = min(self.outcome, other.outcome, key=_GRAVITY.index)
        if (other.size, other.says) > (self.size, self.says):
            self.size, self.says = other.size, other.says


@dataclasses.dataclass
class RuleResult:
    """What was found of one rule.

    Attributes:
      kind: "custom_vjp" or "custom_jvp".
      where: Its function and its parts, each as "file:line".
      calling: The tests that call it.
      tests: Those of them that go through its derivative.
      mutants: Its mutants, by their keys.
      smallest: The smallest relative error of scale that a test sees; None for none.
      trouble: Why it was not broken; empty where it was.
    """

    kind: str
    where: dict[str, str]
    calling: set[str] = dataclasses.field(default_factory=set)
    tests: set[str] = dataclasses.field(default_factory=set)
    mutants: dict[str, MutantResult] = dataclasses.field(default_factory=dict)
    smallest: float | None = None
    trouble: str = ""

    def include(self, other: RuleResult) -> None:
        """Adds what another process has found of it."""
        self.calling |= other.calling
        self.tests |= other.tests
        for key, mutant in other.mutants.items():
            if key in self.mutants:
                self.mutants[key].include(mutant)
            else:
                self.mutants[key] = mutant
        seen = [s for s in (self.smallest, other.smallest) if s is not None]
        self.smallest = min(seen, default=None)
        self.trouble = self.trouble if other.trouble and self.trouble else ""

    def counted(self, outcome: str) -> list[MutantResult]:
        """Returns the mutants with an outcome that are to be counted."""
        return [
            mutant
            for _, mutant in sorted(self.mutants.items())
            if mutant.counts and mutant.outcome == outcome
        ]


@dataclasses.dataclass
class Results:
    """What was found of all rules.

    Attributes:
      rules: The rules that tests reach, by what they are called.
      unreached: The kind and place of rules that no test reaches, as far as known here.
      created: Kind and place of rules that were made inside of a test or a function.
      left_out: Why tests were not run against mutants.
      sample: How many mutants of each rule were wanted; None for all.
      is_whole: Whether the run came to its end.
      of: Whose rules were asked for.
    """

    rules: dict[str, RuleResult] = dataclasses.field(default_factory=dict)
    unreached: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    created: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    sample: int | None = None
    is_whole: bool = True
    of: str = "your code"

    def plain(self) -> dict[str, Any]:
        """Returns the results in JSON's types."""
        plain = dataclasses.asdict(self)
        for rule in plain["rules"].values():
            for name in ("calling", "tests"):
                rule[name] = sorted(rule[name])
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Results:
        """Makes results of what `plain` returned."""
        rules = {}
        for key, rule in plain["rules"].items():
            mutants = {k: MutantResult(**m) for k, m in rule["mutants"].items()}
            sets = {name: set(rule[name]) for name in ("calling", "tests")}
            rules[key] = RuleResult(**{**rule, **sets, "mutants": mutants})
        return cls(**{**plain, "rules": rules})

    def include(self, other: Results) -> None:
        """Adds what another process has found with its share of the tests."""
        for key, rule in other.rules.items():
            if key in self.rules:
                self.rules[key].include(rule)
            else:
                self.rules[key] = rule
        self.unreached |= other.unreached
        self.created |= other.created
        self.left_out |= other.left_out
        self.sample = other.sample
        self.is_whole &= other.is_whole

    def settle(self) -> None:
        """Draws the sample anew, and strikes out what the whole suite knows better."""
        from gradtest._src.power.suite_mutants import sampled

        for rule in self.rules.values():
            kept = sampled(sorted(rule.mutants.values(), key=_key), self.sample)
            rule.mutants = {mutant.key: mutant for mutant in kept}
        for key in self.rules:
            self.unreached.pop(key, None)
            self.created.pop(key, None)
        for key in self.created:
            self.unreached.pop(key, None)

    @property
    def caught(self) -> int:
        """How many mutants were caught."""
        return sum(len(rule.counted(CAUGHT)) for rule in self.rules.values())

    @property
    def total(self) -> int:
        """How many mutants count."""
        survived = sum(len(rule.counted(SURVIVED)) for rule in self.rules.values())
        return self.caught + survived

    @property
    def percentage(self) -> float | None:
        """The share of mutants that were caught; None where there was none."""
        return 100 * self.caught / self.total if self.total else None

    def lines(self, least: float | None = None) -> Iterator[str]:
        """Yields the lines of the summary.

        Args:
          least: The percentage that is asked for, if any.
        """
        for key, rule in sorted(self.rules.items()):
            yield from _of_a_rule(key, rule)
        yield from _listed(
            "No test reaches these rules:",
            (
                f"{k} ({kind}) at {at}"
                for k, (kind, at) in sorted(self.unreached.items())
            ),
        )
        yield from _listed(
            "Unreached by power: created inside of a test or a function, so they can't "
            "be replaced:",
            (f"{k} ({kind}) at {at}" for k, (kind, at) in sorted(self.created.items())),
        )
        yield from _listed(
            "Tests that were left out:",
            (f"{test}: {why}" for test, why in sorted(self.left_out.items())),
        )
        yield self._closing(least)

    def _closing(self, least: float | None) -> str:
        parts = []
        if self.total:
            share = f"{_floored(self.percentage or 0.0)} %"
            total = _counted(self.total, "mutant")
            parts.append(f"{self.caught} of {total} caught ({share})")
        else:
            parts.append("there was no mutant to run")
            if self.is_whole and not (self.rules or self.unreached or self.created):
                parts.append(f"no custom rule of {self.of} was found")
        parts.append(_counted(len(self.rules), "rule"))
        if self.sample is not None:
            most = _counted(self.sample, "mutant")
            parts.append(f"a sample of at most {most} of each")
        if self.unreached or self.created:
            parts.append(f"{len(self.unreached) + len(self.created)} not reached")
        if not self.is_whole:
            parts.append("broken off before the end")
        if least is not None and self.is_short_of(least):
            parts.append(f"less than the {least:g} % asked for")
        return f"gradtest power: {', '.join(parts)}"

    def is_short_of(self, least: float) -> bool:
        """Whether fewer were caught than asked for; so too where nothing was run."""
        return not self.is_whole or self.percentage is None or self.percentage < least


def _key(mutant: MutantResult) -> str:
    return mutant.key


def _of_a_rule(key: str, rule: RuleResult) -> Iterator[str]:
    head = f"{key} ({rule.kind}) at {rule.where.get('fun', '?')}"
    if rule.trouble:
        yield f"{head}: not broken, {rule.trouble}"
        return
    caught, survived = rule.counted(CAUGHT), rule.counted(SURVIVED)
    yield f"{head}: {len(caught)} caught, {len(survived)} survived"
    yield f"  {_reach(rule)}"
    for mutant in survived:
        where = rule.where.get(mutant.part, "?")
        yield f"  survived: {mutant.says} ({mutant.part} at {where})"
    yield from _aside(rule)


def _reach(rule: RuleResult) -> str:
    if not rule.tests:
        return (
            f"called by {_counted(len(rule.calling), 'test')}, differentiated by none"
        )
    by = f"differentiated by {_counted(len(rule.tests), 'test')}"
    if rule.smallest is None:
        return f"{by}; not even twice the derivative would be seen"
    return f"{by}; smallest scale error that would be seen: {rule.smallest:.1g}"


def _aside(rule: RuleResult) -> Iterator[str]:
    for _, mutant in sorted(rule.mutants.items()):
        if mutant.counts:
            continue
        yield f"  not counted: {mutant.says} ({_ASIDE[mutant.outcome]})"


def _listed(title: str, entries: Iterable[str]) -> Iterator[str]:
    lines = list(entries)
    if lines:
        yield title
        yield from (f"  {line}" for line in lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _floored(percentage: float) -> str:
    """Writes a percentage so that only all is a hundred."""
    return f"{int(percentage * 10) / 10:g}"
