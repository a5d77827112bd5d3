"""What a whole run of tests has checked: counts, and the one closing line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradtest._src.findings import Finding, Report, Verdict

# Smaller than this in the second digit a number is not rounded up.
_EXCESS = 1e-3


@dataclasses.dataclass
class Tally:
    """The sum of many reports.

    Attributes:
      gradients: Leaves on which there was a verdict; each report's count anew.
      rules: The custom rules that were audited: what tells each from the others.
      wrong: Leaves and rules found wrong.
      inconclusive: Leaves and rules about which nothing could be concluded.
      not_checked: Assertions that looked at nothing, as under `chex.disable_asserts()`.
      smallest_visible_error: Every relative error above it would have been seen in
        each gradient and rule with a verdict; None where no size was measured.
    """

    gradients: int = 0
    rules: set[str] = dataclasses.field(default_factory=set)
    wrong: int = 0
    inconclusive: int = 0
    not_checked: int = 0
    smallest_visible_error: float | None = None

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))

    @classmethod
    def of(cls, reports: Iterable[Report]) -> Tally:
        """Counts reports."""
        tally = cls()
        for report in reports:
            tally._add(report)
        return tally

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Tally:
        """Makes a tally of what `plain` returned."""
        return cls(**{**plain, "rules": set(plain["rules"])})

    def plain(self) -> dict[str, Any]:
        """Returns the tally in JSON's types."""
        fields = dataclasses.fields(self)
        plain = {field.name: getattr(self, field.name) for field in fields}
        return plain | {"rules": sorted(self.rules)}

    def include(self, other: Tally) -> None:
        """Adds the counts of another tally."""
        self.gradients += other.gradients
        self.rules |= other.rules
        self.wrong += other.wrong
        self.inconclusive += other.inconclusive
        self.not_checked += other.not_checked
        self._see(other.smallest_visible_error)

    def line(self, expected: int = 0) -> str:
        """Returns the closing line.

        Args:
          expected: How many leaves and rules were wrong in tests that did not fail.
        """
        parts = [
            f"{_counted(self.gradients, 'gradient')} checked",
            f"{_counted(len(self.rules), 'rule')} audited",
        ]
        if self.smallest_visible_error is not None:
            parts.append(
                f"smallest visible error {_rounded_up(self.smallest_visible_error)}"
            )
        if self.wrong:
            parts.append(f"{self.wrong} wrong")
        if expected:
            parts.append(f"{expected} wrong in tests that did not fail")
        if self.inconclusive:
            parts.append(f"{self.inconclusive} inconclusive")
        if self.not_checked:
            parts.append(f"{self.not_checked} not checked")
        return f"gradtest: {', '.join(parts)}"

    def _add(self, report: Report) -> None:
        from gradtest._src.findings import Gap, Verdict

        if report.verdict is Verdict.NOT_CHECKED:
            self.not_checked += 1
            return
        leaves, rules = _leaf_verdicts(report), _rule_verdicts(report)
        verdicts = [*leaves, *rules.values()]
        if report.verdict not in verdicts and report.verdict is not Verdict.PASS:
            verdicts.append(report.verdict)
        self.gradients += sum(verdict is not Verdict.INCONCLUSIVE for verdict in leaves)
        self.rules |= rules.keys()
        self.wrong += verdicts.count(Verdict.FAIL)
        self.inconclusive += verdicts.count(Verdict.INCONCLUSIVE)
        for finding in report.findings:
            if finding.gap in (Gap.FORMULA, Gap.CLOSE):
                self._see(finding.smallest_seen)  # infinite where inconclusive

    def _see(self, error: float | None) -> None:
        if error is not None and math.isfinite(error):
            self.smallest_visible_error = max(error, self.smallest_visible_error or 0.0)


def _leaf_verdicts(report: Report) -> list[Verdict]:
    """Returns one verdict for each gradient that a report is about, rules' aside."""
    from gradtest._src.findings import Gap, Verdict, worst

    own = [finding for finding in report.findings if finding.rule is None]
    if own and all(finding.gap is Gap.AGREEMENT for finding in own):
        return [worst(finding.verdict for finding in own)]  # one gradient, many ways
    # Forward mode sees the same derivative again, output by output.
    in_reverse = any(finding.mode == "rev" for finding in own)
    by_name: dict[str, list[Finding]] = {}
    for finding in own:
        if (
            finding.mode == "rev"
            or not in_reverse
            or finding.verdict is not Verdict.PASS
        ):
            by_name.setdefault(finding.name, []).append(finding)
    return [worst(f.verdict for f in findings) for findings in by_name.values()]


def _rule_verdicts(report: Report) -> dict[str, Verdict]:
    from gradtest._src.findings import worst

    return {
        " ".join((rule.kind, rule.name, *rule.where)): worst(
            finding.verdict for finding in report.findings if finding.rule == rule
        )
        for rule in report.rules
    }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _rounded_up(number: float) -> str:
    """Writes a number with two digits at most, and none smaller than it is."""
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(number))
    tenths = math.ceil(number / 10.0**exponent * 10 - _EXCESS)
    if tenths == 100:
        tenths, exponent = 10, exponent + 1
    return f"{tenths / 10:g}e{exponent}"
