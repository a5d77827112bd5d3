"""The public assertion on per-example clipping: orchestration only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.optimisers.clipping_check import Clip, ClippingCheck
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any


@processes.agreed
def assert_clipped_grads_match(
    clipped: Any,
    loss: Callable[..., PyTree],
    params: PyTree,
    batch: PyTree,
    *,
    max_norm: float,
    reduction: Literal["mean", "sum"] = "mean",
    batch_axis: int = 0,
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
    """Asserts that each example's gradient is clipped, as by a plain loop over them.

    The truth is the mean (or the sum) over examples of g * min(1, max_norm / |g|), with
    g the rule-free gradient of one example's loss, |g| its norm over all leaves, in
    float64, confirmed by differences. What `clipped` returns is evaluated in float64
    and compared, then run in its own dtype. The examples must tell: where all of them
    lie above `max_norm`, or all below, the params are scaled until some do and some do
    not; where that fails too nothing is concluded.

    Args:
      clipped: A function of `params` and `batch` that returns the reduced gradients
        (alone, or with a value or auxiliary data, as for
        `assert_accumulated_grads_match`); or a transformation whose update takes the
        examples' gradients, stacked along a leading axis, such as
        `optax.contrib.differentially_private_aggregate` without noise.
      loss: Takes `params` and a batch of one example (or, where that fails, the example
        without the batch's axis); returns one real number.
      params: A tree of arrays; its float and complex leaves are checked.
      batch: A tree of arrays, held, with a common axis of examples.
      max_norm: The norm that one example's gradient may have.
      reduction: Whether the clipped gradients are averaged or added.
      batch_axis: The axis of examples.
      has_aux: Whether `loss` returns a pair of loss and auxiliary data.
      trials: How many points to draw. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      variant: A chex variant or transformation that `clipped` runs under.
      expect_differs: As for `gradtest.assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report: `unchecked` says where no example has a gradient of zeros. Marked NOT
      CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A leaf is wrong. The message says what the numbers fit: the mean
        is clipped, or each leaf by its own norm, small gradients are scaled up, a norm
        of zero divides, sum in place of mean.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest.optax
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> def clipped(w, x):
      ...     each = jax.vmap(lambda row: jax.grad(loss)(w, row[None]))(x)
      ...     norms = jnp.linalg.norm(each, axis=1, keepdims=True)
      ...     return jnp.mean(each * jnp.minimum(1, 2 / norms), axis=0)
      >>> w, x = jnp.arange(3.0), jnp.sin(jnp.arange(24.0)).reshape(8, 3)
      >>> report = gradtest.optax.assert_clipped_grads_match(
      ...     clipped, loss, w, x, max_norm=2.0
      ... )
      >>> report.verdict.value
      'PASS'
    """
    name, chosen = "assert_clipped_grads_match", Keywords.of(locals())
    if not callable(clipped) and not callable(getattr(clipped, "update", None)):
        raise TypeError(
            "`clipped` must be a function of params and batch, or an Optax "
            f"transformation, got {clipped!r}."
        )
    require_callable("loss", loss)
    in_trace.refuse(name, (params, batch))
    clip = Clip(max_norm, reduction, batch_axis)

    def make_check(options: Options) -> ClippingCheck:
        return ClippingCheck(clipped, loss, (params, batch), clip, options)

    return settled(name, clipped, chosen, make_check)
