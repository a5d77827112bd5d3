"""The public assertion on how a loss reduces: orchestration only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from gradtest._src.findings import Report
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import (
    Inconclusive,
    Keywords,
    Reporter,
    require_callable,
    settled,
)
from gradtest._src.optimisers import reduction_check
from gradtest._src.optimisers.examples_of import Reduction
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any


@processes.agreed
def assert_loss_reduction(
    loss: Callable[..., PyTree],
    *args: PyTree,
    reduction: Literal["mean", "sum", "none"] = "mean",
    where: Any = None,
    where_name: str | None = None,
    axis: int | Sequence[int] | None = None,
    batched: int | Sequence[int] | None = None,
    per_example: Callable[..., Any] | None = None,
    strict_mask: bool = False,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that a loss is the mean, the sum or the list of its examples' losses.

    Each example is cut out of the arguments, its axis kept with length 1, and the loss
    is asked of it alone; what these come to, in value and in gradient, is what the loss
    of all of them must be. With a mask the kept examples alone count, a mean divides by
    how many they are, and masked entries have a gradient of exactly zero. Values and
    gradients are compared in float64 (of custom rules in the loss the functions count),
    then run in their own dtype.

    Args:
      loss: A function of `args`. Its result is one value for "mean" and "sum" (or one
        for each class, or whatever one example's result has no 1 for), and has the axes
        of examples for "none".
      *args: Trees, as for `gradtest.assert_autodiff_matches`. Arrays that have the
        length of the examples' axis there are cut along it, all else goes whole to each
        example.
      reduction: What the loss promises.
      where: A mask, of the shape of the examples: the loss gets it by keyword.
      where_name: That keyword. None: `where` or `mask`, whichever the loss has.
      axis: The axis of examples in the arguments, or several. None: the first, or
        with a mask each axis of the mask.
      batched: Positions of the arguments that have examples. None: all of them. Name
        them where others (params) may have as many rows by chance.
      per_example: `per_example(i, *args)` returns the loss of example i (a tuple of
        numbers for several axes), where cutting it out is no definition: contrastive
        losses, where examples see each other.
      strict_mask: Whether a mask must also keep NaN and inf in masked entries out of
        the gradient, and whether a mask that keeps nothing must give a finite
        gradient. Both are looked at in any case, and told in the report's notes; NaN
        that stands in a masked entry of `args` must not leak, strict or not.
      argnums: Arguments whose gradient is checked. None: the first.
      has_aux: Whether `loss` returns a pair of its result and auxiliary data.
      trials: How many points to draw. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      variant: A chex variant or transformation that `loss` runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report. Marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: The value or a gradient is another. The message says what the
        numbers fit: sum in place of mean, divided by all in place of the unmasked, mask
        ignored, examples that broadcast against each other.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest.optax
      >>> def loss(predictions, targets, mask):
      ...     errors = jnp.where(mask, (predictions - targets) ** 2, 0)
      ...     return jnp.sum(errors) / jnp.sum(mask)
      >>> report = gradtest.optax.assert_loss_reduction(
      ...     loss, jnp.arange(4.0), jnp.ones(4), where=jnp.arange(4) < 3
      ... )
      >>> report.verdict.value
      'PASS'
    """
    name, chosen = "assert_loss_reduction", Keywords.of(locals())
    require_callable("loss", loss)
    in_trace.refuse(name, args)
    promise = Reduction(
        reduction, where, where_name, axis, batched, per_example, strict_mask
    )

    def make_check(options: Options) -> Reporter:
        return reduction_check.make_check(loss, args, promise, options)

    return settled(name, loss, chosen, make_check)
