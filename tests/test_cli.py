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
from gradtest._src.cli import main, targets
from gradtest._src.cli.errors import UsageError

_ROOT = pathlib.Path(__file__).parent.parent
_MODEL = """
import jax
import jax.numpy as jnp
from gradtest.domains import normal


def right(x, y=2.0):
    return jnp.sum(jnp.sin(x) * y)


def right_args():
    return normal(4), 2.0


def right_grad(x, y):
    return jnp.cos(x) * y


def wrong_grad(x, y):
    return -jnp.cos(x) * y


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))
doubled_args = [normal(3)]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
straight_through_args = [normal(3)]


def identity(x):
    return x


def beside(x):
    return jnp.sum(x**2) + jnp.sum(jax.lax.stop_gradient(doubled(x)))


def undefined(x):
    return jnp.sum(jnp.sqrt(x))


undefined_args = (-jnp.ones(3),)


def with_defaults(x=0.5):
    return jax.nn.relu(x)


def pair():
    return right, right_args()


def nothing():
    return None


def needy(weights, x):
    return weights * x


def raising(x):
    raise KeyError("planted")


def mistyped(x):
    return x @ jnp.ones((7, 2))


def asserting(x):
    assert x.ndim == 7, "planted"
    return x


raising_args = mistyped_args = asserting_args = [normal(3)]
lonely = normal(3)
number = 3


class Model:
    @staticmethod
    def loss(x):
        return jnp.cos(x)

    loss_args = [normal(3)]
"""


