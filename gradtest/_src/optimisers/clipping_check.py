"""The check of per-example clipping: a plain loop over examples is the truth.

With factors c of the examples held, sum(c[i] * loss(params, example i)) is a function
whose gradient is the sum of clipped gradients: so the claim is one about a gradient,
and is judged as every other is. The factors come of the rule-free gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.approximation import explain_gaps
from gradtest._src.case import Case
from gradtest._src.claiming import Claims
from gradtest._src.claims import output_seed, trace_claim
from gradtest._src.findings import Cause, Finding, Verdict
from gradtest._src.formula import judge_formula
from gradtest._src.inputs import Inputs, Leaf, Point, Recorded, Role, read_inputs
from gradtest._src.lifting import widen
from gradtest._src.matching import Returned
from gradtest._src.optimisers.accumulating import read_returned
from gradtest._src.optimisers.clip_causes import Examples, explain_clipped
from gradtest._src.optimisers.micro_batches import Pieces, count_rows, cut
from gradtest._src.optimisers.unlocated import UnlocatedCheck
from gradtest._src.options import Options
from gradtest._src.primal import solver_findings
from gradtest._src.program import Program, Values, trace_program
from gradtest._src.rounding import judge_rounding

PyTree = Any
# Where no example is clipped, or every one is, the params are scaled so often, each
# time by no less and no more than this.
_MOST_SCALES, _FARTHEST = 8, (0.1, 10.0)


@dataclasses.dataclass(frozen=True)
class Clip:
    """How examples are clipped: see `assert_clipped_grads_match`."""

    max_norm: float
    reduction: str = "mean"
    batch_axis: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where an option makes no sense."""
        if not np.isscalar(self.max_norm) and np.ndim(self.max_norm):
            raise ValueError(f"`max_norm` must be a number, got {self.max_norm!r}.")
        if not 0 < float(self.max_norm) < np.inf:
            raise ValueError(
                f"`max_norm` must be positive and finite, got {self.max_norm!r}."
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"`reduction` must be 'mean' or 'sum', got {self.reduction!r}."
            )
        if type(self.batch_axis) is not int or self.batch_axis < 0:
            raise ValueError(
                f"`batch_axis` must be an integer >= 0, got {self.batch_axis!r}."
            )


