"""What a run shares: defaults, who is told of reports, and what they add up to."""

import math
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src import outputs, session
from gradtest._src.findings import Finding, Gap, Report, Rule, Verdict
from gradtest._src.job import agreement
from gradtest._src.tally import Tally

X = np.float32([0.5, 1.0])


def vjp(args, cotangent):
    return cotangent * jnp.cos(args[0])


def jvp(args, tangents):
    return tangents[0] * jnp.cos(args[0])


def loss(x):
    return jnp.sum(jnp.sin(x))


def hvp(args, tangents):
    return -jnp.sin(args[0]) * tangents[0]


def step(params, batch):
    return jax.grad(mean)(params, batch)


def mean(params, batch):
    return jnp.mean(params * batch)


# Each takes the options that all but one of them share.
ASSERTIONS = {
    "assert_grad_matches": lambda **o: gradtest.assert_grad_matches(
        loss, jnp.cos, X, **o
    ),
    "assert_autodiff_matches": lambda **o: gradtest.assert_autodiff_matches(
        jnp.sin, X, **o
    ),
    "assert_custom_rules_match": lambda **o: gradtest.assert_custom_rules_match(
        jax.nn.relu, X, order=1, **o
    ),
    "assert_vjp_matches": lambda **o: gradtest.assert_vjp_matches(jnp.sin, vjp, X, **o),
    "assert_jvp_matches": lambda **o: gradtest.assert_jvp_matches(jnp.sin, jvp, X, **o),
    "assert_hvp_matches": lambda **o: gradtest.assert_hvp_matches(loss, hvp, X, **o),
    "assert_transpose_matches": lambda **o: gradtest.assert_transpose_matches(
        jnp.negative, jnp.negative, X, **o
    ),
    "assert_grads_agree": lambda **o: gradtest.assert_grads_agree(
        jnp.sin, jnp.sin, X, **o
    ),
    "assert_variants_agree": lambda **o: gradtest.assert_variants_agree(
        jnp.sin, X, variants=["jit"], **o
    ),
    "assert_parallel_grads_match": lambda **o: gradtest.assert_parallel_grads_match(
        step, mean, X, X, **o
    ),
    "assert_grads_finite": lambda **o: gradtest.assert_grads_finite(loss, X, **o),
    "assert_grads_flow": lambda **o: gradtest.assert_grads_flow(loss, X, **o),
    "check": lambda **o: gradtest.check(jnp.sin, X, **o),
}
WITHOUT_OPTIONS = {
    "assert_grads_close": lambda: gradtest.assert_grads_close(X, X),
}


def test_no_assertion_is_forgotten_here():
    public = {name for name in dir(gradtest) if name.startswith("assert_")}
    assert public | {"check"} == ASSERTIONS.keys() | WITHOUT_OPTIONS.keys()


@pytest.mark.parametrize("name", ASSERTIONS)
def test_each_assertion_takes_the_runs_defaults_and_tells_of_its_report(name):
    told = []
    with session.watching(told.append), session.using(key=5, trials=2):
        report = ASSERTIONS[name]()
    assert len(told) == 1
    assert told[0] is report
    assert (report.key, report.trials) == ("5", 2)
    assert report.verdict is Verdict.PASS


@pytest.mark.core
def test_none_is_the_default_and_what_a_call_gives_wins():
    finite = ASSERTIONS["assert_grads_finite"]
    assert (finite().key, finite().trials) == ("0", 1)
    assert finite(key=None, trials=None).key == "0"
    with session.using(key=5, trials=2):
        assert (finite(key=7).key, finite(key=7).trials) == ("7", 2)
        assert finite(key=0).key == "0"
        assert finite(trials=1).trials == 1
        with session.using(trials=3):
            assert (finite().key, finite().trials) == ("5", 3)
        assert finite(key=None, trials=None).trials == 2
    assert (finite().key, finite().trials) == ("0", 1)


def test_the_default_may_be_a_jax_key():
    with session.using(key=jax.random.key(3)):
        assert ASSERTIONS["assert_grads_finite"]().key == "jax.random.key(3)"


def test_processes_compare_the_defaults_that_their_runs_have():
    def told(**options):
        return sorted(agreement._described((X,), options))

    assert told() == told(key=0, trials=1) == told(key=None)
    with session.using(key=5):
        assert told() == told(key=5) != told(key=0)
    with session.using(trials=2):
        assert told() == told(trials=2) != told(trials=1)


