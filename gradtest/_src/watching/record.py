"""What was checked when: the state of a watcher, as it is saved and told."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradtest._src.findings import Report, Verdict
from gradtest._src.watching.verdict import Explained

_FORMAT = 1
_NEVER = -1
# The last checks that the summary lists.
_LISTED = 8


def digest(*texts: str) -> int:
    """Returns a positive number of 31 bits that stands for texts."""
    data = "\n".join(texts).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little") % (2**31 - 1) + 1


@dataclasses.dataclass(frozen=True)
class Look:
    """One check, in a line.

    Attributes:
      step: Before which step of the training.
      verdict: What came of it.
      how: "screened", "in full", or which rules were audited.
      seconds: What it took, without compiling.
    """

    step: int
    verdict: Verdict
    how: str
    seconds: float


class Record:
    """What a watcher remembers from check to check.

    Attributes:
      names: Of the leaves, once they are known.
      last: The step of the last check; None before the first.
      checks: How many there were.
      in_full: How many of them looked at the gradient with a whole check.
      failures: How many failed, and `open`: how many were inconclusive.
      leaf_steps: When each leaf was looked at last, -1 for never.
      rule_steps: The same of each rule, by the digest of its name.
      explained: What whole checks found to be no mistake.
      looks: The last checks of this run.
    """

    def __init__(self, loss_name: str):
        self._loss = digest(loss_name)
        self._loss_name = loss_name
        self._leaves = 0
        self.names: list[str] = []
        self.last: int | None = None
        self.checks = self.in_full = self.failures = self.open = 0
        self.leaf_steps = np.full(1, _NEVER)
        self.rule_steps: dict[int, int] = {}
        self.explained = Explained.nothing(1)
        self.looks: list[Look] = []

    def of_leaves(self, names: Sequence[str], described: Sequence[str]) -> None:
        """Takes note of the leaves of the parameters, once they are known.

        Raises:
          ValueError: A restored state is of other leaves.
        """
        found = digest(*described)
        if self._leaves and found != self._leaves:
            raise ValueError(
                f"`params` has other leaves ({', '.join(described[:3])}"
                f"{', …' * (len(described) > 3)}) than those that this watcher, or the "
                "state that it was given, has watched: make another watcher for them."
            )
        self.names = list(names)
        if not self._leaves:
            self._leaves = found
            self.leaf_steps = np.full(len(names), _NEVER)
            self.explained = Explained.nothing(len(names))

    def add(self, look: Look, *, in_full: bool) -> None:
        """Takes note of a check."""
        self.last = look.step
        self.checks += 1
        self.in_full += in_full
        self.failures += look.verdict is Verdict.FAIL
        self.open += look.verdict is Verdict.INCONCLUSIVE
        self.looks = [*self.looks, look][-_LISTED:]

    def looked_at(self, positions: Sequence[int], step: int) -> None:
        """Takes note of the leaves that a check compared."""
        self.leaf_steps[list(positions)] = step

    def audited(self, report: Report, step: int) -> None:
        """Takes note of the rules that a check audited."""
        for rule in report.rules:
            self.rule_steps[digest(rule.name)] = step

    # --- saved and restored ---------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns it all as arrays."""
        known = self.explained
        rules = self.rule_steps or {0: _NEVER}  # an empty array can't be saved
        numbers = {
            "format": _FORMAT,
            "loss": self._loss,
            "leaves": self._leaves,
            "last_step": _NEVER if self.last is None else self.last,
            "checks": self.checks,
            "checks_in_full": self.in_full,
            "failures": self.failures,
            "inconclusive": self.open,
            "leaf_steps": self.leaf_steps,
            "explained_gaps": known.gaps,
            "explained_rounding": known.rounding,
            "at_kink": known.kinks.astype(np.int64),
            "rules": list(rules),
            "rule_steps": list(rules.values()),
        }
        return {name: np.array(value) for name, value in numbers.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
          TypeError, ValueError: It is none, or one of another loss or other leaves.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                "`state` must be what `state_dict()` returned, a dict of arrays, got "
                f"{type(state).__name__}."
            )
        wanted = self.state_dict()
        missing = sorted(set(wanted) - set(state))
        if missing:
            raise ValueError(
                f"`state` must be what `state_dict()` returned, but lacks "
                f"{', '.join(map(repr, missing))}."
            )
        arrays = {name: np.asarray(state[name]) for name in wanted}
        self._require_same(arrays)
        numbers = {name: int(a) for name, a in arrays.items() if not a.ndim}
        self._leaves = numbers["leaves"]
        last = numbers["last_step"]
        self.last = None if last == _NEVER else last
        self.checks, self.in_full = numbers["checks"], numbers["checks_in_full"]
        self.failures, self.open = numbers["failures"], numbers["inconclusive"]
        self.leaf_steps = arrays["leaf_steps"].astype(np.int64)
        self.explained = Explained(
            arrays["explained_gaps"].astype(np.float64),
            arrays["explained_rounding"].astype(np.float64),
            arrays["at_kink"].astype(bool),
        )
        pairs = zip(
            arrays["rules"].tolist(), arrays["rule_steps"].tolist(), strict=True
        )
        self.rule_steps = {rule: step for rule, step in pairs if rule}

    def _require_same(self, arrays: Mapping[str, np.ndarray]) -> None:
        if int(arrays["format"]) != _FORMAT:
            raise ValueError(
                f"`state` is of format {int(arrays['format'])}, wanted {_FORMAT}: "
                "another version of gradtest saved it."
            )
        if int(arrays["loss"]) != self._loss:
            raise ValueError(
                "`state` was saved by a watcher of another loss than "
                f"{self._loss_name}: functions are told apart by their names."
            )
        found = int(arrays["leaves"])
        if self._leaves and found and found != self._leaves:
            raise ValueError(
                "`state` was saved by a watcher of other parameters: their names, "
                "shapes or dtypes differ from those that this one has seen."
            )

    # --- told -----------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Returns what was checked when, line by line."""
        if not self.checks:
            return ["no check yet"]
        passed = self.checks - self.failures - self.open
        told = [
            f"{self.checks} check{'s' * (self.checks != 1)}, the last at step "
            f"{self.last}: {passed} passed, {self.failures} failed, {self.open} "
            f"inconclusive; {self.in_full} in full"
        ]
        told += [
            f"step {look.step}: {look.verdict.value}, {look.how}, "
            f"{1e3 * look.seconds:.0f} ms"
            for look in self.looks
        ]
        steps = sorted(set(self.leaf_steps.tolist()))
        for step in steps:
            names = [
                name
                for name, seen in zip(self.names, self.leaf_steps, strict=False)
                if seen == step
            ]
            when = "never" if step == _NEVER else f"last at step {step}"
            if names:
                more = f", … ({len(names)} leaves)" if len(names) > 4 else ""
                told.append(f"{when}: {', '.join(names[:4])}{more}")
        return told
