"""The keywords that assertions share, and what they all do with a check."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax

from gradtest._src import seeding, variants
from gradtest._src.findings import Report, Verdict
from gradtest._src.options import Options
from gradtest._src.report import text
from gradtest._src.variants import MessageOptions

Inconclusive = Literal["raise", "warn"]


class Reporter(Protocol):
    """Whatever can be checked: one claim, or every rule of a program."""

    def report(self, assertion: str) -> Report:
        """Runs the check."""


@dataclasses.dataclass(frozen=True)
class Keywords:
    """The keywords of an assertion, sorted by whom they concern."""

    options: Options
    messages: MessageOptions
    inconclusive: str

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Keywords:
        """Picks the keywords by name out of all that an assertion was called with."""
        inconclusive = arguments["inconclusive"]
        if inconclusive not in ("raise", "warn"):
            raise ValueError(
                f"`inconclusive` must be 'raise' or 'warn', got {inconclusive!r}."
            )
        options, messages = (
            {
                field.name: arguments[field.name]
                for field in dataclasses.fields(kind)
                if field.name in arguments
            }
            for kind in (Options, MessageOptions)
        )
        return cls(Options(**options), MessageOptions(**messages), inconclusive)


def require_callable(role: str, function: Any) -> None:
    """Raises TypeError where an argument is no function."""
    if not callable(function):
        raise TypeError(f"`{role}` must be callable, got {function!r}.")


def settled(
    name: str,
    fn: Callable[..., Any],
    chosen: Keywords,
    make_check: Callable[[Options], Reporter],
) -> Report:
    """Runs a check, unless Chex is told to check nothing; raises what it finds."""
    options = chosen.options
    if variants.asserts_are_disabled():
        subject = getattr(fn, "__name__", type(fn).__name__)
        key = seeding.describe(options.key)
        return Report(name, subject, Verdict.NOT_CHECKED, key=key)
    with jax.transfer_guard("allow"):  # what a check moves is its own affair
        report = make_check(options).report(name)
    return settle(name, report, chosen.inconclusive, chosen.messages)


def settle(
    name: str, report: Report, inconclusive: str, messages: MessageOptions
) -> Report:
    """Returns a report that passed; raises or warns about any other."""
    if report.verdict in (Verdict.PASS, Verdict.NOT_CHECKED):
        return report
    error = messages.error(name, text.message(report), report)
    if report.verdict is Verdict.INCONCLUSIVE and inconclusive == "warn":
        warnings.warn(str(error), stacklevel=_users_frame())
        return report
    raise error


def _users_frame() -> int:
    """Returns how far up the caller's stack gradtest was called from."""
    package = os.path.dirname(os.path.dirname(__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level
