"""The check of what is accumulated over micro-batches against the full batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src.approximation import explain_gaps
from gradtest._src.case import Case
from gradtest._src.claiming import Claims
from gradtest._src.claims import output_seed, trace_claim
from gradtest._src.execution import SlipError
from gradtest._src.findings import Finding, Verdict
from gradtest._src.formula import judge_formula
from gradtest._src.inputs import Inputs, Point
from gradtest._src.matching import Returned
from gradtest._src.optimisers.accumulation_causes import explain_accumulated
from gradtest._src.optimisers.micro_batches import (
    Pieces,
    Sizes,
    count_rows,
    cut,
    join,
    listed,
    ranges_of,
    read_cut,
    read_sizes,
)
from gradtest._src.optimisers.multi_steps import Accumulator, read_accumulator
from gradtest._src.optimisers.protocol import Protocol
from gradtest._src.optimisers.trees import describe
from gradtest._src.optimisers.unlocated import UnlocatedCheck
from gradtest._src.options import Options
from gradtest._src.primal import solver_findings
from gradtest._src.program import Program, Values, trace_program
from gradtest._src.rounding import judge_rounding

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Micro:
    """How the batch is cut: see `assert_accumulated_grads_match`."""

    micro_batches: Any = None
    batch_axis: int = 0
    inner: Any = None

    def __post_init__(self) -> None:
        """Raises ValueError where the axis is none."""
        if type(self.batch_axis) is not int or self.batch_axis < 0:
            raise ValueError(
                f"`batch_axis` must be an integer >= 0, got {self.batch_axis!r}."
            )


class AccumulationCheck(UnlocatedCheck):
    """Checks that what is accumulated is the gradient of the full batch's loss."""

    def __init__(
        self,
        accumulate: Any,
        loss: Callable[..., Any],
        args: tuple[PyTree, PyTree],
        micro: Micro,
        options: Options,
    ):
        self.accumulate = accumulate
        self._axis = micro.batch_axis
        self._accumulator = read_accumulator(accumulate, micro.inner)
        self._lists = isinstance(args[1], list) and (
            self._accumulator is not None or micro.micro_batches == "list"
        )
        params, batch = args
        self._sizes: Sizes | None = None
        if self._lists:
            self._sizes = tuple(count_rows(each, self._axis) for each in batch)
            batch = join(batch, self._axis)
        self._batch = batch
        rows = count_rows(batch, self._axis)
        self._sizes = self._sizes or self._read_sizes(micro, rows, params)
        options = dataclasses.replace(options, argnums=0)
        super().__init__(
            loss, (params, batch), self._claim, options, names=("params", "batch")
        )

    def _read_sizes(self, micro: Micro, rows: int, params: PyTree) -> Sizes | None:
        if micro.micro_batches == "list":
            raise TypeError(
                "`micro_batches='list'` wants a list of batches as `batch`."
            )
        if micro.micro_batches is None and self._accumulator is None:
            return None
        if not rows:
            raise ValueError(
                f"`batch` has no array with an axis {self._axis} to cut into "
                "micro-batches."
            )
        if micro.micro_batches is not None:
            return read_sizes(micro.micro_batches, rows)
        assert self._accumulator is not None
        if self._accumulator.multi_steps is None:
            raise ValueError(
                "`micro_batches` must say into how many micro-batches (or of which "
                "sizes) the batch is cut, where `accumulate` is a transformation other "
                "than optax.MultiSteps."
            )
        return read_sizes(self._accumulator.usual_steps(params), rows)

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        traced = trace_program(
            self.fn, inputs, point, has_aux=self.options.has_aux, role="loss",
            intentions=self.options.expect_differs,
        )  # fmt: skip
        traced.require_scalar(
            "`loss` must return one real number, the loss of the full batch",
            "reduce it over the batch",
        )
        return traced

    def _claim(self, traced: Program, point: Point) -> Claims:
        """Traces the accumulation: a claim about the gradient of the loss."""
        inputs = traced.inputs

        def call(moving: Values, held: Values, seed: Values) -> Values:
            params, batch = inputs.arguments(moving, held)
            returned = self._accumulated(inputs, params, batch)
            tree = Returned(returned, "accumulate", "accumulate(...)", strict=False)
            return tree.like_argument(inputs, 0)

        claim = trace_claim(
            "rev", traced, point, call, output_seed(traced), self.options.variant
        )
        return Claims(claim, None)

    def _accumulated(self, inputs: Inputs, params: PyTree, batch: PyTree) -> PyTree:
        """Returns the tree of gradients that comes of the micro-batches."""
        if self._accumulator is None:
            given = self._pieces(batch) if self._lists else batch
            try:
                returned = self.accumulate(params, given)
            except Exception as error:
                error.add_note("gradtest: raised by `accumulate` itself.")
                raise
            return read_returned(returned, inputs, has_aux=self.options.has_aux)
        if not self._is_seen(self._accumulator):
            return self._gradient(params, batch)  # the updates are judged by themselves
        tx = self._accumulator.bare()
        state, updates = tx.init(params), None
        for piece in self._pieces(batch):
            updates, state = tx.update(self._gradient(params, piece), state, params)
        return updates

    @staticmethod
    def _is_seen(accumulator: Accumulator) -> bool:
        """Whether what is accumulated can be told from the update."""
        return accumulator.multi_steps is not None or accumulator.inner is None

    def _gradient(self, params: PyTree, batch: PyTree) -> PyTree:
        has_aux = self.options.has_aux
        found = jax.grad(self.fn, has_aux=has_aux, allow_int=True)(params, batch)
        gradients = found[0] if has_aux else found
        return jax.tree.map(_without_float0, gradients, params)

    def _pieces(self, batch: PyTree) -> list[PyTree]:
        assert self._sizes is not None
        rows = count_rows(batch, self._axis)
        return [cut(batch, self._axis, rows, *each) for each in ranges_of(self._sizes)]

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        found = explain_gaps(case, judge_formula(case), judge_formula)
        found = judge_rounding(case, found, self.options.rounding_rtol)
        pieces = Pieces(
            self.fn, self.inputs, case.point, self.options, axis=self._axis,
            sizes=self._sizes or self._cut_by_hand(claims),
        )  # fmt: skip
        if any(finding.verdict is Verdict.FAIL for finding in found):
            found = explain_accumulated(case, found, pieces)
        return [*self._updates(case, found, pieces), *solver_findings(case)]

    def _cut_by_hand(self, claims: Claims) -> Sizes | None:
        """Returns how a function cuts the batch, where that shows in its program."""
        assert claims.reverse is not None
        rows = count_rows(self._batch, self._axis)
        return read_cut(claims.reverse.jaxpr, rows, self._axis)

    def _updates(
        self, case: Case, found: list[Finding], pieces: Pieces
    ) -> list[Finding]:
        """Adds what a transformation does beside accumulating."""
        if self._accumulator is None:
            return found
        gradients = pieces.on_each(self._sizes or ())
        if gradients is None or not all(np_finite(each) for each in gradients):
            return found
        more = Protocol(self._accumulator, case, gradients).findings()
        if more and more[0].cause is not None and more[0].cause.name == "no update":
            found = [
                dataclasses.replace(finding, cause=more[0].cause, other_causes=())
                if finding.verdict is Verdict.FAIL
                else finding
                for finding in found
            ]
        return [*found, *more]

    def _subject(self) -> str:
        if self._accumulator is None:
            own = getattr(self.accumulate, "__name__", None)
            return own or type(self.accumulate).__name__
        if self._accumulator.multi_steps is not None:
            return type(self._accumulator.multi_steps).__name__
        return describe(self.accumulate)

    @property
    def _loss_name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _notes(self) -> list[str]:
        against = f"compared with the gradient of {self._loss_name} of the full batch"
        over = []
        if self._sizes is not None:
            count = len(self._sizes)
            over = [f"over {count} micro-batches of {listed(self._sizes)} rows"]
        seen = []
        if self._accumulator is not None and self._accumulator.multi_steps is not None:
            seen = ["what the wrapped transformation is given was looked at, and then "
                    "its update and state"]  # fmt: skip
        return [against, *over, *seen, *super()._notes()]

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        return super()._replay(
            f"optax.{assertion}", f"{name}, {self._loss_name}", findings
        )


