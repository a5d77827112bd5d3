"""Assertions about gradients as they come: close, finite, present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import backward, closeness, seeding, session, variants
from gradtest._src.backward import Backward
from gradtest._src.findings import Report, Verdict, worst
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, naming_what_chex_refuses, settle
from gradtest._src.options import Options
from gradtest._src.traced import checks as in_trace
from gradtest._src.traced import runs as traced_runs
from gradtest._src.variants import MessageOptions

PyTree = Any


@processes.agreed
def assert_grads_close(
    claimed: PyTree,
    reference: PyTree,
    *,
    rtol: float | None = None,
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that two trees of gradients agree, each leaf relative to its own norm.

    A leaf of `n` entries agrees where the norm of the difference is at most `rtol` of
    the reference's norm, and no entry differs by more than 100 `rtol` of itself plus
    `rtol` of the norm over sqrt(n), so that neither a small leaf nor a single entry
    hides behind large ones. Added to it is the noise of float32 beside the tree's
    largest leaf (by root mean square); beside a reference that is exactly zero, that of
    the leaf's own dtype.

    The trees must have one structure, and each pair of leaves one shape and kind (real
    or complex); anything else is a mismatch of `claimed`, reported with its path.
    Leaves that hold no gradient (None, float0, integers, keys) must stand at the same
    places. Their values are not compared, and the report lists them.

    Args:
      claimed: Gradients under test: a tree of arrays.
      reference: What they should be. Dtypes may differ: the coarser one counts.
      rtol: Allowed relative difference of a leaf, never scaled by its size. None takes
        128 units in the last place of the coarser dtype, at most 1/16.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: A leaf differs, the trees are unlike, or `claimed` has a NaN or
        an infinite entry: these are close to nothing, not even to each other.
      GradientInconclusive: Only the reference is not finite.
      ValueError: There is no gradient to compare, or `rtol` makes no sense.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> claimed = {"w": 2 * jnp.arange(3.0)}
      >>> reference = jax.grad(lambda p: jnp.sum(p["w"] ** 2))({"w": jnp.arange(3.0)})
      >>> gradtest.assert_grads_close(claimed, reference).verdict.value
      'PASS'
    """
    name = "assert_grads_close"
    messages = MessageOptions(
        custom_message, custom_message_format_vars, include_default_message,
        exception_type,
    )  # fmt: skip
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"`rtol` must lie between 0 and 1, got {rtol!r}.")
    if variants.asserts_are_disabled():
        return session.tell(Report(name, "claimed", Verdict.NOT_CHECKED))
    if in_trace.is_traced((claimed, reference)):
        subject = in_trace.Subject(
            (), (), lambda o: traced_runs.close(claimed, reference, rtol)
        )
        return in_trace.add_checks(name, subject, Options(), "raise", messages)
    processes.meet()
    found = closeness.compare(claimed, reference, rtol)
    report = Report(
        name, "claimed", worst(finding.verdict for finding in found.findings),
        found.findings, precision=("precision: that of the trees",),
        unchecked=found.unchecked,
    )  # fmt: skip
    return settle(name, report, "raise", messages)