def test_the_defaults_hold_inside_of_a_trace():
    def inside(x):
        gradtest.assert_grads_finite(loss, x)
        return x

    with session.using(trials=0), pytest.raises(ValueError, match="`trials` must be"):
        jax.make_jaxpr(inside)(X)


@pytest.mark.core
@pytest.mark.parametrize("raised", [True, False])
def test_a_failure_is_told_once_whether_it_raises_or_warns(raised):
    told = []
    how = "raise" if raised else "warn"
    expected = pytest.raises(gradtest.GradientInconclusive)
    expected = expected if raised else pytest.warns(UserWarning, match="concluded")
    with session.watching(told.append), expected:
        gradtest.assert_grads_flow(lambda x: x / 0, np.float32(1), inconclusive=how)
    assert [report.verdict for report in told] == [Verdict.INCONCLUSIVE]


def test_a_wrong_gradient_is_told_with_the_report_that_is_raised():
    told = []
    with (
        session.watching(told.append),
        pytest.raises(KeyError) as caught,
    ):
        gradtest.assert_grads_close(X, 2 * X, exception_type=KeyError)
    assert len(told) == 1
    assert told[0] is caught.value.report


def test_what_is_not_checked_is_told_too():
    told = []
    chex.disable_asserts()
    try:
        with session.watching(told.append):
            for run in (*ASSERTIONS.values(), *WITHOUT_OPTIONS.values()):
                run()
    finally:
        chex.enable_asserts()
    # `check` asserts nothing, so it runs.
    assert [report.verdict for report in told].count(Verdict.NOT_CHECKED) == 13
    assert len(told) == 14


def test_an_observer_that_fails_is_no_failure_of_the_assertion():
    told = []

    def broken(report):
        raise KeyError("no")

    with session.watching(broken), session.watching(told.append):
        with pytest.warns(UserWarning, match=r"observer .* raised KeyError\('no'\)"):
            gradtest.assert_grads_close(X, X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradtest.assert_grads_close(X, X)
            with pytest.raises(gradtest.GradientMismatch):
                gradtest.assert_grads_close(X, 2 * X)
    assert len(told) == 3
    gradtest.assert_grads_close(X, X)
    assert len(told) == 3


def test_bad_input_is_nothing_to_tell_of():
    told = []
    with session.watching(told.append), pytest.raises(TypeError):
        gradtest.assert_grads_finite(None, X)
    assert told == []


def test_reports_are_found_through_causes_contexts_and_groups():
    def error(text):
        found = KeyError(text)
        found.report = Report(text, "f", Verdict.FAIL)
        return found

    one, two, three = map(error, "abc")
    three.report = one.report
    try:
        try:
            raise one
        except KeyError:
            raise ExceptionGroup("both", [two, three, ValueError()]) from None
    except ExceptionGroup as group:
        group.__cause__ = one
        found = session.reports_within(group)
    assert sorted(report.assertion for report in found) == ["a", "b"]
    one.__cause__ = one
    assert session.reports_within(one) == [one.report]
    assert session.reports_within(ValueError()) == []


# --- sums ---------------------------------------------------------------------------

RULE = Rule("swiglu", "custom_vjp", ("swiglu at a.py:3",))


def found(name, verdict=Verdict.PASS, **fields):
    return Finding(name, (3,), "float32", verdict, **{"allowed": 2e-6, **fields})


def tally(*findings, verdict=Verdict.PASS, rules=()):
    return Tally.of([Report("a", "f", verdict, findings, rules=rules)])


def test_a_leaf_counts_once_however_often_it_was_looked_at():
    counted = tally(
        found("w"),
        found("w", order=2),
        found("b"),
        found("result", mode="fwd", allowed=1e-9),
    )
    assert counted.gradients == 2
    assert tally(found("result", mode="fwd")).gradients == 1


def test_what_is_wrong_forward_alone_counts():
    wrong = found("result", Verdict.FAIL, mode="fwd")
    assert tally(found("w"), wrong, verdict=Verdict.FAIL).wrong == 1


def test_one_gradient_in_many_ways_is_one():
    ways = [found(n, gap=Gap.AGREEMENT, check=n) for n in ("jit", "vmap[3]")]
    counted = tally(*ways)
    assert (counted.gradients, counted.smallest_visible_error) == (1, None)


def test_a_rule_counts_once_in_all_reports_and_no_gradient():
    counted = tally(found("x", rule=RULE), rules=(RULE,))
    counted.include(tally(found("y", rule=RULE), rules=(RULE,)))
    assert (counted.gradients, len(counted.rules)) == (0, 1)
    wrong = found("x", Verdict.FAIL, rule=RULE)
    assert tally(wrong, verdict=Verdict.FAIL, rules=(RULE,)).wrong == 1


def test_the_visible_error_is_the_largest_of_those_that_are_known():
    counted = tally(found("w"), found("b", allowed=3e-5), found("n", gap=Gap.FLOW))
    assert counted.smallest_visible_error == 3e-5
    open_one = found("w", Verdict.INCONCLUSIVE)
    counted = tally(open_one, found("b"), verdict=Verdict.INCONCLUSIVE)
    assert counted.smallest_visible_error == 2e-6
    assert (counted.gradients, counted.inconclusive) == (1, 1)


def test_a_verdict_without_findings_still_counts():
    assert tally(verdict=Verdict.INCONCLUSIVE).inconclusive == 1
    assert tally(verdict=Verdict.NOT_CHECKED).not_checked == 1
    assert not tally()


def test_a_tally_travels_as_plain_data():
    counted = tally(found("w"), found("x", rule=RULE), rules=(RULE,))
    assert Tally.from_plain(counted.plain()) == counted


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (2e-6, "2e-6"),
        (2.0000001e-6, "2e-6"),
        (1.5378e-5, "1.6e-5"),
        (9.99e-7, "1e-6"),
        (0.25, "2.5e-1"),
        (0.0, "0"),
    ],
)
def test_the_visible_error_is_never_written_smaller_than_it_is(error, written):
    counted = Tally(gradients=1, smallest_visible_error=error)
    assert counted.line() == (
        f"gradtest: 1 gradient checked, 0 rules audited, smallest visible error "
        f"{written}"
    )
    assert float(written) >= error * (1 - 1e-4)


