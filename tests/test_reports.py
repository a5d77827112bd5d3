"""Whole reports as they are stored, as text, JSON and HTML, and what reports can do."""

import dataclasses
import io
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import gradtest
from gradtest._src.findings import Cause, Entry, Finding, Gap, Line, Rule, Verdict
from gradtest._src.report import notebook, text
from tests.snapshots import failures, schema_check, storing

_X = jnp.array([0.5, 1.0, 1.5, 2.0])
_ANEW = (
    "{} is not as stored; see it with `git diff` after `python -m tests.snapshots`, "
    "and read it: is the new one better?"
)


def square(x):
    return jnp.sum(x**2)


def _finding(name="x", verdict=Verdict.FAIL, **fields):
    given = {"size": 1.0, "allowed": 2e-6, **fields}
    return Finding(name, (3,), "float32", verdict, **given)


def _report(*findings, verdict=Verdict.FAIL, **fields):
    return gradtest.Report("assert_x", "fn", verdict, findings, 1, **fields)


# --- as stored --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", storing.SUFFIXES)
@pytest.mark.parametrize("name", failures.NAMES)
def test_the_whole_report_is_as_stored(name, suffix):
    path = storing.stored(name, suffix)
    assert storing.told(name, suffix) == path.read_text(encoding="utf-8"), _ANEW.format(
        path.name
    )


def test_the_schema_is_that_of_the_records():
    stored = storing.SCHEMA.read_text(encoding="utf-8")
    assert storing.schema_text() == stored, _ANEW.format("report.schema.json")


def test_what_is_stored_of_a_report_is_all_but_noise():
    noisy = _finding(verdict=Verdict.PASS, size=3.14159e-9, rounding=(1.234e-7, 1.9e-5))
    wrong = _finding(size=0.123456, entry=Entry((0,), 1.234567, 2.0))
    told = storing.steady(_report(noisy, wrong, environment=(("jax", "1.2.3"),)))
    first, second = told.findings
    assert (first.size, first.rounding) == (0.0, (0.0, 2e-5))
    assert (second.size, second.entry.claimed) == (0.1235, 1.235)
    assert told.environment == (("jax", "any"), ("system", "any"))


# --- the message ------------------------------------------------------------------


def test_a_message_names_the_line_and_what_puts_it_right():
    line = Line(
        os.path.join(os.getcwd(), "layers.py"),
        38,
        "layer.<locals>.bwd",
        "dx = inverse * pulled",
        "negating it makes the gradient right",
    )
    told = text.message(_report(_finding(line=line))).splitlines()
    assert told[1] == (
        "  At: layers.py:38 in bwd: dx = inverse * pulled  "
        "(negating it makes the gradient right)"
    )
    doubtful = dataclasses.replace(line, file="/elsewhere/layers.py", likelihood=0.3)
    told = text.message(_report(_finding(line=doubtful))).splitlines()
    assert told[1].startswith("  Possibly at: /elsewhere/layers.py:38 in bwd")


def test_a_message_says_how_sure_a_cause_is():
    likely = Cause("a", "it is a", "mend a", 0.9)
    possible = Cause("b", "it is b", "mend b", 0.4)
    unlikely = Cause("c", "it is c", "mend c", 0.2)
    told = text.message(_report(_finding(cause=likely, other_causes=(possible,))))
    assert "Likely cause: it is a.\n  Try: mend a.\n  Or: it is b." in told
    told = text.message(_report(_finding(cause=possible, other_causes=(unlikely,))))
    assert "Possible cause: it is b." in told
    assert "it is c" not in told
    assert "Or (20%): it is c; mend c." in str(
        _report(_finding(cause=possible, other_causes=(unlikely,)))
    )


@pytest.mark.parametrize("assertion", ["assert_x", "assert_variants_agree"])
@pytest.mark.parametrize("rule", [None, Rule("layer", "custom_vjp", ("layer at a:1",))])
def test_a_message_never_has_more_than_eight_lines(assertion, rule):
    cause, other = Cause("a", "it is a", "mend a"), Cause("b", "it is b", "mend b")
    findings = [
        _finding(
            name,
            gap=Gap.AGREEMENT,
            check=f"vmap[{i}]",
            entry=Entry((0,), 1.0, 2.0),
            cause=cause,
            other_causes=(other,),
            line=Line("a.py", 3),
            rule=rule,
        )
        for i, name in enumerate("xyz")
    ]
    report = _report(*findings, hint="a hint", found_in="process 1", replay="check()")
    told = text.message(dataclasses.replace(report, assertion=assertion)).splitlines()
    assert 7 <= len(told) <= 8
    assert told[-1] == "  Replay: check()"
    assert "  Try: mend a." in told


