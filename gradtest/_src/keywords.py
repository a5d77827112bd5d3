"""The keywords that assertions share, and what they all do with a check."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

from gradtest._src import seeding, session, variants
from gradtest._src.devices import homes
from gradtest._src.environment import environment
from gradtest._src.findings import Cause, Finding, Gap, Report, Verdict
from gradtest._src.job import agreement as processes
from gradtest._src.options import Options
from gradtest._src.report import text
from gradtest._src.traced import checks as in_trace
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
        chosen = Options(**session.with_defaults(options))
        return cls(chosen, MessageOptions(**messages), inconclusive)


def require_callable(role: str, function: Any) -> None:
    """Raises TypeError where an argument is no function."""
    if not callable(function):
        raise TypeError(f"`{role}` must be callable, got {function!r}.")


def settled(
    name: str,
    fn: Callable[..., Any],
    chosen: Keywords,
    make_check: Callable[[Options], Reporter],
    subject: in_trace.Subject | None = None,
) -> Report:
    """Runs a check, unless Chex is told to check nothing; raises what it finds.

    Inside of a trace checks are added to the program instead, and None is returned.
    """
    options = chosen.options
    if variants.asserts_are_disabled():
        key = seeding.describe(options.key)
        return session.tell(Report(name, _name(fn), Verdict.NOT_CHECKED, key=key))
    if subject is not None and subject.is_traced():
        if options.hazards:
            raise ValueError(
                "`hazards` needs values, and the arguments are traced: call "
                f"`{name}` outside of jit, grad, vmap and pmap."
            )
        return in_trace.add_checks(
            name, subject, options, chosen.inconclusive, chosen.messages
        )
    report = reported(name, fn, options, make_check)
    return settle(name, report, chosen.inconclusive, chosen.messages)


def reported(
    name: str,
    fn: Callable[..., Any],
    options: Options,
    make_check: Callable[[Options], Reporter],
) -> Report:
    """Runs a check; it is inconclusive where no device has float64.

    Raises:
      BackendRefusedError: `chex.restrict_backends` forbids what the check needs.
    """
    # What a check moves is its own affair.
    with jax.transfer_guard("allow"), naming_what_chex_refuses(name, fn):
        try:
            check = make_check(options)
            processes.meet()  # before anything runs that spans processes
            report = check.report(name)
        except homes.NoHomeError as error:
            report = _without_float64(name, _name(fn), options, error)
    return dataclasses.replace(report, environment=environment())


@contextlib.contextmanager
def naming_what_chex_refuses(name: str, fn: Callable[..., Any]) -> Iterator[None]:
    """Names the assertion and the function where `chex.restrict_backends` forbids it.

    Raises:
      BackendRefusedError: It does.
    """
    what = f"{_name(fn)}, or its float64 form by which it is judged,"
    try:
        with variants.explaining_refusals(what, "where it runs, or float64 is native"):
            yield
    except variants.BackendRefusedError as error:
        text = f"{name}({_name(fn)}, ...): {error}"
        raise variants.BackendRefusedError(text) from error.__cause__


def _without_float64(
    name: str, subject: str, options: Options, error: homes.NoHomeError
) -> Report:
    cause = Cause("no float64", error.says, error.remedy)
    finding = Finding(
        "all arguments", (), "", Verdict.INCONCLUSIVE, Gap.REACH, cause=cause
    )
    key = seeding.describe(options.key)
    return Report(
        name, subject, Verdict.INCONCLUSIVE, (finding,), options.trials, key,
        replay=f"gradtest.{name}({subject}, ..., key={key})",
    )  # fmt: skip


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def settle(
    name: str,
    report: Report,
    inconclusive: str,
    messages: MessageOptions,
    more: Sequence[str] = (),
) -> Report:
    """Returns a report that passed; raises or warns about any other.

    Of several processes' reports it is the one that all of them go by. Below its
    message stand the lines of `more`.
    """
    report = session.tell(processes.agree(report))
    if report.verdict in (Verdict.PASS, Verdict.NOT_CHECKED):
        return report
    says = "\n  ".join([text.message(report), *more])
    error = messages.error(name, says, report)
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
