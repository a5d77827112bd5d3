"""What absltest's users get of a run: files in the directory that the runner names."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradtest._src import session
from gradtest._src.findings import Report
from gradtest._src.outputs import ReportFolder, process_name
from gradtest._src.tally import Tally

# pytest's workers run their tests at one time.
_WORKER = "PYTEST_XDIST_WORKER"
# Take a test, or a test and a part of it, and what it raised.
_FAILING = frozenset({"addFailure", "addError", "addSubTest"})


class Outputs:
    """The files of one process: a page and a record of each failure, and the sums."""

    def __init__(self, folder: str):
        self._folder = ReportFolder(Path(folder))
        self._total = Tally()
        self._expected = 0
        self._failures = 0

    @contextlib.contextmanager
    def watching(self, result: Any) -> Iterator[Any]:
        """Counts the reports of one test, and writes those that fail it.

        Args:
          result: The test result; what is yielded stands before it.
        """
        reports: list[Report] = []
        failures = self._failures
        with session.watching(reports.append):
            yield _WatchedResult(result, self._keep)
        tally = Tally.of(reports)
        if self._failures == failures:
            self._expected += tally.wrong
            tally.wrong = 0
        self._total.include(tally)
        if self._total or self._expected:
            self._write_summary()

    def _write_summary(self) -> None:
        summary = self._total.plain() | {
            "wrong_in_tests_that_did_not_fail": self._expected,
            "failures": self._failures,
            "line": self._total.line(self._expected),
        }
        with self._warning():
            self._folder.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(summary, indent=2, sort_keys=True)
            apart = os.environ.get(_WORKER, ""), process_name()
            name = "-".join(("gradtest_summary", *filter(None, apart)))
            path = self._folder.path / f"{name}.json"
            path.write_text(f"{text}\n", encoding="utf-8")

    def _keep(self, test: Any, error: BaseException) -> None:
        self._failures += 1
        for report in session.reports_within(error):
            with self._warning():
                self._folder.save(report, _name(test))

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Warns of what can't be written: that is no failure of a test."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"gradtest can't write to {str(self._folder.path)!r}: {error!r}",
                    stacklevel=4,
                )


@functools.cache
def outputs_of(folder: str) -> Outputs:
    """Returns the outputs of this process in a directory."""
    return Outputs(folder)


def _name(test: Any) -> str:
    """Returns a test's name, with the script's where that runs as the main module."""
    module, _, rest = test.id().partition(".")
    return f"{Path(sys.argv[0]).stem}.{rest}" if module == "__main__" else test.id()


class _WatchedResult:
    """Stands before a test result, and looks at each failure that it is told of."""

    def __init__(self, result: Any, keep: Callable[[Any, BaseException], None]):
        self.__dict__.update(_result=result, _keep=keep)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._result, name)
        return self._looking(own) if name in _FAILING else own

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._result, name, value)

    def _looking(self, tell: Callable[..., Any]) -> Callable[..., Any]:
        def look_and_tell(*arguments: Any) -> Any:
            *tests, error = arguments
            if error is not None:
                self._keep(tests[-1], error[1])
            return tell(*arguments)

        return look_and_tell
