"""Asserts that two Flax modules have one gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradtest._src.findings import Finding, Report
from gradtest._src.implementations import AgreementCheck
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.modules import pairing
from gradtest._src.modules.grads import of_flax
from gradtest._src.modules.repeats import Repeat
from gradtest._src.modules.subject import Subject, read_module, speaking_of
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any


class ModulesAgreementCheck(AgreementCheck):
    """Checks that a module has the values and the gradient of another one."""

    def __init__(
        self, first: Subject, second: Subject, params_map: Any, options: Options
    ):
        options = dataclasses.replace(options, argnums=0, exclude=first.frozen)
        self._modules = (first, second)
        mapped = pairing.map_for_params(first.params, second.params, params_map)
        chosen = params_map if isinstance(params_map, Mapping) else None
        collections, self._unpaired = _map_for_collections(first, second, chosen)

        def reference(params: PyTree, held: PyTree, *inputs: Any) -> Any:
            return second.loss(mapped(params), collections(held), *inputs)

        reference.__name__ = second.name
        with speaking_of("`fn`", "`module`"):
            super().__init__(first.loss, reference, first.args, options)
        self._repeat = Repeat(
            self._programs[0], lambda: self._trace(self.inputs, self._first)
        )

    def findings(self) -> list[Finding]:
        """Runs every trial, unless two calls of the reference differ."""
        differs = self._repeat.differs(self._first)
        return super().findings() if differs is None else [differs]

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        report = super().report(assertion)
        notes = [note for module in self._modules for note in module.notes]
        if self._unpaired:
            notes.append(
                f"{self._modules[1].name} keeps its own "
                f"{pairing.listed(self._unpaired)}: {self._modules[0].name} has "
                "nothing to pair with"
            )
        return dataclasses.replace(
            report, notes=(*report.notes, *notes), replay=of_flax(report.replay)
        )


def _map_for_collections(
    first: Subject, second: Subject, chosen: Mapping[str, str] | None
) -> tuple[Callable[[PyTree], PyTree], list[pairing.Path]]:
    """Returns what makes the second's collections of the first's, as far as it can."""
    one = pairing.leaves_of(first.collections, 1)
    two = pairing.leaves_of(second.collections, 1)
    within = {
        path: name
        for path, name in (chosen or {}).items()
        if _has(one, path) and _has(two, name)
    }
    found = pairing.pairs(one, two, within)

    def mapped(collections: PyTree) -> PyTree:
        values = pairing.values_of(collections, 1)
        known = {path: values[own] for path, own in found.items()}
        return pairing.rebuilt(second.collections, known, 1)

    return mapped, [path for path in two if path not in found]


def _has(leaves: pairing.Leaves, path: str) -> bool:
    parts = pairing.split(path)
    return any(leaf[: len(parts)] == parts for leaf in leaves)


@processes.agreed
def assert_grads_agree(
    module: Any,
    reference: Any,
    *inputs: PyTree,
    params_map: Callable[[PyTree], PyTree] | Mapping[str, str] | None = None,
    loss: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    variables: Any = None,
    wrt: Any = None,
    exclude: Any = (),
    method: Any = None,
    reference_method: Any = None,
    reference_kwargs: Mapping[str, Any] | None = None,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    variant: Callable[..., Any] | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
    **apply_kwargs: Any,
) -> Report:
    """Asserts that a Flax module has the output and the gradient of another one.

    Either may be a Linen or an NNX module. Both get the same inputs; the reference
    gets the parameters of `module`, mapped, and its other collections (`batch_stats`
    for `BatchStat`), where they can be paired. They are compared as by
    `gradtest.assert_grads_agree`. Dropout draws other masks in Linen than in NNX:
    compare what is deterministic.

    Args:
      module: The module under test; its parameters are differentiated.
      reference: What it must agree with. Its own custom rules are not used.
      *inputs: As for `assert_module_grads`; both get the same.
      params_map: Makes the reference's parameters of the module's: a function from
        the one tree of nested dicts to the other, or a dict of module paths
        (`{"Dense_0": "layers/0"}`). Leaves that it does not name are paired by their
        path, else by the end of the path and the shape where that is unique.
      loss: A function of either's output that returns one real number. None takes the
        output itself.
      rngs: As for `assert_module_grads`, for both.
      variables: Those of `module`, as for `assert_module_grads`.
      wrt: Which parameters of `module` to check, as for `assert_module_grads`.
      exclude: Those not to check.
      method: The method of `module` to call, or its name.
      reference_method: That of the reference; None takes `method` where it is a name.
      reference_kwargs: The reference's keyword arguments; None for `apply_kwargs`.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      variant: A chex variant or transformation that the gradient runs under.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.
      **apply_kwargs: Keyword arguments of the module.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: An output or the gradient of a parameter differs.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      ValueError: A parameter can't be paired; the message names it.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import gradtest.flax
      >>> report = gradtest.flax.assert_grads_agree(
      ...     nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      ... )
      >>> report.verdict.value
      'PASS'
    """
    name, chosen = "assert_grads_agree", Keywords.of(locals())
    in_trace.refuse(name, inputs, variables, apply_kwargs)

    def make_check(options: Options) -> ModulesAgreementCheck:
        first = read_module(
            module, inputs, loss=loss, rngs=rngs, variables=variables, wrt=wrt,
            exclude=exclude, method=method, apply_kwargs=apply_kwargs, key=options.key,
        )  # fmt: skip
        its_method = method if isinstance(method, str) else None
        second = read_module(
            reference, inputs, loss=loss, rngs=rngs,
            method=its_method if reference_method is None else reference_method,
            apply_kwargs=apply_kwargs if reference_kwargs is None else reference_kwargs,
            key=options.key, role="reference",
        )  # fmt: skip
        return ModulesAgreementCheck(first, second, params_map, options)

    return settled(name, module, chosen, make_check)
