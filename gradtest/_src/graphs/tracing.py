"""Traces or lowers a function, and has the result drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src.findings import Report
from gradtest._src.graphs import hlo, labels
from gradtest._src.graphs.arguments import Arguments, NamedLeaf, named_results
from gradtest._src.graphs.drawing import Drawing, Group, GroupKind, Kind, Node
from gradtest._src.graphs.marks import Marks
from gradtest._src.graphs.programs import Source, draw_program
from gradtest._src.lifting import is_inexact

PyTree = Any


def draw(
    fn: Callable[..., PyTree],
    arguments: Arguments,
    of: str,
    argnums: Sequence[int],
    has_aux: bool,
    title: str,
    report: Report | None,
) -> Drawing:
    """Draws a function as `graph` does; see there for the arguments."""
    if of == "gradient":
        return _Gradient(fn, arguments, argnums, has_aux).draw(title, report)
    drawing = _empty(title)
    if of == "jaxpr":
        return _draw_traced(drawing, fn, arguments, report)
    return _draw_compiled(drawing, fn, arguments, of, report)


def _empty(title: str, has_backward: bool = False) -> Drawing:
    return Drawing(title, Group("", GroupKind.SCOPE), has_backward=has_backward)


def _draw_traced(
    drawing: Drawing,
    fn: Callable[..., PyTree],
    arguments: Arguments,
    report: Report | None,
) -> Drawing:
    def call(*values: Any) -> PyTree:
        return fn(*arguments.rebuild(values))

    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(*arguments.values)
    marks = Marks(report)
    sources = _leaves(drawing.root, arguments.leaves, Kind.ARGUMENT)
    results = draw_program(drawing, jaxpr, sources, marks)
    _results(drawing, results, named_results(shapes))
    drawing.wrong = marks.legend()
    return drawing


def _draw_compiled(
    drawing: Drawing,
    fn: Callable[..., PyTree],
    arguments: Arguments,
    of: str,
    report: Report | None,
) -> Drawing:
    def call(*values: Any) -> PyTree:
        return fn(*arguments.rebuild(values))

    # Arguments that are not used keep their places, and so their names.
    lowered = jax.jit(call, keep_unused=True).lower(*arguments.values)
    if of == "hlo":
        text = lowered.as_text(dialect="hlo", debug_info=True)
    else:
        text = lowered.compile().as_text() or ""
    sources = _leaves(drawing.root, arguments.leaves, Kind.ARGUMENT)
    results = hlo.draw_text(drawing, text, sources)
    shapes = jax.eval_shape(call, *arguments.values)
    _results(drawing, results, named_results(shapes))
    marks = Marks(report)
    if marks.says:
        drawing.wrong = f"{marks.says} (HLO does not tell rules apart)"
    return drawing


class _Gradient:
    """The VJP of a function, as a program of its arguments and a cotangent."""

    def __init__(
        self,
        fn: Callable[..., PyTree],
        arguments: Arguments,
        argnums: Sequence[int],
        has_aux: bool,
    ):
        self.fn = fn
        self.arguments = arguments
        self.has_aux = has_aux
        self.moving = [
            place
            for place, leaf in enumerate(arguments.leaves)
            if leaf.is_floating and leaf.argument in argnums
        ]
        if not self.moving:
            raise TypeError(
                "`args` has no leaf to differentiate: wanted a float or complex array "
                "among the arguments of `argnums`."
            )

    def draw(self, title: str, report: Report | None) -> Drawing:
        """Draws the forward and the backward pass."""
        primal, shapes = jax.make_jaxpr(self._value, return_shape=True)(
            *self.arguments.values
        )
        named = named_results(shapes, "value")
        results = [leaf for leaf in named if is_inexact(leaf.value.dtype)]
        if not results:
            raise TypeError(
                "`fn` returns nothing to differentiate: wanted a float or complex "
                f"result, got {', '.join(labels.type_text(r.value) for r in named)}."
            )
        cotangents = [leaf.value for leaf in results]
        jaxpr = jax.make_jaxpr(self._vjp)(self.arguments.values, cotangents)
        return self._drawn(title, jaxpr, results, Marks(report, primal))

    def _value(self, *values: Any) -> PyTree:
        returned = self.fn(*self.arguments.rebuild(values))
        if not self.has_aux:
            return returned
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise TypeError(
                "`fn` must return a pair (value, auxiliary) where `has_aux` is True, "
                f"got {_kind(returned)}."
            )
        return returned[0]

    def _vjp(self, values: Sequence[Any], cotangents: Sequence[Any]) -> tuple:
        def of_moving(*moving: Any) -> list[Any]:
            whole = list(values)
            for place, value in zip(self.moving, moving, strict=True):
                whole[place] = value
            leaves = jax.tree_util.tree_leaves(self._value(*whole))
            return [leaf for leaf in leaves if is_inexact(jnp.result_type(leaf))]

        moving = [values[place] for place in self.moving]
        results, pull_back = jax.vjp(of_moving, *moving)
        return results, pull_back(list(cotangents))

    def _drawn(
        self, title: str, jaxpr: Any, results: list[NamedLeaf], marks: Marks
    ) -> Drawing:
        drawing = _empty(title, has_backward=True)
        root, leaves = drawing.root, self.arguments.leaves
        sources = _leaves(root, leaves, Kind.ARGUMENT)
        is_scalar = len(results) == 1 and results[0].value.shape == ()
        cotangents = [
            NamedLeaf(
                "cotangent of value\n(1 for the gradient)" if is_scalar
                else f"cotangent of {leaf.name}",
                leaf.trees, leaf.value,
            )
            for leaf in results
        ]  # fmt: skip
        sources += _leaves(root, cotangents, Kind.ARGUMENT, is_backward=True)
        drawn = draw_program(drawing, jaxpr, sources, marks)
        _results(drawing, drawn[: len(results)], results)
        gradients = [
            NamedLeaf(
                f"gradient of {leaves[place].name}",
                tuple(f"gradient of {tree}" for tree in leaves[place].trees),
                leaves[place].value,
            )
            for place in self.moving
        ]
        _results(drawing, drawn[len(results) :], gradients, is_backward=True)
        drawing.wrong = marks.legend()
        return drawing


def _kind(returned: Any) -> str:
    if isinstance(returned, jax.Array):
        return f"one array, {labels.type_text(returned)}"
    return type(returned).__name__


def _leaves(
    root: Group, leaves: Sequence[NamedLeaf], kind: Kind, is_backward: bool = False
) -> list[Source]:
    """Draws arguments or results, in groups for the trees that they are in."""
    groups: dict[str, Group] = {}
    nodes: list[Source] = []
    for leaf in leaves:
        home = root
        for tree in leaf.trees:
            if tree not in groups:
                groups[tree] = home.add_group(
                    tree, GroupKind.LEAVES, is_backward=is_backward
                )
            home = groups[tree]
        value = leaf.value if hasattr(leaf.value, "dtype") else jax.typeof(leaf.value)
        label = f"{leaf.name}\n{labels.type_text(value)}"
        nodes.append(home.add_node(label, kind, is_backward=is_backward))
    return nodes


def _results(
    drawing: Drawing,
    sources: Sequence[Source],
    leaves: Sequence[NamedLeaf],
    is_backward: bool = False,
) -> None:
    """Draws results, each with an edge from what makes it."""
    nodes = _leaves(drawing.root, leaves, Kind.RESULT, is_backward)
    for source, node, leaf in zip(sources, nodes, leaves, strict=True):
        assert isinstance(node, Node)
        if isinstance(source, Node):
            drawing.connect(source, node, labels.type_text(leaf.value))
        else:
            node.label += f"\n= {source}"
