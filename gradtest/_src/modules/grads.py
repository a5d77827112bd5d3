"""Asserts that the gradient of a Flax module's parameters is right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import jaxprs, rules
from gradtest._src.audit import ProgramAudit
from gradtest._src.blame import AutodiffCheck
from gradtest._src.claiming import autodiff_claims
from gradtest._src.findings import Finding, Report, Verdict, worst
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.modules.repeats import Repeat
from gradtest._src.modules.subject import Subject, read_module
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any

# A rule of `nnx.custom_vjp` takes modules, and returns their state beside its result.
_NNX_STATE = re.compile(r"\.states\[\d+\]")
_WHY_NOT_ALONE = (
    "by itself: nnx.custom_vjp returns the modules' state as well, whose cotangent a "
    "rule may leave out where nothing uses it; it is judged in the module's gradient"
)
_NO_RULES = "the module calls no custom rule: there is none to audit"


class ModuleCheck(AutodiffCheck):
    """Checks a module's gradient, its custom rules, and that calls repeat."""

    def __init__(self, subject: Subject, options: Options, *, audit_order: int):
        options = dataclasses.replace(options, argnums=0, exclude=subject.frozen)
        self._module, self._audit_order = subject, audit_order
        super().__init__(subject.loss, subject.args, autodiff_claims(options), options)
        self._repeat = Repeat(
            self._programs[0], lambda: self._trace(self.inputs, self._first)
        )

    def findings(self) -> list[Finding]:
        """Runs every trial, unless two calls differ: then no number means a thing."""
        differs = self._repeat.differs(self._first)
        if differs is not None:
            return [differs]
        found = super().findings()
        later = self._repeat.differs_later(self._first)
        return found if later is None else [later]

    def report(self, assertion: str) -> Report:
        """Runs the check, and audits every rule that the module calls."""
        report = super().report(assertion)
        report = dataclasses.replace(
            report,
            notes=(*report.notes, *self._held(), *self._module.notes),
            replay=of_flax(report.replay),
        )
        if not self._audit_order:
            unchecked = (*report.unchecked, "custom rules by themselves (audit=False)")
            return dataclasses.replace(report, unchecked=unchecked)
        if any(finding.check == "repeat" for finding in report.findings):
            return report
        return _with_audit(report, self._audited(assertion))

    def _held(self) -> tuple[str, ...]:
        names = ", ".join(map(str, self._module.collections))
        return (f"collections that are held: {names}",) if names else ()

    def _audited(self, assertion: str) -> Report | None:
        """Returns the audit of the module's rules; None where it calls none."""
        used = jaxprs.primitives(self._programs[0].jaxpr)
        if jaxprs.CUSTOM_RULES.isdisjoint(used):
            return None
        options = dataclasses.replace(self.options, order=self._audit_order)
        audit = ProgramAudit(self.fn, self._module.args, options, None)
        try:
            return audit.report(assertion)
        except ValueError as error:
            if str(error) != rules.NO_RULES:
                raise
            return None


def of_flax(replay: str) -> str:
    """Returns a line that replays a check, with this assertion's home."""
    return replay.replace("gradtest.assert_", "gradtest.flax.assert_", 1)


def _with_audit(report: Report, audit: Report | None) -> Report:
    """Returns one report of the gradient and of the rules."""
    if audit is None:
        return dataclasses.replace(report, notes=(*report.notes, _NO_RULES))
    of_nnx = {f.rule for f in audit.findings if _NNX_STATE.search(f.name)}
    unchecked = [
        f"{rule.kind} {rule.name}: {_WHY_NOT_ALONE}"
        for rule in audit.rules
        if rule in of_nnx
    ]
    unchecked = [*audit.unchecked, *unchecked]
    # Where no rule could be audited, `unchecked` says why.
    found = [f for f in audit.findings if f.rule is not None and f.rule not in of_nnx]
    findings = (*report.findings, *found)
    verdict = worst(finding.verdict for finding in findings)
    return dataclasses.replace(
        report,
        verdict=verdict,
        findings=findings,
        precision=tuple(dict.fromkeys((*report.precision, *audit.precision))),
        unchecked=tuple(dict.fromkeys((*report.unchecked, *unchecked))),
        notes=tuple(dict.fromkeys((*report.notes, *audit.notes))),
        rules=audit.rules,
        hint=report.hint or audit.hint,
        exhibits=(*report.exhibits, *audit.exhibits),
        inputs=report.inputs or audit.inputs,
        replay=""
        if verdict is Verdict.PASS
        else report.replay or of_flax(audit.replay),
    )


