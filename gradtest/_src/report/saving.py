"""Reports as files: the suffix says in which form."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from gradtest._src.findings import Report

_WRITERS: dict[str, Callable[[Report], str]] = {
    ".html": lambda report: report.to_html(),
    ".json": lambda report: report.to_json(indent=2) + "\n",
    ".txt": lambda report: f"{report}\n",
}
_REPLAYED = (".npz", ".py")


def save(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes a report in the form that the suffix names; see `Report.save`."""
    goal = Path(path)
    suffix = goal.suffix.lower()
    if suffix not in _WRITERS and suffix not in _REPLAYED:
        known = ", ".join([*_WRITERS, *_REPLAYED])
        raise ValueError(
            f"`path` must end in one of {known}, which says what is written; got "
            f"{os.fspath(path)!r}."
        )
    if not goal.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must lie in a directory that is there; {str(goal.parent)!r} "
            f"is none (for {os.fspath(path)!r})."
        )
    if suffix in _REPLAYED:
        from gradtest._src.report import replay

        replay.save(report, goal)
        return goal
    text = _WRITERS[suffix](report)
    with written_whole(goal) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return goal


@contextlib.contextmanager
def written_whole(goal: Path) -> Iterator[Path]:
    """Yields a file to write beside `goal`, which takes its place only when whole."""
    target = Path(os.path.realpath(goal))  # a link stays one
    part = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
