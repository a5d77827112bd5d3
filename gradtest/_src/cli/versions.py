"""`gradtest versions`: what a check runs with, for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
from typing import Any

from gradtest._src.cli.output import RIGHT, tell

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def add_to(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "versions", help="show versions, devices and settings", allow_abbrev=False,
        description="Shows the versions, devices and settings that checks run with, "
        "and what is installed for pictures.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    found = dict(_found())
    if chosen.json:
        tell(json.dumps(found, indent=2))
        return RIGHT
    width = max(map(len, found))
    for name, value in found.items():
        tell(f"{name:{width}s}  {value}")
    return RIGHT


def _found() -> list[tuple[str, str]]:
    """Returns names and values of all that is shown."""
    from gradtest._src.environment import environment, versions

    try:
        known = environment()
    except RuntimeError as error:  # JAX can't start
        known = (*versions(), ("devices", f"none: {error}"))
    return [
        *known,
        ("matplotlib (plots)", _version("matplotlib")),
        ("rich (terminal)", _version("rich")),
        ("treescope (notebooks)", _version("treescope")),
        ("dot (pictures of graphs)", shutil.which("dot") or _MISSING),
        ("chromium (tests of pages)", _browser() or _MISSING),
    ]


_MISSING = "not found"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, _BROWSERS)), None)
