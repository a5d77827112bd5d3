"""The command line: what it runs, what it prints, and how it exits."""

import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import gradtest
from gradtest._src import progress
from tests.cli_runs import _run as _run

_ROOT = pathlib.Path(__file__).parent.parent


# --- verdicts and exit codes ---------------------------------------------------------


@pytest.mark.core
def test_a_right_function_exits_0_and_shows_every_leaf(run):
    code, out, err = run("check", "model.py:right")
    assert (code, err) == (0, "")
    assert out.startswith("PASS: check(right)\n")
    assert "x (float32[4])" in out


@pytest.mark.core
def test_a_wrong_rule_exits_1_and_both_reports_name_it(run):
    code, out, _ = run("check", "model.py:doubled")
    assert code == 1
    assert "FAIL: check(doubled)" in out
    assert "FAIL: assert_custom_rules_match(doubled)" in out
    assert out.count("2 times too large") == 2


def test_a_wrong_rule_that_the_derivative_never_uses_exits_1(run):
    code, out, _ = run("check", "model.py:beside", "--args", ":doubled_args", "-q")
    assert code == 1
    assert out.splitlines() == [
        "PASS: check(beside)",
        "FAIL: assert_custom_rules_match(beside)",
    ]


@pytest.mark.core
def test_what_has_no_derivative_exits_3_and_says_why(run):
    code, out, _ = run("check", "model.py:undefined")
    assert code == 3
    assert out.startswith("INCONCLUSIVE: check(undefined)\n")
    assert "NaN" in out


def test_a_disabled_check_is_no_pass(run):
    import chex

    chex.disable_asserts()
    try:
        code, out, _ = run("check", "model.py:right", "--grad", ":right_grad")
    finally:
        chex.enable_asserts()
    assert code == 3
    assert out.startswith("NOT CHECKED")


def test_a_hand_written_gradient_is_checked_alone(run):
    command = ["check", "model.py:right", "-q", "--grad"]
    assert run(*command, ":right_grad")[:2] == (0, "PASS: assert_grad_matches(right)\n")
    assert run(*command, "model.py:wrong_grad")[:2] == (
        1,
        "FAIL: assert_grad_matches(right)\n",
    )


def test_a_variant_that_was_asked_for_and_cannot_run_leaves_the_check_open(run):
    code, out, err = run("check", "model.py:right", "--variants", "jit,pmap[999]")
    assert code == 3
    assert "PASS: assert_variants_agree(right)" in out
    assert "not checked: pmap[999]" in err


def test_variants_are_checked_as_well(run):
    code, out, _ = run("check", "model.py:right", "--variants", "jit,vmap[3]")
    assert code == 0
    assert "PASS: assert_variants_agree(right)" in out
    assert "vmap[3]" in out


def test_a_rule_that_differs_on_purpose_is_declared(run):
    command = ["check", "model.py:straight_through", "-q"]
    assert run(*command)[0] == 1
    declared = "straight_through=:identity"
    assert run(*command, "--expect-differs", declared)[0] == 0


def test_options_reach_the_assertions(run, tmp_path):
    code, *_ = run(
        "check", "model.py:right", "--order", "2", "--trials", "2", "--seed", "7",
        "--modes", "rev", "--rtol", "1e-4", "--exclude", "y",
        "--json", "out.json",
    )  # fmt: skip
    report = gradtest.Report.from_json((tmp_path / "out.json").read_text())
    assert code == 0
    assert (report.order, report.trials, report.key) == (2, 2, "7")
    assert report.modes == ("rev",)
    assert report.leaf("x").allowed == pytest.approx(1e-4, rel=0.01)
    assert "y (excluded)" in report.unchecked
    _, out, _ = run("check", "model.py:right", "--argnums", "1,")
    assert "y (float32[])" in out
    assert "x (float32[4])" not in out


