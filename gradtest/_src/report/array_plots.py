"""Pictures of the entries of one leaf: where they are off, and by how much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradtest._src.findings import Exhibit
from gradtest._src.report import drawing, folding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Cells of a map along each axis, and points of a scatter plot, at most.
_CELLS, _POINTS, _BARS_DRAWN, _CROSSES = 128, 20_000, 128, 2_000
# A wrong cell among so many along an axis is ringed, to be seen.
_EASY_CELLS = 24
# How many powers of ten a map shows below its largest error.
_DECADES = 6
# Claimed and true entries that differ in size by this factor have unlike axes.
_UNLIKE = 20


def error(ax: Axes, exhibit: Exhibit, *, named: bool = True) -> None:
    """Draws where in a leaf the claim is off; the claim itself, if truth is unknown."""
    exhibit = _drawable(exhibit)
    count = len(folding.long_axes(exhibit.claimed.shape))
    draw = _single if not count else _row if count == 1 else _map
    drawing.title(ax, draw(ax, exhibit), exhibit if named else None)


def _drawable(exhibit: Exhibit) -> Exhibit:
    """Returns an exhibit with what is finite no larger than an axis can hold."""
    claimed, true = exhibit.claimed, exhibit.true
    kept = None if true is None else _clipped(true)
    return dataclasses.replace(exhibit, claimed=_clipped(claimed), true=kept)


def _clipped(array: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(array):
        found = np.empty(array.shape, np.complex128)
        found.real, found.imag = _clipped(array.real), _clipped(array.imag)
        return found
    largest = drawing.LARGEST
    return np.where(np.isfinite(array), np.clip(array, -largest, largest), array)


def _off(exhibit: Exhibit) -> tuple[np.ndarray, str]:
    """Returns absolute errors, or absolute claims, and what they are called."""
    modulus = " (modulus)" if np.iscomplexobj(exhibit.claimed) else ""
    with np.errstate(all="ignore"):
        if exhibit.true is None:
            return np.abs(exhibit.claimed), f"|claimed|{modulus}"
        return np.abs(exhibit.claimed - exhibit.true), f"|claimed − true|{modulus}"


def _picture(exhibit: Exhibit, bad: int, cell: str = "") -> str:
    name = (
        "Error"
        if exhibit.true is not None
        else "Claimed; the true one is not known by entries"
    )
    if bad:
        name += f"; × marks NaN or inf ({bad} of {exhibit.claimed.size} entries)"
    return f"{name}{cell}"


def _single(ax: Axes, exhibit: Exhibit) -> str:
    """Draws the one number that a leaf has; returns what to call the picture."""
    pairs = [("claimed", exhibit.claimed, drawing.CLAIMED, "//")]
    if exhibit.true is not None:
        pairs.append(("true", exhibit.true, drawing.TRUE, ""))
    bad = 0
    for i, (name, array, colour, hatch) in enumerate(pairs):
        value = array.ravel()[0]
        parts = [("", value)]
        if np.iscomplexobj(array):
            parts = [(" (real)", value.real), (" (imag)", value.imag)]
        for k, (part, number) in enumerate(parts):
            place = i + (k - (len(parts) - 1) / 2) * 0.4
            bad += not np.isfinite(number)
            height = number if np.isfinite(number) else 0.0
            ax.bar(place, height, 0.36, color=colour, hatch=hatch, ec="white")
            text = f"{name}{part}\n{number:.6g}"
            ax.annotate(
                text, (place, height), ha="center", va="center", fontsize="small",
                xytext=(0, 14 if height >= 0 else -14), textcoords="offset points",
            )  # fmt: skip
    ax.margins(x=0.3, y=0.25)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks([])
    ax.set_ylabel("derivative" if exhibit.of != "value" else "value")
    return _picture(exhibit, bad)


def _row(ax: Axes, exhibit: Exhibit) -> str:
    """Draws the entries of a leaf with one axis: bars, or of many the worst of each."""
    off, label = _off(exhibit)
    off = off.ravel()
    axes = folding.long_axes(exhibit.claimed.shape)
    first = exhibit.start[axes[0]] if exhibit.is_part else 0
    bad = ~np.isfinite(off)
    if off.size <= _BARS_DRAWN:
        _bars(ax, exhibit, first)
        label, cell = ("claimed − true" if exhibit.true is not None else "claimed"), ""
    else:
        worst, length = folding.block_maxima(off, _CELLS)
        places = first + length * np.arange(worst.size)
        heights = drawing.positive(worst)
        ax.set_yscale("log")
        ax.step(places, heights, where="post", color=drawing.TRUE, lw=1.2)
        if np.isfinite(heights).any():
            high = np.nanmax(heights)
            ax.set_ylim(min(np.nanmin(heights), high / 10) / 2, 2 * high)
        cell = f"; the largest of {length} entries in a row" if length > 1 else ""
    if bad.any():
        x = first + np.flatnonzero(bad)[:_CROSSES]
        ax.plot(
            x, np.full(x.size, 0.03), "x", color="black", ms=6, mew=1.4,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
    ax.set_xlim(first - 0.6, first + off.size - 0.4)
    drawing.integer_ticks(ax.xaxis)
    ax.set_xlabel(f"index of axis {axes[0]}")
    ax.set_ylabel(label, **drawing.PLAIN)
    return _picture(exhibit, int(bad.sum()), cell)


def _bars(ax: Axes, exhibit: Exhibit, first: int) -> None:
    with np.errstate(all="ignore"):
        claimed = exhibit.claimed.ravel()
        values = claimed if exhibit.true is None else claimed - exhibit.true.ravel()
    places = first + np.arange(values.size)
    parts = [("", values, drawing.CLAIMED, "", 0.8)]
    if np.iscomplexobj(values):
        parts = [
            ("real part", values.real, drawing.CLAIMED, "//", 0.4),
            ("imaginary part", values.imag, drawing.TRUE, "", 0.4),
        ]
    for k, (name, part, colour, hatch, width) in enumerate(parts):
        shift = (k - (len(parts) - 1) / 2) * width
        heights = np.where(np.isfinite(part), part, 0.0)
        ax.bar(
            places + shift, heights, width, color=colour, hatch=hatch, ec="white",
            lw=0.3, label=name or None,
        )  # fmt: skip
    ax.axhline(0, color="black", lw=0.8)
    drawing.legend(ax)


def _map(ax: Axes, exhibit: Exhibit) -> str:
    """Draws the entries of a matrix, or of a higher rank folded to one, as colours."""
    import matplotlib
    from matplotlib.colors import LogNorm

    off, label = _off(exhibit)
    folded = folding.fold(off, exhibit.start)
    cells, lengths = folding.block_maxima_2d(folded.matrix, _CELLS)
    bad = ~np.isfinite(cells)
    seen = cells[~bad & (cells > 0)]
    largest = float(seen.max()) if seen.size else 1.0
    smallest = float(seen.min()) if seen.size else largest / 10
    norm = LogNorm(max(min(smallest, largest / 10), largest * 10.0**-_DECADES), largest)
    assert norm.vmin is not None
    shown = np.ma.masked_array(np.maximum(np.where(bad, 1.0, cells), norm.vmin), bad)
    colours = matplotlib.colormaps["cividis"].with_extremes(bad=drawing.GREY)
    rows, columns = folded.matrix.shape
    top, left = folded.start
    extent = (left - 0.5, left + columns - 0.5, top + rows - 0.5, top - 0.5)
    ratio = rows / columns
    image = ax.imshow(
        shown, norm=norm, cmap=colours, interpolation="nearest", extent=extent,
        aspect="equal" if 1 / 4 <= ratio <= 4 else "auto",
    )  # fmt: skip
    places = np.argwhere(bad)[:_CROSSES]
    if places.size:
        y = top + (places[:, 0] + 0.5) * lengths[0] - 0.5
        x = left + (places[:, 1] + 0.5) * lengths[1] - 0.5
        ax.plot(x, y, "x", color="black", ms=5, mew=1.2)
        ax.set_xlim(extent[:2])
        ax.set_ylim(extent[2:])
    if seen.size:
        if max(cells.shape) > _EASY_CELLS:
            _ring(ax, cells, lengths, folded.start)
        figure = ax.get_figure()
        assert figure is not None
        has_smaller = smallest < norm.vmin or bool((cells == 0).any())
        extend = "min" if has_smaller else "neither"
        bar = figure.colorbar(image, ax=ax, extend=extend, shrink=0.9)
        bar.set_label(label, **drawing.PLAIN)
    drawing.integer_ticks(ax.xaxis)
    drawing.integer_ticks(ax.yaxis)
    ax.set_xlabel(folded.column_label)
    ax.set_ylabel(folded.row_label)
    cell = "" if seen.size or bad.any() else ": none, all are zero"
    if max(lengths) > 1:
        cell = f"; the largest of each {lengths[0]} × {lengths[1]} entries"
    return _picture(exhibit, int((~np.isfinite(off)).sum()), cell)


def _ring(
    ax: Axes, cells: np.ndarray, lengths: tuple[int, int], start: tuple[int, int]
) -> None:
    """Draws a ring around the cell of the largest finite number."""
    finite = np.where(np.isfinite(cells), cells, -1.0)
    row, column = np.unravel_index(int(np.argmax(finite)), cells.shape)
    y = start[0] + (row + 0.5) * lengths[0] - 0.5
    x = start[1] + (column + 0.5) * lengths[1] - 0.5
    for width, colour in ((3.0, "black"), (1.2, "white")):
        ax.plot(x, y, "o", ms=11, mfc="none", mec=colour, mew=width)


def scatter(ax: Axes, exhibit: Exhibit, *, named: bool = True) -> None:
    """Draws claimed against true entries, with the diagonal."""
    exhibit = _drawable(exhibit)
    assert exhibit.true is not None
    true, claimed = exhibit.true.ravel(), exhibit.claimed.ravel()
    kept = _worst_and_some(true, claimed)
    parts: list[tuple[str, np.ndarray, np.ndarray, str, str]]
    parts = [("entries", true, claimed, "o", drawing.CLAIMED)]
    if np.iscomplexobj(true) or np.iscomplexobj(claimed):
        parts = [
            ("real parts", true.real, claimed.real, "o", drawing.CLAIMED),
            ("imaginary parts", true.imag, claimed.imag, "^", drawing.TRUE),
        ]
    ax.axline((0, 0), slope=1, color="black", lw=1, zorder=1, label="claimed = true")
    bad = 0
    for name, x, y, marker, colour in parts:
        fine = np.isfinite(x) & np.isfinite(y)
        bad += int((~fine).sum())
        ax.plot(
            x[kept][fine[kept]], y[kept][fine[kept]], marker, color=colour, ms=5,
            mfc="none", alpha=0.8, ls="none", label=name,
        )  # fmt: skip
        lost = ~fine & np.isfinite(x)
        ax.plot(
            x[lost][:_CROSSES], np.full(int(min(lost.sum(), _CROSSES)), 0.97), "x",
            color="black", ms=6, mew=1.4, transform=ax.get_xaxis_transform(),
        )  # fmt: skip
    _limits(ax, parts)
    what = "value" if exhibit.of == "value" else "derivative"
    ax.set_xlabel(f"true {what}")
    ax.set_ylabel(f"claimed {what}")
    picture = "Claimed against true"
    if kept.size < true.size:
        picture += f" (the worst and some others: {kept.size} of {true.size} entries)"
    if bad:
        picture += f"; × marks NaN or inf ({bad})"
    drawing.title(ax, picture, exhibit if named else None)
    drawing.legend(ax)


def _limits(ax: Axes, parts: Sequence[tuple[Any, ...]]) -> None:
    """Sets limits around what is finite: alike ones, unless one side is far larger."""
    ends = []
    for k in (1, 2):
        values = np.concatenate([part[k] for part in parts])
        values = values[np.isfinite(values)]
        ends.append((values.min(), values.max()) if values.size else (0.0, 0.0))
    largest = [max(abs(low), abs(high)) for low, high in ends]
    if max(largest) <= _UNLIKE * min(largest) or not min(largest):
        together = min(low for low, _ in ends), max(high for _, high in ends)
        ends = [together, together]
    ax.set_xlim(_with_room(*ends[0]))
    ax.set_ylim(_with_room(*ends[1]))


def _with_room(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _worst_and_some(true: np.ndarray, claimed: np.ndarray) -> np.ndarray:
    """Returns which entries to draw: all, or the worst ones and every k-th other."""
    if true.size <= _POINTS:
        return np.arange(true.size)
    with np.errstate(all="ignore"):
        off = np.nan_to_num(np.abs(claimed - true), nan=np.inf)
    worst = np.argpartition(-off, _POINTS // 2)[: _POINTS // 2]
    some = np.arange(0, true.size, math.ceil(2 * true.size / _POINTS))
    return np.union1d(worst, some)
