"""The program `gradtest`: its commands, and what their exit codes mean."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from gradtest._src.cli import check, graph, rules, versions
from gradtest._src.cli.errors import UsageError, UsersError, internal_error
from gradtest._src.cli.output import USAGE, require_stdout

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_EXIT_CODES = """
exit codes:
  0  right: every report passed
  1  wrong: a gradient, a rule or a variant is wrong
  2  usage: the command line is wrong, or your code raised (its traceback is shown)
  3  inconclusive: nothing is wrong as far as known, but something stayed open, or
     nothing was checked

TARGET is file.py:name or package.module:name. It is imported as `python -m` would, with
the working directory on sys.path, and no arguments in sys.argv.

examples:
  gradtest check model.py:loss
  gradtest check model.py:loss --args model.py:batch --order 2 --html report.html
  gradtest rules package.model:loss --list
  gradtest graph model.py:loss --of gradient -o gradient.svg
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: Those after the program's name; None takes this process's.

    Returns:
      The exit code: 0 right, 1 wrong, 2 usage, 3 inconclusive.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal can't show is escaped, as in a traceback.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return _run(arguments)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else USAGE
    except UsageError as error:
        print(f"gradtest: error: {error}", file=sys.stderr)
        return USAGE
    except UsersError as error:
        print(error, file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return _BROKEN_PIPE
    except Exception as error:  # Python's own exit code would be that of a wrong one
        print(internal_error(error), file=sys.stderr)
        return USAGE


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    require_stdout()
    return chosen.run(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradtest",
        description="Tells whether gradients in JAX are right.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (check, rules, graph, versions):
        command.add_to(commands)
    return parser
