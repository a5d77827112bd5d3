"""Who wants to know how far a long check is: nobody, unless somebody listens."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")


class Listener(Protocol):
    """Hears how far the loops of a check are."""

    def begin(self, what: str, total: int | None) -> None:
        """Hears of a loop, of so many rounds; None where that is not known."""

    def advance(self) -> None:
        """Hears that the innermost loop is one round further."""

    def end(self) -> None:
        """Hears that the innermost loop is over."""


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "gradtest_progress", default=None
)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Lets a listener hear of all loops that run inside of the `with` block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def following(
    items: Iterable[_Item], what: str, total: int | None = None
) -> Iterable[_Item]:
    """Returns the items of a loop, and tells the listener, if any, of each round.

    Args:
      items: What the loop runs over; returned as it is where nobody listens.
      what: What it runs over, in a word or two, such as "trials".
      total: How many there are; by default what `len` says, where it can.
    """
    listener = _listener.get()
    if listener is None:
        return items
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _followed(items, what, total, listener)


def _followed(
    items: Iterable[_Item], what: str, total: int | None, listener: Listener
) -> Iterator[_Item]:
    listener.begin(what, total)
    try:
        for item in items:
            yield item
            listener.advance()
    finally:
        listener.end()
