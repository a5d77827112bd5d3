"""Transformations that accumulate: run over micro-batches, with what they are fed seen.

What a wrapped transformation is given shows in the update where it hands on what it
gets: `optax.MultiSteps` is looked at with `optax.identity` in place of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
# So many micro-batches are tried before an update is given up on.
_MOST_STEPS = 256


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """A transformation that accumulates, and the one that it feeds.

    Attributes:
      tx: The transformation.
      inner: What gets the accumulated gradient; None where the update is that gradient.
      multi_steps: The `optax.MultiSteps` that `tx` is, if it is one.
    """

    tx: Any
    inner: Any = None
    multi_steps: Any = None

    def bare(self) -> Any:
        """Returns the transformation whose update is the accumulated gradient."""
        if self.multi_steps is None:
            return self.tx
        seen = copy.copy(self.multi_steps)
        # The one private name of Optax that is needed: `inner_opt` can't be set.
        seen._opt = optax.with_extra_args_support(optax.identity())
        return seen

    def usual_steps(self, params: PyTree) -> int:
        """Returns after how many micro-batches `MultiSteps` updates.

        Raises:
          ValueError: It does not within a reasonable number.
        """
        assert self.multi_steps is not None
        tx = self.bare()
        state, update = tx.init(params), jax.jit(tx.update)
        zeros = jax.tree.map(jnp.zeros_like, params)
        for step in range(_MOST_STEPS):
            _, state = update(zeros, state, params)
            if bool(tx.has_updated(state)):
                return step + 1
        raise ValueError(
            f"`accumulate` makes no update within {_MOST_STEPS} micro-batches: say "
            "after how many it does by `micro_batches=`."
        )


def read_accumulator(accumulate: Any, inner: Any) -> Accumulator | None:
    """Returns the transformation that `accumulate` is; None for a function.

    Raises:
      TypeError: It is neither, or `inner` is no transformation or not asked for.
    """
    is_tx = callable(getattr(accumulate, "init", None)) and callable(
        getattr(accumulate, "update", None)
    )
    if not is_tx:
        if not callable(accumulate):
            raise TypeError(
                "`accumulate` must be a function of params and batch, or an Optax "
                f"transformation, got {accumulate!r}."
            )
        if inner is not None:
            raise TypeError(
                "`inner` is for transformations: a function `accumulate` returns the "
                "accumulated gradient itself."
            )
        return None
    if inner is not None and not callable(getattr(inner, "update", None)):
        raise TypeError(f"`inner` must be an Optax transformation, got {inner!r}.")
    owner = accumulate
    if not isinstance(owner, optax.MultiSteps):
        owner = getattr(accumulate.update, "__self__", None)
    if isinstance(owner, optax.MultiSteps):
        return Accumulator(accumulate, inner or owner.inner_opt, owner)
    return Accumulator(accumulate, inner)
