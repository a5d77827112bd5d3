"""The gradient of a function as it runs, in its own precision, trial by trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gradtest._src import (
    claims,
    diagnose,
    execution,
    jaxprs,
    program,
    seeding,
    variants,
)
from gradtest._src.findings import Cause, Entry, Finding, Gap, Report, Verdict, worst
from gradtest._src.inputs import Leaf, Point, Role, read_inputs
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.nans import explaining
from gradtest._src.options import Options
from gradtest._src.program import Values
from gradtest._src.silence import asking
from gradtest._src.silence.reasons import Silence

Judge = Callable[["Backward"], list[Finding]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one trial returned, with a leading axis of devices under some variants."""

    trial: int
    values: Values
    gradient: Values


class Backward:
    """A function and its reverse-mode derivative, ready to run."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], options: Options):
        self.fn = fn
        self.options = options
        self.inputs = read_inputs(
            fn, args, argnums=options.argnums, exclude=options.exclude
        )
        self.first = self.inputs.draw(options.key, 0)
        self.program = program.trace_program(
            fn,
            self.inputs,
            self.first,
            has_aux=options.has_aux,
            variant=options.variant,
        )
        self.claim = claims.reverse_claim(self.program, self.first, options.variant)
        self.checked = [
            i for i, leaf in enumerate(self.inputs.moving) if np.prod(leaf.shape)
        ]
        if not self.checked:
            names = ", ".join(str(leaf) for leaf in self.inputs.moving[:4])
            raise ValueError(f"`args` has no entry to differentiate, got {names}.")

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves that are differentiated."""
        return self.inputs.moving

    def runs(self) -> Iterator[Run]:
        """Runs every trial, one at a time."""
        return map(self._run, range(self.options.trials))

    def _run(self, trial: int) -> Run:
        point = self.point(trial)
        arguments = [list(point.moving), list(point.held), self.cotangents(trial)]
        with execution.working_precision():
            if self.claim.variant:
                results = self.claim.call(*arguments)
            else:
                consts = [
                    const for const in jaxprs.nested_consts(self.claim.jaxpr)
                    if hasattr(const, "dtype") and hasattr(const, "shape")
                ]  # fmt: skip
                results = self._compiled(consts)(*arguments, consts)
            results = execution.to_host(results)
        count = len(self.program.outputs)
        return Run(trial, results[:count], results[count:])

    def point(self, trial: int) -> Point:
        """Returns the arguments of a trial."""
        return self.inputs.draw(self.options.key, trial) if trial else self.first

    def cotangents(self, trial: int) -> Values:
        """Returns 1 for a function of one real number, random ones for any other."""
        if self.program.is_scalar:
            return claims.output_seed(self.program)
        return [
            seeding.normal(
                seeding.generator(self.options.key, "cotangent", trial, i),
                out.shape,
                out.dtype,
            )
            for i, out in enumerate(self.program.outputs)
        ]

    def _compiled(self, consts: Sequence[Any]) -> Callable[..., Values]:
        """Returns the derivative as one program, shared by all of its structure."""
        claim = self.claim

        def function(moving: Values, held: Values, seed: Values, at: Values) -> Values:
            hoisted = {id(c): value for c, value in zip(consts, at, strict=True)}
            run = Evaluator(wide=False, hoisted=hoisted)
            return run(claim.jaxpr, [*moving, *held, *seed])

        return execution.cached(
            ("backward", claim.key), lambda: execution.jit_as_written(function)
        )

    def rule_free(self, *, lifted: bool) -> Values | None:
        """Returns the first trial's gradient without custom rules, if there is one.

        Args:
          lifted: Whether in float64, or in the function's own precision.
        """
        point, seed = self.first, self.cotangents(0)
        run = Evaluator(wide=lifted)

        def function(moving: Values, held: Values, seed: Values) -> Values:
            of = self.program.mathematics
            return program.derivative(of, run, moving, held, seed)[1]

        arguments: list[Values] = [list(point.moving), list(point.held), seed]
        if lifted:
            arguments = [[widen(value) for value in part] for part in arguments]
        lower = execution.lifted if lifted else execution.working
        try:
            return execution.to_host(lower(function, arguments)(*arguments))
        except Exception:  # a loop without a reverse mode, a kernel without a rule
            return None

    def report(self, assertion: str, judge: Judge) -> Report:
        """Runs the check."""
        findings = judge(self)
        options, name = self.options, _name(self.fn)
        key = seeding.describe(options.key)
        notes = []
        if options.variant is not None:
            notes.append(f"run under {variants.describe_variant(options.variant)}")
        if self.claim.devices:
            notes.append(
                f"the result of each of {self.claim.devices} devices was checked"
            )
        notes += variants.cut_notes([self.program.jaxpr])
        verdict = worst(finding.verdict for finding in findings)
        replay = f"gradtest.{assertion}({name}, ..., key={key}"
        replay += f", trials={options.trials})" if options.trials > 1 else ")"
        return Report(
            assertion, name, verdict, tuple(findings), options.trials, key, ("rev",),
            precision=("precision: the function's own",),
            unchecked=tuple(self._unchecked()),
            notes=tuple(notes),
            replay="" if verdict is Verdict.PASS else replay,
        )  # fmt: skip

    def _unchecked(self) -> list[str]:
        excluded = self.inputs.unchecked
        lines = [f"{name} (excluded)" for name in excluded]
        for leaf in self.inputs.leaves:
            if leaf.argument not in self.inputs.argnums or leaf.name in excluded:
                continue
            kind = f"{leaf.dtype}{list(leaf.shape)}"
            if leaf.role is Role.STATIC:
                kind = "None" if leaf.source is None else type(leaf.source).__name__
            if leaf.role is not Role.MOVES:
                lines.append(f"{leaf.name} ({kind}: holds no gradient)")
            elif not np.prod(leaf.shape):
                lines.append(f"{leaf.name} ({kind}: has no entries)")
        return lines


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _finding(leaf: Leaf, verdict: Verdict, gap: Gap, **fields: Any) -> Finding:
    return Finding(
        leaf.name, leaf.shape, np.dtype(leaf.dtype).name, verdict, gap, **fields
    )


