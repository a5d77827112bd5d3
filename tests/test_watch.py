"""A watcher lets right trainings through, and stops wrong ones where they go wrong."""

import gc
import logging
import os
import pathlib
import re
import subprocess
import sys
import weakref

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

import gradtest
from tests.watched import (
    BATCH,
    X,
    Y,
    counts,
    fresh_params,
    loss_with,
    quiet,
    rule,
    scaled,
    square,
    steps_checked,
    wrong_clip,
)

# --- when it checks -------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "steps", "checked"),
    [
        ({"every": 5}, range(12), [0, 5, 10]),
        ({"every": 5}, [3, 4, 6, 9, 17, 18, 20], [3, 6, 17, 20]),
        ({"every": 5, "start": 2}, range(13), [2, 7, 12]),
        ({"every": 1}, range(3), [0, 1, 2]),
        ({"every": 5}, [0, 10, 6, 7, 10], [0, 10, 6, 10]),
        ({"every": 500}, [np.int64(1), jnp.int32(499), 500], [1, 500]),
    ],
    ids=["multiples", "jumps", "start", "each", "rewound", "array steps"],
)
def test_a_check_is_due_at_the_first_call_at_or_past_each_multiple(
    options, steps, checked
):
    watcher = gradtest.watch(square, **options)
    assert steps_checked(watcher, steps) == checked


@pytest.mark.core
def test_a_report_says_the_step_and_what_was_looked_at():
    watcher = gradtest.watch(quiet, every=5)
    report = watcher(5, fresh_params(), BATCH)
    assert report is watcher.last_report
    assert report.verdict is gradtest.Verdict.PASS
    assert report.assertion == "watch"
    assert "at step 5" in report.notes
    assert any(
        note.startswith("screened: claimed against rule-free autodiff in float64")
        for note in report.notes
    )
    assert [f.name for f in report.findings] == [
        "params['b']",
        "params['out']",
        "params['w']",
    ]
    assert all(0 < f.allowed < 1e-5 and f.rounding for f in report.findings)


def test_a_watcher_compiles_once_for_a_set_of_shapes_and_says_what_that_took():
    watcher = gradtest.watch(quiet, every=1)
    took = watcher.prepare(fresh_params(), BATCH)
    assert took > 0
    assert watcher.compile_seconds == took
    assert counts(watcher) == (0, 0, 0, 0)
    for step in range(3):
        watcher(step, scaled(fresh_params(), 1 + step), BATCH)
    assert watcher.compile_seconds == took
    watcher(3, fresh_params(), (X[:8], Y[:8]))
    assert watcher.compile_seconds > took
    assert "2 times" in watcher.summary()


# --- what happens then ----------------------------------------------------------------


def test_a_failure_may_be_logged_and_the_training_goes_on(caplog):
    watcher = gradtest.watch(loss_with(wrong_clip), every=1, on_failure="log")
    with caplog.at_level(logging.ERROR, logger="gradtest.watch"):
        report = watcher(0, scaled(fresh_params(), 8), BATCH)
    assert report.verdict is gradtest.Verdict.FAIL
    (record,) = caplog.records
    assert "watch at step 0 failed: the gradient of loss is wrong" in record.message
    assert (
        watcher(1, scaled(fresh_params(), 0.5), BATCH).verdict is gradtest.Verdict.PASS
    )
    assert watcher.failures == 1


def test_a_failure_may_be_handed_to_a_function():
    told = []
    watcher = gradtest.watch(loss_with(wrong_clip), on_failure=told.append)
    report = watcher(0, scaled(fresh_params(), 8), BATCH)
    assert told == [report]


def test_after_a_failure_that_was_raised_the_next_check_waits_its_turn():
    watcher = gradtest.watch(loss_with(wrong_clip), every=5)
    with pytest.raises(gradtest.GradientMismatch):
        watcher(0, scaled(fresh_params(), 8), BATCH)
    assert watcher(1, fresh_params(), BATCH) is None


