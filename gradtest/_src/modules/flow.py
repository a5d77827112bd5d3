"""Asserts that every parameter of a module, or of a loss, gets a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradtest._src import backward, seeding
from gradtest._src.backward import Backward, Run
from gradtest._src.findings import Finding, Report, Verdict, worst
from gradtest._src.inputs import argument_names
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.lifting import is_inexact
from gradtest._src.modules import filters
from gradtest._src.modules.model import Entry, entries_of
from gradtest._src.modules.ranking import Ranking
from gradtest._src.modules.subject import read_module, speaking_of
from gradtest._src.options import Options
from gradtest._src.traced import checks as in_trace

PyTree = Any

_WEIGHTED = "`loss` is None: the outputs are summed, weighted by fixed random numbers"


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """What is differentiated, and how it is to be spoken of.

    Attributes:
      fn: Takes the parameters first; returns one real number.
      args: Its arguments.
      frozen: Names of the leaves that are frozen on purpose.
      notes: What a report should say of it.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    frozen: tuple[str, ...]
    notes: tuple[str, ...] = ()


class FlowCheck(Backward):
    """Judges whether every leaf has a gradient, and ranks the layers by its size."""

    def __init__(self, loss: Loss, options: Options, ranking: Ranking):
        options = dataclasses.replace(options, argnums=0, exclude=loss.frozen)
        with speaking_of("`fn`", "`module`"):
            super().__init__(loss.fn, loss.args, options)
        self._loss, self._ranking = loss, ranking

    def runs(self) -> Iterator[Run]:
        """Runs every trial, and remembers how large the gradients are."""
        for run in super().runs():
            point = self.first
            if run.trial:
                point = self.inputs.draw(self.options.key, run.trial)
            self._ranking.add(self.leaves, run.gradient, point.moving)
            yield run

    def report(self, assertion: str, judge: Any = backward.judge_flow) -> Report:
        """Runs the check."""
        with speaking_of("`fn`", "`module`"):
            report = super().report(assertion, judge)
        findings = (*map(_of_frozen, report.findings), *self._ranking.findings())
        verdict = worst(finding.verdict for finding in findings)
        replay = f"gradtest.flax.{assertion}({report.subject}, ..., key={report.key})"
        return dataclasses.replace(
            report,
            verdict=verdict,
            findings=findings,
            notes=(*report.notes, *self._loss.notes, *self._ranking.notes()),
            unchecked=tuple(
                line.replace(" (excluded)", " (frozen on purpose)")
                for line in report.unchecked
            ),
            replay="" if verdict is Verdict.PASS else replay,
        )


def _of_frozen(finding: Finding) -> Finding:
    """Lets a remedy speak of the option that this assertion has."""
    if finding.cause is None:
        return finding
    remedy = finding.cause.remedy.replace("`exclude`", "`frozen`")
    cause = dataclasses.replace(finding.cause, remedy=remedy)
    return dataclasses.replace(finding, cause=cause)


# --- a module ------------------------------------------------------------------------


def weighted_sum(key: Any) -> Callable[[Any], Any]:
    """Returns a function that sums a tree of outputs by fixed random weights."""

    def total(output: Any) -> Any:
        leaves = [
            leaf
            for leaf in jax.tree_util.tree_leaves(output)
            if is_inexact(getattr(leaf, "dtype", None))
        ]
        if not leaves:
            raise TypeError(
                "`module` must return a float or complex array, or a tree with one: "
                "there is nothing to differentiate."
            )
        if len(leaves) == 1 and leaves[0].shape == () and _is_real(leaves[0]):
            return leaves[0]
        parts = []
        for i, leaf in enumerate(leaves):
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            generator = seeding.generator(key, "weights", 0, i)
            weights = seeding.normal(generator, leaf.shape, wide)
            parts.append(jnp.sum((leaf.astype(wide) * weights).real))
        return sum(parts[1:], parts[0])

    return total


