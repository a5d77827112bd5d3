"""Whether a module is called in evaluation mode, and which slip it may be if not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from gradtest._src.findings import Cause

# What says that a call is training, and what that it is not.
_TRAINING = frozenset(
    {"train", "training", "is_training", "is_train", "update_stats", "mutable_stats"}
)
_EVALUATING = frozenset(
    {
        "use_running_average", "deterministic", "eval", "evaluate", "evaluation",
        "inference", "is_eval", "test",
    }
)  # fmt: skip


class Flag(NamedTuple):
    """A flag of a call.

    Attributes:
      trains: Whether it says training.
      given: Whether it was handed over.
      is_attribute: Whether the module has it, and not the call.
    """

    trains: bool
    given: bool
    is_attribute: bool = False


def flags(
    module: Any, method: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Flag]:
    """Returns the flags of a call, by name, and those that the module itself holds."""
    call: Any = "__call__" if method is None else method
    if isinstance(call, str):
        call = getattr(type(module), call, None)
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return {}
    if parameters and not inspect.ismethod(call):
        parameters = parameters[1:]
    found: dict[str, Flag] = {}
    for place, parameter in enumerate(parameters):
        name = parameter.name
        if name not in _TRAINING | _EVALUATING:
            continue
        given = name in kwargs or place < len(inputs)
        value = kwargs.get(name, inputs[place] if place < len(inputs) else None)
        if not given:
            value = parameter.default
        if _is_flag(value):
            found[name] = Flag(bool(value) is (name in _TRAINING), given)
    for name in sorted(_TRAINING | _EVALUATING):
        value = getattr(module, name, None)
        if name not in found and isinstance(value, bool):
            is_attribute = name not in [each.name for each in parameters]
            found[name] = Flag(value is (name in _TRAINING), True, is_attribute)
    return found


def _is_flag(value: Any) -> bool:
    """Whether a value is true or false, as Python's or as an array."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return isinstance(value, bool) or (
        is_array and value.dtype == np.bool_ and value.shape == ()
    )


def flipped(name: str, is_training: bool) -> bool:
    """Returns the value of a flag that says the other thing."""
    return (name in _TRAINING) is not is_training


def with_flag(module: Any, name: str, value: bool) -> Any:
    """Returns a copy of a module with another value of a flag that it holds."""
    if not isinstance(module, nnx.Module):
        return module.clone(**{name: value})
    copy = nnx.clone(module)
    setattr(copy, name, value)
    return copy


def changing(
    module: Any,
    said: Mapping[str, Flag],
    holds_when_flipped: Callable[[str], bool],
    what: str,
    *,
    is_average: bool,
) -> Cause:
    """Says which slip may be behind a change.

    Args:
      module: The module.
      said: Its flags, as `flags` returns them.
      holds_when_flipped: Whether nothing changes where a flag is turned over.
      what: What changes, in a clause.
      is_average: Whether it is an average such as a normalisation holds.
    """
    training = [
        name
        for name, flag in said.items()
        if flag.trains and (not flag.is_attribute or holds_when_flipped(name))
    ]
    if training:
        name = training[0]
        value = not flipped(name, True)
        return _in_training(module, name, said[name], value, what)
    for name, flag in said.items():
        if not flag.trains and holds_when_flipped(name):
            value = not flipped(name, False)
            return Cause(
                "inverted flag",
                f"{what} with {name}={value}, and does not with {name}={not value}: "
                "the flag is inverted on its way to the layer",
                f"pass {'not ' if name in _TRAINING else ''}{name} on as "
                "use_running_average",
            )
    handed = [
        name for name, flag in said.items() if not (flag.is_attribute or flag.trains)
    ]
    if handed:
        told = ", ".join(f"{name}={not flipped(name, False)}" for name in handed)
        return Cause(
            "flag ignored",
            f"{what} although the call says {told}: the layer does not heed it",
            "hand the flag on to the layer, and update its state only in training",
        )
    if isinstance(module, nnx.Module):
        return Cause(
            "not set by eval",
            f"{what} although the module is set to .eval(): use_running_average or "
            "deterministic is given at the call, or the layer has no such flag",
            "read the flag from the layer itself, and update state only in training",
        )
    if not is_average:
        return Cause(
            "updated in every call",
            f"{what}: the call has no flag for evaluation, and updates it always",
            "add a flag to the call, and update its state only in training",
        )
    return Cause(
        "use_running_average not set",
        f"{what}: the call has no flag for evaluation, and use_running_average=True "
        "is not set",
        "set use_running_average=True for evaluation, say by a flag of the call",
    )


def _in_training(module: Any, name: str, flag: Flag, value: bool, what: str) -> Cause:
    """Says that a flag of the call, or one that the module holds, says training."""
    says = f"{what}: the call is in training mode, "
    own = f"{type(module).__name__}.{name}"
    if not flag.is_attribute:
        handed = "is" if flag.given else "is by default"
        remedy = f"hand over {name}={not value}"
        return Cause("training mode", f"{says}{name} {handed} {value}", remedy)
    if isinstance(module, nnx.Module):
        says += f"{own} is {value} and .eval() does not set it"
        remedy = (
            f"set module.{name} = {not value} before, or read one of the flags that "
            ".eval() sets (use_running_average, deterministic)"
        )
        return Cause("training mode", says, remedy)
    says += f"{own} is {value}"
    remedy = f"make the module with {name}={not value}"
    return Cause("training mode", says, remedy)