@pytest.mark.parametrize(
    ("params", "batch", "says"),
    [
        (
            scaled(fresh_params(), jnp.nan),
            BATCH,
            r"params\['b'\] \(and 2 more\) holds NaN",
        ),
        (fresh_params(), (X * jnp.inf, Y), "the loss is NaN or infinite"),
    ],
    ids=["parameters", "loss"],
)
def test_what_is_not_finite_is_said_and_never_a_crash(params, batch, says):
    with pytest.warns(UserWarning, match=says):
        report = gradtest.watch(quiet)(0, params, batch)
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    with pytest.raises(gradtest.GradientInconclusive, match=says):
        gradtest.watch(quiet, inconclusive="raise")(0, params, batch)


def test_under_disabled_asserts_nothing_is_checked():
    watcher = gradtest.watch(loss_with(wrong_clip))
    chex.disable_asserts()
    try:
        report = watcher(0, scaled(fresh_params(), 8), BATCH)
    finally:
        chex.enable_asserts()
    assert report.verdict is gradtest.Verdict.NOT_CHECKED


# --- what it leaves alone -------------------------------------------------------------


def test_arrays_may_be_donated_right_after_the_call():
    watcher = gradtest.watch(quiet, every=1)
    step = jax.jit(
        lambda params, batch: jax.tree.map(
            lambda p, g: p - 0.1 * g, params, jax.grad(quiet)(params, batch)
        ),
        donate_argnums=0,
    )
    params, old = fresh_params(), None
    for number in range(3):
        assert watcher(number, params, BATCH).verdict is gradtest.Verdict.PASS
        old, params = params, step(params, BATCH)
    assert old["w"].is_deleted()
    with pytest.raises(ValueError, match="before the step that donates it"):
        watcher(3, old, BATCH)


def test_parameters_and_random_state_stay_as_they_are():
    params = fresh_params()
    before = jax.tree.map(np.array, params)
    state, flags = np.random.get_state()[1].copy(), dict(jax.config.values)
    gradtest.watch(quiet, what="both")(0, params, BATCH)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert dict(jax.config.values) == flags


def test_a_watcher_keeps_no_parameters_alive():
    watcher = gradtest.watch(quiet, every=1)
    params = fresh_params()
    watcher(0, params, BATCH)
    seen = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    del params
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


# --- rules, samples, options ----------------------------------------------------------


def _two_rules(params, batch):
    x, y = batch
    hidden = nn.relu(x @ params["w"])
    return jnp.mean((wrong_clip(hidden @ params["out"]) - y) ** 2)


def test_rules_are_audited_in_turn_until_the_wrong_one_comes():
    watcher = gradtest.watch(_two_rules, every=1, what="rules", on_failure="log")
    params = scaled(fresh_params(), 20)
    reports = [watcher(step, params, BATCH) for step in range(2)]
    names = [rule.name for report in reports for rule in report.rules]
    assert sorted(names) == ["layer", "relu"]
    verdicts = {r.rules[0].name: r.verdict.value for r in reports}
    assert verdicts == {"layer": "FAIL", "relu": "PASS"}
    assert sorted(watcher.state_dict()["rule_steps"]) == [0, 1]


def test_both_screens_the_gradient_and_audits_a_rule():
    report = gradtest.watch(quiet, what="both")(0, fresh_params(), BATCH)
    assert [rule.name for rule in report.rules] == ["layer"]
    assert report.leaf("params['w']").verdict is gradtest.Verdict.PASS


def test_leaves_are_looked_at_in_turn_and_all_come_round():
    watcher = gradtest.watch(quiet, every=1, sample=2)
    seen = []
    for step in range(2):
        report = watcher(step, fresh_params(), BATCH)
        seen.append({finding.name for finding in report.findings})
        assert len(report.unchecked) == 3 - len(seen[-1])
    assert seen[0] | seen[1] == {"params['b']", "params['out']", "params['w']"}
    assert sorted(watcher.state_dict()["leaf_steps"].tolist()) in ([0, 0, 1], [0, 1, 1])


