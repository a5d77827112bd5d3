"""The pytest plugin: seeds, trials, files of reports, and a closing line.

pytest loads it wherever gradtest is installed. It imports no JAX: a run that uses none
of gradtest's assertions does not pay for it. `docs/pytest.md` says what it does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import gradtest
from gradtest._src import session
from gradtest._src.outputs import ReportFolder
from gradtest._src.power import suite_options
from gradtest._src.tally import Tally

if TYPE_CHECKING:
    from gradtest._src.findings import Report

_INI = {
    "gradtest_seed": "the key of gradtest's assertions that are given none",
    "gradtest_trials": "the number of trials of those that are given none",
    "gradtest_report": "directory for an HTML and a JSON file of each failure",
}
_TALLY = "gradtest_tally"  # travels with pytest's reports, also between processes
_EACH = "gradtest_each"  # tells a worker whether it runs with `--dist=each`
_REPORTS = pytest.StashKey[list["Report"]]()
# What a traceback need not show between a test and the assertion.
_AROUND = ("chex", "jax")
_IN_TRACE = re.compile(r"\[Chex\] chexify assertion '(assert_\w+)' failed")
_UNSAFE_IN_QUOTES = frozenset('"$`\\!')


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options, and the settings of the same names for pytest's ini-file."""
    group = parser.getgroup("gradtest", "gradients (gradtest)")
    group.addoption("--gradtest-seed", type=int, metavar="N",
                    help=f"{_INI['gradtest_seed']} (default: 0)")  # fmt: skip
    group.addoption("--gradtest-trials", type=int, metavar="N",
                    help=f"{_INI['gradtest_trials']} (default: 1)")  # fmt: skip
    group.addoption("--gradtest-report", metavar="DIR", help=_INI["gradtest_report"])
    for name, says in _INI.items():
        parser.addini(name, says, default="")
    suite_options.add_options(parser, group)


def pytest_configure(config: pytest.Config) -> None:
    """Sets the defaults of the run, and starts to count."""
    seed = _number(config, "gradtest_seed")
    trials = _number(config, "gradtest_trials")
    if trials is not None and trials < 1:
        raise pytest.UsageError(f"--gradtest-trials must be at least 1, got {trials}")
    watch = _Watch(config, _folder(config))
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.using(key=seed, trials=trials))
        stack.enter_context(session.watching(watch.note))
        config.add_cleanup(stack.pop_all().close)
    config.pluginmanager.register(watch, "gradtest-watch")
    power = suite_options.read_options(config)
    if power is not None:
        from gradtest._src.power.suite import PowerSuite

        suite = PowerSuite(config, power, watch.paused)
        config.pluginmanager.register(suite, suite_options.NAME)


def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """Hides frames of gradtest, Chex and JAX where an assertion of ours has failed."""
    if call.excinfo is None or not _is_ours(call.excinfo.value):
        return
    folders = [
        os.path.dirname(path)
        for path in (getattr(sys.modules.get(n), "__file__", None) for n in _AROUND)
        if path
    ]
    for error in session.errors_within(call.excinfo.value):
        session.hide_frames(error.__traceback__, *folders)


class _Watch:
    """Counts the reports of a run, and adds to the failures what is known of them."""

    def __init__(self, config: pytest.Config, folder: ReportFolder | None):
        self._config = config
        self._folder = folder
        self._fresh: list[Report] = []
        self._total = Tally()
        self._expected = 0
        self._is_paused = False

    def note(self, report: Report) -> None:
        """Keeps a report until pytest makes its own of the test."""
        if not self._is_paused:
            self._fresh.append(report)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes no notice of the tests that run inside."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Adds to pytest's report of a test what the assertions in it have found."""
        result = yield
        if self._is_paused:
            return result
        fresh, self._fresh = self._fresh, []
        if fresh:
            setattr(result, _TALLY, Tally.of(fresh).plain())
        known = item.stash.setdefault(_REPORTS, [])
        known += fresh
        properties: list[tuple[str, object]] = []
        if result.failed and call.excinfo is not None and _is_ours(call.excinfo.value):
            failed = session.reports_within(call.excinfo.value)
            known += failed  # one may have been made before this test
            properties += self._explain(item, result, failed)
        if call.when == "teardown":
            properties += _verdict_properties(item.stash[_REPORTS])
            item.stash[_REPORTS] = []
        item.user_properties += properties
        result.user_properties += properties
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sums up, in the process that also ends the run."""
        plain = getattr(report, _TALLY, None)
        if plain is None:
            return
        tally = Tally.from_plain(plain)
        if not report.failed:
            self._expected += tally.wrong
            tally.wrong = 0
        self._total.include(tally)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Writes the closing line, where any assertion has run."""
        if (self._total or self._expected) and self._config.get_verbosity() > -2:
            terminalreporter.write_line(self._total.line(self._expected))

    def _explain(
        self, item: pytest.Item, result: pytest.TestReport, failed: list[Report]
    ) -> list[tuple[str, object]]:
        """Adds a section to a failure; returns what JUnit's file shall hold of it."""
        replay, shown = self._replay(item), result.longreprtext
        lines = [line for report in failed for line in _not_shown(report, shown)]
        lines.append(f"replay: {replay}")
        properties: list[tuple[str, object]] = [("gradtest_replay", replay)]
        for report in failed:
            for path in self._saved(report, item.nodeid, lines):
                lines.append(f"report: {path}")
                properties.append(("gradtest_report", str(path)))
            if self._config.get_verbosity() > 1:
                lines.append(str(report))
        text = "\n".join(lines)
        add = getattr(result.longrepr, "addsection", None)
        if add is not None:
            add("gradtest", text)
        else:
            result.sections.append(("gradtest", text))
        return properties

    def _saved(self, report: Report, test: str, lines: list[str]) -> tuple[Path, ...]:
        if self._folder is None:
            return ()
        try:
            return self._folder.save(report, test)
        except Exception as error:  # the verdict matters more than the file
            lines.append(f"the report could not be written: {error!r}")
            return ()

    def _replay(self, item: pytest.Item) -> str:
        """Returns the command that runs a test again as it was run."""
        chosen = session.chosen()
        seed, instance = session.key(), getattr(item, "instance", None)
        module = sys.modules.get("gradtest.absltest")
        if module is not None and isinstance(instance, module.TestCase):
            seed = instance.gradtest_seed()
        test = _quoted(_from_here(item, self._config.invocation_params.dir))
        parts = ["pytest", test, f"--gradtest-seed={seed}"]
        if chosen.trials is not None:
            parts.append(f"--gradtest-trials={chosen.trials}")
        return " ".join(parts)


