"""The gradients of parts of a batch: what single devices compute by themselves."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import execution
from gradtest._src.inputs import Point, read_inputs
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.options import Options
from gradtest._src.program import Program, Values, derivative, trace_program


class Parts:
    """Evaluates the rule-free gradient of a loss on parts of its batch, in float64."""

    def __init__(
        self,
        loss: Callable[..., Any],
        whole: Program,
        point: Point,
        options: Options,
    ):
        self._loss = loss
        self._options = options
        self._known: dict[Any, list[Values] | None] = {}
        self._params, self._batch = whole.inputs.arguments(point.moving, point.held)
        lengths = [
            leaf.shape[0]
            for leaf in jax.tree_util.tree_leaves(self._batch)
            if getattr(leaf, "shape", ())
        ]
        self.rows = collections.Counter(lengths).most_common(1)[0][0] if lengths else 0

    def gradients(self, count: int) -> list[Values] | None:
        """Returns the gradient on each of so many equal parts; None without parts."""
        if count < 2 or not self.rows or self.rows % count:
            return None
        size = self.rows // count
        return self._evaluated(*((k * size, (k + 1) * size) for k in range(count)))

    def first(self, rows: int) -> Values | None:
        """Returns the gradient on the first rows alone."""
        found = self._evaluated((0, rows)) if 0 < rows < self.rows else None
        return found and found[0]

    def _evaluated(self, *ranges: tuple[int, int]) -> list[Values] | None:
        if ranges not in self._known:
            try:
                self._known[ranges] = self._gradients(ranges)
            except Exception:  # a loss need not take a part of its batch
                self._known[ranges] = None
        return self._known[ranges]

    def _gradients(self, ranges: Sequence[tuple[int, int]]) -> list[Values]:
        options, compiled, found = self._options, None, []
        for low, high in ranges:
            args = (self._params, self._cut(low, high))
            inputs = read_inputs(
                self._loss, args, argnums=0, exclude=options.exclude,
                names=("params", "batch"),
            )  # fmt: skip
            point = inputs.draw(options.key, 0)
            arguments = [
                [widen(value) for value in point.moving],
                [execution.at_home(widen(value)) for value in point.held],
            ]
            if compiled is None:
                traced = trace_program(
                    self._loss, inputs, point, has_aux=options.has_aux, role="loss",
                    intentions=options.expect_differs,
                )  # fmt: skip

                def gradient(
                    moving: Any, held: Any, traced: Program = traced
                ) -> Values:
                    one = [np.ones(())]
                    run = Evaluator()
                    return derivative(traced.mathematics, run, moving, held, one)[1]

                compiled = execution.lifted(gradient, arguments)
            found.append(execution.to_host(compiled(*arguments)))
        return found

    def _cut(self, low: int, high: int) -> Any:
        def cut(leaf: Any) -> Any:
            shape = getattr(leaf, "shape", ())
            return leaf[low:high] if shape and shape[0] == self.rows else leaf

        return jax.tree_util.tree_map(cut, self._batch)
