"""Which parameters a check is about: by module path, by a function, by NNX filters."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from flax import nnx

from gradtest._src.modules.model import Entry

_KINDS = (
    "a module path ('encoder/Dense_0', '*/kernel'), a function of (path, value), or an "
    "nnx filter"
)


def as_filters(role: str, chosen: Any) -> list[Any]:
    """Returns the filters that a user gave: one, or a sequence of them.

    Raises:
      TypeError: One is of no known kind.
    """
    if chosen is None:
        return []
    several = chosen if isinstance(chosen, list | tuple | set | frozenset) else [chosen]
    for each in several:
        if not isinstance(each, str) and not callable(each) and each is not Ellipsis:
            raise TypeError(f"`{role}` must be {_KINDS}, or several, got {each!r}.")
    return list(several)


def frozen(
    entries: Sequence[Entry], wrt: Sequence[Any], exclude: Sequence[Any]
) -> tuple[str, ...]:
    """Returns the names of the leaves that are left out.

    Raises:
      ValueError: A filter names no parameter, or nothing is left.
    """
    wanted = _selected("wrt", entries, wrt) if wrt else {e.name for e in entries}
    dropped = _selected("exclude", entries, exclude)
    if not wanted - dropped:
        raise ValueError(
            "`exclude` leaves nothing to check: every parameter that `wrt` selects is "
            "excluded."
            if wrt
            else "`exclude` leaves nothing to check: every parameter is excluded."
        )
    left_out = dropped | {e.name for e in entries if e.name not in wanted}
    return tuple(e.name for e in entries if e.name in left_out)


def _selected(role: str, entries: Sequence[Entry], chosen: Sequence[Any]) -> set[str]:
    """Returns the names of the leaves that any of the filters selects."""
    found: set[str] = set()
    for each in chosen:
        if isinstance(each, str):
            names = _of_pattern(each, entries)
        else:
            names = _of_predicate(role, each, entries)
        if not names:
            raise ValueError(
                f"`{role}` selects no parameter: {_describe(each)} fits none of "
                f"{_listed(entries)}."
            )
        found |= names
    return found


def _of_predicate(role: str, chosen: Any, entries: Sequence[Entry]) -> set[str]:
    try:
        predicate = nnx.filterlib.to_predicate(chosen)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{role}` must be {_KINDS}, got {chosen!r}.") from error
    try:
        return {e.name for e in entries if predicate(e.path, e.value)}
    except TypeError as error:
        raise TypeError(
            f"`{role}` must be callable as {_describe(chosen)}(path, value), with the "
            f"path a tuple such as {entries[0].path!r}: {error}"
        ) from error


def _of_pattern(pattern: str, entries: Sequence[Entry]) -> set[str]:
    """Returns what a path selects: from the root if it can, else anywhere."""
    for written in dict.fromkeys((pattern, pattern.replace(".", "/"))):
        for match in (_from_the_root, _anywhere):
            names = {
                e.name
                for e in entries
                if e.name == written or match(written.strip("/"), _parts(e))
            }
            if names:
                return names
    return {e.name for e in entries if _is_prefix(pattern, e.name)}


def _is_prefix(pattern: str, name: str) -> bool:
    rest = name.removeprefix(pattern)
    return rest != name and rest[:1] in ("", "[", ".")


def _parts(entry: Entry) -> list[str]:
    return [str(part) for part in entry.path]


def _from_the_root(pattern: str, parts: list[str]) -> bool:
    heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(head, pattern) for head in heads)


def _anywhere(pattern: str, parts: list[str]) -> bool:
    return any(_from_the_root(pattern, parts[start:]) for start in range(len(parts)))


def _describe(chosen: Any) -> str:
    if isinstance(chosen, str):
        return repr(chosen)
    return getattr(chosen, "__name__", repr(chosen))


def _listed(entries: Sequence[Entry], most: int = 8) -> str:
    names = ", ".join("/".join(_parts(entry)) for entry in entries[:most])
    return names + ", …" * (len(entries) > most)