def _is_real(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _of_module(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Loss:
    loss, key = options["loss"], options["key"]
    with speaking_of("`exclude`", "`frozen`"):
        subject = read_module(
            module, inputs, **(options | {"loss": loss or weighted_sum(key)})
        )
    notes = subject.notes if loss is not None else (*subject.notes, _WEIGHTED)
    return Loss(subject.loss, subject.args, subject.frozen, notes)


# --- a loss and parameters -----------------------------------------------------------


def _of_loss(fn: Callable[..., Any], args: tuple[Any, ...], chosen: Any) -> Loss:
    wanted = filters.as_filters("frozen", chosen)
    if not args:
        raise TypeError(
            "`params` is missing: wanted assert_grads_flow(loss_fn, params, *args)."
        )
    params, *rest = args
    name = argument_names(fn, 1)[0]
    if isinstance(params, nnx.Module):
        return _of_nnx_loss(fn, params, tuple(rest), wanted)
    entries = entries_of(params, _variable_of(params))
    frozen = _frozen(entries, wanted, name)
    return Loss(fn, args, frozen)


def _of_nnx_loss(
    fn: Callable[..., Any], module: nnx.Module, rest: tuple[Any, ...], wanted: list[Any]
) -> Loss:
    """Reads a loss of an NNX module: its parameters are those of the module."""
    graph, variables, *rest_of_state = nnx.split(module, nnx.Param, ...)
    others = rest_of_state[0]
    at = dict(nnx.to_flat_state(variables))

    def loss(params: Any, *args: Any) -> Any:
        # Made anew: a variable may change in the trace alone that it was made in.
        state, held = (
            jax.tree_util.tree_map(lambda leaf: leaf, each)
            for each in (variables, others)
        )
        nnx.replace_by_pure_dict(state, params)
        return fn(nnx.merge(graph, state, held), *args)

    loss.__name__ = getattr(fn, "__name__", type(fn).__name__)
    pure = nnx.to_pure_dict(variables)
    entries = entries_of(pure, lambda path, leaf: at.get(path, leaf))
    return Loss(loss, (pure, *rest), _frozen(entries, wanted, "params"))


def _variable_of(params: Any) -> Callable[..., Any]:
    """Returns what finds the variable of a leaf, where the parameters are NNX's."""
    if not isinstance(params, nnx.State):
        return lambda path, leaf: leaf
    at = dict(nnx.to_flat_state(params))

    def variable(path: tuple[Any, ...], leaf: Any) -> Any:
        heads = (path[:count] for count in range(len(path), 0, -1))
        return next((at[head] for head in heads if head in at), leaf)

    return variable


def _frozen(entries: Sequence[Entry], wanted: list[Any], name: str) -> tuple[str, ...]:
    """Returns the names of the frozen leaves, as the loss calls them."""
    if not wanted:
        return ()
    renamed = [
        dataclasses.replace(each, name=name + each.name.removeprefix("params"))
        for each in entries
    ]
    with speaking_of("`exclude`", "`frozen`"):
        return filters.frozen(renamed, [], wanted)


# --- the assertion -------------------------------------------------------------------


@processes.agreed
def assert_grads_flow(
    module: Any,
    *inputs: PyTree,
    loss: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    variables: Any = None,
    frozen: Any = (),
    method: Any = None,
    vanishing: float | None = None,
    exploding: float | None = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
    **apply_kwargs: Any,
) -> Report:
    """Asserts that every parameter of a Flax module, or of a loss, gets a gradient.

    A parameter whose gradient is exactly zero in every entry and every trial fails. The
    message says why: the loss does not use it; uses it only behind a `stop_gradient` or
    another step without derivative; a custom rule loses it; it underflows; or the way
    back to it is cut at this point, by a dead ReLU, a saturated function, a mask or
    another factor that is zero, a layer after it whose weights are zero, a branch that
    is not taken. That is found by following the gradient back through the program,
    rules opened, from the loss to where it ends. What is frozen on purpose is declared
    in `frozen`. Single entries without gradient are not looked for.

    The report's notes rank the layers by the root mean square of their gradient,
    relative to that of their parameters (to 1 where these are zero).

    Args:
      module: A Linen module, bound or not, or an NNX module; or a loss, called as
        `module(params, *inputs)`, that returns one real number. Its `params` are a
        tree, an `nnx.State` or an NNX module.
      *inputs: What it is called with: trees of arrays, numbers, keys, None,
        `jax.ShapeDtypeStruct` or `gradtest.domains` entries; the last two are drawn
        anew in each trial. They are held, not differentiated, but for the first one
        of a loss.
      loss: A function of the module's output that returns one real number. None sums
        the outputs, weighted by fixed random numbers, so that no symmetry hides a
        gradient (the sum of a softmax has none).
      rngs: The random streams, as for `assert_module_grads`.
      variables: The module's variables, as for `assert_module_grads`.
      frozen: Parameters without a gradient on purpose: module paths
        (`"encoder/Dense_0"`, `"*/bias"`), functions of (path, value) or nnx filters;
        one, or several. The report lists them.
      method: The method to call, or its name; None for `__call__`.
      vanishing: A layer fails whose relative gradient is below this part of the
        median layer's; None fails none.
      exploding: A layer fails whose relative gradient is above so many times the
        median layer's; None fails none.
      has_aux: Whether a loss returns a pair of the loss and auxiliary data.
      trials: How many points to try. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      variant: A chex variant or transformation that the gradient runs under; under
        pmap a gradient on one device is enough.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.
      **apply_kwargs: Keyword arguments of the module (`train=True`), and of Linen's
        `apply`; of a loss, its own.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A parameter has no gradient, or a layer's vanishes or explodes
        by the limits given.
      GradientInconclusive: A gradient is never finite, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> import gradtest.flax
      >>> dead = nn.Sequential(
      ...     [
      ...         nn.Dense(4, bias_init=nn.initializers.constant(-9.0)),
      ...         nn.relu,
      ...         nn.Dense(2),
      ...     ]
      ... )
      >>> try:
      ...     gradtest.flax.assert_grads_flow(dead, jnp.ones((2, 3)))
      ... except gradtest.GradientMismatch as error:
      ...     error.report.leaf("params['layers_0']['bias']").cause.name
      'dead ReLU'
    """
    name, chosen = "assert_grads_flow", Keywords.of(locals())
    in_trace.refuse(name, inputs, variables, apply_kwargs)
    ranking = Ranking(vanishing, exploding)
    is_module = isinstance(module, nn.Module | nnx.Module)
    _check_use(module, is_module, loss, rngs, variables, method, has_aux)

    def make_check(options: Options) -> FlowCheck:
        if not is_module:
            fn = _with_kwargs(module, apply_kwargs)
            return FlowCheck(_of_loss(fn, inputs, frozen), options, ranking)
        read = _of_module(module, inputs, {
            "loss": loss, "rngs": rngs, "variables": variables, "exclude": frozen,
            "method": method, "apply_kwargs": apply_kwargs, "key": options.key,
        })  # fmt: skip
        return FlowCheck(read, options, ranking)

    return settled(name, module, chosen, make_check)


def _check_use(
    module: Any,
    is_module: bool,
    loss: Any,
    rngs: Any,
    variables: Any,
    method: Any,
    has_aux: bool,
) -> None:
    """Raises TypeError where an argument belongs to the other use."""
    if is_module:
        if has_aux:
            raise TypeError(
                "`has_aux` is about a loss and its params: of a module's output, pick "
                "what is differentiated by `loss=lambda output: ...`."
            )
        return
    if isinstance(module, type) or not callable(module):
        raise TypeError(
            "`module` must be an instance of a Linen or NNX module, or a loss that is "
            f"called with its params, got {module!r}."
        )
    given = {"loss": loss, "rngs": rngs, "variables": variables, "method": method}
    for option, value in given.items():
        if value is not None:
            raise TypeError(
                f"`{option}` is about a module, but `module` is a plain function: "
                "close over it instead."
            )


def _with_kwargs(fn: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    if not kwargs:
        return fn

    def loss(params: Any, *args: Any) -> Any:
        return fn(params, *args, **kwargs)

    loss.__name__ = getattr(fn, "__name__", type(fn).__name__)
    return loss
