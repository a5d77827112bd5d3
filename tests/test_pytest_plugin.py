"""The pytest plugin: what a failure shows, its options, its files, its closing line."""

import importlib.metadata
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import gradtest
import gradtest.absltest
from gradtest._src import public  # a run inside of this one forgets what it imports

pytest_plugins = ["pytester"]

_ROOT = Path(public.__file__).parents[2]
_INSTALLED = importlib.metadata.entry_points(group="pytest11", name="gradtest")
_PLUGIN = () if _INSTALLED else ("-p", "gradtest.pytest_plugin")

# Trees that are compared as they come: nothing is compiled.
_TREES = """
import numpy as np
import pytest

import gradtest

ONE = {"w": np.ones(3, np.float32)}
TWO = {"w": 2 * ONE["w"]}

def compare(claimed, **options):
    return gradtest.assert_grads_close(claimed, ONE, **options)
"""
_WRONG = f"""
{_TREES}
def test_wrong():
    gradtest.assert_grads_close(TWO, ONE)  # the user's line
"""
_KEYS = """
import numpy as np

import gradtest

def report(**options):
    return gradtest.assert_grads_finite(lambda x: x, np.float32(1), **options)

def test_default():
    print("default", report().key, report().trials, report(key=None, trials=None).key)

def test_own():
    print("own", report(key=5, trials=2).key, report(key=5, trials=2).trials)
"""


@pytest.fixture
def run(pytester):
    """Runs pytest on a test file in this process; returns what it prints."""

    def run(source, *options, plugin=_PLUGIN):
        pytester.makepyfile(test_inner=source)
        result = pytester.runpytest_inprocess(
            "-p", "no:cacheprovider", "-p", "no:xdist", *plugin, *options
        )
        return result.stdout.str()

    return run


def closing(printed):
    """Returns the closing line; None where there is none."""
    found = [line for line in printed.splitlines() if line.startswith("gradtest: ")]
    assert len(found) < 2
    return found[0] if found else None


# --- what a failure shows -----------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("plugin", [_PLUGIN, ("-p", "no:gradtest")], ids=["on", "off"])
@pytest.mark.parametrize("style", ["auto", "long", "short"])
def test_a_failure_ends_at_the_users_line_and_shows_the_report(run, plugin, style):
    printed = run(_WRONG, f"--tb={style}", plugin=plugin)
    assert "gradtest.assert_grads_close(TWO, ONE)  # the user's line" in printed
    assert "E         Likely cause: " in printed or "E     Likely cause: " in printed
    assert "keywords.py" not in printed
    assert "agreement.py" not in printed


@pytest.mark.parametrize("option", ["--full-trace", "--tb=native"])
def test_all_frames_are_there_for_who_wants_them(run, option):
    assert "gradtest/_src/keywords.py" in run(_WRONG, option)


def test_a_mistake_in_the_call_keeps_its_frames(run):
    source = f"{_TREES}\ndef test_slip():\n    compare(TWO, rtol=7)\n"
    printed = run(source)
    assert "`rtol` must lie between 0 and 1, got 7" in printed
    assert "--- gradtest ---" not in printed
    assert closing(printed) is None


def test_an_exception_that_hides_its_lines_is_told_in_the_section(run):
    source = f"{_TREES}\ndef test_it():\n    compare(TWO, exception_type=KeyError)\n"
    printed = run(source)
    assert "keywords.py" not in printed
    assert "\n  Likely cause: " in printed.split("--- gradtest ---")[1]


def test_what_an_exception_was_raised_from_is_shown_and_kept(run, tmp_path):
    source = f"""
{_TREES}
def test_it():
    try:
        compare(TWO)
    except gradtest.GradientMismatch as error:
        raise RuntimeError("training can't go on") from error
"""
    printed = run(source, f"--gradtest-report={tmp_path}")
    assert "keywords.py" not in printed
    assert "RuntimeError: training can't go on" in printed
    assert len(list(tmp_path.glob("*.html"))) == 1


