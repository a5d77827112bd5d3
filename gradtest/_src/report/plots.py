"""Pictures of a report, with matplotlib: what was claimed beside what is true.

Figures are made by themselves, on the Agg canvas: matplotlib's current figure, its
backend and its settings stay as they are, and no window opens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradtest._src.findings import Exhibit, Finding, Report, Verdict
from gradtest._src.report import array_plots, drawing, gap_plots, legible, slope_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("taylor", "steps", "error", "scatter", "gaps")
_OF_ARRAYS = ("error", "scatter", "taylor", "steps")
_DRAW: dict[str, Callable[..., None]] = {
    "taylor": slope_plots.taylor,
    "steps": slope_plots.steps,
    "error": array_plots.error,
    "scatter": array_plots.scatter,
}
# What a kind needs of an exhibit, and what it is called where it is not there.
_NEEDS: dict[str, Callable[[Exhibit], bool]] = {
    "taylor": lambda exhibit: exhibit.ladder is not None,
    "steps": lambda exhibit: exhibit.ladder is not None,
    "error": lambda exhibit: exhibit.claimed.size > 0,
    "scatter": lambda exhibit: exhibit.true is not None and exhibit.claimed.size > 0,
}
_NEEDED = {
    "taylor": "slopes at many steps, measured for the gravest leaves away from kinks",
    "steps": "slopes at many steps, measured for the gravest leaves away from kinks",
    "error": "entries",
    "scatter": "a true derivative that is known by entries",
}
# One panel's width and height, in inches; a page of a report shows so many leaves.
_PANEL = (5.6, 4.2)
_LEAVES_SHOWN = 4
_NAMES_TOLD = 8


def plot(
    report: Report,
    kind: str | None = None,
    leaf: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draws what a check found.

    "taylor": the Taylor remainder |f(x + hv) - f(x) - h s| against h, for the claimed
    slope s and the true one: it falls as h² for a right gradient, as h for a wrong one.
    "steps": how far central differences are off the true slope at each step, beside
    their noise and the claim: the V of too large and too small steps.
    "error": where in the leaf the claim is off; a map for matrices, higher ranks folded
    to one, of large arrays the worst entry of each block. Where the true derivative is
    not known by entries, the claim itself.
    "scatter": claimed against true entries; right ones lie on the diagonal.
    "gaps": each leaf's gap beside what was allowed.

    Args:
      report: What a check found. All kinds but "gaps" need the arrays that a failed or
        inconclusive check keeps: `report.exhibits`.
      kind: One of the above; None draws all that apply in one figure.
      leaf: Name of the leaf to draw; None takes the gravest that has what is needed.
        "gaps" shows all leaves, or this one.
      ax: Axes to draw in, for one `kind`.

    Returns:
      The figure: a new one, or that of `ax`.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `report` is no report, or `ax` no axes.
      ValueError: `kind` or `leaf` names nothing that is there, or the report has
        nothing of the kind; the message says what there is.
    """
    _check(report, kind, ax)
    if kind is None:
        return _overview(report, leaf)
    exhibit = None if kind == "gaps" else _exhibit_for(report, kind, leaf)
    findings = _findings(report, leaf) if kind == "gaps" else []
    if ax is None:
        height = gap_plots.gaps_height(findings) if kind == "gaps" else _PANEL[1]
        figure = _new_figure(1.3 * _PANEL[0], height)
        ax = figure.add_subplot()
    if exhibit is None:
        gap_plots.gaps(ax, findings)
    else:
        _DRAW[kind](ax, exhibit)
    drawn = ax.get_figure(root=True)
    assert drawn is not None
    return drawn


def figures(report: Report) -> dict[str, Figure]:
    """Returns the pictures of a report by caption, for a page.

    Args:
      report: What a check found.

    Returns:
      The gaps, then the gravest leaves, one figure each; empty where nothing was found.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `report` is no report.
    """
    _check(report, None, None)
    found = {}
    if report.findings:
        found["gaps of all leaves"] = plot(report, "gaps")
    for exhibit in report.exhibits[:_LEAVES_SHOWN]:
        kinds = [kind for kind in _OF_ARRAYS if _NEEDS[kind](exhibit)]
        if kinds:
            found[drawing.caption(exhibit)] = _panels(report, exhibit, kinds, [])
    return found


