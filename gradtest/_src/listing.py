"""The custom rules that a function calls, by name and place; nothing is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gradtest._src import jaxprs, rules
from gradtest._src.execution import SlipError
from gradtest._src.findings import Rule
from gradtest._src.inputs import Point, read_inputs
from gradtest._src.options import Options
from gradtest._src.program import Program, trace_program


@dataclasses.dataclass(frozen=True)
class Listing:
    """The custom rules that a function calls.

    Attributes:
      rules: Each of them.
      unreached: What keeps some from being audited, one line each.
    """

    rules: tuple[Rule, ...]
    unreached: tuple[str, ...]


def list_rules(
    fn: Callable[..., Any], args: tuple[Any, ...], options: Options, only: Any = None
) -> Listing:
    """Runs a function once, and lists the custom rules that it calls.

    Raises:
      ValueError: `only` names none of them.
    """
    program, point = _trace(fn, args, options)
    uses = rules.find_rules(program, point, only)
    unreached = [
        f"{use.rule.kind} {use.rule.name}: {use.trouble}" for use in uses if use.trouble
    ]
    unreached += [
        f"{name}: called inside of a linear solver, a reduction or a kernel"
        for name in rules.hidden_rules(program)
    ]
    return Listing(tuple(use.rule for use in uses), tuple(unreached))


def users_rules(
    fn: Callable[..., Any], args: tuple[Any, ...], options: Options
) -> list[str]:
    """Names the custom rules that a function calls and no library wrote."""
    program, _ = _trace(fn, args, options)
    sources = [jaxprs.read_rule(calls[0].eqn) for calls in rules.wanted_calls(program)]
    return list(dict.fromkeys(s.name for s in sources if jaxprs.is_users(s)))


def _trace(
    fn: Callable[..., Any], args: tuple[Any, ...], options: Options
) -> tuple[Program, Point]:
    inputs = read_inputs(fn, args, argnums=options.argnums, exclude=options.exclude)
    point = inputs.draw(options.key, 0)
    try:
        program = trace_program(fn, inputs, point, has_aux=options.has_aux)
    except SlipError as error:
        raise TypeError(str(error)) from None
    return program, point
