"""Where equations were traced: modules, scopes, and the calls that made them."""

from __future__ import annotations

import os
from typing import Any

import jax

from gradtest._src.jaxprs.programs import Eqn

# The class of a transformation's element in the stack; that of a name is `Scope`.
_TRANSFORM = "Transform"
# Around the calls of rules that a program differentiates by what takes their place.
INNER = "gradtest: differentiated"
_JAX = os.path.dirname(jax.__file__) + os.sep


def scope_names(eqn: Eqn) -> tuple[str, ...]:
    """Returns the scopes around an equation, outermost first; no transformations."""
    return tuple(
        str(element.name)
        for element in _stack(eqn)
        if type(element).__name__ != _TRANSFORM and element.name != INNER
    )


def is_inner(eqn: Eqn) -> bool:
    """Whether an equation calls a rule that its program differentiates itself."""
    return any(element.name == INNER for element in _stack(eqn))


def scope(eqn: Eqn) -> str:
    """Returns the names of modules, scopes and transformations around an equation."""
    whole = str(eqn.source_info.name_stack)
    return whole.replace(f"/{INNER}", "").replace(INNER, "")


def is_differentiated(eqn: Eqn) -> bool:
    """Whether an equation was made by differentiating a part of its program."""
    return any(
        type(element).__name__ == _TRANSFORM and element.name in ("jvp", "transpose")
        for element in _stack(eqn)
    )


def is_transposed(eqn: Eqn) -> bool:
    """Whether an equation belongs to the outermost backward pass of its program."""
    first: Any = next(iter(_stack(eqn)), None)
    return type(first).__name__ == _TRANSFORM and first.name == "transpose"


def _stack(eqn: Eqn) -> tuple[Any, ...]:
    return tuple(getattr(eqn.source_info.name_stack, "stack", ()))


def call_place(eqn: Eqn) -> tuple[str, str, int] | None:
    """Returns the call outside of JAX that an equation was traced from.

    The equations of a rule's `bwd` have the place of the rule's call: JAX traces them
    in its name.

    Returns:
      The file, the function, and the place in the function's bytecode, which tells
      calls on one line apart.
    """
    traceback = getattr(eqn.source_info, "traceback", None)
    if traceback is None:
        return None
    for code, place in zip(*traceback.raw_frames(), strict=True):
        if not code.co_filename.startswith(_JAX):
            return code.co_filename, code.co_qualname, place
    return None
