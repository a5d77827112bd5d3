"""What all pictures share: colours, and names as text that is only text.

Colours are of P. Tol's high-contrast scheme, which keeps apart in greyscale and for
colour-blind readers; lines and markers differ as well.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtest._src.findings import Exhibit
from gradtest._src.report import legible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLAIMED, TRUE, OPEN, GREY = "#BB5566", "#004488", "#DDAA33", "#BBBBBB"
# Text that holds names is never read as mathematics.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
NAME_LENGTH = 44
# What an axis can hold with room around it: beyond it float64 overflows.
LARGEST = 1e280


@functools.cache
def _has_glyph(character: str) -> bool:
    """Whether the font that text is drawn in has a character."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return font.get_char_index(ord(character)) != 0


def printable(text: str, length: int = NAME_LENGTH) -> str:
    """Returns a text on one line, its middle left out where it is long.

    What can't be printed, or the font lacks, is escaped.
    """
    shown = "".join(
        c
        if c.isprintable() and _has_glyph(c)
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )
    return legible.shortened(shown, length)


def caption(exhibit: Exhibit) -> str:
    """Names what an exhibit shows: leaf, kind of array, order, rule."""
    parts = [exhibit.name]
    if exhibit.of:
        parts.append(exhibit.of)
    elif exhibit.mode == "fwd":
        parts.append("forward mode")
    if exhibit.order > 1:
        parts.append(f"order {exhibit.order}")
    if exhibit.rule is not None:
        parts.append(f"{exhibit.rule.kind} {exhibit.rule.name}")
    if exhibit.is_part:
        ranges = ", ".join(
            f"{start}:{start + length}"
            for start, length in zip(exhibit.start, exhibit.claimed.shape, strict=True)
        )
        parts.append(f"the part [{ranges}] of {list(exhibit.whole)}")
    return ", ".join(parts)


def title(
    ax: Axes, picture: str, exhibit: Exhibit | None = None, pad: float | None = None
) -> None:
    lines = [picture]
    if exhibit is not None:
        lines.append(printable(caption(exhibit), 64))
    ax.set_title("\n".join(lines), loc="left", fontsize="small", pad=pad, **PLAIN)


def legend(ax: Axes, **place: Any) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="x-small", framealpha=0.9, **place)


def positive(values: np.ndarray) -> np.ndarray:
    """Returns values for a logarithmic axis: what is not positive is left out."""
    fine = np.isfinite(values) & (values > 0)
    return np.where(fine, np.minimum(values, LARGEST), np.nan)


def integer_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
