"""A part of a program in 32 bits that is traced, batched and lowered in 64 bits.

`jax.enable_x64` reaches what is traced inside of it. But the operations of a 32-bit
program are lowered to machine code later, when it is off again, and many of them
(`argmax`, `logistic`, `igamma`) are lowered by tracing them once more, where a float64
constant would then become a float32 one. So such a part is one equation here, and has
a lowering rule that turns the setting on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

Settings = Callable[[], contextlib.AbstractContextManager[None]]

_wide_call = core.Primitive("gradtest_wide_call")
_wide_call.multiple_results = True


def wide_call(
    function: Callable[..., Any], arguments: Sequence[Any], settings: Settings
) -> Any:
    """Calls a function in 64 bits, in the midst of a program that has 32.

    Args:
      function: Takes the arguments as they are, and returns a tree of arrays.
      arguments: Arrays of 32 bits; what else is traced the function may close over.
      settings: Turns 64 bits on.
    """
    with settings():
        jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
        values, opened = _open(jaxpr, arguments)
        flat = _wide_call.bind(*values, jaxpr=opened, settings=settings)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(result), flat)


def _open(jaxpr: Any, arguments: Sequence[Any]) -> tuple[list[Any], Any]:
    """Makes the constants of a program its first arguments: they may be traced."""
    consts = [c for c in jaxpr.consts if isinstance(c, jax.Array)]
    places = [i for i, c in enumerate(jaxpr.consts) if isinstance(c, jax.Array)]

    def opened(consts: list[Any], flat: list[Any]) -> list[Any]:
        whole = list(jaxpr.consts)
        for place, const in zip(places, consts, strict=True):
            whole[place] = const
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        return jax.core.eval_jaxpr(inner, whole, *flat)

    flat = jax.tree_util.tree_leaves(list(arguments))
    return [*consts, *flat], jax.make_jaxpr(opened)(consts, flat)


def _run(*values: Any, jaxpr: Any, settings: Settings) -> list[Any]:
    with settings():
        return jax.jit(core.jaxpr_as_fun(jaxpr))(*values)


def _types(*_: Any, jaxpr: Any, settings: Settings) -> tuple[list[Any], Any]:
    return list(jaxpr.out_avals), jaxpr.effects


def _batch(
    axis: Any,
    values: Sequence[Any],
    places: Sequence[Any],
    *,
    jaxpr: Any,
    settings: Settings,
) -> tuple[list[Any], list[int]]:
    mapped = jax.vmap(
        core.jaxpr_as_fun(jaxpr),
        in_axes=tuple(places),
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    with settings():
        batched = jax.make_jaxpr(mapped)(*values)
        results = _wide_call.bind(*values, jaxpr=batched, settings=settings)
    return results, [0] * len(results)


def _lower(ctx: Any, *values: Any, jaxpr: Any, settings: Settings) -> Any:
    with settings():
        return mlir.core_call_lowering(
            ctx, *values, name="gradtest_wide_call", call_jaxpr=jaxpr
        )


_wide_call.def_impl(_run)
_wide_call.def_effectful_abstract_eval(_types)
batching.fancy_primitive_batchers[_wide_call] = _batch
mlir.register_lowering(_wide_call, _lower)