def test_the_line_names_what_is_amiss():
    counted = Tally(42, {"a", "b", "c"}, 2, 5, 1, math.pi * 1e-7)
    assert counted.line(expected=3) == (
        "gradtest: 42 gradients checked, 3 rules audited, smallest visible error "
        "3.2e-7, 2 wrong, 3 wrong in tests that did not fail, 5 inconclusive, "
        "1 not checked"
    )


# --- names of files, names of the package -------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "..", "/", "a/../b", "n" * 5000, "日本", "\ud800"]
)
def test_any_text_makes_a_file_name(text, tmp_path):
    name = outputs.safe_name(text)
    assert name.isascii()
    assert len(name) <= 91
    assert not name.startswith(".")
    (tmp_path / f"{name}.html").write_text("")
    assert [each.name for each in tmp_path.iterdir()] == [f"{name}.html"]


def test_texts_that_clean_up_alike_have_other_names():
    names = {outputs.safe_name(text) for text in ("a/b", "a_b", "a:b", "A_b", "a__b")}
    assert len({name.lower() for name in names}) == 5


_LAZY = """
import sys
import gradtest
assert not {"jax", "numpy", "chex"} & sys.modules.keys()
import jax

@jax.jit
def first_use_inside_of_a_trace(x):
    assert gradtest.assert_grad_matches
    return x

with jax.transfer_guard("disallow"):
    first_use_inside_of_a_trace.lower(jax.ShapeDtypeStruct((3,), "float32"))
leaked = [
    name
    for module in list(sys.modules.values())
    for name, value in vars(module).copy().items()
    if isinstance(value, jax.core.Tracer)
]
assert leaked == [], leaked
assert gradtest.check(lambda x: x, 1.0).verdict.value == "PASS"
assert gradtest.domains.normal
from gradtest import Report, domains
"""


def test_the_package_imports_jax_when_it_is_used_also_inside_of_a_trace():
    ran = subprocess.run(
        [sys.executable, "-c", _LAZY], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_a_name_that_is_not_there_is_refused_as_usual():
    with pytest.raises(AttributeError, match="'gradtest' has no attribute 'nothing'"):
        gradtest.nothing  # noqa: B018
    assert "assert_grad_matches" in dir(gradtest)
    assert not {"Any", "TYPE_CHECKING", "annotations"} & set(dir(gradtest))
