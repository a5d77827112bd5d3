"""A function of one device out of many that all have the same arguments.

What uses a named axis of devices can't be traced by itself. Under a variant that maps
it over devices, each of which has the same arguments, it is a function of these all the
same: reductions over the axis meet as many copies of one value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src import jaxprs, variants
from gradtest._src.execution import SlipError

Call = Callable[..., Sequence[Any]]
# What makes of each device another one; reductions treat all alike.
_UNLIKE = frozenset(
    {
        "axis_index",
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "pgather",
        "ppermute",
        "ragged_all_to_all",
        "reduce_scatter",
    }
)


def on_replicas(
    call: Call, variant: Callable[..., Any], arguments: Sequence[Any]
) -> Call | None:
    """Returns what any device computes of `call`, the axes of the variant bound.

    Args:
      call: Uses an axis that only the variant binds.
      variant: Maps it over devices.
      arguments: Trees of arrays that all devices have.

    Returns:
      The function of those arguments; None where the variant binds no such axis.

    Raises:
      SlipError: Each device computes something else.
    """
    try:
        mapped = jax.make_jaxpr(variants.apply_variant(variant, call))(*arguments)
    except NameError:
        return None
    axes: dict[Any, int] = {}
    for eqn in jaxprs.walk(mapped):
        if eqn.primitive.name == "shard_map":
            region = jaxprs.read_shard_map(eqn)
            axes |= {name: region.mesh.shape[name] for name in region.axis_names}
            _require_alike(region.body)

    def alone(*args: Any) -> Sequence[Any]:
        def one(_: Any) -> Sequence[Any]:
            return call(*args)

        function = one
        for name, size in axes.items():
            function = _mapped(function, name, size)
        return [result[(0,) * len(axes)] for result in function(None)]

    return alone


def _mapped(function: Any, name: Any, size: int) -> Any:
    copies = jax.vmap(lambda _: function(None), axis_name=name, axis_size=size)
    return lambda _: copies(jnp.arange(size))


def _require_alike(body: jaxprs.Jaxpr) -> None:
    """Raises SlipError where a program treats devices differently."""
    for name in sorted(_UNLIKE & jaxprs.primitives(body)):
        raise SlipError(
            f"`fn` uses {name} over an axis of `variant`: each device computes another "
            "function, and there is no one gradient to compare with. Check the whole "
            "with assert_parallel_grads_match, or call the assertion inside of the "
            "function that is mapped."
        )