class ClippingCheck(UnlocatedCheck):
    """Checks that gradients are clipped example by example, and then reduced."""

    def __init__(
        self,
        clipped: Any,
        loss: Callable[..., Any],
        args: tuple[PyTree, PyTree],
        clip: Clip,
        options: Options,
    ):
        self.clipped, self.clip = clipped, clip
        options = dataclasses.replace(options, argnums=0)
        self._given = read_inputs(
            loss, args, argnums=0, exclude=options.exclude, names=("params", "batch")
        )
        first = self._given.draw(options.key, 0)
        self._rows = count_rows(
            self._given.arguments(first.moving, first.held)[1], clip.batch_axis
        )
        if not self._rows:
            raise ValueError(
                f"`batch` has no array with an axis {clip.batch_axis} of examples."
            )
        self._loss = loss
        self._single = self._of_one_example(loss, first, options)
        self._examples: list[Examples] = []
        self._scale: float | None = None
        points = self._points(options)
        options = dataclasses.replace(options, trials=len(points))
        recorded = self._recorded(points)
        super().__init__(
            self._looped, recorded, self._claim, options,
            names=("params", "batch", "factors"),
        )  # fmt: skip

    # --- the plain loop ---------------------------------------------------------------

    def _of_one_example(
        self, loss: Callable[..., Any], point: Point, options: Options
    ) -> Callable[..., Any]:
        """Returns the loss of a batch of one example, whichever way `loss` takes it."""
        axis, rows = self.clip.batch_axis, self._rows

        def squeezed(params: PyTree, batch: PyTree) -> Any:
            def one(leaf: Any) -> Any:
                shape = getattr(leaf, "shape", ())
                is_cut = len(shape) > axis and shape[axis] == 1
                return leaf[(slice(None),) * axis + (0,)] if is_cut else leaf

            return loss(params, jax.tree_util.tree_map(one, batch))

        params, batch = self._given.arguments(point.moving, point.held)
        piece = cut(batch, axis, rows, 0, 1)
        errors = []
        for candidate in (loss, squeezed):
            try:
                returned = jax.eval_shape(candidate, params, piece)
            except Exception as error:
                errors.append(error)
                continue
            value = returned[0] if options.has_aux else returned
            if getattr(value, "shape", None) == ():
                return candidate
        if len(errors) == 2:
            errors[0].add_note("gradtest: raised by `loss` itself, of one example.")
            raise errors[0]
        raise TypeError(
            "`loss` must return one real number for a batch of one example (or for an "
            f"example without its axis), got {returned!r}."
        )

    def _looped(self, params: PyTree, batch: PyTree, factors: Any) -> Any:
        """The function whose gradient is that of the clipped examples."""
        axis, rows = self.clip.batch_axis, self._rows

        def weighed(i: Any, factor: Any) -> Any:
            def piece(leaf: Any) -> Any:
                shape = getattr(leaf, "shape", ())
                if len(shape) <= axis or shape[axis] != rows:
                    return leaf
                return jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), i, 1, axis)

            value = self._single(params, jax.tree_util.tree_map(piece, batch))
            value = value[0] if self.options.has_aux else value
            return factor.astype(value.dtype) * value

        values = jax.lax.map(lambda pair: weighed(*pair), (jnp.arange(rows), factors))
        return values.mean() if self.clip.reduction == "mean" else values.sum()

    def _points(self, options: Options) -> list[Point]:
        """Returns where to look: as drawn, and where some examples are clipped."""
        points = []
        for trial in range(options.trials):
            point = self._given.draw(options.key, trial)
            points.append(point)
            self._examples.append(self._examples_at(point, options))
        if any(map(_tells, self._examples)):
            return points
        scale = 1.0
        for _ in range(_MOST_SCALES):
            median = float(np.median(self._examples[-1].norms()))
            if not 0 < median < np.inf:
                break
            scale *= float(np.clip(self.clip.max_norm / median, *_FARTHEST))
            point = self._scaled(points[0], scale)
            examples = self._examples_at(point, options)
            self._examples.append(examples)
            if _tells(examples):
                self._scale = scale
                self._examples = [*self._examples[: len(points)], examples]
                return [*points, point]
        del self._examples[len(points) :]
        return points

    def _scaled(self, point: Point, scale: float) -> Point:
        """Returns the point with all that moves times a factor."""
        moved = tuple(
            (scale * widen(value)).astype(leaf.dtype)
            for leaf, value in zip(self._given.moving, point.moving, strict=True)
        )
        return Point(moved, point.held)

    def _examples_at(self, point: Point, options: Options) -> Examples:
        """Takes the rule-free gradient of each example, in float64."""
        pieces = Pieces(
            self._single,
            self._given,
            point,
            options,
            axis=self.clip.batch_axis,
            sizes=None,
        )
        gradients = [
            pieces.gradient((k, k + 1), pieces.moving) for k in range(self._rows)
        ]
        is_mean = self.clip.reduction == "mean"
        return Examples(gradients, float(self.clip.max_norm), is_mean)

    def _recorded(self, points: list[Point]) -> tuple[PyTree, PyTree, Any]:
        """Returns arguments that have the values of each point in turn."""

        def recorded(leaf: Leaf, values: list[Any]) -> Any:
            return leaf.source if leaf.role is Role.STATIC else Recorded(tuple(values))

        by_role = {
            Role.MOVES: iter(zip(*(p.moving for p in points), strict=True)),
            Role.HELD: iter(zip(*(p.held for p in points), strict=True)),
        }
        leaves = [
            leaf.source
            if leaf.role is Role.STATIC
            else recorded(leaf, list(next(by_role[leaf.role])))
            for leaf in self._given.leaves
        ]
        params, batch = jax.tree_util.tree_unflatten(self._given.treedef, leaves)
        factors = Recorded(tuple(each.factors() for each in self._examples))
        return params, batch, factors

    # --- the claim --------------------------------------------------------------------

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        return trace_program(
            self.fn, inputs, point, role="loss",
            intentions=self.options.expect_differs,
        )  # fmt: skip

    def _claim(self, traced: Program, point: Point) -> Claims:
        inputs = traced.inputs

        def call(moving: Values, held: Values, seed: Values) -> Values:
            params, batch, _ = inputs.arguments(moving, held)
            if callable(getattr(self.clipped, "update", None)):
                returned = self._transformed(params, batch)
            else:
                returned = self.clipped(params, batch)
                has_aux = self.options.has_aux
                returned = read_returned(
                    returned, inputs, has_aux=has_aux, role="clipped"
                )
            tree = Returned(returned, "clipped", "clipped(...)", strict=False)
            return tree.like_argument(inputs, 0)

        claim = trace_claim(
            "rev", traced, point, call, output_seed(traced), self.options.variant
        )
        return Claims(claim, None)

    def _transformed(self, params: PyTree, batch: PyTree) -> PyTree:
        """Hands each example's gradient to a transformation, stacked."""
        axis, rows = self.clip.batch_axis, self._rows
        gradient = jax.grad(self._single, has_aux=self.options.has_aux)
        each = []
        for k in range(rows):
            found = gradient(params, cut(batch, axis, rows, k, k + 1))
            each.append(found[0] if self.options.has_aux else found)
        stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *each)
        return self.clipped.update(stacked, self.clipped.init(params), params)[0]

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        found = explain_gaps(case, judge_formula(case), judge_formula)
        found = judge_rounding(case, found, self.options.rounding_rtol)
        if any(finding.verdict is Verdict.FAIL for finding in found):
            found = explain_clipped(case, found, self._examples[case.trial])
        return [*found, *solver_findings(case)]

    def findings(self) -> list[Finding]:
        """Runs every trial; concludes nothing where the examples do not tell."""
        found = super().findings()
        is_wrong = any(finding.verdict is Verdict.FAIL for finding in found)
        if is_wrong or any(map(_tells, self._examples)):
            return found
        cause = _untelling(self._examples[0])
        return [
            dataclasses.replace(finding, verdict=Verdict.INCONCLUSIVE, cause=cause)
            for finding in found
        ]

    # --- the report -------------------------------------------------------------------

    def _subject(self) -> str:
        return getattr(self.clipped, "__name__", None) or type(self.clipped).__name__

    def _not_compared(self) -> list[str]:
        if any((each.norms() == 0).any() for each in self._examples):
            return []
        return ["an example whose gradient is zero: `batch` has none"]

    def _notes(self) -> list[str]:
        told = self._examples[-1]
        clipped = int((told.norms() > told.max_norm).sum())
        notes = [
            f"compared with a loop over {told.count} examples, {clipped} of which are "
            f"clipped to {told.max_norm:g}, and their {self.clip.reduction}"
        ]
        if self._scale is not None:
            notes.append(
                "at `params` as given all examples are clipped, or none: looked at "
                f"`params` times {self._scale:g} as well"
            )
        return [*notes, *super()._notes()]

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        loss = getattr(self._loss, "__name__", type(self._loss).__name__)
        options = f"{name}, {loss}, params, batch, max_norm={self.clip.max_norm:g}"
        return super()._replay(f"optax.{assertion}", options, findings)


def _tells(examples: Examples) -> bool:
    """Whether some examples are clipped, and some are not."""
    clipped = examples.norms() > examples.max_norm * (1 + 1e-6)
    kept = examples.norms() < examples.max_norm * (1 - 1e-6)
    return bool(clipped.any() and (kept & (examples.norms() > 0)).any())


def _untelling(examples: Examples) -> Cause:
    norms = examples.norms()
    where = "above" if norms.min() > examples.max_norm else "below"
    if np.ptp(norms) == 0:
        remedy = "hand over examples whose gradients have different norms"
    else:
        remedy = f"choose max_norm between them, such as {np.median(norms):.3g}"
    return Cause(
        "no example tells",
        f"the norms of the {len(norms)} examples' gradients ({norms.min():.3g} to "
        f"{norms.max():.3g}) all lie {where} max_norm={examples.max_norm:g}, so that "
        "clipping looks like scaling, or like nothing",
        remedy,
    )
