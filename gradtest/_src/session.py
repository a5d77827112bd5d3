"""What all assertions of a run share: their defaults, and who is told of each report.

It imports neither JAX nor anything that does, so that a plugin may use it at its start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradtest._src.findings import Report

Observer = Callable[["Report"], object]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_HIDDEN = "__tracebackhide__"


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """What a whole run chose in place of the assertions' own defaults; None: nothing.

    Attributes:
      key: The key of assertions that are given none.
      trials: The number of their trials.
    """

    key: Any = None
    trials: int | None = None


# Neither is a context variable: a thread that a test starts must see them too.
_chosen: list[Chosen] = [Chosen()]
_observers: list[Observer] = []


def chosen() -> Chosen:
    """Returns what the run chose."""
    return _chosen[-1]


def key() -> Any:
    """Returns the key of an assertion that is given none."""
    own = chosen().key
    return 0 if own is None else own


def trials() -> int:
    """Returns the number of trials of an assertion that is given none."""
    own = chosen().trials
    return 1 if own is None else own


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with the run's key and trials where they are None or missing."""
    full = dict(options)
    for name, default in (("key", key), ("trials", trials)):
        if full.get(name) is None:
            full[name] = default()
    return full


@contextlib.contextmanager
def using(key: Any = None, trials: int | None = None) -> Iterator[None]:
    """Gives the assertions inside other defaults; None leaves one as it is."""
    outer = chosen()
    own = Chosen(
        outer.key if key is None else key,
        outer.trials if trials is None else trials,
    )
    _chosen.append(own)
    try:
        yield
    finally:
        _chosen.remove(own)


@contextlib.contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Tells `observer` of every report that assertions make inside, whatever it says.

    Each is told once, just before it is returned or raised. What the observer itself
    raises becomes a warning. On traced values there is no report to tell of.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Tells nobody of the reports that assertions make inside, on purpose wrong ones.

    Who watches from inside is told.
    """
    outer = list(_observers)
    _observers.clear()
    try:
        yield
    finally:
        _observers[:0] = outer


def tell(report: Report) -> Report:
    """Tells every observer of a report, and returns it."""
    for observer in tuple(_observers):
        try:
            observer(report)
        except Exception as error:
            # Where warnings are errors it must not stand in for the verdict.
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"an observer of gradtest's reports raised {error!r}", stacklevel=2
                )
    return report


def errors_within(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception, those it was raised from or amid, and a group's members."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            left += reversed(one.exceptions)
        left += [None if one.__suppress_context__ else one.__context__, one.__cause__]


def reports_within(error: BaseException) -> list[Report]:
    """Returns the reports that an exception carries, or those it was raised from."""
    findings = sys.modules.get("gradtest._src.findings")
    if findings is None:  # then no assertion has been called
        return []
    found: list[Report] = []
    for one in errors_within(error):
        report = vars(one).get("report")
        if isinstance(report, findings.Report) and all(report is not r for r in found):
            found.append(report)
    return found


def hide_frames(trace: TracebackType | None, *packages: str) -> None:
    """Hides the package's own frames of a traceback from pytest and IPython.

    Only what they show is shortened: the traceback keeps all of its frames.

    Args:
      trace: The traceback.
      *packages: Directories of other packages whose frames are hidden too.
    """
    hidden = tuple(os.path.join(folder, "") for folder in (_PACKAGE, *packages))
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(hidden):
            trace.tb_frame.f_locals[_HIDDEN] = True
        trace = trace.tb_next
