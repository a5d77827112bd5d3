"""Asserts that evaluation leaves a module's state as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

from gradtest._src import seeding
from gradtest._src.findings import Cause, Entry, Finding, Gap, Report, Verdict, worst
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.modules import modes
from gradtest._src.modules.averages import Average
from gradtest._src.modules.batches import statistic_of_the_batch, unused_averages
from gradtest._src.modules.held import Held, Item, called, left_by, moved
from gradtest._src.modules.subject import Subject, read_module
from gradtest._src.options import Options
from gradtest._src.traced import checks as in_trace

PyTree = Any

_NOTHING_HELD = (
    "the module has no collection but its parameters: there is no other state"
)
_OUTPUT = "output"
_PARAMETERS = "params"


class StatsCheck:
    """Compares a module's variables before and after calls in evaluation mode."""

    def __init__(
        self,
        module: Any,
        options: Options,
        read: Callable[..., Subject],
        loss: Callable[[Any], Any] | None,
        changes: Sequence[Any],
        call: tuple[Any, Sequence[Any], dict[str, Any]],
    ):
        self._options, self._loss, self._read = options, loss, read
        self._module = nnx.clone(module) if isinstance(module, nnx.Module) else module
        if isinstance(self._module, nnx.Module):
            self._module.eval()
        self._said = modes.flags(self._module, *call)
        self._subject = read(self._module, {})
        self._first = self._at(0)
        self._declared = _declared(changes, self._first)
        self._settling = self._once_for_all()
        self._rewritten = tuple(
            item.name
            for item in self._first.items
            if item.name in self._settling and not item.has_changed
        )
        self._unused: list[Item] = []

    def _at(self, trial: int) -> Held:
        return called(self._subject, self._loss, self._options.key, trial)

    def _once_for_all(self) -> tuple[str, ...]:
        """Names the parameters that a call rewrites so that a second one leaves them.

        NNX's SpectralNorm and WeightNorm put the normalised weights in the place of
        the weights. Asked at other values: these may be what such a call left.
        """
        written = [
            item.name
            for item in self._first.items
            if _is_parameter(item.name)
            and self._first.is_computed(item)
            and not self._first.uses_data(item)
        ]
        if not written:
            return ()
        subject = moved(self._subject)
        once = called(subject, self._loss, self._options.key, 0)
        again = called(left_by(subject, once), self._loss, self._options.key, 0)
        settled = {item.name for item in again.items if item.has_settled}
        return tuple(name for name in written if name in settled)

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        findings = self._findings()
        verdict = worst(finding.verdict for finding in findings)
        name, options = self._subject.name, self._options
        key = seeding.describe(options.key)
        notes = [*self._subject.notes]
        if not self._first.has_collections:
            notes.append(_NOTHING_HELD)
        if self._first.sown:
            told = ", ".join(self._first.sown)
            notes.append(f"what the call sows is no state: {told}")
        notes += [
            f"{each} is rewritten by the call, from the variables alone and with the "
            "bits that it had"
            for each in self._rewritten
            if each not in self._declared
        ]
        if self._unused:
            told = _listed([item.name for item in self._unused])
            notes.append(f"held averages are not used: {told}")
        replay = f"gradtest.flax.{assertion}({name}, ..., key={key}"
        replay += f", trials={options.trials})" if options.trials > 1 else ")"
        unchecked = [f"{each} (declared to change)" for each in self._declared]
        if self._first.flow.unopened:
            unchecked.append("updated averages inside of long loops and of branches")
        return Report(
            assertion, name, verdict, tuple(findings), options.trials, key,
            precision=("precision: the module's own",),
            unchecked=tuple(unchecked),
            notes=tuple(notes),
            replay="" if verdict is Verdict.PASS else replay,
        )  # fmt: skip

    def _findings(self) -> list[Finding]:
        found: dict[str, Finding] = {}
        for trial in range(self._options.trials):
            held = self._at(trial) if trial else self._first
            for item in held.items:
                if item.name not in (*self._declared, *self._rewritten):
                    finding = self._of_item(held, item, trial)
                    known = found.get(item.name)
                    if known is None or known.verdict is Verdict.PASS:
                        found[item.name] = finding
        parameters = [f for n, f in found.items() if _is_parameter(n)]
        others = [f for n, f in found.items() if not _is_parameter(n)]
        wrong = [f for f in parameters if f.verdict is not Verdict.PASS]
        if not wrong and any(_is_parameter(i.name) for i in self._first.items):
            wrong = [Finding(_PARAMETERS, (), "", Verdict.PASS, Gap.STATE)]
        self._unused = [
            item
            for item in unused_averages(self._first)
            if item.name in found and found[item.name].verdict is Verdict.PASS
        ]
        return [*others, *wrong, *self._of_output()]

    def _of_item(self, held: Held, item: Item, trial: int) -> Finding:
        def found(verdict: Verdict, **fields: Any) -> Finding:
            return Finding(
                item.name, item.shape, item.dtype, verdict, Gap.STATE, trial=trial,
                check="state", **fields,
            )  # fmt: skip

        if not item.is_there_before or not item.is_there_after:
            does = (
                "is new after the call" if item.is_there_after else "is gone after it"
            )
            return found(Verdict.FAIL, cause=self._cause(f"{item.name} {does}", item))
        if item.has_changed:
            cause = self._cause(f"{item.name} changes", item, held.uses_data(item))
            entry = Entry(*item.entry()) if item.shows_numbers else None
            return found(Verdict.FAIL, entry=entry, cause=cause, line=held.line(item))
        sources = held.sources(item)
        if sources:
            what = (
                f"{item.name} is updated from {_listed(sources)} (at this point its "
                "value stays the same)"
            )
            cause = self._cause(what, item)
            return found(Verdict.FAIL, cause=cause, line=held.line(item))
        if held.is_computed(item):
            what = (
                f"{item.name} is computed anew from what is held (at this point its "
                "value stays the same)"
            )
            cause = self._cause(what, item, held.uses_data(item))
            return found(Verdict.FAIL, cause=cause, line=held.line(item))
        return found(Verdict.PASS)

    def _of_output(self) -> list[Finding]:
        averages = [
            each
            for each in self._first.averages()
            if self._first.names[each.statistic] not in self._declared
        ]
        if not averages:
            batch = statistic_of_the_batch(self._first, self._unused)
            if batch is not None:
                self._unused = []
                return [Finding(_OUTPUT, (), "", Verdict.FAIL, Gap.STATE,
                                cause=batch.cause, line=batch.line,
                                check="average")]  # fmt: skip
            return [Finding(_OUTPUT, (), "", Verdict.PASS, Gap.STATE, check="average")]
        return [self._of_average(each) for each in averages]

    def _of_average(self, average: Average) -> Finding:
        name = self._first.names[average.statistic]
        cause = Cause(
            "updated average used",
            f"the output goes through {name} as the call updates it, and so does its "
            f"gradient unless it is stopped: {average.kept:.4g} times what is held, "
            "and the rest a statistic of the inputs",
            "in evaluation normalise by the average that is held, not by the updated "
            "one",
        )
        return Finding(
            _OUTPUT, (), "", Verdict.FAIL, Gap.STATE, cause=cause, line=average.line,
            check="average",
        )  # fmt: skip

    # --- causes ------------------------------------------------------------------

    def _cause(self, what: str, item: Item, uses_data: bool = True) -> Cause:
        if _is_parameter(item.name):
            as_what = ", as if it were a running average" if uses_data else ""
            if item.name in self._settling:
                return Cause(
                    "parameter written",
                    f"{what}: the call writes a parameter, and a second call leaves it",
                    "compute it beside the parameter, not in its place; if the layer "
                    "works so (nnx.SpectralNorm, nnx.WeightNorm), name it in `changes`",
                )
            return Cause(
                "parameter written",
                f"{what}: the call writes a parameter{as_what}",
                "hold it in a collection (self.variable('batch_stats', ...), "
                "nnx.BatchStat): the optimiser would train it; if it is meant to "
                "change, name it in `changes`",
            )
        if item.collection in ("cache", "Cache"):
            return Cause(
                "cache written",
                f"{what}: the call fills a cache",
                f"if that is meant, declare it: changes={item.collection!r}",
            )
        is_average = item.path[-1] in ("mean", "var")
        cause = modes.changing(
            self._module, self._said, self._holds_flipped, what, is_average=is_average
        )
        remedy = f"{cause.remedy}; if it is meant to change, name it in `changes`"
        return dataclasses.replace(cause, remedy=remedy)

    def _holds_flipped(self, flag: str) -> bool:
        """Whether nothing changes where a flag of the call is turned over."""
        value = modes.flipped(flag, self._said[flag].trains)
        try:
            if self._said[flag].is_attribute:
                subject = self._read(modes.with_flag(self._module, flag, value), {})
            else:
                subject = self._read(self._module, {flag: value})
            held = called(subject, self._loss, self._options.key, 0)
        except Exception:  # the flag is an attribute, or given by position
            return False
        return not any(
            item.has_changed or held.sources(item) or held.is_computed(item)
            for item in held.items
        )


