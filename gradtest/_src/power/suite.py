"""Runs a user's test suite against mutants of the custom rules that it reaches.

First the tests run as always, and every call of a rule object is noted. Those that pass
and may reach a rule run once more, each alone: so it is known which tests go through
which rule's derivative, how long each takes, and that each passes a second time. Then
each mutant takes its rule's place, and the tests of that rule run until one fails.

Under pytest-xdist each worker does so with the tests that it ran, and the controller
joins what they have found: a mutant is caught where any worker caught it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from gradtest._src.power import suite_items
from gradtest._src.power.suite_options import PowerOptions
from gradtest._src.power.suite_results import Results

_OUTPUT = "gradtest_power"  # travels from an xdist worker to the controller


class PowerSuite:
    """The plugin behind `--gradtest-power`."""

    def __init__(
        self,
        config: pytest.Config,
        options: PowerOptions,
        unwatched: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self._config = config
        self._options = options
        self._unwatched = unwatched
        self._results: Results | None = None
        self._passed: dict[str, bool] = {}
        self._why: dict[str, str] = {}
        self._wide: set[pytest.Item] = set()
        self._observer: Any = None

    # --- as the tests run -----------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(
        self, session: pytest.Session
    ) -> Generator[None, object, object]:
        """Runs the tests as always, then against the mutants."""
        is_controller = self._config.pluginmanager.has_plugin("dsession")
        if is_controller or self._config.getoption("collectonly", False):
            return (yield)
        from gradtest._src.power.suite_seen import Observer

        self._refuse_unknown(self._options.module)
        self._observer = Observer(self._options.module)
        with self._observer.watching():
            result = yield
        self._results = self._nothing()
        self._results.is_whole = False
        with self._unwatched(), suite_items.apart():
            self._run(session)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item
    ) -> Generator[None, object, object]:
        """Notes for which test rules are called, where nothing is compiled yet."""
        from gradtest._src.jaxprs import rule_objects

        if self._observer is not None and self._results is None:
            self._observer.now(item.nodeid)
            rule_objects.clear_caches()
            with suite_items.with_settings(item):
                return (yield)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: Any
    ) -> Generator[None, object, object]:
        """Notes where a rule is called in a fixture that several tests share."""
        is_shared = fixturedef.scope != "function" and self._results is None
        before = self._calls() if is_shared else 0
        try:
            return (yield)
        finally:
            if is_shared and self._calls() > before:
                items = request.session.items
                self._wide |= {i for i in items if request.node in i.listchain()}

    def _calls(self) -> int:
        return 0 if self._observer is None else self._observer.calls

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes which tests pass."""
        known = self._passed.get(report.nodeid, True)
        is_plain = report.passed and not hasattr(report, "wasxfail")
        self._passed[report.nodeid] = known and is_plain
        if report.failed:
            self._why[report.nodeid] = "it fails without any mutant"

    # --- against the mutants --------------------------------------------------------

    def _run(self, session: pytest.Session) -> None:
        from gradtest._src.power.suite_trial import Trial

        assert self._results is not None
        module = self._options.module
        if module:
            self._import(module)
        reached = {t for s in self._observer.seen for t in s.calling}
        items = [
            item
            for item in session.items
            if (item.nodeid in reached or item in self._wide)
            and item.nodeid in self._passed
        ]
        for item in items:
            if item.nodeid in self._why:
                self._results.left_out[item.nodeid] = self._why[item.nodeid]
        items = [item for item in items if self._passed[item.nodeid]]
        trial = Trial(self._config, self._options, self._results, self._observer)
        trial.run(items)
        self._results.is_whole = True

    def _refuse_unknown(self, module: str) -> None:
        """Refuses a name that is no module's, before the tests take their time."""
        is_worker = hasattr(self._config, "workerinput")
        if not module or is_worker or module in sys.modules:
            return
        try:
            is_known = importlib.util.find_spec(module) is not None
        except ImportError:
            is_known = False
        if not is_known:
            raise pytest.UsageError(
                f"--gradtest-power={module}: it can't be imported (no module has this "
                "name)"
            )

    def _nothing(self) -> Results:
        return Results(
            sample=self._options.mutants, of=self._options.module or "your code"
        )

    def _import(self, module: str) -> None:
        """Imports the module that was asked for: no test may have done so."""
        try:
            importlib.import_module(module)
        except ImportError as error:
            # A worker's tests need not be all that import it.
            if not self._observer.seen and not hasattr(self._config, "workerinput"):
                raise pytest.UsageError(
                    f"--gradtest-power={module}: it can't be imported ({error})"
                ) from error

    # --- what was found -------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Sends what a worker has found; else judges the whole."""
        if hasattr(self._config, "workerinput"):
            if self._results is not None:
                output = self._config.workeroutput  # type: ignore[attr-defined]
                output[_OUTPUT] = json.dumps(self._results.plain())
            return
        least = self._options.least
        if self._results is None:
            return
        self._results.settle()
        is_green = session.exitstatus == pytest.ExitCode.OK
        if least is not None and is_green and self._results.is_short_of(least):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Joins what an xdist worker has found."""
        plain = getattr(node, "workeroutput", {}).get(_OUTPUT)
        if self._results is None:
            self._results = self._nothing()
        if plain is None:  # it crashed, or was stopped
            self._results.is_whole = False
            return
        self._results.include(Results.from_plain(json.loads(plain)))

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Writes what was found."""
        is_listing = self._config.getoption("collectonly", False)
        if is_listing or self._config.get_verbosity() < -1:
            return
        terminalreporter.write_sep("=", "gradtest power")
        if self._results is None:
            terminalreporter.write_line("not run: the tests did not come to their end")
            return
        for line in self._results.lines(self._options.least):
            terminalreporter.write_line(line)