def test_further_arguments_and_auxiliary_data_are_handed_on():
    def loss(params, x, y, *, scale=1.0):
        value = quiet(params, (x, y)) * scale
        return value, {"value": value}

    report = gradtest.watch(loss, has_aux=True)(0, fresh_params(), X, Y)
    assert report.verdict is gradtest.Verdict.PASS


def test_a_rule_that_differs_on_purpose_is_declared():
    straight = rule(jnp.round, jnp.ones_like)
    loss = loss_with(straight)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.watch(loss)(0, fresh_params(), BATCH)
    watcher = gradtest.watch(loss, expect_differs={straight: lambda x: x})
    assert watcher(0, fresh_params(), BATCH).verdict is gradtest.Verdict.PASS


def test_a_declared_product_is_judged_without_differences():
    straight = rule(jnp.round, jnp.ones_like)
    declared = {straight: gradtest.vjp(lambda args, g: (g,))}
    watcher = gradtest.watch(loss_with(straight), expect_differs=declared)
    report = watcher(0, fresh_params(), BATCH)
    assert report.verdict is gradtest.Verdict.PASS
    assert "can't follow declared products" in str(report)


def test_an_excluded_leaf_is_listed_and_not_looked_at():
    watcher = gradtest.watch(quiet, exclude=["params['b']"])
    report = watcher(0, fresh_params(), BATCH)
    assert report.unchecked == ("params['b'] (excluded)",)
    assert "params['b']" not in {finding.name for finding in report.findings}


# --- what is refused ------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"every": 0}, ValueError, "`every` must be an integer >= 1, got 0"),
        ({"every": 2.5}, ValueError, "`every` must be an integer >= 1, got 2.5"),
        ({"start": -1}, ValueError, "`start` must be an integer >= 0"),
        ({"sample": 0}, ValueError, "`sample` must be an integer >= 1"),
        ({"what": "all"}, ValueError, "`what` must be one of"),
        ({"on_failure": "stop"}, ValueError, "`on_failure` must be 'raise', 'log'"),
        ({"inconclusive": "log"}, ValueError, "`inconclusive` must be"),
        ({"exclude": "b"}, TypeError, "`exclude` must be a sequence"),
        ({"rtol": 2}, ValueError, "`rtol` must lie between"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_at_once(options, kind, says):
    with pytest.raises(kind, match=re.escape(says)):
        gradtest.watch(quiet, **options)


@pytest.mark.core
def test_wrong_calls_are_refused_with_a_reason():
    with pytest.raises(TypeError, match="`loss` must be callable"):
        gradtest.watch(3.0)
    with pytest.raises(TypeError, match="`loss` must return one real number"):
        gradtest.watch(lambda params, batch: params["w"])(0, fresh_params(), BATCH)
    for step in (1.5, True, "3"):
        with pytest.raises(TypeError, match="`step` must be an integer"):
            gradtest.watch(quiet)(step, fresh_params(), BATCH)
    shapes = jax.eval_shape(fresh_params)
    with pytest.raises(TypeError, match="must be an array that the training has now"):
        gradtest.watch(quiet)(0, shapes, BATCH)
    with pytest.raises(ValueError, match="calls no custom rule"):
        gradtest.watch(lambda params: jnp.sum(params["w"] ** 2), what="rules")(
            0, fresh_params()
        )


@pytest.mark.core
def test_inside_of_a_trace_it_says_where_it_belongs():
    watcher = gradtest.watch(quiet)
    for function in (
        lambda step: watcher(step, fresh_params(), BATCH),
        lambda scale: watcher(0, scaled(fresh_params(), scale), BATCH),
        lambda unused: watcher(0, fresh_params(), BATCH),
    ):
        with pytest.raises(TypeError, match="call the watcher from the training loop"):
            jax.jit(function)(1)


# --- saved and restored ---------------------------------------------------------------


@pytest.mark.parametrize("with_target", [False, True])
def test_a_state_goes_through_orbax_and_the_schedule_goes_on(tmp_path, with_target):
    watcher = gradtest.watch(square, every=5)
    for step in range(8):
        watcher(step, jnp.ones(2))
    restored = gradtest.watch(square, every=5)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "watcher", watcher.state_dict())
        checkpointer.wait_until_finished()
        target = ()
        if with_target:
            restored.prepare(jnp.ones(2))
            target = (restored.state_dict(),)
        state = checkpointer.restore(tmp_path / "watcher", *target)
    restored.load_state_dict(state)
    jax.tree.map(
        np.testing.assert_array_equal, restored.state_dict(), watcher.state_dict()
    )
    assert steps_checked(restored, range(8, 16)) == [10, 15]
    assert counts(restored) == (4, 0, 0, 0)