def _verdict_properties(reports: list[Report]) -> list[tuple[str, object]]:
    """Returns the gravest verdict of a test, and what it would have seen."""
    if not reports:
        return []
    gravest = max((each.verdict for each in reports), key=lambda v: v.severity)
    properties: list[tuple[str, object]] = [("gradtest_verdict", gravest.value)]
    seen = Tally.of(reports).smallest_visible_error
    if seen is not None:
        properties.append(("gradtest_smallest_visible_error", f"{seen:.2g}"))
    return properties


def _is_ours(error: BaseException) -> bool:
    return bool(session.reports_within(error)) or _names_ours(error)


def _names_ours(error: BaseException) -> bool:
    """Whether an assertion of gradtest's in a traced program has failed."""
    text = error.args[0] if error.args else None
    found = _IN_TRACE.search(text) if isinstance(text, str) else None
    return found is not None and hasattr(gradtest, found.group(1))


def _number(config: pytest.Config, name: str) -> int | None:
    """Returns an option, or the setting of its name; None where neither is given."""
    given = config.getoption(name)
    if given is not None:
        return int(given)
    setting = config.getini(name)
    if not setting:
        return None
    try:
        return int(setting)
    except ValueError:
        raise pytest.UsageError(f"{name} must be an integer, got {setting!r}") from None


def _folder(config: pytest.Config) -> ReportFolder | None:
    """Returns the directory for reports, which is made now; None where none is asked.

    An option is relative to where pytest was called, a setting to the ini-file.
    """
    given, base = config.getoption("gradtest_report"), config.invocation_params.dir
    if given is None:
        given, base = config.getini("gradtest_report"), config.rootpath
    if not given:
        return None
    path = Path(base, given)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--gradtest-report must name a directory that can be written: {error}"
        ) from None
    # Workers that run the same tests must not write over each other's files.
    each = getattr(config, "workerinput", {}).get(_EACH, False)
    return ReportFolder(path, os.environ.get("PYTEST_XDIST_WORKER", "") if each else "")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker of pytest-xdist's whether every worker runs every test."""
    node.workerinput[_EACH] = node.config.getoption("dist", "no") == "each"


def _not_shown(report: Report, shown: str) -> list[str]:
    """Returns the message of a report where the exception has not shown it by lines.

    A KeyError shows its text as a literal, and one may be caught and not handed on.
    """
    from gradtest._src.report import text

    message = text.message(report)
    before = "E| "  # what stands before a line: pytest's own mark, or a group's rule
    lines = {line.lstrip(before) for line in shown.splitlines()}
    wanted = {line.lstrip(before) for line in message.splitlines()[1:]}
    return [] if wanted <= lines else [message]


def _from_here(item: pytest.Item, folder: Path) -> str:
    """Returns a test's name as pytest takes it in this folder."""
    _, mark, rest = str(item.nodeid).partition("::")
    try:
        return f"{Path(os.path.relpath(item.path, folder)).as_posix()}{mark}{rest}"
    except ValueError:  # on another drive
        return str(item.nodeid)


def _quoted(test: str) -> str:
    """Quotes a test's name for a shell, in double quotes where they are enough."""
    return shlex.quote(test) if _UNSAFE_IN_QUOTES & set(test) else f'"{test}"'
