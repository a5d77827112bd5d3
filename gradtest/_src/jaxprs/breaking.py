"""Custom rules that are broken, or looked at, while a function is traced.

JAX binds a rule's function and its derivative as one call, at any depth of jit, scan,
remat, vmap or of a function that differentiates itself. There the derivative is
replaced: the program that is traced has the call of another rule in it, and nothing
else of it is different.

Checked on jax 0.10.2 and 0.12.0; where they differ: from 0.12 on a `bwd` returns its
cotangents beside a log.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# Only the primitives themselves say which rule is bound, and with what.
from jax._src import core, source_info_util
from jax._src.custom_derivatives import (
    CustomVJPPrimal,
    custom_jvp_call_p,
    custom_vjp_call_p,
)
from jax._src.interpreters import ad

from gradtest._src.jaxprs.programs import Eqn
from gradtest._src.jaxprs.sources import RuleSource, inside, source_of_parts

_PRIMITIVES = (custom_vjp_call_p, custom_jvp_call_p)
_patching = threading.RLock()
# JAX keeps what it has traced by the context that it was traced in.
_breaking = jax.make_user_context(None)

# Makes the broken part of a rule of the right one, in its flat form: of tuples.
Part = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def in_the_name_of(eqn: Eqn) -> Iterator[None]:
    """Gives what is traced inside the line and the scopes of an equation."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
        yield


def outside_of_traces() -> contextlib.AbstractContextManager[None]:
    """Lets what is called inside run at once, also amid a trace."""
    return core.set_current_trace(core.eval_trace)


