"""The public assertion on accumulated gradients: orchestration only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.optimisers.accumulating import AccumulationCheck, Micro
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any


@processes.agreed
def assert_accumulated_grads_match(
    accumulate: Any,
    loss: Callable[..., PyTree],
    params: PyTree,
    batch: PyTree,
    *,
    micro_batches: int | Sequence[int] | str | None = None,
    batch_axis: int = 0,
    inner: Any = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    variant: Callable[..., Any] | None = None,
    expect_differs: Intentions | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that what is accumulated over micro-batches is the full batch's gradient.

    The accumulation is evaluated in float64 and compared with the rule-free gradient of
    `loss` of the full batch, confirmed by differences; then it is run in its own dtype.
    A transformation is fed the gradient of `loss` on each micro-batch. What it gives to
    the transformation that it wraps is compared first (seen through
    `optax.identity`, for `optax.MultiSteps`), then what it does with it: updates
    before the last micro-batch are exactly zero, counters and accumulator start anew,
    the wrapped state moves once, and update and state are those of one step with the
    accumulated gradient.

    Args:
      accumulate: A function of `params` and `batch`, which cuts the batch itself and
        returns gradients like `params` (or, as `jax.value_and_grad` does, a pair of a
        value and gradients; with `has_aux` also a pair of gradients and auxiliary
        data); or an `optax.MultiSteps`, its `.gradient_transformation()`, or any other
        transformation that accumulates.
      loss: Takes `params` and `batch`, or part of it; returns one real number.
      params: A tree of arrays; its float and complex leaves are checked.
      batch: A tree of arrays, held, whose arrays have a common axis of rows; what has
        none (class weights, keys, numbers, None) goes whole to every micro-batch. For a
        transformation a list is a list of micro-batches.
      micro_batches: How many micro-batches there are (as equal as can be, the last one
        smaller), or the rows of each. None: what `MultiSteps` waits for; a function
        cuts by itself, and how it does so is guessed where something is wrong. "list":
        `batch` is a list of micro-batches, and a function gets that list.
      batch_axis: The axis of rows.
      inner: For a transformation other than `MultiSteps`: what it wraps. Its last
        update must be that of `inner`, given the full batch's gradient. None: the last
        update must be that gradient itself.
      has_aux: Whether `loss` returns a pair of loss and auxiliary data.
      trials: How many points to draw. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      variant: A chex variant or transformation that the accumulation runs under.
      expect_differs: As for `gradtest.assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report. Marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A leaf is wrong. The message says how the numbers explain it:
        micro-batches of unequal rows or masks that count alike, a sum in place of a
        mean, a micro-batch left out or counted twice, parameters that move in between.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gradtest.optax
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.arange(3.0), jnp.sin(jnp.arange(24.0)).reshape(8, 3)
      >>> tx = optax.MultiSteps(optax.adam(1e-3), every_k_schedule=4)
      >>> report = gradtest.optax.assert_accumulated_grads_match(tx, loss, w, x)
      >>> report.verdict.value
      'PASS'
    """
    name, chosen = "assert_accumulated_grads_match", Keywords.of(locals())
    require_callable("loss", loss)
    in_trace.refuse(name, (params, batch))
    micro = Micro(micro_batches, batch_axis, inner)

    def make_check(options: Options) -> AccumulationCheck:
        return AccumulationCheck(accumulate, loss, (params, batch), micro, options)

    return settled(name, accumulate, chosen, make_check)
