"""What ends a command early: a slip of the caller's, or an error of the user's code."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator


class UsageError(Exception):
    """The command can't be carried out as it was written; the text says why."""


class UsersError(Exception):
    """Code of the user's raised; the text has the traceback, in the user's frames."""

    def __init__(self, doing: str, error: BaseException):
        name = type(error).__name__
        super().__init__(f"{_told(error)}gradtest: error: {doing} raised {name}.")


def internal_error(error: BaseException) -> str:
    """Says that gradtest itself failed, with the whole traceback."""
    return (
        "".join(traceback.format_exception(error))
        + "gradtest: error: gradtest itself failed, or a package that it needs; "
        "nothing is known about the gradient."
    )


@contextlib.contextmanager
def running_users_code(doing: str) -> Iterator[None]:
    """Tells the errors of the user's code from those of gradtest in a `with` block.

    Args:
      doing: What is done, such as "importing model.py".

    Raises:
      UsersError: Code of the user's raised, or failed to compile.
      UsageError: gradtest refused what it was given, or the code ended the process.
      Exception: gradtest failed.
    """
    try:
        yield
    except (UsageError, UsersError):
        raise
    except SystemExit as stop:
        raise UsageError(
            f"{doing} ended the process (exit code {stop.code!r}). Start programs "
            'under if __name__ == "__main__": so that functions can be imported.'
        ) from None
    except Exception as error:
        if isinstance(error, SyntaxError) or _has_users_frames(error):
            raise UsersError(doing, error) from None
        if isinstance(error, TypeError | ValueError | ImportError):
            raise UsageError(str(error)) from None
        raise


# --- whose frames they are -----------------------------------------------------------

_GRADTEST = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
# Through these the user's code is called, and they are what it calls.
_LIBRARIES = tuple(
    os.path.join(folder, package) + os.sep
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for package in ("jax", "jaxlib", "flax", "chex")
)
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_OF_JAX = "JAX has removed its internal frames"
_INSTALLED = f"-packages{os.sep}"


def _is_users(path: str) -> bool:
    if path.startswith(("<frozen ", _GRADTEST + os.sep, *_LIBRARIES)):
        return False
    return not path.startswith(_STANDARD) or _INSTALLED in path


def _has_users_frames(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(_is_users(frame.filename) for frame in frames)


def _told(error: BaseException) -> str:
    """Returns an error's traceback without the frames that are not the user's."""
    told = traceback.TracebackException.from_exception(error)
    _strip(told)
    return "".join(told.format())


def _strip(told: traceback.TracebackException) -> None:
    notes = getattr(told, "__notes__", None) or []
    told.__notes__ = [note for note in notes if _OF_JAX not in note]
    told.stack[:] = [frame for frame in told.stack if _is_users(frame.filename)]
    for before in (told.__cause__, told.__context__):
        if before is not None:
            _strip(before)
