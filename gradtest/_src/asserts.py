"""The public assertions on gradients and custom rules: orchestration only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import session
from gradtest._src.audit import ProgramAudit
from gradtest._src.blame import AutodiffCheck
from gradtest._src.check import Check
from gradtest._src.claiming import autodiff_claims, hand_written_claims
from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, reported, settled
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import claims as traced_claims
from gradtest._src.traced import rules as traced_rules
from gradtest._src.traced.checks import Subject

PyTree = Any


@processes.agreed
def assert_grad_matches(
    fn: Callable[..., Any],
    grad_fn: Callable[..., PyTree],
    *args: PyTree,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    hazards: bool = False,
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
      trials: How many points and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves (`params['bias']`) or sub-trees that are not checked;
        the report lists them.
      hazards: Whether to try the special points of the arguments as well: zeros, ties,
        the ends of a domain, tiny and large numbers, duplicate indices, empty masks.
        The report tells what came of each; kinks are accepted as elsewhere.
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
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

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
    name, chosen = "assert_grad_matches", Keywords.of(locals())

    def make_check(options: Options) -> Check:
        return Check(fn, args, hand_written_claims(grad_fn, options), options)

    subject = Subject(
        args, (fn, grad_fn), lambda o: traced_claims.gradient(fn, grad_fn, args, o)
    )
    return settled(name, fn, chosen, make_check, subject)


@processes.agreed
def assert_autodiff_matches(
    fn: Callable[..., PyTree],
    *args: PyTree,
    argnums: int | Sequence[int] | None = None,
    order: int = 1,
    modes: Sequence[str] | None = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    hazards: bool = False,
    variant: Callable[..., Any] | None = None,
    expect_differs: Intentions | None = None,
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
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists them.
      hazards: Whether to try the special points of the arguments as well: zeros, ties,
        the ends of a domain, tiny and large numbers, duplicate indices, empty masks.
        The report tells what came of each; kinks are accepted as elsewhere.
      variant: A chex variant or transformation that the derivative runs under.
      expect_differs: Custom rules that differ from their functions on purpose, as
        `{rule or name: alternative}`: a function of the rule's arguments whose
        derivative it should have (`lambda x: x` for a straight-through estimator), or
        `gradtest.vjp(product)` where it is no function's derivative.
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
    name, chosen = "assert_autodiff_matches", Keywords.of(locals())

    def make_check(options: Options) -> Check:
        return AutodiffCheck(fn, args, autodiff_claims(options), options)

    subject = Subject(args, (fn,), lambda o: traced_claims.autodiff(fn, args, o))
    return settled(name, fn, chosen, make_check, subject)


@processes.agreed
def assert_custom_rules_match(
    fn: Callable[..., PyTree],
    *args: PyTree,
    only: Any = None,
    expect_differs: Intentions | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    hazards: bool = False,
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that every custom rule that `fn` calls is right where `fn` calls it.

    The rules (`custom_vjp`, `custom_jvp`, `linear_call`, high-level primitives; JAX's
    own and the user's) are found anywhere inside, also in loops, branches, `vmap`,
    `remat`, device regions and other rules. Each is audited by itself at the values
    that reach it: its derivative in every mode, its value, linearity, dtypes, second
    derivative, and agreement under `jit`, `vmap`, `remat`, `scan`, `linearize` and
    where an argument or result takes no part. A rule that is called often is audited
    at its first, a middle and its last call, and reported once, with the count.

    Args:
      fn: A function of trees that `jax.jit` accepts, such as a model's loss. Its own
        derivative is not checked, and need not exist.
      *args: As for `assert_autodiff_matches`.
      only: Which rules to audit: names (`"swiglu"`, patterns with `*`), Python modules
        (objects or names), module paths in the model (`"Block_0/norm"`) or the
        functions themselves; one or several. None for all.
      expect_differs: As for `assert_autodiff_matches`; what a rule claims is checked.
      argnums: Arguments that `fn` is differentiated for: a rule's operands are checked
        where these reach them. None takes each with a float or complex leaf.
      order: 2, or 1 to leave the rules' second derivatives out.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points to draw. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees of `args` that are held.
      hazards: Whether to try the special points of the arguments as well: zeros, ties,
        the ends of a domain, tiny and large numbers, duplicate indices, empty masks.
        The report tells what came of each; kinks are accepted as elsewhere.
      variant: A chex variant or transformation that `fn` runs under: its rules are
        found there, those on several devices with the values of each.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report: `rules` lists what was audited, each finding names its `rule` and
      `check`; `unchecked` lists rules that were not reached. Marked NOT CHECKED under
      `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.
      What a rule's audit looks at there is its value and its first derivative.

    Raises:
      GradientMismatch: A rule is wrong; the message names it, with file and line.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      ValueError: `fn` calls no custom rule, or none that `only` names.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> report = gradtest.assert_custom_rules_match(
      ...     lambda x: jax.nn.relu(jnp.sin(x)).sum(), jnp.arange(3.0)
      ... )
      >>> [(rule.name, rule.kind) for rule in report.rules]
      [('relu', 'custom_jvp')]
    """
    name, chosen = "assert_custom_rules_match", Keywords.of(locals())
    subject = Subject(args, (fn,), lambda o: traced_rules.audit(fn, args, o, only))
    return settled(name, fn, chosen, lambda o: ProgramAudit(fn, args, o, only), subject)


@processes.agreed
def check(fn: Callable[..., PyTree], *args: PyTree, **options: Any) -> Report:
    """Checks what JAX differentiates of `fn`, and returns the report without raising.

    Args:
      fn: As for `assert_autodiff_matches`.
      *args: As for `assert_autodiff_matches`.
      **options: Those of `assert_autodiff_matches` that say what to check: `argnums`,
        `order`, `modes`, `has_aux`, `trials`, `key`, `rtol`, `rounding_rtol`,
        `exclude`, `hazards`, `variant`, `expect_differs`.

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

    def make_check(options: Options) -> Check:
        return AutodiffCheck(fn, args, autodiff_claims(options), options)

    chosen = Options(**session.with_defaults(options))
    return session.tell(reported("check", fn, chosen, make_check))