def test_special_points_are_tried_where_they_are_asked_for(run):
    assert run("check", "model.py:leaky")[0] == 0
    code, out, _ = run("check", "model.py:leaky", "--hazards", "-q")
    assert (code, out.count("FAIL: ")) == (1, 2)
    code, out, _ = run("rules", "model.py:leaky", "--hazards")
    assert code == 1
    assert "special points tried" in out


def test_double_precision_is_for_the_command_alone(run):
    before = jax.config.values["jax_enable_x64"]
    code, out, _ = run("check", "model.py:right", "--x64", "--args", ":undefined_args")
    assert code == 0
    assert "float64[3]" in out
    assert jax.config.values["jax_enable_x64"] == before


# --- rules ---------------------------------------------------------------------------


@pytest.mark.core
def test_rules_are_listed_with_place_and_verdict(run):
    code, out, _ = run("rules", "model.py:doubled")
    first = out.splitlines()[0]
    assert code == 1
    assert first.startswith("FAIL")
    assert "custom_vjp" in first
    assert "doubled at model.py:23" in first
    assert "FAIL: assert_custom_rules_match(doubled)" in out


def test_rules_of_libraries_are_listed_with_their_call(run):
    code, out, _ = run("rules", "model.py:with_defaults", "--list")
    assert code == 0
    assert out.startswith("custom_jvp  relu: relu at jax/")
    assert "called at model.py:" in out


def test_a_function_without_rules_is_never_silently_right(run):
    assert run("rules", "model.py:right") == (3, "no custom rule is called\n", "")
    assert run("rules", "model.py:right", "--list")[0] == 0


def test_only_some_rules_are_wanted(run):
    code, out, _ = run("rules", "model.py:doubled", "--only", "doub*", "--list")
    assert (code, out.count("\n")) == (0, 1)
    code, _, err = run("rules", "model.py:doubled", "--only", "tripled")
    assert code == 2
    assert "it calls doubled" in err


# --- graph ---------------------------------------------------------------------------


def test_a_graph_is_printed_or_written(run, tmp_path):
    code, out, _ = run("graph", "model.py:doubled")
    assert code == 0
    assert out.startswith("digraph")
    code, out, err = run("graph", "model.py:right", "--of", "gradient", "-o", "g.dot")
    assert (code, out, err) == (0, "", "wrote g.dot\n")
    assert "cos" in (tmp_path / "g.dot").read_text()


def test_a_picture_without_graphviz_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    code, _, err = run("graph", "model.py:right", "-o", "g.svg")
    assert code == 2
    assert "apt-get install graphviz" in err
    assert (tmp_path / "g.dot").exists()


def test_slips_of_a_graph_exit_2(run):
    code, _, err = run("graph", "model.py:right", "-o", "g.jpeg")
    assert code == 2
    assert "-o must end in one of .dot" in err
    code, _, err = run("graph", "model.py:raising")
    assert code == 2
    assert "KeyError: 'planted'" in err


# --- output --------------------------------------------------------------------------


@pytest.mark.core
def test_json_of_one_report_reads_back(run, tmp_path):
    run("check", "model.py:right", "--json", "out.json")
    report = gradtest.Report.from_json((tmp_path / "out.json").read_text())
    assert (report.subject, report.verdict) == ("right", gradtest.Verdict.PASS)


def test_json_and_html_of_several_reports_hold_them_all(run, tmp_path):
    code, _, err = run(
        "check", "model.py:beside", "--args", ":doubled_args",
        "--json", "out.json", "--html", "out.html",
    )  # fmt: skip
    told = json.loads((tmp_path / "out.json").read_text())
    assert err == "wrote out.json\nwrote out.html\n"
    assert (told["verdict"], told["exit_code"], code) == ("FAIL", 1, 1)
    reports = [
        gradtest.Report.from_json(json.dumps(report)) for report in told["reports"]
    ]
    assert [report.verdict.value for report in reports] == ["PASS", "FAIL"]
    page = (tmp_path / "out.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<html") == 1
    assert "2 times too large" in page


