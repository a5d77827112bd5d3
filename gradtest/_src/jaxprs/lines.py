"""The lines of source that equations were traced from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from typing import Any

# Only this module's `current` says which traceback an equation gets.
from jax._src import source_info_util
from jax._src.lib import xla_client

from gradtest._src.jaxprs.programs import CALLS, Eqn, subprograms

# Where no line of a user's stands, though they call users' functions.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
# Code that stands in no file.
_GENERATED = ("<frozen", "<string>")


@dataclasses.dataclass(frozen=True)
class Place:
    """A line of a user's source, and the lines that called it, outwards.

    Attributes:
      file: The path of the file.
      number: The line's number.
      column: Where on the line the expression begins and ends.
      function: The function that it stands in.
      callers: The users' places around it, innermost first.
    """

    file: str
    number: int
    column: tuple[int, int] = (0, 0)
    function: str = ""
    callers: tuple[Place, ...] = ()

    def within(self, file: str, lines: range) -> Place | None:
        """Returns the innermost of its places that is among some lines of a file."""
        for place in (self, *self.callers):
            if place.file == file and place.number in lines:
                return place
        return None


# JAX evaluates a traced program in these, each equation in the name of its own line.
_INTERPRETERS = ("backward_pass", "eval_jaxpr")
_patching = threading.RLock()


@contextlib.contextmanager
def hand_written_lines() -> Iterator[None]:
    """Lets what is traced inside know the lines of hand-written derivatives.

    JAX gives every equation of a backward pass the line of the forward equation that it
    belongs to; all of a rule's bwd then stands at the line that calls the rule. Here a
    user's function that runs inside of a pass speaks for itself. The function of JAX's
    that is replaced for that time is put back in any case.
    """
    with _patching:
        original: Any = source_info_util.current

        def current() -> Any:
            info = original()
            real = xla_client.Traceback.get_traceback()
            for frame in real.frames if info.traceback else ():
                if any(name in frame.function_name for name in _INTERPRETERS):
                    break
                if not is_of_library(frame.file_name):
                    return info.replace(traceback=real)
            return info

        source_info_util.current = current
        try:
            yield
        finally:
            source_info_util.current = original


def users_place(eqn: Eqn) -> Place | None:
    """Returns the innermost line of a user's that an equation was traced from."""
    traceback = getattr(eqn.source_info, "traceback", None)
    if traceback is None:
        return None
    places: list[Place] = []
    for code, last in zip(*traceback.raw_frames(), strict=True):
        if is_of_library(code.co_filename):
            continue
        where = xla_client.Traceback.code_addr2location(code, last)
        number, start, _, end = where
        places.append(Place(code.co_filename, number, (start, end), code.co_qualname))
    if not places:
        return None
    return dataclasses.replace(places[0], callers=tuple(places[1:]))


def call_site(eqn: Eqn) -> str:
    """Returns the user's line that an equation comes from, as "file:line", or ""."""
    place = users_place(eqn)
    return f"{place.file}:{place.number}" if place is not None else ""


def calls_library(eqn: Eqn) -> bool:
    """Whether an equation calls a compiled function that a library wrote.

    JAX keeps its trace: the equations inside know the line that called it first, which
    need not be this one.
    """
    if eqn.primitive.name not in CALLS:
        return False
    for program in subprograms(eqn):
        debug = getattr(getattr(program, "jaxpr", program), "debug_info", None)
        file = getattr(debug, "func_filename", None)
        return file is None or is_of_library(file)
    return True


@functools.cache
def is_of_library(path: str) -> bool:
    """Whether a file is one of a library's that stands between JAX and its user."""
    return path.startswith((*_GENERATED, *folders_of(_LIBRARIES), *_own_folders()))


def folders_of(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the folders of those of some modules that are imported by now."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in modules]
    return tuple(os.path.join(os.path.dirname(file), "") for file in files if file)


@functools.cache
def _own_folders() -> tuple[str, ...]:
    """Returns this package's folder, and what Python itself puts between frames."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    standard = os.path.join(sysconfig.get_path("stdlib"), "")
    between = (standard + each for each in ("functools", "contextlib", "unittest"))
    return (os.path.join(package, ""), *between)