def _is_parameter(name: str) -> bool:
    return name.startswith(f"{_PARAMETERS}[") or name == _PARAMETERS


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    told = ", ".join(names[:most])
    return f"{told} and {more} more" if more > 0 else told


def _declared(changes: Sequence[Any], held: Held) -> tuple[str, ...]:
    """Returns the names of the variables that may change.

    Raises:
      ValueError: What is declared names nothing.
    """
    found: dict[str, None] = {}
    for each in changes:
        names = [item.name for item in held.items if item.fits(each)]
        if not names:
            there = ", ".join(dict.fromkeys(item.collection for item in held.items))
            raise ValueError(
                f"`changes` names {each!r}, which is no collection or path of the "
                f"module: there are {there or 'none'}."
            )
        found.update(dict.fromkeys(names))
    return tuple(found)


def _as_changes(changes: Any) -> tuple[str, ...]:
    several = changes if isinstance(changes, list | tuple | set) else [changes]
    read = []
    for each in several:
        name = each.__name__ if isinstance(each, type) else each
        if not isinstance(name, str):
            raise TypeError(
                "`changes` must name collections or paths ('cache', "
                f"'batch_stats/BatchNorm_0', nnx.Cache), got {each!r}."
            )
        read.append(name)
    return tuple(read)


@processes.agreed
def assert_stats_hold(
    module: Any,
    *inputs: PyTree,
    loss: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    variables: Any = None,
    changes: Any = (),
    method: Any = None,
    trials: int | None = None,
    key: Any = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
    **apply_kwargs: Any,
) -> Report:
    """Asserts that a Flax module's evaluation changes none of its state.

    The module is called as in evaluation: with the keyword arguments given
    (`train=False`) for Linen, as a copy that is set to `.eval()` for NNX. Then

    * every variable of every collection, the parameters included, is the same after
      the call, bit for bit, and none is new or gone;
    * none is computed anew, even if that can't be seen at this point (zeros averaged
      with zeros); a parameter that is written with the bits that it had is noted;
    * the output does not go through an updated running average: a part of a held
      average added to a statistic of the inputs in the same shape. Nor does its
      gradient then;
    * it does not go through a statistic of the batch in the place of a held average
      that it does not use.

    A `where` or branch that flags, counters or held state decide counts as it is
    decided. Random state and what is sown are no state here. A module without
    collections passes; the report says that there was no state.

    Args:
      module: A Linen module, bound or not, or an NNX module; it is not changed.
      *inputs: What it is called with, as for `assert_module_grads`.
      loss: A function of the module's output; None takes the output itself.
      rngs: The random streams, as for `assert_module_grads`.
      variables: The module's variables, as for `assert_module_grads`.
      changes: What may change: collections or paths (`"cache"`,
        `"batch_stats/BatchNorm_0"`), or NNX's variable types; one, or several. The
        report lists them.
      method: The method to call, or its name; None for `__call__`.
      trials: How many points to try. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.
      **apply_kwargs: Keyword arguments of the module (`train=False`).

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A variable changes, or the output uses an updated average.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> import gradtest.flax
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> norm = nn.BatchNorm()
      >>> gradtest.flax.assert_stats_hold(
      ...     norm, x, use_running_average=True
      ... ).verdict.value
      'PASS'
      >>> try:
      ...     gradtest.flax.assert_stats_hold(norm, x, use_running_average=False)
      ... except gradtest.GradientMismatch as error:
      ...     error.report.leaf("batch_stats['mean']").cause.name
      'training mode'
    """
    name, chosen = "assert_stats_hold", Keywords.of(locals())
    in_trace.refuse(name, inputs, variables, apply_kwargs)
    declared = _as_changes(changes)
    if not isinstance(module, nn.Module | nnx.Module):
        raise TypeError(
            f"`module` must be an instance of a Linen or NNX module, got {module!r}."
        )

    def make_check(options: Options) -> StatsCheck:
        def read(module: Any, more: dict[str, Any]) -> Subject:
            return read_module(
                module, inputs, loss=loss, rngs=rngs, variables=variables,
                method=method, apply_kwargs=apply_kwargs | more, key=options.key,
                differentiated=False,
            )  # fmt: skip

        call = (method, inputs, apply_kwargs)
        return StatsCheck(module, options, read, loss, declared, call)

    return settled(name, module, chosen, make_check)
