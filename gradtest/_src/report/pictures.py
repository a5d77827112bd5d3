"""The pictures of a report for a page that must hold all of itself."""

from __future__ import annotations

import base64
import importlib.util
import io
from typing import Any

from gradtest._src.findings import Report
from gradtest._src.report import legible
from gradtest._src.report.parts import Block, Picture, Sentence

# Text as outlines: a page may not load fonts. No date: the same report, the same file.
_SVG: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "gradtest"}
# A drawing with more bytes than this, a scatter of many points, is made of pixels.
_MOST_BYTES = 400_000


def drawn(report: Report) -> tuple[Block, ...]:
    """Returns the pictures of a report that has arrays; none without matplotlib.

    A page without pictures is better than none: what can't be drawn is said instead.
    """
    if not report.exhibits or importlib.util.find_spec("matplotlib") is None:
        return ()
    try:
        from gradtest._src.report import plots

        figures = plots.figures(report)
        return tuple(
            Picture(legible.name(title), _address(figure))
            for title, figure in figures.items()
        )
    except Exception as error:
        says = legible.shortened(legible.one_line(f"{type(error).__name__}: {error}"))
        return (Sentence(f"nothing could be drawn: {says}."),)


def _address(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context(_SVG):
        svg = _written(figure, "svg", metadata={"Date": None})
    if len(svg) <= _MOST_BYTES:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    png = _written(figure, "png", dpi=144)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _written(figure: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)
    return file.getvalue()
