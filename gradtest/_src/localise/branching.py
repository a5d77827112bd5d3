"""The line at which a rule goes another way, where JAX runs it in another way."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, ways
from gradtest._src.case import Case
from gradtest._src.findings import Line
from gradtest._src.jaxprs import RuleSource
from gradtest._src.localise import source as sources

# A function of the user's, and a line of it that was run.
_Run = list[tuple[CodeType, int]]


def branching_line(
    case: Case, check: str, source: RuleSource, renew: Callable[[], None]
) -> Line | None:
    """Returns the line that decides what a rule does in a way where it is wrong.

    The rule's Python is run as it is and in that way, its lines are written down, and
    the first that differ tell.

    Args:
      case: The rule as a program.
      check: The name of the check that it fails, as in `ways.WAYS`, or "eager".
      source: Where the rule was written.
      renew: Makes the rule's call new, before it is traced in another pattern.
    """
    files = {where.rpartition(" at ")[2].rpartition(":")[0] for where in source.where}
    renew()
    usual = _lines_of(lambda: jax.make_jaxpr(_fresh(case))(*_at(case)), files)
    for run in _runs(case, check):
        renew()
        other = _lines_of(run, files)
        found = _first_that_differs(usual, other)
        if found is not None:
            return found
    return None


def _fresh(case: Case) -> Callable[..., Any]:
    """Returns the claim as a function that JAX has not traced yet."""
    return lambda moving, held, seed: _pulled(case, moving, held, seed)


def _pulled(case: Case, moving: Any, held: Any, seed: Any) -> Any:
    return jax.vjp(lambda *xs: case.program.call(xs, held), *moving)[1](list(seed))


def _at(case: Case) -> tuple[list[Any], list[Any], list[Any]]:
    held = case.program.held(case.point)
    return list(case.point.moving), list(held), list(case.seed)


def _runs(case: Case, check: str) -> Iterator[Callable[[], Any]]:
    """Yields what runs the rule's Python in each way of a check."""
    if check == "eager":
        moving, held, seed = _at(case)
        arrays = [jnp.asarray(value) for value in moving]
        pulled = [jnp.asarray(value) for value in seed]
        yield lambda: _pulled(case, arrays, held, pulled)
        return
    stacked = [
        [np.stack([np.asarray(v)] * ways.EXAMPLES) for v in p] for p in _at(case)
    ]
    for name, _, make, wanted in ways.WAYS:
        if name == check:
            for _, function, _ in ways.several(case, make, wanted):
                yield functools.partial(jax.make_jaxpr(function), *stacked)


def _lines_of(run: Callable[[], Any], files: set[str]) -> _Run:
    """Runs something and returns the lines of users' that it ran, in order."""
    lines: _Run = []

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code, frame.f_lineno))
        return at_line

    def at_call(frame: FrameType, event: str, _: Any) -> Any:
        return at_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()  # a debugger's, or one that measures coverage
    try:
        with execution.working_precision(), execution.user_code():
            sys.settrace(at_call)
            run()
    except Exception:  # the lines until there tell as much
        pass
    finally:
        sys.settrace(before)
    return lines


def _first_that_differs(usual: _Run, other: _Run) -> Line | None:
    """Returns the branch that two runs take otherwise, or what only the other runs."""
    pairs = itertools.zip_longest(usual, other)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if same == max(len(usual), len(other)) or not same:
        return None
    after = [run[same][0] for run in (usual, other) if same < len(run)]
    branch, number = usual[same - 1]
    if len(after) == 2 and after[0] is after[1] is branch:
        return _line(branch, number, "it goes another way from here")
    alone = [place for place in other if place not in set(usual)]
    if not alone:
        return None
    return _line(*alone[-1], "it is run in this way alone")


def _line(code: CodeType, number: int, says: str) -> Line:
    text = sources.code_at(code.co_filename, number)
    return Line(code.co_filename, number, code.co_qualname, text, says, 0.7)