def test_all_reports_of_a_group_are_kept_and_none_is_told_twice(run, tmp_path):
    source = f"""
{_TREES}
def test_it():
    errors = []
    for _ in range(2):
        try:
            compare(TWO)
        except gradtest.GradientMismatch as error:
            errors.append(error)
    raise ExceptionGroup("both", errors)
"""
    printed = run(source, f"--gradtest-report={tmp_path}")
    assert len(list(tmp_path.glob("*.html"))) == 2
    assert "Likely cause" not in printed.split("--- gradtest ---")[1]


@pytest.mark.parametrize("failing", ["setup", "teardown"])
def test_a_fixture_that_fails_is_shown_as_a_test_is(run, tmp_path, failing):
    calls = "compare(TWO)", "yield"
    first, last = calls if failing == "setup" else calls[::-1]
    source = f"""
{_TREES}
@pytest.fixture
def loss():
    {first}
    {last}

def test_it(loss):
    pass
"""
    printed = run(source, f"--gradtest-report={tmp_path}")
    assert f"ERROR at {failing} of test_it" in printed
    assert "keywords.py" not in printed
    assert 'replay: pytest "test_inner.py::test_it" --gradtest-seed=0' in printed
    assert len(list(tmp_path.glob("*.html"))) == 1
    assert closing(printed).endswith("smallest visible error 1.6e-5, 1 wrong")


def test_an_inconclusive_check_is_shown_in_the_same_way(run):
    source = """
import gradtest, jax.numpy as jnp

def test_it():
    gradtest.assert_grad_matches(jnp.log, jnp.reciprocal, 0.0)
"""
    printed = run(source)
    assert "GradientInconclusive: " in printed
    assert "keywords.py" not in printed
    assert closing(printed) == (
        "gradtest: 0 gradients checked, 0 rules audited, 1 inconclusive"
    )


def test_under_chexify_the_failure_is_the_users_line_too(run):
    source = """
import chex, gradtest, jax, jax.numpy as jnp

def checked(x):
    gradtest.assert_grads_finite(lambda x: jnp.sqrt(x).sum(), x)
    return x

def test_it():
    chex.chexify(jax.jit(checked), async_check=False)(jnp.zeros(2))  # here
"""
    printed = run(source)
    assert "async_check=False)(jnp.zeros(2))  # here" in printed
    assert "asserts_chexify.py" not in printed
    assert "assert_grads_finite' failed" in printed
    assert 'replay: pytest "test_inner.py::test_it" --gradtest-seed=0' in printed


_CLASS = """
import gradtest, gradtest.absltest
import numpy as np

ONE = np.ones(3, np.float32)

class LossTest(gradtest.absltest.TestCase):
    def test_method(self):
        self.assertGradsClose(2 * ONE, ONE)

    def test_seed(self):
        print("function", gradtest.assert_grads_finite(lambda x: x, ONE[0]).key)
        print("method", self.assertGradsFinite(lambda x: x, ONE[0]).key)
"""


def test_methods_of_the_test_case_are_hidden_and_keep_their_seed(run):
    printed = run(_CLASS, "-s")
    assert "absltest.py" not in printed
    assert "self.assertGradsClose(2 * ONE, ONE)" in printed
    assert 'LossTest::test_method" --gradtest-seed=301' in printed
    assert "function 301" in printed
    assert "method 301" in printed
    printed = run(_CLASS, "-s", "--gradtest-seed=7")
    assert 'LossTest::test_method" --gradtest-seed=7' in printed
    assert "function 7" in printed
    assert "method 7" in printed


# --- seed and trials ----------------------------------------------------------------


@pytest.mark.core
def test_the_options_are_defaults_that_a_test_may_overrule(run):
    assert "default 0 1 0" in run(_KEYS, "-s")
    printed = run(_KEYS, "-s", "--gradtest-seed=-3", "--gradtest-trials=4")
    assert "default -3 4 -3" in printed
    assert "own 5 2" in printed


def test_the_ini_file_sets_the_same_and_the_options_win(run, pytester):
    pytester.makeini("[pytest]\ngradtest_seed = 11\ngradtest_trials = 3")
    assert "default 11 3 11" in run(_KEYS, "-s")
    assert "default 12 3 12" in run(_KEYS, "-s", "--gradtest-seed=12")


