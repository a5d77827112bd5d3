"""The public assertion on data-parallel steps: orchestration only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.parallel.step import ParallelCheck
from gradtest._src.traced import checks as in_trace

PyTree = Any


@processes.agreed
def assert_parallel_grads_match(
    step: Callable[..., PyTree],
    loss: Callable[..., PyTree],
    params: PyTree,
    batch: PyTree,
    mesh: Any = None,
    *,
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
    """Asserts that a data-parallel step's gradient is that of the full batch.

    The step is evaluated in float64 over as many devices as it runs on, and compared
    with the rule-free gradient of `loss`, evaluated on one device and confirmed by
    differences. Then it is run as it is, on copies of the arguments. What each device
    holds is looked at, also where a result that should be the same on all devices is
    not (`check_vma=False`).

    Args:
      step: Takes `params` and `batch` as global arrays; `jax.pmap`, `jax.shard_map` or
        a sharded `jax.jit` is inside. Returns gradients like `params`, or a pair of a
        loss and such gradients. All gradients may lead with an axis of devices.
      loss: Takes `params` and `batch`; returns the full batch's loss, one real number.
      params: A tree of arrays; its float and complex leaves are checked.
      batch: A tree of arrays, held. Arrays may be laid out over devices already; the
        step gets them as they are. As in all assertions, leaves of both trees may be
        `jax.ShapeDtypeStruct` or `gradtest.domains` entries, drawn in each trial.
      mesh: A `jax.sharding.Mesh` that `step` runs under (`jax.set_mesh`), where it does
        not bring its own.
      has_aux: Whether `loss` returns a pair of loss and auxiliary data. A step's loss
        may come with auxiliary data in any case.
      trials: How many points to draw. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      variant: A chex variant or transformation that the step runs under.
      expect_differs: As for `assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report. A loss that the step returns is not part of the claim: where it is not
      the full batch's, a note says so. Marked NOT CHECKED under
      `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A gradient is wrong on some device. The message says by which
        factor (the size of which mesh axis), which reduction is missing, which devices
        are wrong, or that parts of the batch do not count alike.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      ValueError: The batch does not divide over the devices.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> def local_step(w, x):
      ...     return jax.lax.pmean(jax.grad(loss)(w, x), "data")
      >>> mapped = jax.pmap(local_step, axis_name="data", in_axes=(None, 0))
      >>> def step(w, x):
      ...     return mapped(w, x.reshape(jax.device_count(), -1, 3))
      >>> w, x = jnp.arange(3.0), jnp.sin(jnp.arange(48.0)).reshape(16, 3)
      >>> report = gradtest.assert_parallel_grads_match(step, loss, w, x)
      >>> report.verdict.value
      'PASS'
    """
    name, chosen = "assert_parallel_grads_match", Keywords.of(locals())
    require_callable("step", step)
    require_callable("loss", loss)
    args = (params, batch)
    in_trace.refuse(name, args)

    def make_check(options: Options) -> ParallelCheck:
        return ParallelCheck(step, loss, args, mesh, options)

    return settled(name, step, chosen, make_check)