@pytest.fixture(name="run")
def _run(tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder with model.py: code, stdout and stderr."""
    (tmp_path / "model.py").write_text(_MODEL)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(list(arguments))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


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


# --- targets and arguments -----------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("model.py", "Write 'model.py:name'"),
        ("model.right", "Did you mean 'model:right'"),
        ("model.py::right", "write 'model.py:right'"),
        ("model.py:", "got 'model.py:'"),
        (":right", "got ':right'"),
        ("model.py:a-b", "must end in a name"),
        ("C:\\x.py:right", "'C:\\\\x.py'"),
        ("modle.py:right", "Did you mean 'model.py'"),
        ("no/model.py:right", "there is no folder 'no'"),
        ("./:right", "is a folder"),
        ("modle:right", "Did you mean 'model'"),
        ("no_such.module:right", "there is no module 'no_such'"),
        ("model.py:wright", "Did you mean 'right'"),
        ("model.py:Model.lose", "Did you mean 'loss'"),
        ("model.py:zzz", "It has right, "),
        ("model.py:number", "is no function: it is 3"),
        ("model.py:nothing", "it returned NoneType"),
        ("model.py:needy", "def needy_args():"),
        ("model.py:right --args :lonely", "goes into a tuple: (x,)"),
        ("model.py:right --args :needy", "itself needs weights, x"),
        ("model.py:right --args :zzz", "has no 'zzz'"),
        ("model.py:right --grad :number", "is no function"),
        ("model.py:right --grad :right_grad --order 2", "there is no --order"),
        ("model.py:right --variants jot", "`variants` names 'jot'"),
        ("model.py:right --variants jit,,pmap", "names between commas"),
        ("model.py:right --expect-differs x", "RULE=TARGET"),
        ("model.py:right --argnums 5", "`argnums` names argument 5"),
        ("model.py:right --argnums x", "wanted an integer or some"),
        ("model.py:right --exclude z", "`exclude` names 'z'"),
        ("model.py:right --order 3", "invalid choice"),
        ("model.py:right --modes up", "wanted rev, fwd or rev,fwd"),
        ("model.py:right --trials 0", "wanted an integer >= 1"),
        ("model.py:right --devices x", "wanted an integer >= 1"),
        ("model.py:right --rtol 2", "wanted a number between 0 and 1"),
        ("model.py:right --seed x", "invalid int value"),
        ("model.py:right --html no/x.html", "there is no folder 'no'"),
        ("model.py:right --json .", "it is a folder"),
        ("model.py:right --quiet --full", "not allowed with"),
        ("model.py:right --ord 2", "unrecognized arguments"),
        ("", "the following arguments are required: TARGET"),
    ],
)
def test_a_slip_exits_2_and_says_what_to_write(run, command, says):
    code, out, err = run("check", *command.split())
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_no_command_and_a_wrong_one_are_slips(run):
    assert run()[0] == 2
    code, _, err = run("chekc", "model.py:right")
    assert code == 2
    assert "chekc" in err
    code, _, err = run("rules", "model.py:right", "--list", "--json", "x.json")
    assert code == 2
    assert "--list makes no report" in err


def test_a_windows_path_keeps_its_drive():
    with pytest.raises(UsageError, match="there is no file"):
        targets.parse("C:\\models\\x.py:loss")
    target = targets.parse("package.module:Class.method")
    assert (target.place, target.attribute) == ("package.module", "Class.method")


@pytest.mark.parametrize(
    "target", ["model:right", "model.py:Model.loss", "model.py:pair"]
)
def test_modules_attributes_and_pairs_are_targets(run, target):
    code, out, _ = run("check", target, "-q")
    assert code == 0
    assert out.startswith("PASS: check(")


def test_defaults_of_all_parameters_are_arguments(run):
    code, out, _ = run("check", "model.py:with_defaults")
    assert code == 0
    assert "x (float32[])" in out


def test_hostile_file_names_are_imported_and_nothing_stays(run, tmp_path):
    folder = tmp_path / "a folder: <b>"
    folder.mkdir()
    (folder / "sibling_of_it.py").write_text("factor = 2.0\n")
    hostile = folder / "it's: [red].py"
    hostile.write_text(
        "import sibling_of_it\ndef f(x=0.5): return x * sibling_of_it.factor\n"
    )
    modules, path, argv = set(sys.modules), list(sys.path), list(sys.argv)
    code, out, err = run("check", f"{hostile}:f", "-q", "--html", "page.html")
    assert (code, out) == (0, "PASS: check(f)\n"), err
    assert set(sys.modules) - modules <= {"sibling_of_it"} | _of_installed(modules)
    assert (path, argv) == (sys.path, sys.argv)
    assert sorted(each.name for each in folder.glob("**/*it's*")) == [hostile.name]
    sys.modules.pop("sibling_of_it")


def _of_installed(before):
    """Modules that a check imports when it first needs them."""
    return {
        name
        for name in set(sys.modules) - before
        if not str(getattr(sys.modules[name], "__file__", "")).endswith("[red].py")
    }


def test_a_file_in_a_package_imports_its_neighbours(run, tmp_path):
    package = tmp_path / "cli_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package.parent / "constants.py").write_text("factor = 3.0\n")
    (package / "layer.py").write_text(
        "from ..constants import factor\ndef f(x=0.5): return factor * x\n"
    )
    assert run("check", "cli_package/inner/layer.py:f", "-q")[0] == 0
    assert run("check", "cli_package.inner.layer:f", "-q")[0] == 0


def test_a_file_with_the_name_of_a_library_hides_nothing(run, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "jax.py").write_text("import jax\ndef f(x=0.5): return jax.nn.relu(x)\n")
    assert run("check", "elsewhere/jax.py:f", "-q")[0] == 0
    assert sys.modules["jax"] is jax


def test_flags_and_arguments_are_the_users_own(run, tmp_path):
    (tmp_path / "flagged.py").write_text(
        "import sys\n"
        "from absl import flags\n"
        "flags.DEFINE_integer('order', 7, 'Not that of the command line.')\n"
        "ORDER = flags.FLAGS.order\n"
        "def f(x=0.5):\n"
        "    assert flags.FLAGS.order == ORDER == 7 and len(sys.argv) == 1\n"
        "    return 2.0 * x\n"
    )
    from absl import flags

    try:
        code, _, err = run("check", "flagged.py:f", "-q", "--order", "2")
    finally:
        delattr(flags.FLAGS, "order")
    assert code == 0, err


# --- errors of the user's code -------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raising", "KeyError: 'planted'"),
        ("mistyped", "TypeError: dot_general"),
        ("asserting", "AssertionError: planted"),
    ],
)
def test_an_error_of_the_function_exits_2_with_its_own_frames(run, name, error):
    code, out, err = run("check", f"model.py:{name}")
    assert (code, out) == (2, "")
    assert f"in {name}" in err
    assert error in err
    assert f"gradtest: error: check({name}) raised {error.partition(':')[0]}." in err
    assert err.count("File ") == 1
    assert "internal frames" not in err


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("1 / 0\n", "importing 'broken.py' raised ZeroDivisionError."),
        ("raise SystemExit(0)\n", "importing 'broken.py' ended the process"),
        ("def f(x): pass\ndef f_args(): return 1 / 0\n", "calling f_args raised"),
    ],
)
def test_an_error_on_import_exits_2(run, tmp_path, source, says):
    (tmp_path / "broken.py").write_text(source)
    code, out, err = run("check", "broken.py:f")
    assert (code, out) == (2, "")
    assert says in err
    assert "gradtest/_src" not in err


def test_an_error_of_gradtest_is_no_wrong_gradient(run, monkeypatch):
    def failing(*args, **options):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(gradtest, "check", failing)
    # As if it stood in gradtest, whose frames are not the user's.
    monkeypatch.setattr("gradtest._src.cli.errors._has_users_frames", lambda _: False)
    code, _, err = run("check", "model.py:right")
    assert code == 2
    assert "gradtest itself failed" in err
    assert "planted" in err


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