def test_the_defaults_are_as_before_when_the_run_is_over(run):
    run(_KEYS, "--gradtest-seed=9")
    report = gradtest.check(lambda x: x, 1.0)
    assert (report.key, report.trials) == ("0", 1)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--gradtest-trials=0", "--gradtest-trials must be at least 1, got 0"),
        ("--gradtest-seed=x", "invalid int value: 'x'"),
        ("-ogradtest_seed=1.5", "gradtest_seed must be an integer, got '1.5'"),
        ("--gradtest-report=test_inner.py", "must name a directory"),
    ],
)
def test_a_wrong_option_is_named_before_any_test_runs(pytester, option, says):
    pytester.makepyfile(test_inner=_WRONG)
    result = pytester.runpytest_inprocess("-p", "no:xdist", *_PLUGIN, option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert says in result.stderr.str()


_BY_KEY = """
import gradtest
import numpy as np
import pytest

@pytest.mark.parametrize("size", [1], ids=["a b/$[c]"])
def test_it(size):
    report = gradtest.assert_grads_finite(lambda x: x, np.float32(1))
    gradtest.assert_grads_close(np.float32([report.trials]), np.float32([0]),
                                custom_message=f"key {report.key}")
"""


def test_the_replay_line_repeats_the_test_as_it_was_run(run, pytester):
    printed = run(_BY_KEY, "--gradtest-seed=42", "--gradtest-trials=2")
    (line,) = (each for each in printed.splitlines() if each.startswith("replay: "))
    assert "[key 42]" in printed
    assert line.endswith("--gradtest-seed=42 --gradtest-trials=2")
    command = line.removeprefix("replay: pytest ")
    script = f"{sys.executable} -m pytest {' '.join(_PLUGIN)} {command}"
    again = subprocess.run(
        script,
        shell=True,
        cwd=pytester.path,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "[key 42]" in again.stdout
    assert "1 failed" in again.stdout


# --- files --------------------------------------------------------------------------

_HOSTILE = f"""
{_TREES}
NAMES = ["../../up", "a/b\\\\c", "<script>", "[x]::y", "n" * 5000, "日本", "CON"]
NAMES += ["A", "a"]

@pytest.mark.parametrize("name", NAMES, ids=NAMES)
def test_it(name):
    compare(TWO)

def test_caught():
    with pytest.raises(gradtest.GradientMismatch):
        compare(TWO)

def test_parts(subtests):
    for claimed in (TWO, ONE, TWO):
        with subtests.test():
            compare(claimed)
"""


def test_every_failure_has_its_files_whatever_its_test_is_called(run, pytester):
    printed = run(_HOSTILE, "--gradtest-report=a/b")
    folder = pytester.path / "a" / "b"
    pages, records = sorted(folder.glob("*.html")), sorted(folder.glob("*.json"))
    assert len(pages) == len(records) == 9 + 2
    assert len(list(folder.iterdir())) == 2 * 11
    assert len({page.name.lower() for page in pages}) == 11
    assert not any("caught" in page.name for page in pages)
    for page, record in zip(pages, records, strict=True):
        assert page.stem == record.stem
        report = gradtest.Report.from_json(record.read_text(encoding="utf-8"))
        assert report.verdict is gradtest.Verdict.FAIL
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert f"report: {page}" in printed
        assert f"report: {record}" in printed


def test_a_second_run_replaces_the_files_of_the_first(run, pytester):
    for _ in range(2):
        run(_WRONG, "--gradtest-report=out")
    assert len(list((pytester.path / "out").iterdir())) == 2


def test_the_ini_files_directory_lies_beside_it(run, pytester, monkeypatch):
    pytester.makeini("[pytest]\ngradtest_report = out")
    below = pytester.mkdir("below")
    pytester.makepyfile(test_inner=_WRONG)
    monkeypatch.chdir(below)
    pytester.runpytest_inprocess("-p", "no:xdist", *_PLUGIN, "..")
    assert len(list((pytester.path / "out").iterdir())) == 2


def test_a_report_that_cannot_be_written_leaves_the_verdict(run, monkeypatch):
    def refused(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(gradtest.Report, "save", refused)
    printed = run(_WRONG, "--gradtest-report=out")
    assert "the report could not be written: OSError('disk full')" in printed
    assert "1 failed" in printed


def test_junit_has_verdict_visible_error_report_and_replay(run, pytester):
    source = f"{_WRONG}\ndef test_right():\n    compare(ONE)\n"
    run(source, "--gradtest-report=out", "--junitxml=out.xml")
    tree = xml.etree.ElementTree.parse(pytester.path / "out.xml")
    found = {
        case.get("name"): {
            each.get("name"): each.get("value") for each in case.iter("property")
        }
        for case in tree.iter("testcase")
    }
    wrong = found["test_wrong"]
    assert wrong["gradtest_verdict"] == "FAIL"
    assert 0 < float(wrong["gradtest_smallest_visible_error"]) < 1e-4
    assert wrong["gradtest_replay"].endswith('::test_wrong" --gradtest-seed=0')
    assert Path(wrong["gradtest_report"]).is_file()
    assert found["test_right"].keys() == {
        "gradtest_verdict",
        "gradtest_smallest_visible_error",
    }
    assert found["test_right"]["gradtest_verdict"] == "PASS"


# --- the closing line ---------------------------------------------------------------

_MANY = f"""
{_TREES}
import chex
import jax

@jax.custom_vjp
def double(x):
    return 2 * x

double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

@pytest.fixture(scope="session")
def checked_once():
    compare({{"w": ONE["w"]}})

def test_trees(checked_once):
    compare(ONE)

def test_two_leaves():
    both = {{"a": ONE["w"], "b": ONE["w"]}}
    gradtest.assert_grads_close(both, both)

@pytest.mark.parametrize("times", [1, 2])
def test_rule(times):
    gradtest.assert_custom_rules_match(double, 1.0, order=1)

def test_wrong():
    compare(TWO)

def test_caught():
    with pytest.raises(gradtest.GradientMismatch):
        compare(TWO)

@pytest.mark.xfail(strict=True)
def test_known():
    compare(TWO)

def test_switched_off():
    chex.disable_asserts()
    try:
        compare(TWO)
    finally:
        chex.enable_asserts()
"""


def test_the_closing_line_sums_up_all_that_ran(run):
    assert closing(run(_MANY)) == (
        "gradtest: 7 gradients checked, 1 rule audited, smallest visible error 1.6e-5, "
        "1 wrong, 2 wrong in tests that did not fail, 1 not checked"
    )


def test_the_closing_line_is_quiet_when_asked_twice(run):
    assert closing(run(_WRONG, "-q")) is not None
    assert closing(run(_WRONG, "-qq")) is None


def test_nothing_is_said_where_no_assertion_ran(run):
    printed = run("def test_other():\n    assert True")
    assert "gradtest:" not in printed
    assert "1 passed" in printed


def test_workers_send_their_sums_and_write_beside_one_another(pytester):
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    source = f"""
{_TREES}
@pytest.mark.parametrize("number", range(6))
def test_it(number):
    compare(TWO if number % 2 else ONE)
"""
    pytester.makepyfile(test_inner=source)
    result = pytester.runpytest_subprocess(
        *_PLUGIN, "-n", "2", "--gradtest-report=out", "--gradtest-seed=4",
        "--junitxml=out.xml",
    )  # fmt: skip
    printed = result.stdout.str()
    assert closing(printed) == (
        "gradtest: 6 gradients checked, 0 rules audited, smallest visible error "
        "1.6e-5, 3 wrong"
    )
    assert len(list((pytester.path / "out").iterdir())) == 6
    assert printed.count("--gradtest-seed=4") == 3
    assert (pytester.path / "out.xml").read_text().count("gradtest_verdict") == 6


# --- a run without gradtest ---------------------------------------------------------


def test_a_run_that_uses_nothing_of_gradtest_imports_no_jax(pytester):
    # As pip would install it: the entry point alone.
    metadata = pytester.mkdir("site") / "gradtest-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gradtest\n")
    (metadata / "entry_points.txt").write_text(
        "[pytest11]\ngradtest = gradtest.pytest_plugin\n"
    )
    pytester.makepyfile(
        test_inner="""
import sys

def test_modules(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("gradtest")
    names = ("jax", "jaxlib", "chex", "gradtest._src.public")
    assert [name for name in names if name in sys.modules] == []
"""
    )
    path = os.pathsep.join([str(metadata.parent), str(_ROOT)])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=pytester.path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
    assert "gradtest:" not in ran.stdout