def test_a_state_without_any_check_can_be_saved(tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "watcher", gradtest.watch(square).state_dict())
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "watcher")
    restored = gradtest.watch(square, every=5)
    restored.load_state_dict(state)
    assert steps_checked(restored, range(3, 7)) == [3, 5]


@pytest.mark.core
def test_a_state_of_something_else_is_refused():
    watcher = gradtest.watch(quiet)
    watcher(0, fresh_params(), BATCH)
    state = watcher.state_dict()

    def another(params, batch):
        return quiet(params, batch)

    with pytest.raises(ValueError, match="another loss than another"):
        gradtest.watch(another).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks 'at_kink'"):
        gradtest.watch(quiet).load_state_dict({})
    with pytest.raises(TypeError, match="got int"):
        gradtest.watch(quiet).load_state_dict(3)
    restored = gradtest.watch(quiet, every=1)
    restored.load_state_dict(state)
    with pytest.raises(ValueError, match="`params` has other leaves"):
        restored(1, fresh_params(width=4), BATCH)


def test_a_summary_says_what_was_checked_when():
    watcher = gradtest.watch(loss_with(wrong_clip), every=5, on_failure="log")
    assert "no check yet" in str(watcher)
    for step, factor in ((0, 0.5), (5, 8)):
        watcher(step, scaled(fresh_params(), factor), BATCH)
    told = re.sub(r"\d+(\.\d)? (ms|s)\b", r"# \2", watcher.summary())
    assert told.splitlines() == [
        "watch(loss, every=5): 2 checks, the last at step 5: 1 passed, 1 failed, "
        "0 inconclusive; 1 in full",
        "  step 0: PASS, screened, # ms",
        "  step 5: FAIL, in full, # ms",
        "  last at step 5: params['b'], params['out'], params['w']",
        "  compiling took # s, 1 time",
    ]


# --- several processes ----------------------------------------------------------------


def test_a_watcher_in_a_job_comes_to_one_verdict():
    root = pathlib.Path(__file__).parent.parent
    environment = dict(os.environ, PYTHONPATH=str(root), JAX_PLATFORMS="cpu")
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [
            sys.executable, "-m", "gradtest.launch", "--processes", "2",
            "--devices-per-process", "4", "--timeout", "280", "--",
            "python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "tests/processes/watching.py",
        ],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(re.findall(r"^\[[01]\] 4 passed", done.stdout, re.MULTILINE)) == 2


def test_auxiliary_data_that_is_not_declared_is_refused():
    def loss(params):
        return jnp.sum(params**2), {"count": 1}

    with pytest.raises(TypeError, match=r"`loss` must return one real.*has_aux=True"):
        gradtest.watch(loss)(0, jnp.ones(3))
    assert gradtest.watch(loss, has_aux=True)(0, jnp.ones(3))