@processes.agreed
def assert_grads_finite(
    fn: Callable[..., PyTree],
    *args: PyTree,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    exclude: Sequence[str] = (),
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that the gradient of `fn` has no NaN and no infinite entry at `args`.

    The gradient is JAX's in reverse mode, run in the function's own precision. It is
    not compared with anything: a finite gradient may be wrong.

    Args:
      fn: A function of trees, differentiable by JAX; may return any tree of arrays.
      *args: Trees of arrays, numbers, keys, None, `jax.ShapeDtypeStruct` or
        `gradtest.domains` entries; the last two are drawn anew in each trial.
      argnums: Arguments to differentiate; None takes each with a float or complex leaf.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points and cotangents to try; the cotangent of a function of one
        real number is 1. None: 1, or what pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      exclude: Names of leaves (`params['bias']`) or sub-trees that are not checked; the
        report lists them.
      variant: A chex variant (`self.variant`) or transformation that the gradient runs
        under; under pmap every device's result is checked.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: A gradient is not finite where the value is.
      GradientInconclusive: The value itself is not finite, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> gradtest.assert_grads_finite(jnp.linalg.norm, jnp.ones(3)).verdict.value
      'PASS'
      >>> try:
      ...     gradtest.assert_grads_finite(jnp.linalg.norm, jnp.zeros(3))
      ... except gradtest.GradientMismatch as error:
      ...     error.report.leaf("x").cause.name
      'NaN gradient'
    """
    messages = MessageOptions(
        custom_message, custom_message_format_vars, include_default_message,
        exception_type,
    )  # fmt: skip
    options = Options(
        argnums=argnums, has_aux=has_aux, exclude=exclude, variant=variant,
        **session.with_defaults({"trials": trials, "key": key}),
    )  # fmt: skip
    subject = in_trace.Subject(args, (fn,), lambda o: traced_runs.finite(fn, args, o))
    return _assert("assert_grads_finite", fn, args, options, backward.judge_finite,
                   inconclusive, messages, subject)  # fmt: skip


@processes.agreed
def assert_grads_flow(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    exclude: Sequence[str] = (),
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that no leaf of `params` is left without a gradient of the loss `fn`.

    A leaf whose gradient is exactly zero in every entry and every trial fails. The
    message says why: the loss does not use it; uses it only behind a `stop_gradient`
    or another step without derivative; a custom rule loses it; it underflows; or the
    gradient is zero just at this point (a dead ReLU, a mask). Single entries without
    gradient are not looked for.

    Args:
      fn: A loss: called as `fn(params, *args)`, returns one real number.
      params: Tree of the leaves that must have a gradient, as `args` below.
      *args: Trees of arrays, numbers, keys, None, `jax.ShapeDtypeStruct` or
        `gradtest.domains` entries; the last two are drawn anew in each trial. They are
        held, not differentiated.
      has_aux: Whether `fn` returns a pair of the loss and auxiliary data.
      trials: How many points to try. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      exclude: Names of leaves (`params['bias']`) or sub-trees that are frozen; the
        report lists them.
      variant: A chex variant (`self.variant`) or transformation that the gradient runs
        under; under pmap a gradient on one device is enough.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: A leaf has no gradient.
      GradientInconclusive: A gradient is never finite, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> loss = lambda params: jnp.sum(params["used"] ** 2)
      >>> params = {"used": jnp.ones(3), "forgotten": jnp.ones(3)}
      >>> try:
      ...     gradtest.assert_grads_flow(loss, params)
      ... except gradtest.GradientMismatch as error:
      ...     error.report.leaf("params['forgotten']").cause.name
      'unused'
    """
    messages = MessageOptions(
        custom_message, custom_message_format_vars, include_default_message,
        exception_type,
    )  # fmt: skip
    options = Options(
        argnums=0, has_aux=has_aux, exclude=exclude, variant=variant,
        **session.with_defaults({"trials": trials, "key": key}),
    )  # fmt: skip
    subject = in_trace.Subject(
        (params, args), (fn,), lambda o: traced_runs.flow(fn, (params, *args), o)
    )
    return _assert("assert_grads_flow", fn, (params, *args), options,
                   backward.judge_flow, inconclusive, messages, subject)  # fmt: skip


def _assert(
    name: str,
    fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    options: Options,
    judge: backward.Judge,
    inconclusive: str,
    messages: MessageOptions,
    traced: in_trace.Subject,
) -> Report:
    if inconclusive not in ("raise", "warn"):
        raise ValueError(
            f"`inconclusive` must be 'raise' or 'warn', got {inconclusive!r}."
        )
    if variants.asserts_are_disabled():
        subject = getattr(fn, "__name__", type(fn).__name__)
        key = seeding.describe(options.key)
        return session.tell(Report(name, subject, Verdict.NOT_CHECKED, key=key))
    if traced.is_traced():
        return in_trace.add_checks(name, traced, options, inconclusive, messages)
    with naming_what_chex_refuses(name, fn):
        made = Backward(fn, args, options)
        processes.meet()  # before anything runs that spans processes
        report = made.report(name, judge)
    return settle(name, report, inconclusive, messages)
