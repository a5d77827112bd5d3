"""Reports as JSON and as files: what is written, what is read back, what is refused."""

import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src.findings import Entry, Finding, Verdict
from tests.snapshots import failures, schema_check, storing

_X = jnp.array([0.5, 1.0, 1.5, 2.0])


def square(x):
    return jnp.sum(x**2)


def _finding(**fields):
    given = {"size": 1.0, "allowed": 2e-6, **fields}
    return Finding("x", (3,), "float32", Verdict.FAIL, **given)


def _report(*findings):
    return gradtest.Report("assert_x", "fn", Verdict.FAIL, findings, 1)


# --- JSON -------------------------------------------------------------------------


@pytest.mark.parametrize("name", failures.NAMES)
def test_a_report_comes_back_from_json(name):
    report = failures.report_of(name)
    back = gradtest.Report.from_json(report.to_json(indent=2))
    assert back == report
    assert hash(back) == hash(report)
    assert str(back) == str(report)
    assert (back.exhibits, back.inputs) == ((), ())
    assert back.to_json() == report.to_json()


def test_json_is_strict_and_numbers_without_a_name_in_it_are_strings():
    entry = Entry((0, 2), complex(math.nan, -math.inf), np.float32(np.inf))
    finding = _finding(size=math.nan, allowed=math.inf, entry=entry)
    told = _report(finding).to_json()
    assert "NaN" not in told.replace('"NaN"', "")
    assert "Infinity" not in told.replace('"Infinity"', "").replace('"-Infinity"', "")
    entry = json.loads(told)["findings"][0]["entry"]
    assert entry["claimed"] == {"real": "NaN", "imag": "-Infinity"}
    assert entry["true"] == "Infinity"
    back = gradtest.Report.from_json(told)
    assert back == _report(finding)
    assert math.isnan(back.findings[0].size)
    assert back.findings[0].entry.claimed.imag == -math.inf


def test_reports_that_differ_in_one_number_are_not_equal():
    entry = Entry((0,), math.nan, 1.0)
    report = _report(_finding(entry=entry))
    assert report == _report(_finding(entry=Entry((0,), float("nan"), 1.0)))
    assert report != _report(_finding(entry=Entry((0,), 0.0, 1.0)))
    assert report != _report(_finding(entry=Entry((0,), 0.0, None)))
    assert report != "report"


@pytest.mark.parametrize("name", failures.NAMES)
def test_json_is_as_its_schema_says(name):
    schema = json.loads(storing.SCHEMA.read_text(encoding="utf-8"))
    told = json.loads(failures.report_of(name).to_json())
    assert schema_check.problems(schema, told, schema) == []
    told["findings"][0]["size"] = "large"
    del told["verdict"]
    problems = schema_check.problems(schema, told, schema)
    assert len(problems) == 2
    assert "report lacks verdict" in problems


def test_json_is_as_its_schema_says_to_others_too():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(storing.SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    reports = [failures.report_of(name) for name in failures.NAMES]
    told = [json.loads(report.to_json()) for report in reports]
    assert [str(e) for one in told for e in validator.iter_errors(one)] == []
    assert not validator.is_valid(dict(told[0], verdict="MAYBE"))


_WHOLE = json.loads(_report(_finding()).to_json())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"size": NaN}', "NaN is no JSON"),
        ("[]", 'lacks "format"'),
        ("{}", "no gradtest report"),
        (b"\xff\xfe", "not JSON"),
        (json.dumps(_WHOLE | {"schema": 2}), "schema 2, this gradtest reads up to 1"),
        (json.dumps(_WHOLE | {"schema": "1"}), "whole number as schema, got '1'"),
        (json.dumps(_WHOLE | {"schema": True}), "whole number as schema, got True"),
        (json.dumps(_WHOLE | {"verdict": "MAYBE"}), "one of PASS, .* as verdict"),
        (json.dumps(_WHOLE | {"verdict": ["PASS"]}), "one of PASS, .* as verdict"),
        (json.dumps(_WHOLE | {"trials": 1.5}), "a whole number as trials, got 1.5"),
        (json.dumps(_WHOLE | {"trials": True}), "a whole number as trials, got True"),
        (json.dumps(_WHOLE | {"notes": "a"}), "a list as notes, got 'a'"),
        (json.dumps(_WHOLE | {"notes": [1]}), r"a string as notes\[0\], got 1"),
        (json.dumps(_WHOLE | {"findings": [1]}), r"an object as findings\[0\], got 1"),
        (json.dumps(_WHOLE | {"findings": [{}]}), r"lacks findings\[0\].name"),
        (json.dumps(_WHOLE | {"environment": [["a"]]}), r"a list of 2 as environment"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(told, says):
    with pytest.raises(ValueError, match=f"`text` .*{says}"):
        gradtest.Report.from_json(told)


def test_fields_that_later_versions_add_are_passed_over_and_lacking_ones_default():
    told = dict(_WHOLE, colour="red")
    del told["notes"]
    assert gradtest.Report.from_json(json.dumps(told)) == _report(_finding())


def test_only_text_is_read():
    with pytest.raises(TypeError, match="`text` must be a str of JSON, got dict"):
        gradtest.Report.from_json(_WHOLE)
    told = json.dumps(_WHOLE).encode()
    assert gradtest.Report.from_json(told) == _report(_finding())


# --- files ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".html", ".json", ".txt", ".HTML"])
def test_a_report_is_saved_as_its_suffix_says(tmp_path, suffix):
    report = gradtest.check(square, _X)
    path = tmp_path / f"report{suffix}"
    path.write_text("old")
    assert report.save(str(path)) == path
    told = path.read_text(encoding="utf-8")
    if suffix == ".json":
        assert gradtest.Report.from_json(told) == report
    else:
        whole = str(report) + "\n" if suffix == ".txt" else report.to_html()
        assert told == whole
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["report", "report.pdf", ".html", "report.html.gz"])
def test_another_suffix_is_refused_with_those_known(tmp_path, name):
    says = r"`path` must end in one of \.html, \.json, \.txt, \.npz, \.py.*; got '.*'"
    with pytest.raises(ValueError, match=says):
        gradtest.check(square, _X).save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_no_directory_is_made(tmp_path):
    report = gradtest.check(square, _X)
    with pytest.raises(
        FileNotFoundError, match=r"a directory that is there; '.*nowhere'"
    ):
        report.save(tmp_path / "nowhere" / "report.txt")
    assert os.listdir(tmp_path) == []


def test_what_can_not_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    report = gradtest.check(square, _X)
    path = tmp_path / "report.txt"
    path.write_text("old")

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.save(path)
    assert os.listdir(tmp_path) == ["report.txt"]
    assert path.read_text() == "old"


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    gradtest.check(square, _X).save(link)
    assert link.is_symlink()
    assert target.read_text().startswith("PASS")
