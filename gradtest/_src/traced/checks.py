"""Assertions called on traced values: checks that are made when the program runs.

Inside of `jit`, `pmap`, `vmap`, `scan`, `grad` or `shard_map` no value is known, so
nothing can be raised. Each assertion then adds checks of `jax.experimental.checkify` to
the program around it, whose messages start as Chex's own do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from gradtest._src.execution import SlipError
from gradtest._src.inputs import is_tracing
from gradtest._src.options import Options
from gradtest._src.traced.gaps import Condition, escaped

if TYPE_CHECKING:
    from gradtest._src.variants import MessageOptions

# How deep a function is searched for traced values that it closes over.
_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an assertion is about, and what must hold of it inside of a trace.

    Attributes:
      args: Everything that may hold traced values.
      functions: Every function handed over: they may close over traced values.
      conditions: Returns the conditions, as traced numbers.
    """

    args: Any
    functions: tuple[Callable[..., Any], ...]
    conditions: Callable[[Options], list[Condition]]

    def is_traced(self) -> bool:
        """Whether the assertion stands inside of a trace, or is about traced values."""
        return is_traced(self.args, *self.functions)


def is_traced(args: Any, *functions: Any) -> bool:
    """Whether JAX traces now, or any argument or closure holds a traced value."""
    leaves = jax.tree_util.tree_leaves(args)
    return (
        any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        or is_tracing()
        or any(_closes_over_tracer(function, _DEPTH) for function in functions)
    )


def _closes_over_tracer(value: Any, depth: int) -> bool:
    if isinstance(value, jax.core.Tracer):
        return True
    if not callable(value):
        leaves = jax.tree_util.tree_leaves(value) if depth else []
        return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not depth:
        return False
    held: list[Any] = []
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    for cell in getattr(value, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    held += [getattr(value, name, None) for name in ("__wrapped__", "__self__")]
    return any(_closes_over_tracer(each, depth - 1) for each in held)


def refuse(name: str, *trees: Any) -> None:
    """Raises TypeError where an assertion that has no traced form is in a trace."""
    if is_traced(trees):
        raise TypeError(
            f"`{name}` was called on traced values, or while JAX traces a function: it "
            "runs programs by itself, so call it outside of jit, grad, vmap and pmap."
        )


def add_checks(
    name: str,
    subject: Subject,
    options: Options,
    inconclusive: str,
    messages: MessageOptions,
) -> Any:
    """Adds the checks of an assertion to the program that is being traced.

    Returns:
      None: there is no report.

    Raises:
      TypeError, ValueError: An argument is not what it must be; as outside of a trace.
    """
    with jax.transfer_guard("allow"):
        try:
            conditions = subject.conditions(options)
        except SlipError as error:
            raise TypeError(str(error)) from None
        for condition in conditions:
            if condition.text:
                _check(name, condition.text, condition.wrong, condition, messages)
        if inconclusive == "raise":
            by_reason: dict[str, Any] = {}
            for condition in conditions:
                if condition.why:
                    seen = by_reason.get(condition.why, False)
                    by_reason[condition.why] = seen | condition.open
            for why, is_open in by_reason.items():
                text = f"nothing can be concluded: {escaped(why)}"
                _check(name, text, is_open, None, messages)


def _check(
    name: str,
    text: str,
    fails: Any,
    condition: Condition | None,
    messages: MessageOptions,
) -> None:
    if fails is False:
        return
    # In the trace's own precision: a float64 can't leave a program in 32 bits.
    numbers: dict[str, Any] = {
        key: jax.lax.stop_gradient(jnp.asarray(number).astype(jnp.float32))
        for key, number in (condition.numbers if condition else {}).items()
    }
    custom, values = _custom(messages)
    message = f"[Chex] chexify assertion '{name}' failed: {text}{custom}"
    checkify.check(
        jnp.logical_not(jax.lax.stop_gradient(jnp.asarray(fails))),
        message,
        **numbers,
        **values,
    )


class _Later:
    """Stands for a traced value in a custom message until its number is known."""

    def __init__(self, name: str):
        self.name = name

    def __format__(self, form: str) -> str:
        return f"\0{self.name}{':' + form if form else ''}\1"


def _custom(messages: MessageOptions) -> tuple[str, dict[str, Any]]:
    """Returns the user's own message as a format, and the traced values in it."""
    text = messages.custom_message
    if not text:
        return "", {}
    values = {
        f"custom_{i}": value
        for i, value in enumerate(messages.custom_message_format_vars)
        if isinstance(value, jax.core.Tracer)
    }
    if messages.custom_message_format_vars:
        text = text.format(
            *(
                _Later(f"custom_{i}") if f"custom_{i}" in values else value
                for i, value in enumerate(messages.custom_message_format_vars)
            )
        )
    text = escaped(text).replace("\0", "{").replace("\1", "}")
    return f" [{text}]", values