@processes.agreed
def assert_module_grads(
    module: Any,
    *inputs: PyTree,
    loss: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    variables: Any = None,
    wrt: Any = None,
    exclude: Any = (),
    method: Any = None,
    audit: bool = True,
    order: int | None = None,
    modes: Sequence[str] | None = None,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    variant: Callable[..., Any] | None = None,
    expect_differs: Intentions | None = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
    **apply_kwargs: Any,
) -> Report:
    """Asserts that the gradient of a Flax module's parameters is the right one.

    The module is called as in training: `module.apply(variables, *inputs, rngs=...,
    **apply_kwargs)` for Linen, `module(*inputs, **apply_kwargs)` for NNX. What JAX
    differentiates, custom rules included, is judged for each parameter as
    `assert_autodiff_matches` judges it. All other collections and the random streams
    are held; what the call changes in them (`batch_stats`) is let go. Two calls with
    the same keys must be the same. Then every custom rule that the module calls is
    audited as by `assert_custom_rules_match`, in the same report. The module itself
    stays as it is.

    Args:
      module: A Linen module, bound or not, or an NNX module.
      *inputs: What it is called with: trees of arrays, numbers, keys, None,
        `jax.ShapeDtypeStruct` or `gradtest.domains` entries; the last two are drawn
        anew in each trial. They are held.
      loss: A function of the module's output that returns one real number. None takes
        the output itself, with random cotangents.
      rngs: The random streams: an integer or key for all of them, or a dict of these
        by stream (`{"dropout": 0}`). None takes `key` (Linen), or the module's own
        streams as they are (NNX). For NNX also an `nnx.Rngs`.
      variables: Linen: the dict of all collections; None initialises the module. NNX:
        an `nnx.State` or pure dict of some or all variables, in place of its own.
      wrt: Which parameters to check: module paths (`"encoder/Dense_0"`,
        `"*/kernel"`), functions of (path, value) with a tuple for the path, or nnx
        filters (`nnx.LoRAParam`, `nnx.PathContains("bias")`); one, or a sequence of
        which any may select. None for all. A type of variables that are no
        `nnx.Param` makes them parameters.
      exclude: Those not to check, in the same terms; the report lists them.
      method: The method to call, or its name; None for `__call__`.
      audit: Whether to audit the custom rules by themselves.
      order: 1, or 2 for the derivative of the gradient as well; the rules are audited
        to the same order. None: 1 for the gradient, 2 for the rules.
      modes: Some of "rev" and "fwd"; None takes every mode that the module supports.
      trials: How many points, cotangents and directions to try. None: 1, or what
        pytest's `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      variant: A chex variant or transformation that the derivative runs under.
      expect_differs: Custom rules that differ from their functions on purpose; as for
        `assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.
      **apply_kwargs: Keyword arguments of the module (`train=True`, `mask=...`), and
        of Linen's `apply`: with `mutable=` the output is the pair that `apply`
        returns. One that has the name of an option here is handed over by
        `method=lambda module, x: module(x, key=...)`.

    Returns:
      The report: a finding for each parameter under its path
      (`params['Dense_0']['kernel']`), and for each rule; `rules` lists those,
      `unchecked` what was left out. Marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: The gradient of a parameter is wrong, a custom rule is, or two
        calls with the same keys differ.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> import gradtest.flax
      >>> report = gradtest.flax.assert_module_grads(
      ...     nn.Dense(3), jnp.ones((2, 4)), loss=jnp.mean
      ... )
      >>> sorted({finding.name for finding in report.findings})
      ["params['bias']", "params['kernel']", 'result']
    """
    audit_order = 0 if not audit else 2 if order is None else order
    order = 1 if order is None else order
    name, chosen = "assert_module_grads", Keywords.of(locals())
    in_trace.refuse(name, inputs, variables, apply_kwargs)

    def make_check(options: Options) -> ModuleCheck:
        subject = read_module(
            module, inputs, loss=loss, rngs=rngs, variables=variables, wrt=wrt,
            exclude=exclude, method=method, apply_kwargs=apply_kwargs, key=options.key,
        )  # fmt: skip
        return ModuleCheck(subject, options, audit_order=audit_order)

    return settled(name, module, chosen, make_check)