def _check(report: Report, kind: str | None, ax: Any) -> None:
    """Raises where an argument makes no sense."""
    _require_matplotlib()
    from matplotlib.axes import Axes

    if not isinstance(report, Report):
        raise TypeError(
            f"`report` must be a gradtest.Report, got {type(report).__name__}."
        )
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"`kind` must be None or one of {', '.join(map(repr, KINDS))}, got "
            f"{kind!r}."
        )
    if ax is None:
        return
    if not isinstance(ax, Axes):
        raise TypeError(f"`ax` must be matplotlib Axes, got {type(ax).__name__}.")
    if kind is None:
        raise ValueError(
            "`ax` holds one picture: name its `kind`, one of "
            f"{', '.join(map(repr, KINDS))}."
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: "
            'pip install "gradtest[plots]"'
        ) from error


def _exhibit_for(report: Report, kind: str, leaf: str | None) -> Exhibit:
    """Returns the gravest exhibit of a leaf that a kind of picture can show."""
    if not report.exhibits:
        raise ValueError(
            f"`kind` {kind!r} needs the arrays of the leaves, which this report does "
            f'not have: {_why_none(report)}; "gaps" works without them.'
        )
    _check_leaf(leaf, [exhibit.name for exhibit in report.exhibits])
    able = [exhibit for exhibit in report.exhibits if _NEEDS[kind](exhibit)]
    for exhibit in able:
        if leaf in (None, exhibit.name):
            return exhibit
    which = "no leaf" if leaf is None else f"{leaf!r} does not"
    verb = "has" if leaf is None else "have"
    others = _told([exhibit.name for exhibit in able])
    raise ValueError(
        f"`kind` {kind!r} needs {_NEEDED[kind]}: {which} {verb} that"
        + (f"; there are {others}." if able else ".")
    )


def _why_none(report: Report) -> str:
    if report.verdict in (Verdict.PASS, Verdict.NOT_CHECKED):
        return f"its verdict is {report.verdict.value}, and only failures keep them"
    return (
        "it was read back from JSON, or the check compared no arrays that could be kept"
    )


def _findings(report: Report, leaf: str | None) -> list[Finding]:
    if not report.findings:
        raise ValueError("the report has no findings, so there is nothing to draw.")
    _check_leaf(leaf, [finding.name for finding in report.findings])
    return [each for each in report.findings if leaf in (None, each.name)]


def _check_leaf(leaf: str | None, names: list[str]) -> None:
    if leaf is not None and leaf not in names:
        raise ValueError(
            f"`leaf` {leaf!r} is none of those that can be drawn: there are "
            f"{_told(names)}."
        )


def _told(names: list[str]) -> str:
    return legible.listed([repr(name) for name in dict.fromkeys(names)], _NAMES_TOLD)


def _overview(report: Report, leaf: str | None) -> Figure:
    """Draws all that apply: the gaps, and the pictures of one leaf."""
    findings = _findings(report, leaf if not report.exhibits else None)
    if not report.exhibits:
        return _panels(report, None, [], findings)
    _check_leaf(leaf, [exhibit.name for exhibit in report.exhibits])
    exhibit = next(e for e in report.exhibits if leaf in (None, e.name))
    kinds = [kind for kind in _OF_ARRAYS if _NEEDS[kind](exhibit)]
    return _panels(report, exhibit, kinds, findings)


def _panels(
    report: Report, exhibit: Exhibit | None, kinds: list[str], findings: list[Finding]
) -> Figure:
    """Lays out the pictures of one exhibit, and the gaps below them."""
    columns = min(2, max(len(kinds), 1))
    rows = math.ceil(len(kinds) / columns)
    heights = [_PANEL[1]] * rows
    if findings:
        heights.append(gap_plots.gaps_height(findings))
    width = columns * _PANEL[0] if kinds else 1.3 * _PANEL[0]
    figure = _new_figure(width, sum(heights) + 0.5)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for i, kind in enumerate(kinds):
        assert exhibit is not None
        place = grid[i // columns, i % columns]
        _DRAW[kind](figure.add_subplot(place), exhibit, named=False)
    if findings:
        gap_plots.gaps(figure.add_subplot(grid[rows, :]), findings)
    about = [f"{report.assertion}({report.subject}): {report.verdict.value}"]
    if exhibit is not None:
        about.append(drawing.caption(exhibit))
    title = "\n".join(drawing.printable(line, 110) for line in about)
    figure.suptitle(title, parse_math=False, usetex=False, fontsize="medium")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
