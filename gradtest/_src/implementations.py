"""Two implementations compared: the gradient of one, and the truth about the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import claims, execution, jaxprs
from gradtest._src.approximation import explain_gaps, literal_reach
from gradtest._src.case import Case, norm
from gradtest._src.check import Check
from gradtest._src.claiming import Claims, is_missing_mode
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.formula import judge_formula
from gradtest._src.gaps import LeafGap, leaf_gap
from gradtest._src.hand_written import hand_written_findings
from gradtest._src.inputs import Inputs, Point
from gradtest._src.lifting import Evaluator, is_inexact, widen
from gradtest._src.matching import match_results
from gradtest._src.options import Options
from gradtest._src.primal import solver_findings, value_trouble
from gradtest._src.program import Program, Values, trace_program
from gradtest._src.rounding import judge_rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Pair(Program):
    """A reference, and the implementation that is to agree with it.

    All but `own` is the reference's; only the results' dtypes are those of `own`, so
    that cotangents are drawn as it takes them.
    """

    own: Program | None = None


class AgreementCheck(Check):
    """Checks that `fn` has the values and the gradient of `reference`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        reference: Callable[..., Any],
        args: tuple[Any, ...],
        options: Options,
    ):
        self.reference = reference
        self._primal: execution.Compiled | None = None
        super().__init__(fn, args, self._claim, options)

    def _trace(self, inputs: Inputs, point: Point) -> Pair:
        aux = self.options.has_aux
        variant = self.options.variant
        own = trace_program(self.fn, inputs, point, has_aux=aux, variant=variant)
        reference = trace_program(
            self.reference, inputs, point, has_aux=aux, role="reference",
            variant=variant,
        )  # fmt: skip
        match_results(own, reference)
        fields = {
            field.name: getattr(reference, field.name)
            for field in dataclasses.fields(Program)
        }
        return Pair(**(fields | {"outputs": own.outputs}), own=own)

    def _claim(self, traced: Program, point: Point) -> Claims:
        """Traces what JAX differentiates of `fn`: a claim about the reference."""
        try:
            claim = claims.reverse_claim(_own(traced), point, self.options.variant)
        except Exception as error:
            if not is_missing_mode(error):
                raise
            raise ValueError(
                f"`fn` must have a gradient, but JAX finds none: {error}"
            ) from error
        return Claims(dataclasses.replace(claim, is_autodiff=False), None)

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        eps = _spacing(case)
        found = explain_gaps(case, judge_formula(case), judge_formula, eps=eps)
        found = judge_rounding(
            case,
            found,
            self.options.rounding_rtol,
            yardstick=lambda: self._yardstick(case),
        )
        return [
            *self._value_findings(case, eps),
            *hand_written_findings(case, found),
            *solver_findings(case),
        ]

    def _yardstick(self, case: Case) -> Case:
        """Returns `fn` itself as a case: how its rule-free derivative rounds."""
        own = _own(case.program)
        claim = claims.reverse_claim(own, case.point, self.options.variant)
        judged = Case(
            own, claim, case.point, rtol=case.rtol, key=case.key, trial=case.trial,
            works=False,
        )  # fmt: skip
        judged.seed = case.seed
        judged.bench.reseed(case.seed)
        return judged

    def _value_findings(self, case: Case, eps: float) -> list[Finding]:
        """Compares the values: under differentiation, and where rules are, without."""
        if value_trouble(case):
            return []
        readings = case.readings
        assert readings.claimed_values is not None
        found = _value_gaps(case, readings.claimed_values, eps)
        if not found and _own(case.program).has_rules:
            found = _value_gaps(case, self._own_values(case), eps)
        return found

    def _own_values(self, case: Case) -> Values:
        """Returns what `fn` computes where it is not differentiated, in float64."""
        own = _own(case.program)
        arguments = [
            [widen(value) for value in part]
            for part in (case.point.moving, own.held(case.point))
        ]
        if self._primal is None:

            def values(moving: Values, held: Values) -> Values:
                return own.mathematics(Evaluator(), moving, held)

            self._primal = execution.lifted(values, arguments)
        return execution.to_host(self._primal(*arguments))

    def _not_compared(self) -> list[str]:
        results, _ = jax.tree_util.tree_flatten_with_path(self._programs[0].result)
        return [
            f"result{jax.tree_util.keystr(path)}: {leaf.dtype} has no gradient, and "
            "depends on each implementation's rounding"
            for path, leaf in results
            if not is_inexact(leaf.dtype)
        ]

    def _notes(self) -> list[str]:
        traced = self._programs[0]
        against = f"compared with the values and the gradient of {self._reference}"
        if traced.has_rules:
            against += "; its custom rules were left out, their functions were entered"
        return [against, *super()._notes()]

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        return super()._replay(assertion, f"{name}, {self._reference}", findings)

    @property
    def _reference(self) -> str:
        return getattr(self.reference, "__name__", type(self.reference).__name__)


def _own(traced: Program) -> Program:
    assert isinstance(traced, Pair)
    assert traced.own is not None
    return traced.own


def _spacing(case: Case) -> float:
    """Returns the spacing of the coarsest dtype that either implementation rounds to.

    One that takes and returns float32 may compute in half precision in between.
    """
    literals = jaxprs.half_literals(case.claim.jaxpr)
    literals += jaxprs.half_literals(case.program.jaxpr)
    rounded = [float(jnp.finfo(literal.aval.dtype).eps) for literal in literals]
    return max([case.working_eps, *rounded])


def _value_gaps(case: Case, claimed: Values, eps: float) -> list[Finding]:
    """Returns a finding on each value that differs and is no approximation."""
    truth = case.readings.values
    gaps = [_value_gap(case, c, v) for c, v in zip(claimed, truth, strict=True)]
    wrong = [
        i
        for i, gap in enumerate(gaps)
        if gap.is_exceeded or not np.isfinite(claimed[i]).all()
    ]
    if any(gaps[i].size <= eps**0.5 for i in wrong):
        wrong = [i for i in wrong if not _is_approximate(case, i, gaps[i], eps)]
    return [
        Finding(
            output.name,
            output.shape,
            np.dtype(output.dtype).name,
            Verdict.FAIL,
            Gap.VALUE,
            trial=case.trial,
            size=gaps[i].size,
            allowed=gaps[i].allowed,
            entry=gaps[i].entry,
            cause=_VALUES_DIFFER,
            check="value",
        )
        for i, output in enumerate(case.program.outputs)
        if i in wrong
    ]


def _value_gap(case: Case, claimed: np.ndarray, truth: np.ndarray) -> LeafGap:
    return leaf_gap(claimed, truth, rtol=case.rtol, floor=1e-13 * norm(truth))


def _is_approximate(case: Case, i: int, gap: LeafGap, eps: float) -> bool:
    """Whether tracing in float64, or rounded constants, explain a value's gap."""
    if gap.size > eps**0.5:
        return False
    anew = case.retraced
    if anew is not None and anew.readings.claimed_values is not None:
        readings = anew.readings
        assert readings.claimed_values is not None
        closed = _value_gap(anew, readings.claimed_values[i], readings.values[i])
        if not closed.is_exceeded:
            return True
    reach = literal_reach(anew or case, values=True)
    return reach is not None and gap.size <= 3 * reach[i] + case.rtol


_VALUES_DIFFER = Cause(
    "values differ",
    "the two do not compute the same function here",
    "make the values agree first: look for another constant (eps, scale), axis, mask "
    "or default",
)
