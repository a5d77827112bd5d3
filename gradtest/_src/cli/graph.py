"""`gradtest graph`: the program that a function makes, drawn."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from gradtest._src.cli import options
from gradtest._src.cli.errors import UsageError, running_users_code
from gradtest._src.cli.output import RIGHT, tell
from gradtest._src.cli.subject import subject

_KINDS = ("jaxpr", "hlo", "optimized_hlo", "gradient")
_SUFFIXES = (".dot", ".gv", ".svg", ".png", ".pdf")


def add_to(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "graph", usage="%(prog)s TARGET [--args TARGET] [-o FILE] [options]",
        help="draw the program that a function makes", allow_abbrev=False,
        description="Draws the program that JAX makes of TARGET, as gradtest.graph "
        "does.",
    )  # fmt: skip
    options.add_target(parser)
    parser.add_argument(
        "--of", choices=_KINDS, default="jaxpr",
        help="JAX's own program, XLA's before or after it is optimized, or the "
        "gradient's (default: jaxpr)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="a name in .dot, .svg, .png or .pdf (default: the .dot text is printed)",
    )  # fmt: skip
    parser.add_argument(
        "--argnums", type=options.integers, metavar="0,1",
        help="for the gradient: the arguments that are differentiated (default: all "
        "with float leaves)",
    )  # fmt: skip
    parser.add_argument(
        "--has-aux", action="store_true", default=None,
        help="the function returns a pair of its result and auxiliary data",
    )  # fmt: skip
    parser.add_argument(
        "--fold", type=options.positive, metavar="N",
        help="fold parts of the program until so many nodes are left (default: 50)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    path = chosen.output
    if path is not None and os.path.splitext(path)[1].lower() not in _SUFFIXES:
        raise UsageError(f"-o must end in one of {', '.join(_SUFFIXES)}, got {path!r}.")
    options.require_writable(path)
    with subject(chosen) as under_test:
        from gradtest._src.graphs import GraphvizError, graph

        keywords = options.chosen(chosen, "of", "argnums", "has_aux", "fold")
        with running_users_code("tracing the function"):
            drawn = graph(under_test.fn, *under_test.args, **keywords)
    if path is None:
        tell(drawn.dot)
        return RIGHT
    try:
        drawn.save(path)
    except (GraphvizError, OSError) as error:
        raise UsageError(f"can't write {path!r}: {error}") from None
    print(f"wrote {path}", file=sys.stderr)
    return RIGHT
