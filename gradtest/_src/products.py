"""Public assertions about hand-written products, and about two implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import product_checks
from gradtest._src.findings import Report
from gradtest._src.implementations import AgreementCheck
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.options import DEFAULT_RTOL
from gradtest._src.traced import claims as traced_claims
from gradtest._src.traced.checks import Subject

PyTree = Any


@processes.agreed
def assert_vjp_matches(
    fn: Callable[..., PyTree],
    hand_written: Callable[..., PyTree],
    *args: PyTree,
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
    """Asserts that `hand_written(args, cotangent)` is the VJP of `fn` at `args`.

    No rule is registered. The product is judged with random cotangents as
    `assert_autodiff_matches` judges JAX's own, in float64 and in its own dtype, and
    must be linear in its cotangent.

    Args:
      fn: Returns any tree of arrays; may be complex.
      hand_written: Takes the tuple `args` and a cotangent shaped like
        `fn(*args)`, in which results that are not float or complex have zeros of
        dtype float0, as for `jax.vjp`. Returns a tuple with one tree for each
        differentiated argument, shaped like it (or for each argument: what stands
        for the others is not looked at). One tree alone may come without the
        tuple. For leaves of integers, bools or keys it returns None or float0.
      *args: Trees of arrays, numbers, keys, None, `jax.ShapeDtypeStruct` or
        `gradtest.domains` entries; the last two are drawn anew in each trial.
      argnums: Arguments to differentiate; None takes each with a float or complex
        leaf.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists
        them.
      variant: A chex variant or transformation that `hand_written` runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as
        well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: The cotangent of a leaf is wrong, or not linear.
      GradientInconclusive: Nothing could be concluded, and
        `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be, or `hand_written`
        returns another tree, shape or dtype; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def pull(args, cotangent):
      ...     (x,) = args
      ...     return cotangent * jnp.cos(x)
      >>> gradtest.assert_vjp_matches(jnp.sin, pull, jnp.arange(3.0)).verdict.value
      'PASS'
    """
    name, chosen = "assert_vjp_matches", Keywords.of(locals())
    require_callable("hand_written", hand_written)
    subject = Subject(
        args,
        (fn, hand_written),
        lambda o: traced_claims.vjp(fn, hand_written, args, o),
    )
    return settled(
        name,
        fn,
        chosen,
        lambda o: product_checks.check_vjp(fn, hand_written, args, o),
        subject,
    )


@processes.agreed
def assert_jvp_matches(
    fn: Callable[..., PyTree],
    hand_written: Callable[..., PyTree],
    *args: PyTree,
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
    """Asserts that `hand_written(args, tangents)` is the JVP of `fn` at `args`.

    Each leaf's tangent is judged alone, in every result, and all of them together
    for linearity and rounding.

    Args:
      fn: Returns any tree of arrays; may be complex.
      hand_written: Takes the tuple `args` and a tuple of tangents shaped like it:
        zeros for float leaves that are held, float0 for leaves that are not float
        or complex. Returns the tangent of `fn(*args)` alone, shaped like that;
        None or float0 for results that are not float or complex.
      *args: As for `assert_vjp_matches`.
      argnums: Arguments to differentiate; None takes each with a float or complex
        leaf.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists
        them.
      variant: A chex variant or transformation that `hand_written` runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as
        well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: What a leaf's tangent becomes is wrong, or not linear.
      GradientInconclusive: Nothing could be concluded, and
        `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be, or `hand_written`
        returns another tree, shape or dtype; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def push(args, tangents):
      ...     return jnp.cos(args[0]) * tangents[0]
      >>> gradtest.assert_jvp_matches(jnp.sin, push, jnp.arange(3.0)).verdict.value
      'PASS'
    """
    name, chosen = "assert_jvp_matches", Keywords.of(locals())
    require_callable("hand_written", hand_written)
    subject = Subject(
        args,
        (fn, hand_written),
        lambda o: traced_claims.jvp(fn, hand_written, args, o),
    )
    return settled(
        name,
        fn,
        chosen,
        lambda o: product_checks.check_jvp(fn, hand_written, args, o),
        subject,
    )


@processes.agreed
def assert_hvp_matches(
    fn: Callable[..., Any],
    hand_written: Callable[..., PyTree],
    *args: PyTree,
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
    """Asserts that `hand_written(args, tangents)` is the Hessian of `fn` times those.

    The truth is the derivative of the gradient of `fn` without its custom rules,
    confirmed by differences of that gradient; `jax.hessian` is never asked. For
    complex arguments it is the derivative of JAX's gradient, df/dx - i df/dy for z
    = x + iy, along the tangents.

    Args:
      fn: Returns one real number, or a pair of it and auxiliary data with
        `has_aux`.
      hand_written: Takes the tuple `args` and tangents as for
        `assert_jvp_matches`; returns trees as for `assert_vjp_matches`.
      *args: As for `assert_vjp_matches`.
      argnums: Arguments to differentiate; None takes each with a float or complex
        leaf.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists
        them.
      variant: A chex variant or transformation that `hand_written` runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as
        well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: The product is wrong at a leaf, or not linear.
      GradientInconclusive: Nothing could be concluded, and
        `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be, or `hand_written`
        returns another tree, shape or dtype; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def product(args, tangents):
      ...     return 6 * args[0] * tangents[0]
      >>> def cubes(x):
      ...     return jnp.sum(x**3)
      >>> gradtest.assert_hvp_matches(cubes, product, jnp.arange(3.0)).verdict.value
      'PASS'
    """
    name, chosen = "assert_hvp_matches", Keywords.of(locals())
    require_callable("hand_written", hand_written)
    subject = Subject(
        args,
        (fn, hand_written),
        lambda o: traced_claims.hvp(fn, hand_written, args, o),
    )
    return settled(
        name,
        fn,
        chosen,
        lambda o: product_checks.check_hvp(fn, hand_written, args, o),
        subject,
    )


@processes.agreed
def assert_transpose_matches(
    linear_fn: Callable[[PyTree], PyTree],
    transpose_fn: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
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
    """Asserts that `transpose_fn` is the transpose of the linear function `linear_fn`.

    That is, sum(w * linear_fn(x)) = sum(transpose_fn(w) * x) for every w: JAX's
    convention, without complex conjugates, as that of `jax.linear_transpose`; its
    real part is what counts, so that functions which are linear over the real
    numbers alone (`jnp.real`, `jnp.conj`) have a transpose as well. `linear_fn`
    itself must be linear: that is checked by its values, and failing it is a
    mismatch.

    Args:
      linear_fn: Takes one tree, returns a tree.
      transpose_fn: Takes a cotangent shaped like `linear_fn(x)`, with float0 as
        for `jax.vjp`; returns a tree like `x`, or a tuple of one, as
        `jax.linear_transpose` has it.
      x: A tree of arrays, `jax.ShapeDtypeStruct` or `gradtest.domains` entries;
        the last two are drawn anew in each trial.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists
        them.
      variant: A chex variant or transformation that `transpose_fn` runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as
        well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: A leaf is wrong, or one of the two is not linear.
      GradientInconclusive: Nothing could be concluded, and
        `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be, or `transpose_fn`
        returns another tree, shape or dtype; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> x = jax.ShapeDtypeStruct((5,), jnp.float32)
      >>> def adjoint(w):
      ...     return jnp.flip(jnp.cumsum(jnp.flip(w)))
      >>> gradtest.assert_transpose_matches(jnp.cumsum, adjoint, x).verdict.value
      'PASS'
    """
    name, chosen = "assert_transpose_matches", Keywords.of(locals())
    require_callable("linear_fn", linear_fn)
    require_callable("transpose_fn", transpose_fn)
    subject = Subject(
        x,
        (linear_fn, transpose_fn),
        lambda o: traced_claims.transpose(linear_fn, transpose_fn, (x,), o),
    )
    return settled(
        name,
        linear_fn,
        chosen,
        lambda o: product_checks.check_transpose(linear_fn, transpose_fn, (x,), o),
        subject,
    )


@processes.agreed
def assert_grads_agree(
    fn: Callable[..., PyTree],
    reference: Callable[..., PyTree],
    *args: PyTree,
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
    """Asserts that `fn` has the values and the gradient of `reference`.

    For two implementations of one function: a kernel and plain code, two modules,
    half precision and float32. The gradient that JAX makes of `fn`, custom rules
    included, is compared in float64 with that of `reference` without custom rules,
    as differences of `reference` confirm it: the same formula agrees whatever dtype
    `fn` computes in. Then the gradient of `fn` in its own dtype is compared with
    itself in float64.

    Args:
      fn: The implementation under test; differentiable in reverse mode by JAX.
      reference: What it must agree with. Takes the same arguments and returns a
        tree of the same structure and shapes; dtypes may differ. Its own custom
        rules are not used and not checked.
      *args: As for `assert_vjp_matches`; both functions get the same.
      argnums: Arguments to differentiate; None takes each with a float or complex
        leaf.
      has_aux: Whether both return a pair of result and auxiliary data.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; the report lists
        them.
      variant: A chex variant or transformation that `the gradient of `fn`` runs
        under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as
        well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.
      None on traced values: checks are then added to the program, as Chex does
      under `chex.chexify`; `exception_type` plays no part there.

    Raises:
      GradientMismatch: A value or the gradient of a leaf differs.
      GradientInconclusive: Nothing could be concluded, and
        `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be, or the two return
        unlike trees; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def softplus(x):
      ...     return jnp.log1p(jnp.exp(x))
      >>> x = jnp.arange(3.0)
      >>> gradtest.assert_grads_agree(jax.nn.softplus, softplus, x).verdict.value
      'PASS'
    """
    name, chosen = "assert_grads_agree", Keywords.of(locals())
    require_callable("reference", reference)
    subject = Subject(
        args,
        (fn, reference),
        lambda o: traced_claims.agreement(fn, reference, args, o),
    )
    return settled(
        name, fn, chosen, lambda o: AgreementCheck(fn, reference, args, o), subject
    )
