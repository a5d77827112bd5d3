"""Whether the gradient through the steps of an optimiser is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradtest._src.blame import AutodiffCheck
from gradtest._src.check import Check
from gradtest._src.claiming import autodiff_claims
from gradtest._src.execution import SlipError
from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.program import describe
from gradtest._src.traced import claims as traced_claims
from gradtest._src.traced.checks import Subject

PyTree = Any


@processes.agreed
def assert_meta_grads_match(
    tx: Any,
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: PyTree,
    *args: PyTree,
    steps: int = 5,
    hyper: PyTree = None,
    order: int = 1,
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
    """Asserts that the meta-gradient through steps of an optimiser is right.

    The function under test takes `steps` steps of `tx` down the gradient of
    `inner_loss`, starting at `params`, and returns `outer_loss` of where it arrives.
    Its gradient holds the second derivatives of `inner_loss`, and with them the
    derivatives of the custom rules in it. The truth takes the same steps with gradients
    of `inner_loss` free of custom rules: a rule that is wrong at first order, or at
    second order alone, is seen and named.

    Args:
      tx: An `optax.GradientTransformation`; or, with `hyper`, a function of it that
        returns one.
      inner_loss: Called as `inner_loss(params, *args)`, returns one real number.
      outer_loss: Called as `outer_loss(params, *args)` after the last step, returns one
        real number.
      params: Tree of float leaves, or of `jax.ShapeDtypeStruct` or `gradtest.domains`
        entries, where the steps start. The gradient is taken at it.
      *args: Trees that both losses get; held.
      steps: How many steps are taken. The gradient goes through all of them.
      hyper: Tree of float leaves that `tx` takes, such as a learning rate; the gradient
        is taken at it as well. None: `tx` is the transformation itself.
      order: 1, or 2 for the derivative of the meta-gradient as well.
      trials: How many points to try. None: 1, or what pytest's `--gradtest-trials`
        says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves (`params['bias']`, `hyper['rate']`) or sub-trees that are
        not checked; the report lists them.
      variant: A chex variant or transformation that the gradient runs under.
      expect_differs: As for `gradtest.assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: The meta-gradient is wrong at a leaf, or `outer_loss` after the
        steps is another number than without custom rules.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Source: Finn, Abbeel and Levine (2017), "Model-Agnostic Meta-Learning for Fast
      Adaptation of Deep Networks", section 2.2: the meta-gradient through steps.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gradtest.optax
      >>> report = gradtest.optax.assert_meta_grads_match(
      ...     optax.sgd(0.1),
      ...     lambda x: jnp.sum(jnp.cos(x)),
      ...     lambda x: jnp.sum(x**2),
      ...     jnp.arange(3.0),
      ...     steps=2,
      ... )
      >>> report.verdict.value
      'PASS'
    """
    argnums = 0 if hyper is None else (0, 1)
    name, chosen = "assert_meta_grads_match", Keywords.of(locals())
    require_callable("inner_loss", inner_loss)
    require_callable("outer_loss", outer_loss)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"`steps` must be an integer >= 1, got {steps!r}.")
    inputs = (params, *args) if hyper is None else (params, hyper, *args)
    after_steps = _unrolled(tx, inner_loss, outer_loss, steps, hyper is not None)

    def make_check(options: Options) -> Check:
        return AutodiffCheck(after_steps, inputs, autodiff_claims(options), options)

    subject = Subject(
        inputs,
        (after_steps,),
        lambda options: traced_claims.autodiff(after_steps, inputs, options),
    )
    return settled(name, after_steps, chosen, make_check, subject)


def _unrolled(
    tx: Any,
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    steps: int,
    has_hyper: bool,
) -> Callable[..., Any]:
    """Returns the outer loss as a function of where the steps start."""

    def run(transformation: Any, params: PyTree, args: Sequence[PyTree]) -> Any:
        _require_transformation(transformation, has_hyper)

        def step(reached: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            params, state = reached
            grads = jax.grad(inner_loss)(params, *args)
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, _ = _repeated(step, (params, transformation.init(params)), steps)
        return _one_number(outer_loss(params, *args))

    def after_steps(params: PyTree, *args: PyTree) -> Any:
        return run(tx, params, args)

    def after_steps_of_hyper(params: PyTree, hyper: PyTree, *args: PyTree) -> Any:
        return run(tx(hyper), params, args)

    if not has_hyper:
        _require_transformation(tx, has_hyper)
        return _named(after_steps, outer_loss, steps)
    require_callable("tx", tx)
    return _named(after_steps_of_hyper, outer_loss, steps)


def _repeated(step: Callable[[PyTree], PyTree], reached: PyTree, steps: int) -> PyTree:
    """Takes steps, as a loop that compiles once where a step keeps all dtypes."""
    if steps > 1 and _types(jax.eval_shape(step, reached)) == _types(reached):
        return jax.lax.scan(lambda at, _: (step(at), None), reached, length=steps)[0]
    for _ in range(steps):
        reached = step(reached)
    return reached


def _types(tree: PyTree) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _one_number(result: Any) -> Any:
    """Raises SlipError where a loss returns something else than one real number."""
    if jnp.shape(result) == () and jnp.issubdtype(
        jnp.result_type(result), jnp.floating
    ):
        return result
    raise SlipError(
        f"`outer_loss` must return one real number, got {describe(result)}."
    )


def _named(
    fn: Callable[..., Any], outer_loss: Callable[..., Any], steps: int
) -> Callable[..., Any]:
    loss = getattr(outer_loss, "__name__", type(outer_loss).__name__)
    plural = "s" * (steps != 1)
    fn.__name__ = f"{loss}_after_{steps}_step{plural}"
    return fn


def _require_transformation(tx: Any, has_hyper: bool) -> None:
    """Raises TypeError where something is no transformation of Optax's."""
    if hasattr(tx, "init") and hasattr(tx, "update"):
        return
    wanted = "an optax.GradientTransformation"
    if has_hyper:
        raise TypeError(f"`tx` must return {wanted} for `hyper`, got {tx!r}.")
    hint = ": give `hyper` with what it takes" if callable(tx) else ""
    raise TypeError(f"`tx` must be {wanted}, got {tx!r}{hint}.")
