"""The arguments that a TARGET is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gradtest._src.cli.errors import UsageError, running_users_code
from gradtest._src.cli.targets import Importer, Loaded, Target

_EXAMPLE = """Write beside {name} this function or tuple, or name another by --args:

    import gradtest

    def {name}_args():
        return (
{each}
        )
"""


def function_and_arguments(
    importer: Importer, function: Loaded, wanted: Target | None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns what a TARGET names, and the arguments for it.

    The arguments are what `--args` names; or `NAME_args` beside the function NAME; or
    the defaults of its parameters, where each has one. A function without parameters
    may return both: the function that is meant, and its arguments.

    Raises:
      UsageError: There are no arguments, or they are no tuple or list.
      UsersError: The function that returns them raised.
    """
    fn = function.function()
    if wanted is not None:
        named = importer.load(wanted)
        return fn, _read(f"--args {wanted.text}", named.value)
    attribute = function.target.attribute.rpartition(".")[2] + "_args"
    if hasattr(function.owner, attribute):
        return fn, _read(attribute, getattr(function.owner, attribute))
    parameters = _parameters(fn)
    if parameters == []:
        return _pair(function)
    required = _required(parameters or [])
    if parameters is None or required:
        raise UsageError(_which(function, required))
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    return fn, tuple(parameter.default for parameter in positional)


def _pair(function: Loaded) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Calls a function without parameters for a function and its arguments."""
    text = function.target.text
    with running_users_code(f"calling {text!r}"):
        returned = function.value()
    if type(returned) is not tuple or len(returned) != 2 or not callable(returned[0]):
        raise UsageError(
            f"{text!r} has no parameters, and so nothing to differentiate. It may "
            "return what is to be checked, as `return fn, (x, y)`; it returned "
            f"{type(returned).__name__}."
        )
    return returned[0], _read(
        f"what stands behind the function in {text}()", returned[1]
    )


def _read(what: str, value: Any) -> tuple[Any, ...]:
    if callable(value):
        required = _required(_parameters(value) or [])
        if required:
            raise UsageError(
                f"{what} is a function that itself needs {', '.join(required)}; wanted "
                "a tuple of arguments, or a function that returns one for nothing."
            )
        with running_users_code(f"calling {what}"):
            value = value()
        what = f"what {what} returned"
    if type(value) not in (tuple, list):
        raise UsageError(
            f"{what} must be a tuple or list of arguments, got {type(value).__name__}. "
            "A single argument goes into a tuple: (x,)."
        )
    return tuple(value)


_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Returns the parameters of a function, or None where they are unknown."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _required(parameters: list[inspect.Parameter]) -> list[str]:
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in _ANY_NUMBER
    ]


def _which(function: Loaded, required: list[str]) -> str:
    name = function.target.attribute.rpartition(".")[2]
    needs = ", ".join(required) or "arguments"
    lines = "\n".join(
        f"            gradtest.domains.normal((3, 4)),  # {parameter}"
        for parameter in required or ["the first argument"]
    )
    return (
        f"{function.target.text}: at which {needs} is it to be checked? "
        f"{_EXAMPLE.format(name=name, each=lines)}"
    )
