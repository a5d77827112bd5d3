"""Checks of what is done with the gradients of a loss that is right itself."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradtest._src.case import Case
from gradtest._src.check import Check
from gradtest._src.exhibits import exhibits_of, inputs_at
from gradtest._src.findings import Finding, Report, Verdict


class UnlocatedCheck(Check):
    """A check that names no line of source: those of the loss are not to blame."""

    _stopped: Case | None = None

    def findings(self) -> list[Finding]:
        """Runs every trial, and keeps what a line would be looked for in."""
        found = super().findings()
        self._stopped = next(iter(self.troubled.values()), None)
        self.troubled.clear()
        return found

    def report(self, assertion: str) -> Report:
        """Runs the check; what did not pass is shown with its arrays."""
        report, case = super().report(assertion), self._stopped
        wrong = [f for f in report.findings if f.verdict is not Verdict.PASS]
        if case is None or not wrong:
            return report
        with np.errstate(all="ignore"):
            return dataclasses.replace(
                report,
                exhibits=exhibits_of(case, wrong),
                inputs=inputs_at(case.program.inputs, case.point),
            )
