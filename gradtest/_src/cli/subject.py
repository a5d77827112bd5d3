"""What the commands on a TARGET share: it is found, imported and given arguments."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from gradtest._src.cli import targets
from gradtest._src.cli.arguments import function_and_arguments
from gradtest._src.cli.devices import require_devices, running_in


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function, its arguments, and what else the command line names."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    others: dict[str, Any]


@contextlib.contextmanager
def subject(
    chosen: argparse.Namespace, others: dict[str, str] | None = None
) -> Iterator[Subject]:
    """Gives what TARGET names for a `with` block, inside of which it can run.

    Args:
      chosen: The command line.
      others: Further TARGETs that are functions, by what they are for.

    Raises:
      UsageError: Something is missing, or is not what it must be.
      UsersError: The user's module or arguments raised.
    """
    target = targets.parse(chosen.target)
    args = targets.parse(chosen.args, target) if chosen.args is not None else None
    beside = {
        role: targets.parse(text, target) for role, text in (others or {}).items()
    }
    with (
        running_in(chosen.devices, chosen.x64),
        targets.importing() as importer,
        _flags_at_their_defaults(),
    ):
        loaded = importer.load(target)
        functions = {
            role: importer.load(each).function() for role, each in beside.items()
        }
        require_devices(chosen.devices)
        fn, values = function_and_arguments(importer, loaded, args)
        yield Subject(fn, values, functions)


@contextlib.contextmanager
def _flags_at_their_defaults() -> Iterator[None]:
    """Lets code read its absl flags, none of which the command line sets."""
    from absl import flags

    if flags.FLAGS.is_parsed():
        yield
        return
    flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        flags.FLAGS.unparse_flags()