@pytest.mark.parametrize("name", failures.NAMES)
def test_no_failure_has_a_message_of_more_than_eight_lines(name):
    assert 2 <= len(str(failures.error_of(name)).splitlines()) <= 8


@pytest.mark.parametrize(
    "hostile", ["n" * 5000, "a\nb\r\n\x0bc\u2028d", "\x1b[31m", "\ud800", "\u202e", ""]
)
def test_no_string_makes_a_message_long_or_breaks_its_lines(hostile):
    cause = Cause(hostile, f"says {hostile}", f"remedy {hostile}", 0.6)
    rule = Rule(hostile, "custom_vjp", (hostile,), hostile, hostile)
    line = Line(hostile, 1, hostile, hostile, hostile)
    report = _report(
        _finding(hostile, cause=cause, other_causes=(cause,), line=line, rule=rule),
        *(_finding(f"{hostile}{i}", rule=rule, notes=(hostile,)) for i in range(30)),
        notes=(hostile,),
        unchecked=(hostile,),
        precision=(hostile,),
        replay=hostile,
        hint=hostile,
        found_in=hostile,
        environment=((hostile, hostile),),
    )
    told = text.message(report)
    assert len(told.splitlines()) == len(told.split("\n")) <= 8
    assert max(map(len, told.splitlines())) <= 510
    assert told.replace("\n", "").isprintable()
    assert str(report).replace("\n", "").isprintable()
    assert gradtest.Report.from_json(report.to_json()) == report
    report.to_html().encode()
    assert hostile[:90] in report.to_html() or not hostile.isprintable()


def test_a_long_message_of_the_users_own_is_cut():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grad_matches(
            square, lambda x: 3 * x, _X, custom_message="look here\n" * 1000
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 25
    assert lines[-1].startswith("… and ")
    assert "look here" in lines[-2]


def test_a_tree_of_ten_thousand_leaves_has_a_short_message_and_a_whole_page():
    right = [
        _finding(f"p[{i}]", Verdict.PASS, size=i * 1e-11, rounding=(0.0, 1e-5))
        for i in range(10_000)
    ]
    wrong = [_finding(f"q[{i}]", size=1.0 + i) for i in range(30)]
    report = _report(*right, *wrong)
    told = text.message(report)
    assert len(told.splitlines()) <= 8
    assert len(told) < 1000
    assert "Wrong as well: q[0], q[1], q[2], q[3] and 25 more; right: 10000." in told
    lines = str(report).splitlines()
    assert len(lines) < 40
    assert any(line.startswith("  FAIL     q[29] (float32[3])") for line in lines)
    assert (
        "  and 10 more that failed, largest gap 1.0e+01 of 2e-06; 10,000 more that "
        "passed, largest gap 1.0e-07 of 2e-06"
    ) in lines
    page = report.to_html()
    assert all(f"p[{i}] (float32[3])" in page for i in range(0, 10_000, 99))
    assert len(json.loads(report.to_json())["findings"]) == 10_030
    assert len(report._repr_html_()) < 50_000
    assert "10,000 more that passed" in report._repr_html_()


def test_the_error_of_a_tree_of_many_leaves_is_short():
    claimed = {f"layer_{i}": np.float32([i]) for i in range(1000)}
    wrong = {f"layer_{i}": np.float32([2 * i + 1]) for i in (7, 70, 700)}
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grads_close(claimed, claimed | wrong)
    assert len(str(caught.value).splitlines()) <= 8
    assert len(str(caught.value)) < 1000
    assert "right: 997." in str(caught.value)


def test_the_full_text_of_two_hundred_rules_stays_readable():
    rules = tuple(
        Rule(f"rule_{i}", "custom_vjp", (f"rule_{i} at m.py:{i}",)) for i in range(200)
    )
    findings = [_finding("x", Verdict.PASS, rule=rule) for rule in rules]
    findings[150] = _finding("x", rule=rules[150])
    report = _report(*findings, rules=rules)
    lines = str(report).splitlines()
    assert len(lines) < 90
    assert "the custom_vjp rule of rule_150 is wrong at x" in lines[1]
    assert "  and 168 more" in lines
    assert all(f"m.py:{i}" in report.to_html() for i in range(200))


@pytest.mark.parametrize("verdict", Verdict)
def test_a_report_without_findings_can_be_shown(verdict):
    report = gradtest.Report("assert_x", "fn", verdict)
    assert str(report).startswith(f"{verdict.value}: assert_x(fn)")
    assert text.message(report).startswith(("nothing", "fn did not pass"))
    assert f">{verdict.value}<" in report.to_html()
    assert gradtest.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("gap", Gap)
@pytest.mark.parametrize("assertion", ["assert_x", "assert_variants_agree"])
def test_every_gap_can_be_shown_whatever_is_known_of_it(gap, assertion):
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS):
        for entry in (None, Entry((1,), math.nan, None), Entry((1,), 1j, 2.0)):
            for rule in (None, Rule("r", "custom_jvp")):
                finding = _finding(
                    "x", verdict, gap=gap, entry=entry, rule=rule, size=math.inf
                )
                report = gradtest.Report(assertion, "fn", verdict, (finding,))
                assert text.message(report)
                assert str(report).startswith(verdict.value)
                assert verdict.value in report.to_html()
                assert gradtest.Report.from_json(report.to_json()) == report


