"""Stores all reports anew: read what `git diff` then shows before you keep it."""

from pathlib import Path

from tests.snapshots import failures, storing


def store(path: Path, text: str) -> None:
    """Writes a file whose text has changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8", newline="\n")
        print("stored anew:", path.name)


store(storing.SCHEMA, storing.schema_text())
for name in failures.NAMES:
    for suffix in storing.SUFFIXES:
        store(storing.stored(name, suffix), storing.told(name, suffix))
