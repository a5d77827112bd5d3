"""The public function that draws a program, and what it returns."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradtest._src.findings import Report
from gradtest._src.graphs import dot, rendering, tracing
from gradtest._src.graphs.arguments import read_arguments
from gradtest._src.inputs import read_argnums

PyTree = Any
_SUBJECTS = ("jaxpr", "hlo", "optimized_hlo", "gradient")
_DEFAULT_FOLD = 50


@dataclasses.dataclass(frozen=True, repr=False)
class Graph:
    """A picture of a program.

    It shows itself in a notebook. Two pictures of one program are equal, text by text.

    Attributes:
      dot: The picture in Graphviz's language.
      title: What stands above it.
      of: What it is a picture of: "jaxpr", "hlo", "optimized_hlo" or "gradient".
      num_nodes: How many nodes are seen; a folded group is one.
    """

    dot: str
    title: str
    of: str
    num_nodes: int

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture to a file; its suffix says how.

        Args:
          path: A `.dot` or `.gv` needs no other program. A `.svg`, `.png` or `.pdf` is
            drawn by Graphviz's `dot`; where that is missing, the `.dot` is written
            beside it before the error is raised.

        Returns:
          The path of the file.

        Raises:
          ValueError: The suffix is none of these.
          GraphvizError: `dot` is not installed, or could not draw the picture.
        """
        return rendering.save(self.dot, Path(path))

    def _repr_svg_(self) -> str | None:
        """Returns the picture for a notebook; None where Graphviz is missing."""
        try:
            return rendering.svg(self.dot)
        except rendering.GraphvizError:
            return None

    def _repr_html_(self) -> str:
        """Returns the picture for a notebook, or why there is none and its text."""
        try:
            drawn = rendering.svg(self.dot)
        except rendering.GraphvizError as error:
            drawn = (
                f"<p>{html.escape(str(self))}: {html.escape(str(error))}</p>"
                f"<pre>{html.escape(self.dot)}</pre>"
            )
        style = "background:#fff;color:#000;overflow:auto;max-height:80vh"
        return f'<div style="{style}">{drawn}</div>'

    def __str__(self) -> str:
        title = dot.shortened(dot.visible(self.title))
        return f"graph of {title} ({self.of}): {self.num_nodes} nodes"

    def __repr__(self) -> str:
        return f"<{self}>"


def graph(
    fn: Callable[..., PyTree],
    *args: PyTree,
    of: str = "jaxpr",
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    fold: int | None = _DEFAULT_FOLD,
    title: str | None = None,
    report: Report | None = None,
) -> Graph:
    """Draws the program that a function is to JAX.

    The function is traced, and for "optimized_hlo" compiled; it is never run.

    Args:
      fn: Function of `args`; its parameter names name the arguments in the picture.
      *args: Pytrees. Leaves may be arrays, numbers, keys, `jax.ShapeDtypeStruct`s of
        any dtype or `gradtest.domains` entries; all others stay as they are.
      of: "jaxpr" draws what JAX traces; "gradient" the forward and the backward pass
        of its gradient, or of its VJP where it does not return one number; "hlo" what
        is handed to XLA; "optimized_hlo" what XLA makes of it for this device.
      argnums: For "gradient": the arguments to differentiate; None takes each with a
        float or complex leaf.
      has_aux: Whether `fn` returns a pair, the second of which isn't differentiated.
      fold: The most nodes to show, where scopes, functions, loops and runs of
        neighbours can be folded into one node each; None folds nothing.
      title: What stands above the picture; None takes the name of `fn`.
      report: The rules and lines that it found wrong are coloured.

    Returns:
      The picture, to save or to show.

    Raises:
      TypeError: An argument is of the wrong type, or no result can be differentiated.
      ValueError: `of`, `fold` or `argnums` is none of what is possible.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> picture = gradtest.graph(lambda x: jnp.sin(x) ** 2, 1.0)
      >>> "sin" in picture.dot
      True
    """
    arguments = read_arguments(fn, args)
    _check_options(of, fold, title, report)
    wanted = read_argnums(argnums, len(args))
    if title is None:
        title = _name(fn)
    drawing = tracing.draw(fn, arguments, of, wanted, has_aux, title, report)
    text, count = dot.write(drawing.tidied(), fold)
    return Graph(text, title, of, count)


def _name(fn: Callable[..., Any]) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", None) or type(fn).__name__


def _check_options(of: Any, fold: Any, title: Any, report: Any) -> None:
    if of not in _SUBJECTS:
        wanted = ", ".join(map(repr, _SUBJECTS))
        raise ValueError(f"`of` must be one of {wanted}, got {of!r}.")
    if fold is not None and (isinstance(fold, bool) or not isinstance(fold, int)):
        raise TypeError(f"`fold` must be an integer or None, got {fold!r}.")
    if fold is not None and fold < 1:
        raise ValueError(f"`fold` must be at least 1, got {fold}.")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"`title` must be a string or None, got {title!r}.")
    if report is not None and not isinstance(report, Report):
        raise TypeError(
            f"`report` must be a gradtest.Report or None, got {type(report).__name__}; "
            "an error of a failed assertion has it as its `.report`."
        )
