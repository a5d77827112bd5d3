"""The bar that shows on a terminal how far a long check is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradtest._src import progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextlib.contextmanager
def shown(doing: str, quiet: bool = False) -> Iterator[None]:
    """Shows a bar on stderr during a `with` block; nothing where that is a file."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        # What the user's code prints into a file must not end up on the terminal.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        bar.add_task(escape(doing), total=None)
        with progress.told_to(_Bars(bar)):
            yield


class _Bars:
    """One bar for each loop that is running."""

    def __init__(self, bar: Progress):
        self._bar = bar
        self._running: list[TaskID] = []

    def begin(self, what: str, total: int | None) -> None:
        """Adds a bar, where there is anything to count."""
        visible = total is None or total > 1
        self._running.append(self._bar.add_task(what, total=total, visible=visible))

    def advance(self) -> None:
        """Moves the innermost bar."""
        self._bar.advance(self._running[-1])

    def end(self) -> None:
        """Takes the innermost bar away."""
        self._bar.remove_task(self._running.pop())
