"""What the commands' options mean, in the types that the Python API takes."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from gradtest._src.cli.errors import UsageError

EXIT_CODES = (
    "exit codes: 0 right, 1 wrong, 2 usage or an error of your code, 3 inconclusive or "
    "nothing checked; of several reports 1 beats 3, and 3 beats 0"
)
# Options that all assertions of a command take, by their names in Python.
SHARED = ("argnums", "trials", "key", "has_aux", "exclude", "rtol", "rounding_rtol")
_MODES = ("rev", "fwd")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds TARGET, and what says at which arguments and in which JAX it runs."""
    parser.add_argument(
        "target", metavar="TARGET",
        help="the function: file.py:name or package.module:name; dots after the colon "
        "name attributes, as in model.py:Model.loss",
    )  # fmt: skip
    parser.add_argument(
        "--args", metavar="TARGET",
        help="its arguments: a tuple, or a function without parameters that returns "
        "one; :name is beside the function (default: NAME_args beside a function NAME, "
        "else the defaults of its parameters)",
    )  # fmt: skip
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--devices", type=positive, metavar="N",
        help="on the CPU, with so many simulated devices",
    )  # fmt: skip
    where.add_argument(
        "--x64", action="store_true", help="with jax_enable_x64, as double precision"
    )


def add_checking(parser: argparse.ArgumentParser, order: str) -> None:
    """Adds the options of the assertions, which say what is checked."""
    what = parser.add_argument_group("what is checked")
    what.add_argument(
        "--argnums", type=integers, metavar="0,1",
        help="the arguments that are differentiated (default: all with float leaves)",
    )  # fmt: skip
    what.add_argument(
        "--order", type=int, choices=(1, 2), help=f"of the derivative ({order})"
    )
    what.add_argument(
        "--trials", type=positive, metavar="N", help="points to draw (default: 1)"
    )
    what.add_argument(
        "--seed", type=int, metavar="N", help="fixes every draw (default: 0)"
    )
    what.add_argument(
        "--hazards", action="store_true", default=None,
        help="also the special points of the arguments: zeros, ties, saturation, ends",
    )  # fmt: skip
    what.add_argument(
        "--has-aux", action="store_true", default=None,
        help="the function returns a pair of its result and auxiliary data",
    )  # fmt: skip
    what.add_argument(
        "--exclude", action="append", metavar="LEAF",
        help="a leaf or sub-tree that is held, such as params['frozen']; repeatable",
    )  # fmt: skip
    what.add_argument(
        "--expect-differs", action="append", default=[], metavar="RULE=TARGET",
        help="a custom rule that differs on purpose, and the function whose derivative "
        "it should have; repeatable",
    )  # fmt: skip
    what.add_argument(
        "--rtol", type=_fraction, metavar="X",
        help="allowed relative gap of a leaf in float64 (default: 2e-6)",
    )  # fmt: skip
    what.add_argument(
        "--rounding-rtol", type=_fraction, metavar="X",
        help="allowed relative gap between its own precision and float64 (default: "
        "measured)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds what is done with the reports."""
    output = parser.add_argument_group("output")
    length = output.add_mutually_exclusive_group()
    length.add_argument(
        "-q", "--quiet", action="store_true", help="one line for each report"
    )
    length.add_argument(
        "--full", action="store_true", help="every leaf, also of what failed"
    )
    output.add_argument("--html", metavar="FILE", help="write the reports as a page")
    output.add_argument("--json", metavar="FILE", help="write the reports as JSON")


def chosen(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns the keywords of an assertion that the caller chose."""
    found = {name: getattr(parsed, name, None) for name in names}
    if "key" in found:
        found["key"] = parsed.seed
    return {name: value for name, value in found.items() if value is not None}


def require_writable(*paths: str | None) -> None:
    """Makes sure that files can be written, before anything long begins.

    Raises:
      UsageError: One can't.
    """
    for path in filter(None, paths):
        folder = os.path.dirname(path) or os.curdir
        if os.path.isdir(path):
            raise UsageError(f"can't write {path!r}: it is a folder.")
        if not os.path.isdir(folder):
            raise UsageError(f"can't write {path!r}: there is no folder {folder!r}.")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise UsageError(f"can't write {path!r}: it is not allowed.")


# --- the types of argparse, which turns what they raise into usage errors ------------


def names(text: str) -> list[str]:
    """Reads names between commas; a comma inside of brackets belongs to a name."""
    found = [name.strip() for name in re.split(r",(?![^\[]*\])", text)]
    if not all(found):
        raise argparse.ArgumentTypeError(f"wanted names between commas, got {text!r}")
    return found


def modes(text: str) -> list[str]:
    """Reads some of rev and fwd."""
    found = names(text)
    if not set(found) <= set(_MODES):
        raise argparse.ArgumentTypeError(f"wanted rev, fwd or rev,fwd, got {text!r}")
    return found


def integers(text: str) -> int | tuple[int, ...]:
    """Reads one integer, or a tuple of those between commas."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(
            f"wanted an integer or some between commas, got {text!r}"
        )
    return found if "," in text else found[0]


def positive(text: str) -> int:
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer >= 1, got {text!r}")
    return number


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(
            f"wanted a number between 0 and 1, got {text!r}"
        )
    return number
