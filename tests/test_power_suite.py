"""`pytest --gradtest-power`: what a user's own tests would catch."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradtest._src import public
from gradtest._src.jaxprs import rule_objects
from gradtest._src.power import suite_mutants, suite_trial
from gradtest._src.power.suite_results import MutantResult, Results, RuleResult

pytest_plugins = ["pytester"]

_ROOT = Path(public.__file__).parents[2]
_INSTALLED = importlib.metadata.entry_points(group="pytest11", name="gradtest")
_PLUGIN = () if _INSTALLED else ("-p", "gradtest.pytest_plugin")
_HAS_XDIST = importlib.util.find_spec("xdist") is not None

_RULES = """
import jax
import jax.numpy as jnp

def rule(function):
    held = jax.custom_vjp(function)
    held.defvjp(fwd, bwd)
    return held

def fwd(x):
    return jnp.sin(x), x

def bwd(x, g):
    return (jnp.cos(x) * g,)

@jax.custom_jvp
def good(x):
    return 2 * x

@good.defjvp
def good_jvp(primals, tangents):
    return 2 * primals[0], 2 * tangents[0]

@rule
def forward_only(x):
    return jnp.sin(x)

@rule
def one_entry(x):
    return jnp.sin(x)

@rule
def loose(x):
    return jnp.sin(x)

@rule
def nobody(x):
    return jnp.sin(x)

gradient = jax.jit(jax.grad(lambda x: good(x).sum()))
"""
_TESTS = """
import chex
import gradtest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import rules

X = jnp.array([0.3, 0.5, 0.7, 0.9])

def grad_of(rule):
    return jax.jit(jax.grad(lambda x: rule(x).sum()))(X)

@pytest.fixture(scope="module")
def shared():
    return grad_of(rules.good)

def test_good_at_module_level():
    np.testing.assert_allclose(rules.gradient(X), 2, rtol=1e-5)

@pytest.mark.parametrize("entry", [0, 3])
def test_good_in_a_shared_fixture(shared, entry):
    assert shared[entry] == 2

class GoodTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_variant(self):
        gradient = self.variant(lambda x: jax.grad(lambda x: rules.good(x).sum())(x))
        for entry in range(4):
            with self.subTest(entry):
                self.assertEqual(gradient(X)[entry], 2)

def test_forward_only():
    np.testing.assert_allclose(rules.forward_only(X), jnp.sin(X), rtol=1e-5)

def test_one_entry(subtests):
    with subtests.test("the first"):
        np.testing.assert_allclose(grad_of(rules.one_entry)[0], jnp.cos(0.3), rtol=1e-5)

class LooseTest(parameterized.TestCase):
    @parameterized.parameters((0.2,))
    def test_loose(self, rtol):
        np.testing.assert_allclose(grad_of(rules.loose), jnp.cos(X), rtol=rtol)

def test_created_inside():
    inner = rules.rule(lambda x: jnp.sin(x))
    gradtest.assert_grads_finite(lambda x: inner(x).sum(), X)

@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert (grad_of(rules.good) == 7).all()

@pytest.mark.skip
def test_skipped():
    grad_of(rules.nobody)

RUNS = []

def test_that_passes_once():
    RUNS.append(grad_of(rules.good))
    assert len(RUNS) == 1
