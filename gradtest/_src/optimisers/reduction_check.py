"""The check of a loss's reduction: against the losses of its examples, one by one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, seeding
from gradtest._src.case import Case
from gradtest._src.claiming import Claims
from gradtest._src.findings import Cause, Finding, Gap, Report, Verdict, worst
from gradtest._src.implementations import AgreementCheck
from gradtest._src.inputs import read_inputs
from gradtest._src.keywords import Reporter
from gradtest._src.optimisers import reduction_causes
from gradtest._src.optimisers.examples_of import Examples, Reduction
from gradtest._src.optimisers.mask_probes import MaskProbes
from gradtest._src.optimisers.reduction_causes import Told, explain_reduction
from gradtest._src.options import Options

PyTree = Any
_MASK_NAMES = ("where", "mask")
# What is said of a line that is no supposition of another factor or term in it.
_SURE_LINES = "the first result that is"


class ReductionCheck(AgreementCheck):
    """Checks that a loss is the mean, the sum or the list of its examples' losses."""

    def __init__(
        self,
        loss: Callable[..., Any],
        args: tuple[PyTree, ...],
        chosen: Reduction,
        options: Options,
    ):
        self.loss, self.chosen = loss, chosen
        self._aux = options.has_aux
        shapes = _drawn(loss, args, options)
        self.examples = Examples(shapes, chosen)
        self._mask_name = _mask_name(loss, chosen)
        self.probes = MaskProbes(self)
        args = self.probes.cleaned(args)
        options = dataclasses.replace(
            options, argnums=0 if options.argnums is None else options.argnums,
            has_aux=False,
        )  # fmt: skip

        @functools.wraps(loss)
        def whole(*args: PyTree) -> Any:
            return self.call(*args)

        super().__init__(whole, self._reduced, args, options)

    def call(self, *args: PyTree, mask: Any = None) -> Any:
        """Calls the loss, with its mask."""
        keywords = {}
        if self._mask_name:
            mask = self.chosen.where if mask is None else mask
            keywords = {self._mask_name: jnp.asarray(mask)}
        returned = self.loss(*args, **keywords)
        if not self._aux:
            return returned
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                "`loss` must return a pair (result, auxiliary) when has_aux=True."
            )
        return returned[0]

    # --- the losses of single examples ------------------------------------------------

    def one(self, args: tuple[PyTree, ...], index: Any) -> Any:
        """Returns the loss of one example."""
        if self.chosen.per_example is not None:
            place = index[0] if len(index) == 1 else tuple(index)
            return jnp.asarray(self.chosen.per_example(place, *args))
        mask = self.examples.mask_of_one()
        if mask is not None and np.ndim(self.chosen.where):
            mask = mask.astype(jnp.asarray(self.chosen.where).dtype)
        return self.call(*self.examples.cut(args, index), mask=mask)

    def each(self, args: tuple[PyTree, ...], indices: np.ndarray) -> Any:
        """Returns the losses of these examples, stacked."""
        if self.chosen.per_example is not None:
            rows = indices.tolist()
            return jnp.stack([self.one(args, index) for index in rows])
        return jax.lax.map(lambda index: self.one(args, list(index)), indices)

    def _reduced(self, *args: PyTree) -> Any:
        """The reference: what the examples' own losses come to."""
        kept = self.examples.kept()
        losses = self.each(args, self.examples.indices()[kept])
        if self.chosen.reduction == "none":
            return self._laid_out(losses, kept, args)
        total = losses.sum(0).reshape(self._result_shape(args))
        return total / kept.sum() if self.chosen.reduction == "mean" else total

    def _laid_out(self, losses: Any, kept: np.ndarray, args: Any) -> Any:
        """Lays the examples' losses out as the loss does."""
        wanted = self._result_shape(args)
        whole = jnp.zeros((self.examples.count, *losses.shape[1:]), losses.dtype)
        whole = whole.at[np.flatnonzero(kept)].set(losses)
        lengths = self.examples.lengths
        places = result_axes(wanted, losses.shape[1:], lengths)
        if places is None:  # the caller's formula has no axes of length 1
            return whole.reshape(*lengths, *losses.shape[1:])
        rest = [n for i, n in enumerate(losses.shape[1:]) if i not in places]
        whole = whole.reshape(*lengths, *rest)
        return jnp.moveaxis(whole, range(len(lengths)), places)

    def _result_shape(self, args: Any) -> tuple[int, ...]:
        return tuple(jax.eval_shape(self.call, *args).shape)

    # --- judging ----------------------------------------------------------------------

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        found = super()._judge_case(level, case, claims)
        found = [*found, *self.probes.masked_gradients(case, found)]
        if worst(f.verdict for f in found) is Verdict.FAIL:
            found = explain_reduction(case, found, Told(self, case))
        found = [*found, *self.probes.findings(case)]
        if any(f.verdict is Verdict.INCONCLUSIVE for f in found):
            return self._told_of_one(case, found)
        if self._cannot_tell:
            return [_open(finding, self._cannot_tell) for finding in found]
        return found

    @property
    def _cannot_tell(self) -> Cause | None:
        """Why a loss that is right here may be reduced in any way, where that is so."""
        kept, count = int(self.examples.kept().sum()), self.examples.count
        if kept > 1 or (self.chosen.reduction == "none" and count > 1):
            return None
        return reduction_causes.one_example(count, self.chosen.reduction)

    def _told_of_one(self, case: Case, found: list[Finding]) -> list[Finding]:
        """Says whose value is not finite: that of one example, not the loss's."""
        values = case.readings.claimed_values
        whole = values is not None and all(np.isfinite(v).all() for v in values)
        if not whole or all(np.isfinite(v).all() for v in case.readings.values):
            return found
        by = "`per_example`" if self.chosen.per_example else "the loss"
        cause = reduction_causes.not_finite_alone(by)
        return [
            dataclasses.replace(finding, cause=cause, other_causes=())
            if finding.verdict is Verdict.INCONCLUSIVE
            else finding
            for finding in found
        ]

    def _not_compared(self) -> list[str]:
        found = super()._not_compared()
        if self.examples.mask is not None and self.examples.mask.all():
            found.append(
                "`where`: it keeps everything, so a loss that ignores it is not told"
            )
        return found

    def report(self, assertion: str) -> Report:
        """Runs the check; lines found by fitted numbers are not named."""
        report = super().report(assertion)
        findings = [
            finding
            if finding.line is None or finding.line.says.startswith(_SURE_LINES)
            else dataclasses.replace(finding, line=None)
            for finding in report.findings
        ]
        return dataclasses.replace(report, findings=tuple(findings))

    def _notes(self) -> list[str]:
        count, reduction = self.examples.count, self.chosen.reduction
        kept = int(self.examples.kept().sum())
        what = {"mean": "the mean of", "sum": "the sum of", "none": "the list of"}
        of = f"{kept} of {count}" if kept < count else f"{count}"
        against = (
            f"compared with {what[reduction]} the losses of {of} examples, one by one"
        )
        if self.chosen.per_example is not None:
            against += " (by `per_example`)"
        return [against, *self.probes.notes, *super()._notes()[1:]]

    @property
    def subject(self) -> str:
        """The name of the loss."""
        return getattr(self.loss, "__name__", type(self.loss).__name__)

    def _subject(self) -> str:
        return self.subject

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        call = super()._replay(f"optax.{assertion}", name, findings)
        call = call.replace(f"{self._reference}, ...", f"..., {self._says_reduction()}")
        return call

    def _says_reduction(self) -> str:
        return f"reduction={self.chosen.reduction!r}"