# --- source -----------------------------------------------------------------------


def test_lines_of_source_are_shown_where_they_are_still_there(tmp_path):
    file = tmp_path / "layers.py"
    file.write_text("def f():\n    if x:\n\ty = 1\n        return <b>\n# end\n")
    line = Line(str(file), 4, "f", "return <b>")
    report = _report(_finding(line=line))
    assert "  > 4          return <b>" in str(report).splitlines()
    assert "return &lt;b&gt;" in report.to_html()
    file.write_text("secret = 1\n" * 9)
    assert "secret" not in str(report) + report.to_html()
    assert "return &lt;b&gt;" in report.to_html()
    file.unlink()
    assert "return &lt;b&gt;" in report.to_html()
    file.mkdir()
    assert "return &lt;b&gt;" in report.to_html()
    unread = dataclasses.replace(line, code="")
    assert "layers.py:4" in _report(_finding(line=unread)).to_html()


# --- terminals and notebooks ------------------------------------------------------


def _printed(report, **options):
    file = io.StringIO()
    Console(file=file, width=120, **options).print(report)
    return file.getvalue()


@pytest.mark.parametrize("name", failures.NAMES)
def test_rich_shows_a_report_in_colours_in_a_terminal_alone(name):
    report = failures.report_of(name)
    coloured = _printed(report, force_terminal=True, color_system="truecolor")
    assert f" {report.verdict.value} \x1b[0m" in coloured
    plain = _printed(report, force_terminal=False)
    assert "\x1b" not in plain
    assert "".join(plain.split()) == "".join(str(report).split())


def test_rich_takes_no_name_for_its_own_markup():
    told = _printed(failures.report_of("hostile"), force_terminal=True)
    assert "[bold]rich[/bold]" in told
    assert "\x1b[31mred" not in told
    assert "\\x1b[31mred" in told


@pytest.mark.parametrize("name", failures.NAMES)
def test_a_notebook_shows_a_part_whose_style_stays_inside(name):
    told = failures.report_of(name)._repr_html_()
    assert told.startswith('<div class="gradtest-report">')
    assert "<html" not in told
    style = told.partition("<style>")[2].partition("</style>")[0]
    rules = style.replace("@media print {", "").split("{")[:-1]
    selectors = [rule.rpartition("}")[2].rpartition(";")[2].strip() for rule in rules]
    parts = [
        part.strip()
        for selector in selectors
        if selector and not selector.startswith("@media")
        for part in selector.split(",")
    ]
    assert len(parts) > 50
    assert [part for part in parts if not part.startswith(".gradtest-report")] == []


