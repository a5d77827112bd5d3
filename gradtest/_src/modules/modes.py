"""Whether a module is called in evaluation mode, and which slip it may be if not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def flags(
    module: Any, method: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[bool, bool]]:
    """Returns the flags of a call: whether each says training, and was handed over."""
    call: Any = "__call__" if method is None else method
    if isinstance(call, str):
        call = getattr(type(module), call, None)
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return {}
    if parameters and not inspect.ismethod(call):
        parameters = parameters[1:]
    found = {}
    for place, parameter in enumerate(parameters):
        name = parameter.name
        if name not in _TRAINING | _EVALUATING:
            continue
        given = name in kwargs or place < len(inputs)
        value = kwargs.get(name, inputs[place] if place < len(inputs) else None)
        if not given:
            value = parameter.default
        if _is_flag(value):
            found[name] = (bool(value) is (name in _TRAINING), given)
    for name in sorted(_TRAINING | _EVALUATING):
        value = getattr(module, name, None)
        if name not in found and isinstance(value, bool):
            found[name] = (value is (name in _TRAINING), True)
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


def changing(
    module: Any,
    said: Mapping[str, tuple[bool, bool]],
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
    training = [name for name, (trains, _) in said.items() if trains]
    if training:
        name = training[0]
        handed = "is" if said[name][1] else "is by default"
        value = not flipped(name, True)
        return Cause(
            "training mode",
            f"{what}: the call is in training mode, {name} {handed} {value}",
            f"hand over {name}={not value}",
        )
    for name in said:
        if holds_when_flipped(name):
            value = not flipped(name, False)
            return Cause(
                "inverted flag",
                f"{what} with {name}={value}, and does not with {name}={not value}: "
                "the flag is inverted on its way to the layer",
                f"pass {'not ' if name in _TRAINING else ''}{name} on as "
                "use_running_average",
            )
    if said:
        told = ", ".join(f"{name}={not flipped(name, False)}" for name in said)
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
