"""Has Graphviz draw a picture, where its `dot` is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_TEXT = (".dot", ".gv")
_DRAWN = {".svg": "svg", ".png": "png", ".pdf": "pdf"}
_PATIENCE = 120.0  # seconds
_INSTALL = (
    "install it with `apt-get install graphviz`, `brew install graphviz` or "
    "`conda install graphviz`"
)


class GraphvizError(RuntimeError):
    """Graphviz's `dot` is not installed, or it could not draw a picture."""


def save(text: str, path: Path) -> Path:
    """Writes a graph to a file, as its suffix says; see `Graph.save`."""
    suffix = path.suffix.lower()
    if suffix not in (*_TEXT, *_DRAWN):
        wanted = ", ".join((*_TEXT, *_DRAWN))
        raise ValueError(f"`path` must end in one of {wanted}, got {str(path)!r}.")
    if suffix in _TEXT:
        path.write_text(text, encoding="utf-8")
        return path
    try:
        drawn = _draw(text, _DRAWN[suffix])
    except GraphvizError as error:
        instead = path.with_suffix(".dot")
        instead.write_text(text, encoding="utf-8")
        raise GraphvizError(f"{error} The graph is in {instead}.") from None
    path.write_bytes(drawn)
    return path


def svg(text: str) -> str:
    """Returns a graph as an SVG element, to be put into a page.

    Raises:
      GraphvizError: `dot` is not installed, or could not draw it.
    """
    drawn = _draw(text, "svg").decode("utf-8")
    return drawn[drawn.index("<svg") :]


def _draw(text: str, form: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise GraphvizError(
            f"Graphviz's `dot` was not found, so there is no picture: {_INSTALL}."
        )
    try:
        done = subprocess.run(
            [program, f"-T{form}"],
            input=text.encode("utf-8"),
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GraphvizError(
            f"Graphviz's `dot` took longer than {_PATIENCE:.0f} s: draw fewer nodes "
            "with a smaller `fold`."
        ) from None
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise GraphvizError(f"Graphviz's `dot` failed ({done.returncode}): {said}.")
    return done.stdout