def np_finite(gradients: Values) -> bool:
    """Whether every gradient is finite."""
    return all(bool(jnp.isfinite(each).all()) for each in gradients)


def _without_float0(gradient: Any, param: Any) -> Any:
    """Returns zeros for parameters of integers, which have no gradient."""
    if gradient.dtype == jax.dtypes.float0:
        return jnp.zeros_like(param)
    return gradient


def read_returned(
    returned: Any, inputs: Inputs, *, has_aux: bool, role: str = "accumulate"
) -> PyTree:
    """Picks the gradients out of what a function returned, as JAX's own return them.

    Raises:
      SlipError: There are none.
    """
    wanted = inputs.argument_tree(0)
    is_pair = isinstance(returned, tuple | list) and len(returned) == 2
    if _structure(returned) == wanted and not (is_pair and _fits(returned[0], inputs)):
        return returned
    if is_pair:
        places = (0, 1) if has_aux else (1, 0)
        for place in places:
            if _fits(returned[place], inputs):
                return returned[place]
    raise SlipError(
        f"`{role}` must return gradients like `params`, or a pair (value, gradients) "
        "or, with has_aux=True, (gradients, auxiliary): wanted a tree like "
        f"{_shortened(wanted)}, got {_shortened(_structure(returned))}."
    )


def _fits(tree: PyTree, inputs: Inputs) -> bool:
    """Whether a tree has the structure and the shapes of the parameters."""
    if _structure(tree) != inputs.argument_tree(0):
        return False
    leaves = jax.tree_util.tree_leaves(tree, is_leaf=_is_none)
    return all(
        leaf.dtype is None or jnp.shape(value) == leaf.shape
        for leaf, value in zip(inputs.of_argument(0), leaves, strict=True)
        if value is not None
    )


def _structure(tree: PyTree) -> Any:
    return jax.tree_util.tree_structure(tree, is_leaf=_is_none)


def _is_none(value: Any) -> bool:
    return value is None


def _shortened(structure: Any) -> str:
    text = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 200 else f"{text[:200]}…"