"""


def run_apart(folder, *options):
    """Runs pytest in a process of its own; returns what it prints."""
    (folder / "rules.py").write_text(_RULES)
    (folder / "test_rules.py").write_text(_TESTS)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *_PLUGIN, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def summary(printed):
    """Returns the part of what pytest prints that tells of mutants."""
    found = re.search(
        r"=+ gradtest power =+\n(.*?\ngradtest power: .*?)\n", printed, re.S
    )
    assert found, printed
    return found.group(1)


def of_rule(printed, name):
    """Returns the lines of one rule."""
    head, *rest = summary(printed).partition(f"rules.{name} (")[2].splitlines()
    own = [head]
    for line in rest:
        if not line.startswith("  "):
            break
        own.append(line)
    return own


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    status, printed = run_apart(
        folder, "-p", "no:xdist", "--gradtest-report=reports", "--gradtest-power"
    )
    return folder, status, printed


# --- a whole run --------------------------------------------------------------------


def test_a_good_suite_catches_all_jitted_at_module_level_or_not(serial):
    _, status, printed = serial
    assert status == 0
    head, reach, *rest = of_rule(printed, "good")
    assert head.endswith(" caught, 0 survived")
    assert not head.endswith(" 0 caught, 0 survived")
    assert "differentiated by 5 tests" in reach
    assert "smallest scale error that would be seen: 1e-07" in reach
    assert not any("survived" in line for line in rest)


def test_a_suite_of_values_alone_catches_nothing(serial):
    head, reach, *rest = of_rule(serial[2], "forward_only")
    assert ": 0 caught" in head
    assert reach == "  called by 1 test, differentiated by none"
    assert "  survived: dx with the other sign (bwd at rules.py:13)" in rest
    assert "  survived: dx dropped (zero) (bwd at rules.py:13)" in rest


def test_a_suite_that_checks_one_entry_misses_the_others(serial):
    head, _, *rest = of_rule(serial[2], "one_entry")
    assert not head.endswith(" 0 survived")
    assert "  survived: dx zero in rows 2..3 (bwd at rules.py:13)" in rest
    assert "  survived: dx zero at [2] (bwd at rules.py:13)" in rest
    assert not any("dx times 1.01" in line for line in rest)


def test_a_loose_tolerance_misses_small_errors_of_scale(serial):
    _, reach, *rest = of_rule(serial[2], "loose")
    assert "  survived: dx times 1.01 (bwd at rules.py:13)" in rest
    assert not any("dx zero" in line for line in rest)
    # 1 + 10 ** -0.5 is the last one outside of 0.2.
    assert reach.endswith("smallest scale error that would be seen: 0.3")


def test_what_was_not_measured_is_told(serial):
    told = summary(serial[2])
    assert (
        "No test reaches these rules:\n  rules.nobody (custom_vjp) at rules.py:36"
        in told
    )
    inner = told.partition("created inside of a test or a function")[2]
    assert "test_rules.test_created_inside.<locals>.<lambda> (custom_vjp)" in inner
    assert "test_that_passes_once: it does not pass when it is run a second" in told
    closing = told.splitlines()[-1]
    assert re.search(r"\d+ of \d+ mutants caught .*, 4 rules, 2 not reached$", closing)


def test_runs_against_mutants_leave_nothing_behind(serial):
    folder, _, printed = serial
    assert (folder / "rules.py").read_text() == _RULES
    assert not (folder / ".pytest_cache" / "v" / "cache" / "lastfailed").exists()
    assert list((folder / "reports").iterdir()) == []
    assert "10 passed, 1 skipped, 1 xfailed" in printed
    assert "gradtest: 1 gradient checked, 0 rules audited\n" in printed


@pytest.mark.skipif(not _HAS_XDIST, reason="needs pytest-xdist")
def test_workers_find_together_what_one_process_finds(tmp_path):
    options = ("--gradtest-power", "--gradtest-power-mutants=3")
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    alone.mkdir()
    apart.mkdir()
    _, expected = run_apart(alone, "-p", "no:xdist", *options)
    status, printed = run_apart(
        apart, "-n", "2", *options, "--gradtest-power-fail-under=99"
    )
    assert "a sample of at most 3 mutants of each" in summary(expected)
    assert " 0 of " not in summary(expected)
    short = ", less than the 99 % asked for"
    assert summary(printed) == summary(expected) + short
    assert status == pytest.ExitCode.TESTS_FAILED


_CONFTEST = """
import few_rules
import gradtest._src.jaxprs.rule_objects as rule_objects
import jax

BWD, CALL = few_rules.one.bwd, jax.custom_vjp.__call__

def pytest_unconfigure():
    assert few_rules.one.bwd is BWD
    assert jax.custom_vjp.__call__ is CALL
    print("slope", few_rules.slope(1.0), "all as before")
"""
_FEW = """
import jax

@jax.custom_vjp
def one(x):
    return 3 * x

one.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))
slope = jax.jit(jax.grad(lambda x: 2 * one(x)))
"""


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit", "pytest.exit"])
def test_a_run_that_is_broken_off_leaves_the_rules_as_they_were(pytester, error):
    pytester.makepyfile(few_rules=_FEW)
    pytester.makeconftest(_CONFTEST)
    pytester.makepyfile(
        test_inner=f"""
