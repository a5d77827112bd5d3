"""Reports on the terminal and in files, and the exit code that they come to."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradtest._src.cli.errors import UsageError

if TYPE_CHECKING:  # these import JAX, which takes longer than to print a usage error
    from gradtest._src.findings import Report, Verdict

RIGHT, WRONG, USAGE, INCONCLUSIVE = 0, 1, 2, 3


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Returns 1 where one is wrong, else 3 where one is open or unchecked, else 0."""
    from gradtest._src.findings import Verdict, worst

    gravest = worst(verdicts)
    if gravest is Verdict.FAIL:
        return WRONG
    return RIGHT if gravest is Verdict.PASS else INCONCLUSIVE


def require_stdout() -> None:
    """Makes sure that there is a stdout, before anything long begins.

    Raises:
      UsageError: It is closed.
    """
    if sys.stdout is None:
        raise UsageError("nothing can be written to stdout: it is closed.")


def tell(text: str = "") -> None:
    """Prints a text to stdout, at once.

    Raises:
      UsageError: It can't be written.
      BrokenPipeError: Nobody reads it any more.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would write the rest when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(
            f"nothing can be written to stdout: {error.strerror}."
        ) from None


def show(report: Report, chosen: argparse.Namespace) -> None:
    """Prints a report: all of what passed, the message of what did not."""
    from gradtest._src.findings import Verdict
    from gradtest._src.report import text

    says = f"{report.verdict.value}: {report.assertion}({report.subject})"
    is_short = not chosen.full and report.verdict in (
        Verdict.FAIL,
        Verdict.INCONCLUSIVE,
    )
    if not chosen.quiet:
        says = f"{says}\n  {text.message(report)}" if is_short else str(report)
    if not sys.stdout.isatty():
        tell(says)
    elif chosen.quiet or is_short:
        _show_coloured(says, report.verdict)
    else:
        import rich

        rich.print(report)


def _show_coloured(says: str, verdict: Verdict) -> None:
    """Prints a text that begins with a verdict, which rich colours."""
    from rich.console import Console
    from rich.text import Text

    style = {RIGHT: "bold green", WRONG: "bold red"}.get(exit_code([verdict]))
    told = Text(says)
    told.stylize(style or "bold yellow", 0, len(verdict.value))
    # Lines are left as they are, so that a command can be copied from them.
    Console().print(told, soft_wrap=True)


def write(reports: Sequence[Report], chosen: argparse.Namespace, code: int) -> None:
    """Writes the files that were asked for.

    Args:
      reports: All reports of the command.
      chosen: The command line.
      code: What the command exits with.

    Raises:
      UsageError: One can't be written.
    """
    if chosen.json is not None:
        _write(chosen.json, _json(reports, code))
    if chosen.html is not None:
        _write(chosen.html, _html(reports))


def _write(path: str, contents: str) -> None:
    from gradtest._src.report.saving import written_whole

    try:
        with written_whole(Path(path)) as part:
            part.write_text(contents, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"can't write {path!r}: {error.strerror}.") from None
    print(f"wrote {path}", file=sys.stderr)


def _json(reports: Sequence[Report], code: int) -> str:
    """Returns one report as it tells itself, or an object that holds several."""
    if len(reports) == 1:
        return reports[0].to_json(indent=2) + "\n"
    from gradtest._src.findings import worst

    told = {
        "format": "gradtest reports",
        "schema": 1,
        "verdict": worst(report.verdict for report in reports).value,
        "exit_code": code,
        "reports": [json.loads(report.to_json()) for report in reports],
    }
    return json.dumps(told, indent=2, allow_nan=False) + "\n"


def _html(reports: Sequence[Report]) -> str:
    """Returns one page of all reports; its title is that of the gravest."""
    gravest = max(reports, key=lambda report: report.verdict.severity)
    head = gravest.to_html().partition(_BODY)[0]
    bodies = [_between(report.to_html(), _BODY, _END) for report in reports]
    return "".join([head, _BODY, "<hr>".join(bodies), _END, "\n</html>\n"])


_BODY, _END = "<body>", "</body>"


def _between(page: str, start: str, end: str) -> str:
    return page.partition(start)[2].rpartition(end)[0]