class BoundRule:
    """A custom rule at the moment that JAX binds it.

    Attributes:
      source: Where it was written.
      operands: What it is called with.
      symbolic_zeros: Whether it wants to know what takes no part.
    """

    def __init__(self, primitive: Any, operands: Sequence[Any], params: dict[str, Any]):
        self.operands = tuple(operands)
        self.symbolic_zeros = bool(params["symbolic_zeros"])
        self._params = params
        self._is_vjp = primitive is custom_vjp_call_p
        function, *parts = params["subfuns"]
        names = ("fwd", "bwd") if self._is_vjp else ("jvp",)
        kind = "custom_vjp" if self._is_vjp else "custom_jvp"
        held = dict(zip(names, parts, strict=True))
        self.source: RuleSource = source_of_parts(
            kind, function.debug_info, held, self.symbolic_zeros
        )

    @property
    def is_broken(self) -> bool:
        """Whether its derivative was replaced already, where it was bound before."""
        held = self._params["subfuns"][-1]
        return any(isinstance(each, _Broken) for each in inside(held))

    def fwd(self, *operands: Any) -> tuple[list[Any], list[Any]]:
        """Runs `fwd` on flat operands; returns flat results and residuals."""
        _, fwd, _ = self._params["subfuns"]
        _forget(fwd)
        moving = [x for value in operands for x in (value, True)]
        returned = fwd.call_wrapped(*moving)
        return self._opened(returned, operands)

    def _opened(self, returned: Any, operands: Any) -> tuple[list[Any], list[Any]]:
        """Splits what `fwd` returns; residuals that are operands are not in it."""
        _, tree, forwarded = self._params["out_trees"]()
        count = tree.num_leaves - sum(place is not None for place in forwarded)
        kept, results = iter(returned[:count]), list(returned[count:])
        first = len(operands) - len(self.operands)
        residuals = [
            next(kept) if place is None else operands[place + first]
            for place in forwarded
        ]
        return results, residuals

    def bwd(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        """Runs `bwd` on flat values; returns a cotangent, or None, for each operand."""
        _, _, bwd = self._params["subfuns"]
        returned = bwd.call_wrapped(*residuals, *cotangents)
        cotangents, _ = returned if isinstance(returned, tuple) else (returned, None)
        return tuple(None if _is_zero(each) else each for each in cotangents)

    def jvp(self, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        """Runs a `custom_jvp` rule on flat values; returns results and tangents."""
        _, jvp = self._params["subfuns"]
        _forget(jvp)
        returned = jvp.call_wrapped(*primals, *tangents)
        half = len(returned) // 2
        return tuple(returned[:half]), tuple(returned[half:])

    def forget(self) -> None:
        """Lets JAX run the rule as if it had not been run before."""
        for part in self._params["subfuns"][1:]:
            _forget(part)

    def broken(self, part: str, breaks: Part, count: int) -> dict[str, Any]:
        """Returns the parameters of the call with one part of the rule broken.

        Args:
          part: "bwd", "fwd" or "jvp".
          breaks: Makes the broken part of the right one.
          count: How many operands the rule has; others come before them, where it
            closes over traced values.
        """
        change = _Broken(breaks, max(len(self.operands) - count, 0))
        params = dict(self._params)
        if part == "jvp":
            function, jvp = params["subfuns"]
            params["subfuns"] = function, jvp.wrap(_jvp, (change,), None)
            return params
        function, fwd, bwd = params["subfuns"]
        out_trees = params["out_trees"]
        if part == "bwd":
            bwd = bwd.wrap(_bwd, (change, out_trees), None)
        else:
            fwd = fwd.wrap(_fwd, (change, out_trees), None)
            bwd = bwd.wrap(_as_it_is, (change,), None)
            params["out_trees"] = functools.partial(_nothing_forwarded, out_trees)
        params["subfuns"] = function, fwd, bwd
        return params


class _Broken:
    """A change to a rule, where JAX keeps it; no function, so nobody's source."""

    def __init__(self, breaks: Part, first: int):
        self.breaks, self.first = breaks, first

    def __hash__(self) -> int:
        return id(self)


def _jvp(right: Any, change: _Broken, *args: Any) -> list[Any]:
    half, first = len(args) // 2, change.first

    def flat(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        returned = right(*args[:first], *primals, *args[half:][:first], *tangents)
        middle = len(returned) // 2
        return tuple(returned[:middle]), tuple(returned[middle:])

    own = tuple(args[first:half]), tuple(args[half + first :])
    results, tangents = change.breaks(flat)(*own)
    return [*results, *tangents]


def _bwd(right: Any, change: _Broken, out_trees: Any, *args: Any) -> Any:
    count = len(args) - out_trees()[0].num_leaves
    rest: list[Any] = []

    def flat(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        returned = right(*residuals, *cotangents)
        found, logs = returned if isinstance(returned, tuple) else (returned, None)
        rest[:] = [returned, list(found), logs]
        own = found[change.first :]
        return tuple(None if _is_zero(each) else each for each in own)

    changed = change.breaks(flat)(tuple(args[:count]), tuple(args[count:]))
    returned, found, logs = rest
    own = zip(found[change.first :], changed, strict=True)
    cotangents = [
        *found[: change.first],
        *(old if new is None else new for old, new in own),
    ]
    return (cotangents, logs) if isinstance(returned, tuple) else cotangents


def _fwd(right: Any, change: _Broken, out_trees: Any, *args: Any) -> list[Any]:
    before, moving = args[: 2 * change.first], args[2 * change.first + 1 :: 2]

    def flat(*operands: Any) -> tuple[Any, Any]:
        pairs = zip(operands, moving, strict=True)
        returned = right(*before, *(x for pair in pairs for x in pair))
        _, tree, forwarded = out_trees()
        count = tree.num_leaves - sum(place is not None for place in forwarded)
        kept, whole = iter(returned[:count]), [*before[::2], *operands]
        residuals = [next(kept) if i is None else whole[i] for i in forwarded]
        return tuple(returned[count:]), tuple(residuals)

    results, residuals = change.breaks(flat)(*args[2 * change.first :: 2])
    return [*residuals, *results]


def _as_it_is(right: Any, change: _Broken, *args: Any) -> Any:
    return right(*args)


def _nothing_forwarded(out_trees: Any) -> Any:
    out_tree, tree, forwarded = out_trees()
    return out_tree, tree, [None] * len(forwarded)


def _forget(function: Any) -> None:
    for store in function.stores:
        if store is not None:
            store.reset()


def _is_zero(value: Any) -> bool:
    return type(value) is ad.Zero


def wanting(leaf: Any) -> Any:
    """Returns an operand as a `fwd` that wants to know what takes part takes it."""
    return CustomVJPPrimal(leaf, True)


@contextlib.contextmanager
def rules_met(meet: Callable[[BoundRule], dict[str, Any] | None]) -> Iterator[None]:
    """Lets every custom rule that is bound inside be looked at, or broken.

    Functions that are compiled already are traced anew for that. What is replaced of
    JAX meanwhile, in the thread that asks for it, is put back in any case.

    Args:
      meet: Takes a rule; returns other parameters for its call, or None.
    """
    thread = threading.get_ident()
    with _patching, contextlib.ExitStack() as restored:
        for primitive in _PRIMITIVES:
            kind: Any = type(primitive)
            original = kind.bind_with_trace
            restored.callback(setattr, kind, "bind_with_trace", original)
            kind.bind_with_trace = _meeting(original, meet, thread)
        with _breaking(object()):
            yield


def _meeting(original: Any, meet: Any, thread: int) -> Any:
    @functools.wraps(original)
    def bind_with_trace(
        primitive: Any, trace: Any, args: Any, avals: Any, params: Any
    ) -> Any:
        if threading.get_ident() == thread:
            rule = BoundRule(primitive, args, dict(params))
            if not rule.is_broken:
                params = meet(rule) or params
        return original(primitive, trace, args, avals, params)

    return bind_with_trace