def test_a_failure_is_short_unless_all_of_it_is_wanted(run):
    _, short, _ = run("check", "model.py:right", "--grad", ":wrong_grad")
    _, full, _ = run("check", "model.py:right", "--grad", ":wrong_grad", "--full")
    assert len(short.splitlines()) <= 10
    assert "Likely cause" in short
    assert "precision: " not in short
    assert "precision: " in full


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_and_nowhere_else(run, monkeypatch):
    for each in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("check", "model.py:right", "--trials", "3")[2] == ""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    code, out, _ = run("check", "model.py:right", "--trials", "3")
    assert code == 0
    assert "check(right)" in terminal.getvalue()
    assert "\x1b" not in out
    terminal.truncate(0)
    run("check", "model.py:right", "--quiet")
    assert terminal.getvalue() == ""


def test_colour_is_for_terminals_that_want_it(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("check", "model.py:right")[0] == 0
    assert "check(right)" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()


# --- progress in the library ---------------------------------------------------------


class _Heard(list):
    def begin(self, what, total):
        self.append((what, total))

    def advance(self):
        self.append("on")

    def end(self):
        self.append("over")


@pytest.mark.core
def test_a_loop_that_nobody_follows_is_left_alone():
    items = range(3)
    assert progress.following(items, "trials") is items


@pytest.mark.core
def test_a_listener_hears_of_each_round_also_of_a_loop_that_breaks_off():
    heard = _Heard()
    with progress.told_to(heard):
        assert list(progress.following("ab", "letters")) == ["a", "b"]
        with pytest.raises(ZeroDivisionError):
            [1 / n for n in progress.following(iter([1, 0]), "numbers", 2)]
    assert heard[:4] == [("letters", 2), "on", "on", "over"]
    assert heard[4:] == [("numbers", 2), "on", "over"]


def test_the_python_api_tells_of_trials_and_rules():
    heard = _Heard()
    with progress.told_to(heard):
        gradtest.check(jax.numpy.sin, 0.5, trials=2)
        gradtest.assert_custom_rules_match(jax.nn.relu, 0.5)
    assert ("trials", 2) in heard
    assert ("rules", 1) in heard
    assert heard.count("over") == len([each for each in heard if type(each) is tuple])


# --- the program ---------------------------------------------------------------------


def _process(*arguments, cwd, **changes):
    environment = dict(os.environ, PYTHONPATH=str(_ROOT), JAX_PLATFORMS="cpu")
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | changes,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_devices_are_simulated_before_the_users_module_runs(tmp_path):
    (tmp_path / "mapped.py").write_text(
        "import os\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'\n"
        "import jax\n"
        "def f(x=jax.numpy.arange(8.0)): return jax.pmap(jax.numpy.sin)(x)\n"
    )
    command = ["-m", "gradtest", "check", "mapped.py:f", "-q", "--devices"]
    done = _process(*command, "8", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "PASS: check(f)\n"), done.stderr
    done = _process(*command, "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "check(f) raised ValueError" in done.stderr


def test_devices_of_a_running_jax_stay(run):
    count = len(jax.local_devices())
    code, _, err = run("check", "model.py:right", "--devices", str(count + 1))
    assert code == 2
    assert f"--devices {count + 1}: JAX runs on {count} of" in err


_WITHOUT_JAX = """
import sys
from gradtest._src.cli import main
codes = [
    main(arguments.split())
    for arguments in ("--help", "check --help", "check", "check a.py:f", "rules a -x")
]
assert codes == [0, 0, 2, 2, 2], codes
heavy = {"jax", "numpy", "rich", "absl"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_slips_need_no_jax(tmp_path):
    done = _process("-c", _WITHOUT_JAX, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exit codes:" in done.stdout


def test_versions_tell_what_a_check_runs_with(run):
    code, out, _ = run("versions")
    assert code == 0
    assert importlib.metadata.version("jaxlib") in out
    code, out, _ = run("versions", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["jax"] == importlib.metadata.version("jax")
    assert "cpu" in told["devices"]
    assert "dot (pictures of graphs)" in told