def _open(finding: Finding, cause: Cause) -> Finding:
    """Concludes nothing from what passes."""
    if finding.verdict is not Verdict.PASS:
        return finding
    return dataclasses.replace(finding, verdict=Verdict.INCONCLUSIVE, cause=cause)


def make_check(
    loss: Callable[..., Any],
    args: tuple[PyTree, ...],
    chosen: Reduction,
    options: Options,
) -> Reporter:
    """Returns the check, or what is wrong already with the shape of the result."""
    if not args:
        raise ValueError("`args` is empty: hand over what the loss takes.")
    shapes = _drawn(loss, args, options)
    examples = Examples(shapes, chosen)
    probe = _Shape(loss, chosen, options, shapes, examples)
    return (
        probe
        if probe.cause is not None
        else ReductionCheck(loss, args, chosen, options)
    )


class _Shape:
    """Asks whether a loss's result has the shape that its reduction promises."""

    def __init__(
        self,
        loss: Callable[..., Any],
        chosen: Reduction,
        options: Options,
        shapes: tuple[PyTree, ...],
        examples: Examples,
    ):
        self._loss, self._options = loss, options
        name = _mask_name(loss, chosen)

        def shape_of(args: tuple[PyTree, ...], mask: Any) -> Any:
            keywords = {name: jnp.asarray(mask)} if name else {}
            with execution.user_code():
                returned = jax.eval_shape(lambda *a: loss(*a, **keywords), *args)
            return returned[0] if options.has_aux else returned

        result = shape_of(shapes, chosen.where)
        if not hasattr(result, "shape"):
            raise TypeError(f"`loss` must return one array, got {result!r}.")
        self.shape, self.dtype = tuple(result.shape), np.dtype(result.dtype).name
        self.cause: Cause | None = None
        if chosen.per_example is None:
            piece = examples.cut(shapes, [0] * len(examples.axes))
            try:
                one = shape_of(piece, examples.mask_of_one())
            except Exception as error:
                error.add_note(
                    "gradtest: raised by `loss` itself, of one example alone; where "
                    "that makes no sense, hand its formula over as `per_example=`."
                )
                raise
            self.cause = self._wrong(chosen.reduction, examples, tuple(one.shape))

    def _wrong(
        self, reduction: str, examples: Examples, one: tuple[int, ...]
    ) -> Cause | None:
        """Compares the shape with that of one example's result."""
        told, lengths = f"the result has the shape {list(self.shape)}", examples.lengths
        if examples.count == 1:
            return None
        if reduction != "none":
            if self.shape == one:
                return None
            return Cause(
                "not reduced",
                f"{told}, one value for each example, where a {reduction} is promised",
                f"reduce it, jnp.{reduction}(losses), or say reduction='none'",
            )
        many = sum(length > 1 for length in lengths)
        differing = (
            [n for n, m in zip(self.shape, one, strict=True) if n != m]
            if len(self.shape) == len(one)
            else []
        )
        if len(differing) == many:
            return None
        if len(differing) > many:
            return Cause(
                "examples broadcast against each other",
                f"{told}, one value for each pair of examples",
                "give predictions and targets one shape: [n, 1] against [n] makes "
                "[n, n]",
            )
        if self.shape == ():
            return Cause(
                "reduced already",
                "the result is one number, where one for each of "
                f"{examples.count} examples is promised",
                "leave the reduction out, or say reduction='mean' or 'sum'",
            )
        return Cause(
            "reduces over the wrong axis",
            f"{told}, which has no axis for the "
            f"{' x '.join(map(str, lengths))} examples",
            f"reduce over all axes but {', '.join(map(str, examples.axes))}",
        )

    def report(self, assertion: str) -> Report:
        """Returns a report on the shape."""
        finding = Finding(
            "result", self.shape, self.dtype, Verdict.FAIL, Gap.STRUCTURE,
            judged_by="its shape", cause=self.cause, check="structure", size=np.inf,
        )  # fmt: skip
        name = getattr(self._loss, "__name__", type(self._loss).__name__)
        key = seeding.describe(self._options.key)
        return Report(
            assertion, name, Verdict.FAIL, (finding,), self._options.trials, key,
            replay=f"gradtest.optax.{assertion}({name}, ..., key={key})",
        )  # fmt: skip


