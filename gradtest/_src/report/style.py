"""The style of HTML reports: every selector is inside the report, so none leaks."""

import re

ROOT = "gradtest-report"

# In these sheets R stands for the report. The contrast of text to its ground
# is at least 4.5, as WCAG 2 (1.4.3) asks, in both schemes.
_COLOURS = """
R {
  --ground: #ffffff; --raised: #f6f7f9; --line: #dfe3e8; --text: #1b2430;
  --quiet: #566273; --code: #f2f4f7; --mark: #fff1c2;
  --pass: #17703c; --fail: #b3261e; --open: #855300; --none: #566273;
  --pass-ground: #e3f4e9; --fail-ground: #fde8e6; --open-ground: #fdf0d9;
  --none-ground: #eceff3;
}
@media (prefers-color-scheme: dark) { R {
  --ground: #14181e; --raised: #1c222a; --line: #323b47; --text: #e4e9ef;
  --quiet: #9daab9; --code: #1f262f; --mark: #4a3d12;
  --pass: #6fd597; --fail: #ff9c92; --open: #f1bd63; --none: #9daab9;
  --pass-ground: #15341f; --fail-ground: #451d1a; --open-ground: #3d2c0c;
  --none-ground: #29313b;
} }
"""

_LAYOUT = """
R, R * { box-sizing: border-box; }
R {
  color: var(--text); background: var(--ground); color-scheme: light dark;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  max-width: 64rem; margin: 0 auto; padding: 1.75rem 1.5rem 2.5rem;
  overflow-wrap: anywhere; text-align: left;
}
R header { margin-bottom: 1.5rem; }
R .title { font-size: 1.45rem; line-height: 1.3; font-weight: 650; margin: .7rem 0 0;
  color: inherit; }
R .call { color: var(--quiet); margin-left: .6rem; }
R .badge { display: inline-block; font-weight: 700; font-size: .82rem;
  letter-spacing: .05em; padding: .2rem .7rem; border-radius: 1rem; }
R section { margin: 1.75rem 0 0; }
R section.detail { margin-top: .6rem; }
R .heading { font-size: 1.05rem; font-weight: 650; color: inherit;
  margin: 0 0 .55rem; }
R p { margin: .3rem 0; max-width: none; }
R code, R pre, R .call, R .number { font-family: ui-monospace, "SF Mono", Menlo,
  Consolas, "DejaVu Sans Mono", monospace; font-size: .92em; }
R code { background: none; color: inherit; padding: 0; }
R .label { color: var(--quiet); }
R details > summary { cursor: pointer; color: var(--quiet); padding: .2rem 0; }
R details > summary .heading { display: inline; font-size: .98rem; }
R :focus-visible { outline: 2px solid var(--quiet); outline-offset: 2px; }
R ul { margin: .2rem 0; padding-left: 1.2rem; }
R figure { margin: 1rem 0 0; }
R .source { margin: 0; }
R .source figcaption code { color: var(--text); margin-right: .6rem; }
R figcaption { color: var(--quiet); }
R img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
"""

_NUMBERS = """
R .numbers { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
R .tile { background: var(--raised); border: 1px solid var(--line);
  border-radius: .6rem; padding: .7rem .9rem; }
R .tile .label { display: block; font-size: .85rem; }
R .tile .number { display: block; font-size: 1.3rem; font-weight: 600; }
R .tile.claimed .number { color: var(--fail); }
R .tile.true .number { color: var(--pass); }
R .tile .bar { margin: .45rem 0 .2rem; width: 100%; }
R .under { color: var(--quiet); font-size: .9rem; margin-top: .5rem; }
"""

_BARS = """
R .bar { position: relative; display: block; width: 6.5rem; height: .5rem;
  border-radius: .25rem; background: var(--line); overflow: hidden; }
R .bar i { position: absolute; inset: 0 auto 0 0; background: var(--pass); }
R .bar.over i { background: var(--fail); }
R .bar::after { content: ""; position: absolute; inset: 0 auto 0 50%; width: 2px;
  background: var(--text); }
"""

_TABLES = """
R .scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
R table { border-collapse: collapse; width: 100%; margin: 0; border: 0;
  font-size: .92rem; color: inherit; background: none; }
R caption { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
R th, R td { text-align: left; vertical-align: baseline; padding: .45rem .75rem;
  border: 0; border-bottom: 1px solid var(--line); background: none; color: inherit; }
R tr:last-child > td, R tr:last-child > th { border-bottom: 0; }
R thead th { border-bottom: 1px solid var(--line); font-weight: 600;
  color: var(--quiet); background: var(--raised); white-space: nowrap; }
R tbody th { font-weight: inherit; min-width: 10rem; }
R td.number, R th.number { text-align: right; white-space: nowrap; }
R thead th.number { font-family: inherit; font-size: inherit; }
R .rest { color: var(--quiet); font-size: .9rem; margin: .5rem 0 0; }
R .verdict { font-weight: 650; white-space: nowrap; }
R .pass { color: var(--pass); } R .fail { color: var(--fail); }
R .open { color: var(--open); } R .none { color: var(--none); }
R .badge.pass { background: var(--pass-ground); }
R .badge.fail { background: var(--fail-ground); }
R .badge.open { background: var(--open-ground); }
R .badge.none { background: var(--none-ground); }
"""

_PROSE = """
R .guess { border-left: .25rem solid var(--open); background: var(--raised);
  border-radius: 0 .6rem .6rem 0; padding: .65rem .95rem; margin: 0 0 .6rem; }
R .guess.less { border-left-color: var(--line); }
R .likely { color: var(--quiet); font-size: .85rem; float: right; margin-left: 1rem; }
R pre { background: var(--code); color: inherit; border: 1px solid var(--line);
  border-radius: .6rem; padding: .6rem 0; margin: .4rem 0; overflow-x: auto;
  line-height: 1.5; white-space: pre; overflow-wrap: normal; }
R pre code { display: block; min-width: max-content; font-size: inherit; }
R pre .row { display: block; padding: 0 .9rem; }
R pre .at { color: var(--quiet); user-select: none; margin-right: 1.1rem; }
R pre mark { display: block; background: var(--mark); color: inherit; }
R pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; }
R pre.wrapped code { min-width: 0; }
R dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; margin: 0;
  gap: .25rem 1.25rem; }
R dt { color: var(--quiet); font-weight: inherit; max-width: 22rem; }
R dd { margin: 0; }
@media (max-width: 40rem) {
  R { padding: 1.1rem .9rem 2rem; }
  R .title { font-size: 1.2rem; }
  R .call { display: block; margin: .5rem 0 0; }
  R dl { grid-template-columns: 1fr; gap: 0; }
  R dd { margin-bottom: .5rem; }
}
@media print { R .scroll, R pre { overflow: visible; } }
"""

# A page has the ground of the report up to its edges.
PAGE = """
html { color-scheme: light dark; background: #ffffff; }
body { margin: 0; }
@media (prefers-color-scheme: dark) { html { background: #14181e; } }
"""

FRAGMENT = re.sub(
    r"\bR\b",
    f".{ROOT}",
    "".join([_COLOURS, _LAYOUT, _NUMBERS, _BARS, _TABLES, _PROSE]),
)
