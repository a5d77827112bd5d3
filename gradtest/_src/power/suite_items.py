"""Runs tests again in a running session of pytest, which hears nothing of it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_MUTED = (
    "pytest_runtest_logreport",
    "pytest_runtest_logstart",
    "pytest_runtest_logfinish",
    "pytest_exception_interact",
    "pytest_warning_recorded",
)
# Where gradtest's and absltest's own classes leave files of failed tests.
_OUTPUTS = "TEST_UNDECLARED_OUTPUTS_DIR"
_SETTINGS = "_hypothesis_internal_use_settings"


class _QuietHooks:
    """The hooks of a test, of which those that tell of results tell only us."""

    def __init__(self, hooks: Any, note: Callable[[pytest.TestReport], None]):
        self._hooks = hooks
        self._note = note

    def __getattr__(self, name: str) -> Any:
        if name not in _MUTED:
            return getattr(self._hooks, name)
        return _Muted(self._note if name == _MUTED[0] else None)


class _Muted:
    """A hook that nobody hears."""

    def __init__(self, note: Callable[[pytest.TestReport], None] | None):
        self._note = note

    def __call__(self, **given: Any) -> None:
        if self._note is not None:
            self._note(given["report"])

    def call_historic(self, *given: Any, **named: Any) -> None:
        """Stands in for hooks that are told of the past."""


def is_green(item: pytest.Item, nextitem: pytest.Item | None = None) -> bool:
    """Runs a test as pytest does, and says whether it neither failed nor was skipped.

    Where `nextitem` is None all fixtures are torn down behind it, wider ones too.
    """
    reports = _reports_of(item, nextitem)
    called = [report for report in reports if report.when == "call"]
    return bool(called) and all(map(_is_plain_pass, reports))


def is_caught(item: pytest.Item, nextitem: pytest.Item | None = None) -> bool:
    """Runs a test as pytest does, and says whether it failed."""
    return any(report.failed for report in _reports_of(item, nextitem))


def _is_plain_pass(report: pytest.TestReport) -> bool:
    return report.passed and not hasattr(report, "wasxfail")


def _reports_of(
    item: pytest.Item, nextitem: pytest.Item | None
) -> list[pytest.TestReport]:
    reports: list[pytest.TestReport] = []
    properties, sections = len(item.user_properties), len(item._report_sections)
    with _unheard(item.session, reports.append), _same_each_time(item):
        try:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        finally:
            del item.user_properties[properties:]
            del item._report_sections[sections:]
    return reports


@contextlib.contextmanager
def _unheard(
    session: pytest.Session, note: Callable[[pytest.TestReport], None]
) -> Iterator[None]:
    original = session.gethookproxy
    # All that pytest tells of a test goes through the hooks that this returns.
    vars(session)["gethookproxy"] = lambda path: _QuietHooks(original(path), note)
    try:
        with contextlib.ExitStack() as stack:
            if session.config.getoption("capture", "fd") == "no":
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            yield
    finally:
        del vars(session)["gethookproxy"]


@contextlib.contextmanager
def _same_each_time(item: pytest.Item) -> Iterator[None]:
    """Keeps Hypothesis's examples the same, its database and its deadlines aside."""
    hidden = ("shrink", "explain")
    hypothesis = sys.modules.get("hypothesis")
    phases = [p for p in hypothesis.Phase if p.name not in hidden] if hypothesis else []
    with with_settings(item, database=None, derandomize=True, phases=phases):
        yield


@contextlib.contextmanager
def with_settings(item: pytest.Item, **settings: Any) -> Iterator[None]:
    """Runs a test of Hypothesis's with other settings, and without a deadline.

    What is compiled anew takes its time.
    """
    hypothesis = sys.modules.get("hypothesis")
    function = getattr(item, "obj", None)
    function = getattr(function, "__func__", function)
    own = getattr(function, _SETTINGS, None)
    if hypothesis is None or own is None:
        yield
        return
    if "phases" in settings:
        settings["phases"] = [p for p in own.phases if p in settings["phases"]]
    fixed = hypothesis.settings(own, deadline=None, **settings)
    setattr(function, _SETTINGS, fixed)
    try:
        yield
    finally:
        setattr(function, _SETTINGS, own)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Keeps files of other tools and Hypothesis's database as they are."""
    hypothesis = sys.modules.get("hypothesis")
    folder = os.environ.pop(_OUTPUTS, None)
    try:
        with _profile(hypothesis) if hypothesis else contextlib.nullcontext():
            yield
    finally:
        if folder is not None:
            os.environ[_OUTPUTS] = folder


@contextlib.contextmanager
def _profile(hypothesis: Any) -> Iterator[None]:
    """Gives no database to whoever asks Hypothesis for its own inside."""
    settings = hypothesis.settings
    before = settings.get_current_profile_name()
    settings.register_profile("gradtest-power", settings(), database=None)
    settings.load_profile("gradtest-power")
    try:
        yield
    finally:
        settings.load_profile(before)


def torn_down(session: pytest.Session) -> None:
    """Tears down all fixtures that are left."""
    with contextlib.suppress(Exception):  # they are the mutant's
        session._setupstate.teardown_exact(None)


def any_caught(items: list[pytest.Item]) -> bool:
    """Runs tests until one fails; says whether any did.

    Wider fixtures are set up once, and torn down at the end.
    """
    if not items:
        return False
    try:
        for item, following in zip(items, [*items[1:], None], strict=True):
            if is_caught(item, following):
                return True
        return False
    finally:
        torn_down(items[0].session)


def timed(item: pytest.Item) -> tuple[bool, float]:
    """Runs a test alone; returns whether it is green, and the seconds that it took."""
    start = time.perf_counter()
    try:
        return is_green(item), time.perf_counter() - start
    finally:
        torn_down(item.session)
