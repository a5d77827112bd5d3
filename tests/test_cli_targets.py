"""The command line: what it is pointed at, and what that raises."""

import sys

import jax
import pytest

import gradtest
from gradtest._src.cli import targets
from gradtest._src.cli.errors import UsageError
from tests.cli_runs import _run as _run

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
