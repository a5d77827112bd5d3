"""What came of breaking a program's rules: counts, survivors, and a plain text."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
from collections.abc import Iterator, Sequence

SCHEMA = "gradtest.power/1"
_MOST_SHOWN = 20


class Outcome(enum.Enum):
    """What came of one mutant."""

    CAUGHT = "caught"
    SURVIVED = "survived"
    SECOND_ORDER = "seen at second order only"
    EQUIVALENT = "equivalent"
    MALFORMED = "malformed"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One rule, broken in one way.

    Attributes:
      name: The kind of slip, such as "scale 1.01".
      which: The leaf, residual or line that it concerns.
      says: What is different, such as "dw zero in rows 0..31".
      at: Where the broken part stands, as "bwd at file:line".
      outcome: What came of it.
      why: How it was caught; why it was not; why it is equivalent; what it raised.
      error: Of a survivor, how far the broken derivative is from the right one at most,
        relative to it; None where that is not known.
    """

    name: str
    which: str
    says: str
    at: str
    outcome: Outcome
    why: str = ""
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class RulePower:
    """What came of breaking one rule.

    Attributes:
      name: The rule.
      kind: "custom_vjp" or "custom_jvp".
      at: Where its function stands, as "name at file:line".
      mutants: What came of each.
      smallest_scale: The smallest error of scale that was caught, of 1e-1, 1e-2, ...;
        None where none was, or none was tried.
      trouble: Why it was not broken: not reached, or no derivative to break.
      made: How many mutants there are, of which these are a sample.
    """

    name: str
    kind: str
    at: str
    mutants: tuple[Mutant, ...] = ()
    smallest_scale: float | None = None
    trouble: str = ""
    made: int = 0

    def count(self, outcome: Outcome) -> int:
        """Returns how many mutants had an outcome."""
        return sum(mutant.outcome is outcome for mutant in self.mutants)


@dataclasses.dataclass(frozen=True)
class Power:
    """What an assertion is worth: which broken rules it catches.

    Attributes:
      subject: Name of the function whose rules were broken.
      assertion: Name of the assertion that was to catch them.
      rules: What came of each rule.
      key: Says how what was drawn can be drawn again.
      notes: What else is to be known.
    """

    subject: str
    assertion: str
    rules: tuple[RulePower, ...]
    key: str = "0"
    notes: tuple[str, ...] = ()

    @property
    def mutants(self) -> tuple[Mutant, ...]:
        """All mutants, of all rules."""
        return tuple(mutant for rule in self.rules for mutant in rule.mutants)

    def of_outcome(self, outcome: Outcome) -> tuple[Mutant, ...]:
        """Returns the mutants of an outcome."""
        return tuple(m for m in self.mutants if m.outcome is outcome)

    @property
    def caught(self) -> tuple[Mutant, ...]:
        """The mutants that the assertion caught."""
        return self.of_outcome(Outcome.CAUGHT)

    @property
    def survived(self) -> tuple[Mutant, ...]:
        """The mutants that are wrong, and that it let pass."""
        return self.of_outcome(Outcome.SURVIVED)

    @property
    def second_order(self) -> tuple[Mutant, ...]:
        """Those that are wrong in second derivatives alone, and that it let pass."""
        return self.of_outcome(Outcome.SECOND_ORDER)

    @property
    def equivalent(self) -> tuple[Mutant, ...]:
        """Those that are not wrong after all; they count for nothing."""
        return self.of_outcome(Outcome.EQUIVALENT)

    @property
    def malformed(self) -> tuple[Mutant, ...]:
        """Those that made something else raise than the assertion."""
        return self.of_outcome(Outcome.MALFORMED)

    @property
    def unreached(self) -> tuple[RulePower, ...]:
        """The rules that could not be broken, or that nothing reaches."""
        return tuple(rule for rule in self.rules if rule.trouble)

    @property
    def rate(self) -> float:
        """The part of the wrong mutants that were caught; 1 where there are none."""
        missed = len(self.survived) + len(self.second_order)
        wrong = len(self.caught) + missed
        return len(self.caught) / wrong if wrong else 1.0

    @property
    def smallest_scale(self) -> float | None:
        """The error of scale that was caught in every rule that was broken."""
        broken = [rule for rule in self.rules if rule.mutants]
        found = [r.smallest_scale for r in broken if r.smallest_scale is not None]
        return max(found) if found and len(found) == len(broken) else None

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> str:
        """Returns all of it as JSON text, with a `schema` that names its form."""
        plain = dataclasses.asdict(self)
        for rule in plain["rules"]:
            for mutant in rule["mutants"]:
                mutant["outcome"] = mutant["outcome"].value
        return json.dumps({"schema": SCHEMA, **plain}, indent=1)


def _lines(power: Power) -> Iterator[str]:
    yield f"Power of {power.assertion} on {power.subject}: {_summary(power)}."
    for rule in power.rules:
        yield f"  {rule.kind} {rule.at}: {_of_rule(rule)}"
        for outcome, word in _SHOWN.items():
            mutants = [m for m in rule.mutants if m.outcome is outcome]
            yield from _told(mutants, word)
    yield from (f"  Note: {note}" for note in power.notes)


_SHOWN = {
    Outcome.SURVIVED: "SURVIVED",
    Outcome.SECOND_ORDER: "SEEN AT SECOND ORDER ONLY",
    Outcome.MALFORMED: "MALFORMED",
    Outcome.EQUIVALENT: "equivalent",
}


def _told(mutants: Sequence[Mutant], word: str) -> Iterator[str]:
    for mutant in mutants[:_MOST_SHOWN]:
        why = f" ({mutant.why})" if mutant.why else ""
        yield f"    {word}  {mutant.at}: {mutant.says}{why}"
    if mutants[_MOST_SHOWN:]:
        yield f"    and {len(mutants) - _MOST_SHOWN} more {word.lower()}"


def _summary(power: Power) -> str:
    counts = collections.Counter(mutant.outcome for mutant in power.mutants)
    missed = counts[Outcome.SURVIVED] + counts[Outcome.SECOND_ORDER]
    caught = counts[Outcome.CAUGHT]
    if not caught + missed:
        parts = ["no mutant to catch"]
    else:
        parts = [f"{caught} of {caught + missed} mutants caught"]
    for outcome in (Outcome.SURVIVED, Outcome.SECOND_ORDER):
        if counts[outcome]:
            parts.append(f"{counts[outcome]} {outcome.value}")
    if counts[Outcome.EQUIVALENT]:
        parts.append(f"{counts[Outcome.EQUIVALENT]} equivalent, not counted")
    if counts[Outcome.MALFORMED]:
        parts.append(f"{counts[Outcome.MALFORMED]} malformed, not counted")
    if power.unreached:
        parts.append(f"{len(power.unreached)} of {len(power.rules)} rules not broken")
    return "; ".join(parts)


def _of_rule(rule: RulePower) -> str:
    if rule.trouble:
        return f"NOT BROKEN: {rule.trouble}"
    missed = rule.count(Outcome.SURVIVED) + rule.count(Outcome.SECOND_ORDER)
    caught = rule.count(Outcome.CAUGHT)
    parts = [f"{caught} of {caught + missed} caught"]
    if rule.made > len(rule.mutants):
        parts.append(f"a sample of {len(rule.mutants)} out of {rule.made} mutants")
    if rule.smallest_scale is not None:
        parts.append(f"smallest error of scale seen {rule.smallest_scale:.0e}")
    return ", ".join(parts)
