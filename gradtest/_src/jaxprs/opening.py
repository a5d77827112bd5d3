"""Tracing a function so that what it differentiates itself is free of custom rules."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# Only how JAX differentiates a call of a custom rule says where its own rule goes.
from jax._src import core
from jax._src.interpreters import ad

from gradtest._src.jaxprs.programs import (
    Eqn,
    Jaxpr,
    bind,
    is_literal,
    open_body,
    walk,
)
from gradtest._src.jaxprs.scopes import INNER, is_differentiated

# Says which program takes the place of a rule's call, of the same operands; None for
# the rule itself.
Replace = Callable[[Eqn], Jaxpr | None]

_TRACES = (ad.JVPTrace, ad.LinearizeTrace)
_METHODS = ("process_custom_jvp_call", "process_custom_vjp_call")
_patching = threading.RLock()
# JAX keeps what it has traced by the context that it was traced in.
_opening = jax.make_user_context(None)


def differentiates(jaxpr: Jaxpr) -> bool:
    """Whether a traced function differentiates another one itself."""
    return any(map(is_differentiated, walk(jaxpr)))


@contextlib.contextmanager
def rules_opened(replace: Replace) -> Iterator[None]:
    """Lets what is traced inside differentiate through the functions behind rules.

    Where a function calls `jax.grad`, the rules of what it differentiates are gone from
    its trace: in their place are the equations of fwd and bwd, or jvp, right or wrong.
    Here such a call is differentiated through what `replace` says; its value still
    comes from the call, rule and all. Calls that are not differentiated stay as they
    are. What is replaced of JAX for that time, in the thread that asks for it, is put
    back in any case.

    Args:
      replace: Takes the call of a rule as an equation.
    """
    opening = _Opening(replace, threading.get_ident())
    with _patching, contextlib.ExitStack() as restored:
        for trace in _TRACES:
            for name in _METHODS:
                original = getattr(trace, name)
                restored.callback(setattr, trace, name, original)
                setattr(trace, name, opening.method(original))
        with _opening(object()):
            yield


class _Opening:
    """What JAX does with the call of a rule that it differentiates, for a time."""

    def __init__(self, replace: Replace, thread: int):
        self._replace = replace
        self._thread = thread
        self._is_left = False

    def method(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a trace's method in place of its own."""

        @functools.wraps(original)
        def process(trace: Any, primitive: Any, *rest: Any, **params: Any) -> Any:
            (*parts, tracers) = rest
            pairs = [trace.to_primal_tangent_pair(tracer) for tracer in tracers]
            is_at_rest = all(type(tangent) is ad.Zero for _, tangent in pairs)
            if self._is_left or is_at_rest or threading.get_ident() != self._thread:
                return original(trace, primitive, *rest, **params)

            def call(*operands: Any) -> Any:
                held = core.trace_ctx.trace
                return getattr(held, original.__name__)(
                    primitive, *parts, operands, **params
                )

            staged = jax.make_jaxpr(call)(*[primal for primal, _ in pairs])
            (eqn,) = open_body(staged).eqns
            program = self._replace(eqn)
            if program is not None:
                return _through(program, trace, staged, tracers)
            _forget_results(parts[0])
            self._is_left = True
            try:
                with core.set_current_trace(trace):
                    return core.jaxpr_as_fun(staged)(*tracers)
            finally:
                self._is_left = False

        return process


def _through(
    program: Jaxpr, trace: Any, staged: Jaxpr, tracers: Sequence[Any]
) -> list[Any]:
    """Differentiates the one call of a staged program through what takes its place."""
    body = open_body(staged)
    (eqn,) = body.eqns
    values = dict(zip(body.constvars, body.consts, strict=True))
    values |= dict(zip(body.invars, tracers, strict=True))
    operands: list[Any] = [
        atom.val if is_literal(atom) else values[atom]  # type: ignore[union-attr]
        for atom in eqn.invars
    ]
    with core.set_current_trace(trace):
        moved = core.jaxpr_as_fun(program)(*operands)
    with core.set_current_trace(trace.parent_trace), jax.named_scope(INNER):
        at_rest = [trace.to_primal_tangent_pair(each)[0] for each in operands]
        results = bind(eqn, at_rest, eqn.params)
    return [
        _with_tangent(trace, result, trace.to_primal_tangent_pair(other)[1])
        for result, other in zip(results, moved, strict=True)
    ]


def _forget_results(function: Any) -> None:
    """Lets JAX take the tree of a rule's results from its fwd or jvp, as it does."""
    for store in function.stores:
        if store is not None:
            store.reset()


def _with_tangent(trace: Any, value: Any, tangent: Any) -> Any:
    """Returns a value as a trace has it, with its tangent."""
    if isinstance(trace, ad.JVPTrace):
        return ad.maybe_jvp_tracer(trace, value, tangent)
    moves = type(tangent) is not ad.Zero
    return ad.maybe_linearize_tracer(trace, value, moves, tangent)