import few_rules
import pytest

def test_it():
    if few_rules.slope(1.0) != 6.0:
        raise {error}("now")
"""
    )
    options = ("-p", "no:xdist", *_PLUGIN, "--gradtest-power=few_rules")
    result = pytester.runpytest_inprocess(*options, no_reraise_ctrlc=True)
    printed = result.stdout.str() + result.stderr.str()
    assert "slope 6.0 all as before" in printed
    if error != "SystemExit":
        assert "broken off before the end" in printed


def test_a_module_of_its_own_and_a_sample_can_be_asked_for(pytester):
    pytester.makepyfile(few_rules=_FEW, other_rules=_FEW)
    pytester.makepyfile(
        test_inner="""
import few_rules
import other_rules

def test_it():
    assert few_rules.slope(1.0) == 6.0
    assert other_rules.slope(1.0) == 6.0
"""
    )
    options = ("-p", "no:xdist", *_PLUGIN, "--gradtest-power=few_rules")
    settings = ("-ogradtest_power_mutants=2", "-ogradtest_power_fail_under=100.0")
    result = pytester.runpytest_inprocess(*options, *settings)
    told = summary(result.stdout.str())
    assert "other_rules" not in told
    assert told.splitlines()[0].endswith("few_rules.py:3: 2 caught, 0 survived")
    assert told.splitlines()[-1] == (
        "gradtest power: 2 of 2 mutants caught (100 %), 1 rule, a sample of at most "
        "2 mutants of each"
    )
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.core
@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            ("--gradtest-power", "test_inner.py"),
            "takes a module or package, got 'test_",
        ),
        (
            ("--gradtest-power", "tests"),
            "takes a module or package, got 'tests' behind a space: write "
            "--gradtest-power=tests",
        ),
        (("--gradtest-power-fail-under=90",), "-fail-under needs --gradtest-power"),
        (
            ("--gradtest-power", "--gradtest-power-mutants=0"),
            "must be at least 1, got 0",
        ),
        (
            ("--gradtest-power", "--gradtest-power-fail-under=101"),
            "must lie between 0 and 100, got 101",
        ),
        (
            ("-ogradtest_power_mutants=x", "--gradtest-power"),
            "gradtest_power_mutants must be a number, got 'x'",
        ),
    ],
)
def test_a_wrong_option_is_named_before_any_test_runs(pytester, option, says):
    pytester.makepyfile(test_inner="def test_it():\n    pass")
    result = pytester.runpytest_inprocess("-p", "no:xdist", *_PLUGIN, *option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert says in result.stderr.str()


def test_a_module_that_is_not_there_is_named(pytester):
    pytester.makepyfile(test_inner="def test_it():\n    pass")
    options = ("-p", "no:xdist", *_PLUGIN, "--gradtest-power=no_such_module")
    result = pytester.runpytest_inprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = result.stdout.str() + result.stderr.str()
    assert "--gradtest-power=no_such_module: it can't be imported" in told
    assert "passed" not in told


def test_a_module_without_rules_is_told(pytester):
    pytester.makepyfile(test_inner="def test_it():\n    pass")
    options = ("-p", "no:xdist", *_PLUGIN, "--gradtest-power=json")
    result = pytester.runpytest_inprocess(*options)
    result.stdout.fnmatch_lines(
        ["*no mutant to run, no custom rule of json was found*"]
    )


def test_nothing_is_told_where_tests_are_only_listed(pytester):
    pytester.makepyfile(test_inner="def test_it():\n    pass")
    options = ("-p", "no:xdist", *_PLUGIN, "--gradtest-power", "--collect-only")
    result = pytester.runpytest_inprocess(*options)
    result.stdout.no_fnmatch_line("*gradtest power*")


# --- its parts ----------------------------------------------------------------------


@jax.custom_vjp
def _triple(x):
    return 3 * x


_triple.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))
_slope = jax.jit(jax.grad(_triple))


def _mutants():
    found = rule_objects.arguments_of(_triple, (1.0,), {})
    return suite_mutants.mutants_of(suite_mutants.looked_at(_triple, [found]), None)


@pytest.mark.core
def test_a_mutant_takes_the_rules_place_and_leaves_it_after_an_exception():
    (mutant,) = (m for m in _mutants() if m.says == "dx with the other sign")
    bwd = _triple.bwd
    assert _slope(1.0) == 3

    def fail_inside():
        with mutant.in_place([_triple]):
            assert _slope(1.0) == -3
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert _triple.bwd is bwd
    assert _slope(1.0) == 3


def test_a_mutant_fits_rules_with_static_arguments_and_trees():
    held = jax.custom_vjp(lambda tree, size: tree["a"] * size, nondiff_argnums=(1,))
    held.defvjp(
        lambda tree, size: (tree["a"] * size, tree["b"].shape),
        lambda size, shape, g: ({"a": g * size, "b": jnp.zeros(shape)},),
    )
    tree = {"a": jnp.ones(3), "b": jnp.ones(2)}
    arguments = rule_objects.arguments_of(held, (tree,), {"size": 2.0})
    assert arguments.names == ("tree['a']", "tree['b']")
    looks = suite_mutants.looked_at(held, [arguments])
    mutant = suite_mutants.scaling(looks, 1.5)
    with mutant.in_place([held]):
        found = jax.grad(lambda tree: held(tree, 2.0).sum())(tree)
    np.testing.assert_allclose(found["a"], 3.0)
    assert mutant.misfits == []


@pytest.mark.core
def test_a_mutant_that_cannot_be_carried_out_is_no_catch():
    def refuses(function):
        def broken(*args):
            raise TypeError("does not fit")

        return broken

    mutant = _mutants()[0]
    signature, mutation = next(iter(mutant.mutations.items()))
    object.__setattr__(mutation, "breaks", refuses)
    mutant.mutations = {signature: mutation}
    with mutant.in_place([_triple]), pytest.raises(TypeError, match="does not fit"):
        _slope(1.0)
    assert [str(error) for error in mutant.misfits] == ["does not fit"]


@pytest.mark.core
@pytest.mark.parametrize("seen", range(6))
def test_the_smallest_error_is_found_by_bisection(seen):
    errors, asked = (5, 4, 3, 2, 1), []

    def is_seen(error):
        asked.append(error)
        return error > 5 - seen

    expected = errors[seen - 1] if seen else None
    assert suite_trial.bisected(errors, is_seen) == expected
    assert len(asked) <= 3


def _result(outcome, second_order=False, key="k"):
    mutant = MutantResult(key, "bwd", "dx zero", 4, second_order, outcome)
    return RuleResult("custom_vjp", {"fun": "a.py:1"}, mutants={key: mutant})


@pytest.mark.core
@pytest.mark.parametrize(
    ("one", "other", "caught", "total"),
    [
        (_result("caught"), _result("survived"), 1, 1),
        (_result("survived"), _result("caught"), 1, 1),
        (_result("survived"), _result("survived"), 0, 1),
        (_result("misfit"), _result("misfit"), 0, 0),
        (_result("survived", True), _result("survived", True), 0, 0),
        (_result("survived", True), _result("caught", True), 1, 1),
        (_result("caught", key="k"), _result("survived", key="m"), 1, 2),
    ],
)
def test_shares_are_joined_without_counting_twice(one, other, caught, total):
    results = Results({"r": one}, unreached={"s": ("custom_vjp", "b.py:1")})
    share = Results({"r": other}, unreached={"r": ("custom_vjp", "a.py:1")})
    results.include(Results.from_plain(json.loads(json.dumps(share.plain()))))
    results.settle()
    assert (results.caught, results.total) == (caught, total)
    assert list(results.unreached) == ["s"]
    assert results.is_short_of(100) == (caught < total or not total)


@pytest.mark.core
def test_a_share_of_the_mutants_has_its_part_of_the_sample():
    mutants = [MutantResult(str(k), "bwd", "", 0, False, "caught") for k in range(20)]
    whole = suite_mutants.sampled(mutants, 5)
    assert len(whole) == 5
    for share in (mutants[::2], mutants[1::2], mutants[:7]):
        mine = suite_mutants.sampled(share, 5)
        assert [m for m in whole if m in share] == [m for m in mine if m in whole]
