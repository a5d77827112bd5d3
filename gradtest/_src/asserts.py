"""The public assertions: orchestration only."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from gradtest._src import check as _check
from gradtest._src import seeding, variants
from gradtest._src.check import DEFAULT_RTOL, Options
from gradtest._src.findings import Report, Verdict
from gradtest._src.report import text
from gradtest._src.variants import MessageOptions

PyTree = Any
Inconclusive = Literal["raise", "warn"]


def assert_grad_matches(
    fn: Callable[..., Any],
    grad_fn: Callable[..., PyTree],
    *args: PyTree,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    trials: int = 1,
    key: Any = 0,
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
    """Asserts that `grad_fn` is the gradient of `fn` at `args`.

    The claim is evaluated in float64 whatever dtype it runs in, and compared leaf by
    leaf and entry by entry with autodiff of `fn` without its custom rules, which
    differences of `fn`'s values confirm. Then it is run in its own dtype and compared
    with itself in float64. `jax.grad(fn)` is never asked.

    Args:
      fn: Returns one real number, or a pair of it and auxiliary data with `has_aux`.
      grad_fn: Takes `args`; returns a tree like the argument that it differentiates,
        with its shapes and dtypes, for an integer `argnums`, or a tuple of such trees.
      *args: Trees of arrays, numbers, keys, None, `jax.ShapeDtypeStruct` or
        `gradtest.domains` entries; the last two are drawn anew in each trial. Float
        and complex leaves of the arguments in `argnums` are checked; all else is held.
        A complex gradient follows JAX: df/dx - i df/dy for z = x + iy.
      argnums: Which argument, or arguments, `grad_fn` differentiates.
      has_aux: Whether `fn` returns auxiliary data.
      trials: How many points and directions to try.
      key: An integer or a JAX key: fixes every draw.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves (`params['bias']`) or sub-trees that are not checked;
        the report lists them.
      variant: A chex variant (`self.variant`) or transformation that `grad_fn` runs
        under; under pmap every device's result is checked.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report: gaps and allowances by leaf, precision, what was not checked. It is
      marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A leaf of the gradient is wrong.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> report = gradtest.assert_grad_matches(jnp.sum, jnp.ones_like, jnp.arange(3.0))
      >>> report.verdict.value
      'PASS'
    """
    messages = MessageOptions(
        custom_message,
        custom_message_format_vars,
        include_default_message,
        exception_type,
    )
    options = Options(
        argnums=argnums,
        has_aux=has_aux,
        trials=trials,
        key=key,
        rtol=rtol,
        rounding_rtol=rounding_rtol,
        exclude=exclude,
        variant=variant,
    )
    claiming = _check.hand_written_claims(grad_fn, options)
    return _assert(
        "assert_grad_matches", fn, args, claiming, options, inconclusive, messages
    )


def assert_autodiff_matches(
    fn: Callable[..., PyTree],
    *args: PyTree,
    argnums: int | Sequence[int] | None = None,
    order: int = 1,
    modes: Sequence[str] | None = None,
    has_aux: bool = False,
    trials: int = 1,
    key: Any = 0,
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
    """Asserts that JAX's derivative of `fn`, custom rules included, is the right one.

    Args:
      fn: A function of trees, differentiable by JAX; may return any tree of arrays.
      *args: As for `assert_grad_matches`.
      argnums: Arguments to differentiate; None takes each with a float or complex leaf.
      order: 1, or 2 for the derivative of the gradient as well.
      modes: Some of "rev" and "fwd"; None takes every mode that `fn` supports, and
        the report says which (a `custom_vjp` has no forward mode: that is no error).
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points, cotangents and directions to try.
      key: An integer or a JAX key: fixes every draw.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      variant: A chex variant or transformation that the derivative runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: The derivative of a leaf is wrong.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> report = gradtest.assert_autodiff_matches(jax.nn.softplus, jnp.arange(3.0))
      >>> report.modes
      ('rev', 'fwd')
    """
    messages = MessageOptions(
        custom_message,
        custom_message_format_vars,
        include_default_message,
        exception_type,
    )
    options = Options(
        argnums=argnums,
        has_aux=has_aux,
        trials=trials,
        key=key,
        order=order,
        modes=modes,
        rtol=rtol,
        rounding_rtol=rounding_rtol,
        exclude=exclude,
        variant=variant,
    )
    claiming = _check.autodiff_claims(options)
    return _assert(
        "assert_autodiff_matches", fn, args, claiming, options, inconclusive, messages
    )


def check(fn: Callable[..., PyTree], *args: PyTree, **options: Any) -> Report:
    """Checks what JAX differentiates of `fn`, and returns the report without raising.

    Args:
      fn: As for `assert_autodiff_matches`.
      *args: As for `assert_autodiff_matches`.
      **options: Those of `assert_autodiff_matches` that say what to check: `argnums`,
        `order`, `modes`, `has_aux`, `trials`, `key`, `rtol`, `rounding_rtol`,
        `exclude`, `variant`.

    Returns:
      The report, whatever its verdict; `print` shows all of it.

    Raises:
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> gradtest.check(jnp.tanh, 0.5).verdict.value
      'PASS'
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            raise TypeError(
                f"check() got an unexpected option {name!r}; wanted some of "
                f"{', '.join(known)}."
            )
    chosen = Options(**options)
    return _check.Check(fn, args, _check.autodiff_claims(chosen), chosen).report(
        "check"
    )


def _assert(
    name: str,
    fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    claiming: _check.Claiming,
    options: Options,
    inconclusive: str,
    messages: MessageOptions,
) -> Report:
    if inconclusive not in ("raise", "warn"):
        raise ValueError(
            f"`inconclusive` must be 'raise' or 'warn', got {inconclusive!r}."
        )
    if variants.asserts_are_disabled():
        subject = getattr(fn, "__name__", type(fn).__name__)
        return Report(
            name, subject, Verdict.NOT_CHECKED, key=seeding.describe(options.key)
        )
    report = _check.Check(fn, args, claiming, options).report(name)
    return settle(name, report, inconclusive, messages)


def settle(
    name: str, report: Report, inconclusive: str, messages: MessageOptions
) -> Report:
    """Returns a report that passed; raises or warns about any other."""
    if report.verdict in (Verdict.PASS, Verdict.NOT_CHECKED):
        return report
    error = messages.error(name, text.message(report), report)
    if report.verdict is Verdict.INCONCLUSIVE and inconclusive == "warn":
        warnings.warn(str(error), stacklevel=4)
        return report
    raise error