# --- is it finite -----------------------------------------------------------------


def judge_finite(backward: Backward) -> list[Finding]:
    """Judges whether any entry of a gradient is NaN or infinite."""
    found = [_finite_findings(backward, run) for run in backward.runs()]
    worst_of_each = [
        max(trials, key=lambda finding: finding.verdict.severity)
        for trials in zip(*found, strict=True)
    ]
    return _with_equations(backward, worst_of_each)


def _with_equations(backward: Backward, findings: list[Finding]) -> list[Finding]:
    """Adds the equations that spoil a gradient, and what mends them."""
    bad = [finding for finding in findings if finding.verdict is Verdict.FAIL]
    if not bad or backward.claim.devices:
        return findings
    trial = bad[0].trial
    told = explaining.explained(
        [finding for finding in bad if finding.trial == trial],
        backward.program,
        backward.point(trial),
        backward.cotangents(trial),
    )
    by_name = {finding.name: finding for finding in told}
    return [by_name.get(finding.name, finding) for finding in findings]


def _finite_findings(backward: Backward, run: Run) -> list[Finding]:
    trouble = _value_trouble(backward, run)
    return [_finite_finding(backward, run, i, trouble) for i in backward.checked]


def _value_trouble(backward: Backward, run: Run) -> Cause | None:
    for output, value in zip(backward.program.outputs, run.values, strict=True):
        if not np.isfinite(value).all():
            return diagnose.value_not_finite(output.name, value)
    return None


def _finite_finding(
    backward: Backward, run: Run, i: int, trouble: Cause | None
) -> Finding:
    leaf, gradient = backward.leaves[i], run.gradient[i]
    notes: tuple[str, ...] = ()
    if trouble is not None:
        return _finding(leaf, Verdict.INCONCLUSIVE, Gap.FINITE, trial=run.trial,
                        cause=trouble)  # fmt: skip
    if backward.claim.devices:
        bad = [k for k, part in enumerate(gradient) if not np.isfinite(part).all()]
        gradient = gradient[bad[0] if bad else 0]
        notes = tuple(f"on device {k}" for k in bad)
    if np.isfinite(gradient).all():
        return _finding(leaf, Verdict.PASS, Gap.FINITE, trial=run.trial)
    index = tuple(int(n) for n in np.argwhere(~np.isfinite(gradient))[0])
    return _finding(
        leaf, Verdict.FAIL, Gap.FINITE, trial=run.trial, notes=notes,
        entry=Entry(index, gradient[index].item(), np.nan),
        cause=diagnose.not_finite(gradient),
    )  # fmt: skip


# --- is there one -----------------------------------------------------------------


# What the flow of gradients is asked of.
IS_LOSS = "`fn` must return one real number, a loss"


def judge_flow(backward: Backward) -> list[Finding]:
    """Judges whether each leaf has a gradient that is not zero in every trial.

    Raises:
      TypeError: The function returns something else than one real number.
    """
    traced = backward.program
    traced.require_loss(IS_LOSS)
    silent, missing = set(backward.checked), set(backward.checked)
    trouble: Cause | None = None
    for run in backward.runs():
        trouble = trouble or _value_trouble(backward, run)
        moving = {i for i in missing if run.gradient[i].any()}  # a NaN is not zero
        silent -= moving
        missing -= {i for i in moving if _is_usable(run, i)}
    why = asking.silences(backward, sorted(silent)) if silent else {}
    return [
        _flow_finding(backward.leaves[i], i in missing, why.get(i), trouble)
        for i in backward.checked
    ]


def _flow_finding(
    leaf: Leaf, missing: bool, why: Silence | None, trouble: Cause | None
) -> Finding:
    if not missing:
        return _finding(leaf, Verdict.PASS, Gap.FLOW)
    if why is not None:
        return _finding(leaf, Verdict.FAIL, Gap.FLOW, cause=why.cause, line=why.line)
    cause = trouble or asking.UNKNOWN
    return _finding(leaf, Verdict.INCONCLUSIVE, Gap.FLOW, cause=cause)


def _is_usable(run: Run, i: int) -> bool:
    """Whether the value and one leaf's gradient are finite."""
    return all(np.isfinite(array).all() for array in [*run.values, run.gradient[i]])
