"""Files that a run of tests leaves: the reports of what failed, under safe names."""

from __future__ import annotations

import collections
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradtest._src.findings import Report

_LONGEST = 80
_DIGITS = 10


class ReportFolder:
    """A directory that gets an HTML and a JSON file for each failure.

    Args:
      path: The directory; made when the first file is written.
      mark: Tells the names apart from those of other processes that write there.
    """

    def __init__(self, path: Path, mark: str = ""):
        self.path = path
        self._mark = mark
        self._written: collections.Counter[str] = collections.Counter()

    def save(self, report: Report, test: str) -> tuple[Path, Path]:
        """Writes a report, and returns the paths of its HTML and its JSON.

        The first report of a test replaces that of an earlier run; the next ones are
        numbered.

        Args:
          report: The report.
          test: The name of the test; any text.

        Raises:
          OSError: The directory can't be written.
        """
        self._written[test] += 1
        number = self._written[test]
        name = "-".join(
            part
            for part in (
                safe_name(test), self._mark, process_name(),
                str(number) if number > 1 else "",
            )
            if part
        )  # fmt: skip
        self.path.mkdir(parents=True, exist_ok=True)
        page, record = self.path / f"{name}.html", self.path / f"{name}.json"
        report.save(page)
        report.save(record)
        return page, record


def safe_name(text: str) -> str:
    """Returns a short file name for any text; other texts have other names.

    Example:
      >>> safe_name("tests/test_a.py::test_b[1/2]")
      'tests_test_a.py_test_b_1_2-9c7dc85832'
    """
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    words = re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._-")
    return f"{words[-_LONGEST:].lstrip('._-') or 'test'}-{digest[:_DIGITS]}"


def process_name() -> str:
    """Names this process where it is one of a job's."""
    from gradtest._src import jaxprs

    job = jaxprs.current_job()
    return f"process{job.rank}" if job else ""