def test_show_prints_where_there_is_no_notebook(capsys):
    report = gradtest.check(square, _X)
    report.show()
    assert capsys.readouterr().out == f"{report}\n"


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_show_is_coloured_in_a_terminal_where_rich_is_installed(monkeypatch):
    report = failures.report_of("rule")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", _Terminal())
    report.show()
    assert "\x1b[" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    report.show()
    assert sys.stdout.getvalue() == f"{report}\n"


def _pretend_notebook(monkeypatch):
    shown = []
    display = types.ModuleType("IPython.display")
    display.HTML = lambda told: told
    display.display = shown.append
    ipython = types.ModuleType("IPython")
    ipython.display = display
    ipython.get_ipython = lambda: types.SimpleNamespace(
        has_trait=lambda trait: trait == "kernel"
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_show_displays_the_report_and_its_arrays_in_a_notebook(monkeypatch):
    pytest.importorskip("treescope")  # before IPython is another
    shown = _pretend_notebook(monkeypatch)
    report = failures.report_of("transposed")
    assert len(report.exhibits) == 1
    report.show()
    assert shown[0] == report._repr_html_()
    assert "treescope" in shown[1]
    assert len(shown) == 2


def test_show_is_content_without_treescope(monkeypatch):
    shown = _pretend_notebook(monkeypatch)
    monkeypatch.setitem(sys.modules, "treescope", None)
    report = failures.report_of("transposed")
    assert notebook.arrays_as_html(report.exhibits[0]) == ""
    report.show()
    assert shown == [report._repr_html_()]


# --- every kind of report ---------------------------------------------------------


def _kinds():
    tree = {
        "w": jnp.ones((2, 3)),
        "n": None,
        "i": jnp.arange(3),
        "empty": jnp.zeros((0, 2)),
    }
    yield "check", lambda: gradtest.check(lambda t: square(t["w"]), tree)
    yield (
        "vjp",
        lambda: gradtest.assert_vjp_matches(
            jnp.sin, lambda args, g: (g * jnp.cos(args[0]),), _X
        ),
    )
    yield "close", lambda: gradtest.assert_grads_close(tree["w"], tree["w"])
    yield "finite", lambda: gradtest.assert_grads_finite(square, _X)
    yield "flow", lambda: gradtest.assert_grads_flow(square, _X)
    yield (
        "agree",
        lambda: gradtest.assert_grads_agree(square, lambda x: jnp.vdot(x, x), _X),
    )
    yield "rules", lambda: gradtest.assert_custom_rules_match(jax.nn.relu, _X)
    yield (
        "variants",
        lambda: gradtest.assert_variants_agree(jnp.sin, _X, variants="jit"),
    )
    yield (
        "transpose",
        lambda: gradtest.assert_transpose_matches(lambda x: 2 * x, lambda y: 2 * y, _X),
    )
    yield "half", lambda: gradtest.check(square, _X.astype(jnp.bfloat16))
    yield (
        "parallel",
        lambda: gradtest.assert_parallel_grads_match(
            lambda w, x: jax.grad(lambda w, x: jnp.mean((x @ w) ** 2))(w, x),
            lambda w, x: jnp.mean((x @ w) ** 2),
            jnp.ones(3),
            jnp.ones((4, 3)),
        ),
    )


@pytest.mark.parametrize(
    ("name", "call"), [pytest.param(n, c, id=n) for n, c in _kinds()]
)
def test_every_renderer_shows_every_kind_of_report(name, call):
    report = call()
    assert report.verdict is Verdict.PASS
    assert str(report).startswith(f"PASS: {report.assertion}(")
    assert ">PASS</span>" in report.to_html()
    assert " PASS " in _printed(report, force_terminal=True)
    assert gradtest.Report.from_json(report.to_json()) == report
    schema = json.loads(storing.SCHEMA.read_text(encoding="utf-8"))
    assert schema_check.problems(schema, json.loads(report.to_json()), schema) == []


def test_the_guide_runs(capsys):
    guide = Path(__file__).parents[1] / "docs" / "report.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    for block in code:
        exec(compile(block, "guide.py", "exec"), {})
    assert "FAIL: assert_grad_matches(<lambda>)" in capsys.readouterr().out
