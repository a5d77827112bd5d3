"""What is stored of a report, and how it is made the same on every machine."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np

import gradtest
from gradtest._src.findings import Exhibit, Finding
from gradtest._src.report import pictures, schema
from tests.snapshots import failures

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"
SUFFIXES = (".txt", ".json", ".html")
_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
# Below this a gap is rounding, whose size no two versions of JAX share.
_NOISE = 1e-5


def stored(name: str, suffix: str) -> Path:
    """Returns the file that the report of a failure is stored in."""
    return _FOLDER / f"{name}{suffix}"


def told(name: str, suffix: str) -> str:
    """Returns the whole report of a failure as it is stored."""
    report = _steady_report(name)
    if suffix == ".json":
        return report.to_json(indent=1) + "\n"
    if suffix == ".txt":
        return f"{report}\n"
    with mock.patch.object(pictures, "drawn", return_value=()):
        page = report.to_html()
    return re.sub("<style>.*?</style>", "<style></style>", page, flags=re.DOTALL)


def schema_text() -> str:
    """Returns the schema of reports in JSON as it is stored."""
    return json.dumps(schema.schema(), indent=2) + "\n"


def steady(report: gradtest.Report) -> gradtest.Report:
    """Returns a report without what depends on machine and version.

    The environment is another, files are named from the root, numbers have four digits,
    gaps of rounding alone are 0, and rounding's own allowance, which is measured, has
    one digit, as a line's likelihood has.
    """
    return dataclasses.replace(
        _rounded(report),
        environment=(("jax", "any"), ("system", "any")),
        exhibits=tuple(_steady_exhibit(exhibit) for exhibit in report.exhibits),
        findings=tuple(_steady_finding(_rounded(f)) for f in report.findings),
    )


@functools.cache
def _steady_report(name: str) -> gradtest.Report:
    return steady(failures.report_of(name))


def _steady_finding(finding: Finding) -> Finding:
    rounding = finding.rounding
    if rounding is not None and rounding[0] < _NOISE:
        rounding = (0.0, float(f"{rounding[1]:.0e}"))
    size = 0.0 if finding.size < _NOISE else finding.size
    line = finding.line
    if line is not None:
        likelihood = round(line.likelihood, 1)
        path = Path(line.file).relative_to(_ROOT).as_posix()
        line = dataclasses.replace(line, file=path, likelihood=likelihood)
    return dataclasses.replace(finding, size=size, rounding=rounding, line=line)


def _steady_exhibit(exhibit: Exhibit) -> Exhibit:
    true = None if exhibit.true is None else np.round(exhibit.true, 4)
    return dataclasses.replace(exhibit, claimed=np.round(exhibit.claimed, 4), true=true)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, complex):
        return complex(_rounded(value.real), _rounded(value.imag))
    if isinstance(value, tuple):
        return tuple(_rounded(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, Exhibit):
        fields = [f.name for f in dataclasses.fields(value) if f.compare]
        return dataclasses.replace(
            value, **{field: _rounded(getattr(value, field)) for field in fields}
        )
    return value