def _places(shape: tuple[int, ...], lengths: tuple[int, ...]) -> list[int] | None:
    """Returns the first axes, in order, that have these lengths; None without."""
    found, at = [], 0
    for length in lengths:
        while at < len(shape) and shape[at] != length:
            at += 1
        if at == len(shape):
            return None
        found.append(at)
        at += 1
    return found


def result_axes(
    whole: tuple[int, ...], one: tuple[int, ...], lengths: tuple[int, ...]
) -> list[int] | None:
    """Returns the result's axes of examples: those that one example has 1 in.

    Args:
      whole: The shape of all results.
      one: The shape of one example's.
      lengths: How many examples there are along each axis.
    """
    if len(whole) != len(one):
        return None
    found = [i for i, (n, m) in enumerate(zip(whole, one, strict=True)) if n != m]
    if len(found) == len(lengths):
        return found
    return _places(whole, lengths)  # an axis of one example


def _drawn(
    loss: Callable[..., Any], args: tuple[PyTree, ...], options: Options
) -> tuple[PyTree, ...]:
    """Returns the arguments with drawn values, for their shapes."""
    argnums = 0 if options.argnums is None else options.argnums
    inputs = read_inputs(loss, _without_nan(args), argnums=argnums)
    point = inputs.draw(options.key, 0)
    return inputs.arguments(point.moving, point.held)


def _without_nan(args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    def finite(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(
            leaf.dtype, jnp.inexact
        ):
            return jnp.where(jnp.isfinite(leaf), leaf, 0)
        return leaf

    return jax.tree_util.tree_map(finite, args)


def _mask_name(loss: Callable[..., Any], chosen: Reduction) -> str:
    """Returns the keyword that the loss takes its mask by; empty without a mask."""
    if chosen.where is None:
        return ""
    name = chosen.where_name
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return name or _MASK_NAMES[0]
    names = list(signature.parameters)
    if name is not None:
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if name not in names and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(
                f"`where_name` must name an argument of the loss, one of {names}, got "
                f"{name!r}."
            )
        return name
    for name in _MASK_NAMES:
        if name in names:
            return name
    raise ValueError(
        "`where` is a mask, but the loss takes none by the name of where or mask: say "
        f"which argument it is by `where_name=`, one of {names}."
    )
