"""The picture of all leaves: their gaps beside what was allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradtest._src.findings import Finding, Gap, Verdict
from gradtest._src.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = {
    Verdict.PASS: ("#AAC4DD", ""),
    Verdict.NOT_CHECKED: (drawing.GREY, ""),
    Verdict.INCONCLUSIVE: (drawing.OPEN, "//"),
    Verdict.FAIL: (drawing.CLAIMED, ""),
}
_LEAVES_DRAWN = 30


def gaps_height(findings: Sequence[Finding]) -> float:
    """Returns the height, in inches, that the picture of the gaps needs."""
    return 1.5 + 0.24 * min(len(findings), _LEAVES_DRAWN + 1)


def gaps(ax: Axes, findings: Sequence[Finding]) -> None:
    """Draws each leaf's gap beside what was allowed; of many the worst."""
    ranked = sorted(
        findings, key=lambda f: (f.verdict.severity, f.strain), reverse=True
    )
    rows = [(_name(f), f) for f in ranked[:_LEAVES_DRAWN]]
    rest = ranked[_LEAVES_DRAWN:]
    if rest:
        rows.append((f"the worst of {len(rest)} more", rest[0]))
    low, high = _span([finding for _, finding in rows])
    for i, (_, finding) in enumerate(rows):
        _gap_bar(ax, i, finding, low, high)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], **drawing.PLAIN)
    ax.tick_params(axis="y", labelsize="small", length=0)
    ax.grid(axis="x", color="#DDDDDD", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("relative gap between claimed and true")
    drawing.title(ax, "Gap of each leaf", pad=20)
    _verdict_legend(ax, [finding for _, finding in rows])


def _name(finding: Finding) -> str:
    parts = [drawing.printable(finding.name)]
    if finding.mode == "fwd":
        parts.append("fwd")
    if finding.order > 1:
        parts.append(f"order {finding.order}")
    if finding.gap is not Gap.FORMULA:
        parts.append(finding.gap.value)
    elif finding.check != "derivative":
        parts.append(drawing.printable(finding.check, 20))
    if finding.rule is not None:
        parts.append(drawing.printable(finding.rule.name, 24))
    return ", ".join(parts)


def _is_drawn(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _span(findings: Sequence[Finding]) -> tuple[float, float]:
    """Returns the ends of an axis that holds all gaps and allowances."""
    numbers = [n for f in findings for n in (f.size, f.allowed) if _is_drawn(n)]
    low = min(numbers, default=1e-9)
    high = min(max(numbers, default=1.0), drawing.LARGEST)
    # A gap of 1e-300 would leave no room for any other.
    low = max(low, high * 1e-20)
    return 10.0 ** (math.floor(math.log10(low)) - 1), 10.0 ** (
        math.ceil(math.log10(high)) + 1
    )


def _gap_bar(ax: Axes, row: int, finding: Finding, low: float, high: float) -> None:
    colour, hatch = _BARS[finding.verdict]
    size = finding.size
    end, told = min(max(size, low), high), f"{size:.1e}"
    if not math.isfinite(size):
        end, told = high, "NaN" if math.isnan(size) else "infinite"
    elif size == 0:
        told = "0" if finding.verdict is Verdict.PASS else finding.verdict.value
    ax.barh(row, end - low, 0.62, left=low, color=colour, hatch=hatch, ec="white")
    if _is_drawn(finding.allowed):
        ax.plot([finding.allowed] * 2, [row - 0.42, row + 0.42], "-", color="black")
    is_long = math.log(end / low) > 0.75 * math.log(high / low)
    ax.annotate(
        told, (end, row), xytext=(-4 if is_long else 4, 0), va="center",
        textcoords="offset points", ha="right" if is_long else "left",
        fontsize="x-small",
        bbox={"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.8},
    )  # fmt: skip


def _verdict_legend(ax: Axes, findings: Sequence[Finding]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = sorted({f.verdict for f in findings}, key=lambda v: -v.severity)
    handles: list[Any] = [
        Patch(fc=_BARS[v][0], hatch=_BARS[v][1], ec="white", label=v.value)
        for v in seen
    ]
    handles.append(
        Line2D([], [], color="black", marker="|", ls="none", ms=9, label="allowed")
    )
    ax.legend(
        handles=handles, fontsize="x-small", ncols=len(handles), loc="lower left",
        bbox_to_anchor=(0.0, 1.0), frameon=False, borderaxespad=0.2, borderpad=0.1,
    )  # fmt: skip
