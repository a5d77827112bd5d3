"""In what surroundings the cases of a check ran: devices, precision, cotangents."""

from __future__ import annotations

from typing import Any

from gradtest._src.case import Case
from gradtest._src.rounding import product_note


class Surroundings:
    """Where all cases ran and in which precision, kept without their arrays."""

    def __init__(self) -> None:
        self.seed: list[Any] = []
        self.islands: set[str] = set()
        self.why_no_exact: set[str] = set()
        self.precision: set[str] = set()
        self.devices = 0

    def add(self, case: Case) -> None:
        """Takes note of a case; the first one's cotangents serve the second order."""
        self.seed = self.seed or case.seed
        self.islands |= set(case.bench.islands)
        self.why_no_exact |= {case.bench.why_no_exact} - {""}
        self.precision |= {case.bench.devices, product_note(case)} - {""}
        found = [*case.readings.copies, *case.bench.worked]
        copies = [each.count for each in found if each.count > 1]
        self.devices = max(self.devices, case.claim.devices, *copies)
