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
import optax
import orbax.checkpoint
import pytest

import gradtest

X = jax.random.normal(jax.random.key(7), (32, 8))
Y = jnp.sin(X.sum(1, keepdims=True))
BATCH = X, Y


def _rule(value, slope):
    """Returns a function with a custom rule: its cotangent times `slope(x)`."""

    @jax.custom_vjp
    def layer(x):
        return value(x)

    layer.defvjp(
        lambda x: (value(x), x), lambda x, g: ((g * slope(x)).astype(x.dtype),)
    )
    return layer


def _clipped(x):
    return jnp.clip(x, -3, 3)


right_clip = _rule(_clipped, lambda x: jnp.abs(x) < 3)
wrong_clip = _rule(_clipped, lambda x: jnp.ones_like(x))


def _params(width=16):
    keys = jax.random.split(jax.random.key(3), 2)
    return {
        "w": 0.3 * jax.random.normal(keys[0], (8, width)),
        "b": jnp.zeros(width),
        "out": 0.1 * jax.random.normal(keys[1], (width, 1)),
    }


def _loss_with(layer):
    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.mean((layer(hidden @ params["out"]) - y) ** 2)

    return loss


quiet = _loss_with(right_clip)


def _scaled(params, factor):
    return jax.tree.map(lambda leaf: factor * leaf, params)


def _train(loss, params, steps, *, batch=lambda step: BATCH, rate=1e-2, **options):
    """Trains with Adam, watched; returns the watcher."""
    watcher = gradtest.watch(loss, **options)
    optimiser = optax.adam(rate)
    state = optimiser.init(params)

    @jax.jit
    def update(params, state, batch):
        gradient = jax.grad(loss)(params, batch)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        watcher(step, params, batch(step))
        params, state = update(params, state, batch(step))
    return watcher


def _counts(watcher):
    state = watcher.state_dict()
    names = ("checks", "checks_in_full", "failures", "inconclusive")
    return tuple(int(state[name]) for name in names)


# --- when it checks -------------------------------------------------------------------


def square(params):
    return jnp.sum(params**2)


def _steps_checked(watcher, steps):
    return [step for step in steps if watcher(step, jnp.ones(2)) is not None]


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
    assert _steps_checked(watcher, steps) == checked


@pytest.mark.core
def test_a_report_says_the_step_and_what_was_looked_at():
    watcher = gradtest.watch(quiet, every=5)
    report = watcher(5, _params(), BATCH)
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
    took = watcher.prepare(_params(), BATCH)
    assert took > 0
    assert watcher.compile_seconds == took
    assert _counts(watcher) == (0, 0, 0, 0)
    for step in range(3):
        watcher(step, _scaled(_params(), 1 + step), BATCH)
    assert watcher.compile_seconds == took
    watcher(3, _params(), (X[:8], Y[:8]))
    assert watcher.compile_seconds > took
    assert "2 times" in watcher.summary()


# --- right trainings ------------------------------------------------------------------


class _Network(nn.Module):
    width: int = 64
    dtype: object = jnp.float32
    activation: object = nn.relu
    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.activation(nn.Dense(self.width, dtype=self.dtype)(x))
            if self.rate:
                x = nn.Dropout(self.rate, deterministic=False)(x)
        return nn.Dense(1, dtype=self.dtype)(x)


def _of_module(**settings):
    module = _Network(**settings)
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)

    def loss(params, batch):
        (x, y), key = batch
        return jnp.mean((module.apply(params, x, rngs={"dropout": key}) - y) ** 2)

    return loss, params


def _recurrent():
    def loss(params, batch):
        x, y = batch[0]

        def cell(state, column):
            state = right_clip(jnp.tanh(state @ params["w"] + column[:, None]))
            return state, None

        state, _ = jax.lax.scan(cell, jnp.zeros((len(x), 4)), x.T)
        return jnp.mean((state @ params["out"] - y) ** 2)

    return loss, {"w": 0.3 * jnp.eye(4), "out": jnp.ones((4, 1))}


def _normalised():
    """The bias is cancelled by the normalisation: its gradient is rounding."""

    def loss(params, batch):
        x, y = batch[0]
        hidden = x @ params["w"] + params["b"]
        hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        return jnp.mean((right_clip(nn.relu(hidden)) @ params["out"] - y) ** 2)

    return loss, _params()


def _tied():
    """Whole rows are zero, and a layer starts at zero: relu at 0 again and again."""

    def loss(params, batch):
        x, y = batch[0]
        x = jnp.where(jnp.arange(len(x))[:, None] < 8, 0.0, x)
        hidden = nn.relu(x @ params["w"] + params["b"])
        hidden = nn.relu(hidden @ params["zero"])
        return jnp.mean((hidden.sum(1, keepdims=True) + params["end"] - y) ** 2)

    params = _params() | {"zero": jnp.zeros((16, 4)), "end": jnp.zeros(1)}
    del params["out"]
    return loss, params


@pytest.mark.parametrize(
    ("make", "in_full"),
    [
        (lambda: _of_module(rate=0.3), 0),
        (lambda: _of_module(dtype=jnp.bfloat16, activation=nn.silu), 0),
        (_recurrent, 0),
        (_normalised, 0),
        (_tied, 2),
    ],
    ids=["dropout", "bfloat16", "scan", "cancelled bias", "ties"],
)
def test_a_right_training_is_never_accused_and_seldom_looked_at_twice(make, in_full):
    loss, params = make()
    watcher = _train(
        loss,
        params,
        60,
        every=5,
        batch=lambda step: (BATCH, jax.random.key(step)),
    )
    checks, looked_at_twice, failures, undecided = _counts(watcher)
    assert (checks, failures, undecided) == (12, 0, 0)
    assert looked_at_twice <= in_full


def test_constants_rounded_to_half_precision_are_looked_at_twice_only_at_first():
    # The exact gelu rounds its constants to bfloat16, by 1e-3 of the gradient.
    loss, params = _of_module(
        dtype=jnp.bfloat16, activation=lambda x: nn.gelu(x, approximate=False)
    )
    watcher = gradtest.watch(loss, every=1)
    for step in range(4):
        report = watcher(step, params, (BATCH, jax.random.key(step)))
    _, in_full, failures, _ = _counts(watcher)
    assert failures == 0
    assert 1 <= in_full <= 3
    assert "as a whole check has explained before" in str(report)


def test_a_loop_without_a_reverse_mode_of_its_own_is_judged_by_differences():
    def root(a):  # of x**3 + x = a, by Newton's steps
        return jax.lax.fori_loop(
            0, 30, lambda i, x: x - (x**3 + x - a) / (3 * x**2 + 1), jnp.zeros_like(a)
        )

    def looped(a):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 30,
            lambda carry: (
                carry[0] + 1,
                carry[1] - (carry[1] ** 3 + carry[1] - a) / (3 * carry[1] ** 2 + 1),
            ),
            (0, jnp.zeros_like(a)),
        )[1]

    right = _rule(looped, lambda a: 1 / (3 * root(a) ** 2 + 1))
    wrong = _rule(looped, lambda a: 1 / (3.001 * root(a) ** 2 + 1))
    report = gradtest.watch(_loss_with(right))(0, _params(), BATCH)
    assert report.verdict is gradtest.Verdict.PASS
    assert {finding.judged_by for finding in report.findings} == {"measured"}
    with pytest.raises(gradtest.GradientMismatch, match="watch at step 0 failed"):
        gradtest.watch(_loss_with(wrong))(0, _scaled(_params(), 4), BATCH)


# --- wrong rules that begin to bite ---------------------------------------------------


def _caught(loss, points, batches=None, **options):
    """Watches a loss at several points; returns the error, and the step it came at."""
    watcher = gradtest.watch(loss, every=1, **options)
    for step, params in enumerate(points):
        batch = batches[step] if batches else BATCH
        try:
            watcher(step, params, batch)
        except gradtest.GradientMismatch as error:
            return error, step
    raise AssertionError("nothing was caught")


@pytest.mark.core
def test_a_rule_that_forgets_saturation_is_caught_where_it_saturates_first():
    growing = [_scaled(_params(), factor) for factor in (0.5, 1, 2, 8)]
    error, step = _caught(_loss_with(wrong_clip), growing)
    assert step == 3
    message = str(error)
    assert message.startswith("watch at step 3 failed: the gradient of loss is wrong")
    assert "the custom_vjp rule of layer" in message
    assert "|x| > 3" in message
    assert "with what step 3 was given" in message
    assert 2 <= len(message.splitlines()) <= 9
    assert "at step 3" in error.report.notes


def test_a_rule_that_forgets_a_mask_is_caught_at_the_first_padded_batch():
    @jax.custom_vjp
    def masked_mean(values, mask):
        return jnp.sum(values * mask) / jnp.sum(mask)

    def forward(values, mask):
        return masked_mean(values, mask), mask

    masked_mean.defvjp(
        forward, lambda mask, g: (g * jnp.ones_like(mask) / jnp.sum(mask), None)
    )

    def loss(params, batch):
        (x, y), mask = batch
        each = (jnp.tanh(x @ params["w"]) @ params["out"] - y) ** 2
        return masked_mean(each[:, 0], mask)

    full = jnp.ones(len(X))
    batches = [(BATCH, full), (BATCH, full), (BATCH, full.at[20:].set(0))]
    error, step = _caught(loss, [_params()] * 3, batches)
    assert step == 2
    assert "masked_mean" in str(error)


def test_a_factor_of_one_in_a_hundred_thousand_is_caught():
    slightly = _rule(jnp.tanh, lambda x: (1 + 1e-5) * (1 - jnp.tanh(x) ** 2))
    _, step = _caught(_loss_with(slightly), [_params()])
    assert step == 0


def test_a_gradient_that_turns_nan_beside_a_finite_loss_is_caught_there():
    def loss(params, batch):
        return jnp.sqrt(jnp.sum((params["w"] - 1) ** 2)) + jnp.mean(batch[0])

    points = [{"w": jnp.full(3, value)} for value in (3.0, 2.0, 1.0)]
    error, step = _caught(loss, points)
    assert step == 2
    assert "NaN although the value is finite" in str(error)


def test_a_backward_pass_in_half_precision_is_caught():
    narrow = _rule(
        jnp.tanh,
        lambda x: (1 - jnp.tanh(x.astype(jnp.bfloat16)) ** 2).astype(jnp.float32),
    )
    error, _ = _caught(_loss_with(narrow), [_params()])
    assert "loses its accuracy" in str(error)


def test_another_value_under_differentiation_is_caught():
    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x)

    layer.defvjp(
        lambda x: (1.01 * jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),)
    )
    error, _ = _caught(_loss_with(layer), [_params()])
    assert "another value under differentiation" in str(error)


def test_a_wrong_leaf_is_caught_beside_ties_that_were_found_harmless():
    loss, params = _tied()

    def later(params, batch):
        return loss(params, batch) + jnp.sum(wrong_clip(params["late"]))

    points = [params | {"late": jnp.full(2, value)} for value in (1.0, 2.0, 5.0)]
    error, step = _caught(later, points, [(BATCH, None)] * 3)
    assert step == 2
    assert "params['late']" in str(error)


# --- what happens then ----------------------------------------------------------------


def test_a_failure_may_be_logged_and_the_training_goes_on(caplog):
    watcher = gradtest.watch(_loss_with(wrong_clip), every=1, on_failure="log")
    with caplog.at_level(logging.ERROR, logger="gradtest.watch"):
        report = watcher(0, _scaled(_params(), 8), BATCH)
    assert report.verdict is gradtest.Verdict.FAIL
    (record,) = caplog.records
    assert "watch at step 0 failed: the gradient of loss is wrong" in record.message
    assert watcher(1, _scaled(_params(), 0.5), BATCH).verdict is gradtest.Verdict.PASS
    assert watcher.failures == 1


def test_a_failure_may_be_handed_to_a_function():
    told = []
    watcher = gradtest.watch(_loss_with(wrong_clip), on_failure=told.append)
    report = watcher(0, _scaled(_params(), 8), BATCH)
    assert told == [report]


def test_after_a_failure_that_was_raised_the_next_check_waits_its_turn():
    watcher = gradtest.watch(_loss_with(wrong_clip), every=5)
    with pytest.raises(gradtest.GradientMismatch):
        watcher(0, _scaled(_params(), 8), BATCH)
    assert watcher(1, _params(), BATCH) is None


@pytest.mark.parametrize(
    ("params", "batch", "says"),
    [
        (_scaled(_params(), jnp.nan), BATCH, r"params\['b'\] \(and 2 more\) holds NaN"),
        (_params(), (X * jnp.inf, Y), "the loss is NaN or infinite"),
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
    watcher = gradtest.watch(_loss_with(wrong_clip))
    chex.disable_asserts()
    try:
        report = watcher(0, _scaled(_params(), 8), BATCH)
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
    params, old = _params(), None
    for number in range(3):
        assert watcher(number, params, BATCH).verdict is gradtest.Verdict.PASS
        old, params = params, step(params, BATCH)
    assert old["w"].is_deleted()
    with pytest.raises(ValueError, match="before the step that donates it"):
        watcher(3, old, BATCH)


def test_parameters_and_random_state_stay_as_they_are():
    params = _params()
    before = jax.tree.map(np.array, params)
    state, flags = np.random.get_state()[1].copy(), dict(jax.config.values)
    gradtest.watch(quiet, what="both")(0, params, BATCH)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert dict(jax.config.values) == flags


def test_a_watcher_keeps_no_parameters_alive():
    watcher = gradtest.watch(quiet, every=1)
    params = _params()
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
    params = _scaled(_params(), 20)
    reports = [watcher(step, params, BATCH) for step in range(2)]
    names = [rule.name for report in reports for rule in report.rules]
    assert sorted(names) == ["layer", "relu"]
    verdicts = {r.rules[0].name: r.verdict.value for r in reports}
    assert verdicts == {"layer": "FAIL", "relu": "PASS"}
    assert sorted(watcher.state_dict()["rule_steps"]) == [0, 1]


def test_both_screens_the_gradient_and_audits_a_rule():
    report = gradtest.watch(quiet, what="both")(0, _params(), BATCH)
    assert [rule.name for rule in report.rules] == ["layer"]
    assert report.leaf("params['w']").verdict is gradtest.Verdict.PASS


def test_leaves_are_looked_at_in_turn_and_all_come_round():
    watcher = gradtest.watch(quiet, every=1, sample=2)
    seen = []
    for step in range(2):
        report = watcher(step, _params(), BATCH)
        seen.append({finding.name for finding in report.findings})
        assert len(report.unchecked) == 3 - len(seen[-1])
    assert seen[0] | seen[1] == {"params['b']", "params['out']", "params['w']"}
    assert sorted(watcher.state_dict()["leaf_steps"].tolist()) in ([0, 0, 1], [0, 1, 1])


def test_further_arguments_and_auxiliary_data_are_handed_on():
    def loss(params, x, y, *, scale=1.0):
        value = quiet(params, (x, y)) * scale
        return value, {"value": value}

    report = gradtest.watch(loss, has_aux=True)(0, _params(), X, Y)
    assert report.verdict is gradtest.Verdict.PASS


def test_a_rule_that_differs_on_purpose_is_declared():
    straight = _rule(jnp.round, jnp.ones_like)
    loss = _loss_with(straight)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.watch(loss)(0, _params(), BATCH)
    watcher = gradtest.watch(loss, expect_differs={straight: lambda x: x})
    assert watcher(0, _params(), BATCH).verdict is gradtest.Verdict.PASS


def test_a_declared_product_is_judged_without_differences():
    straight = _rule(jnp.round, jnp.ones_like)
    declared = {straight: gradtest.vjp(lambda args, g: (g,))}
    watcher = gradtest.watch(_loss_with(straight), expect_differs=declared)
    report = watcher(0, _params(), BATCH)
    assert report.verdict is gradtest.Verdict.PASS
    assert "can't follow declared products" in str(report)


def test_an_excluded_leaf_is_listed_and_not_looked_at():
    watcher = gradtest.watch(quiet, exclude=["params['b']"])
    report = watcher(0, _params(), BATCH)
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
        gradtest.watch(lambda params, batch: params["w"])(0, _params(), BATCH)
    for step in (1.5, True, "3"):
        with pytest.raises(TypeError, match="`step` must be an integer"):
            gradtest.watch(quiet)(step, _params(), BATCH)
    shapes = jax.eval_shape(_params)
    with pytest.raises(TypeError, match="must be an array that the training has now"):
        gradtest.watch(quiet)(0, shapes, BATCH)
    with pytest.raises(ValueError, match="calls no custom rule"):
        gradtest.watch(lambda params: jnp.sum(params["w"] ** 2), what="rules")(
            0, _params()
        )


@pytest.mark.core
def test_inside_of_a_trace_it_says_where_it_belongs():
    watcher = gradtest.watch(quiet)
    for function in (
        lambda step: watcher(step, _params(), BATCH),
        lambda scale: watcher(0, _scaled(_params(), scale), BATCH),
        lambda unused: watcher(0, _params(), BATCH),
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
    assert _steps_checked(restored, range(8, 16)) == [10, 15]
    assert _counts(restored) == (4, 0, 0, 0)


def test_a_state_without_any_check_can_be_saved(tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "watcher", gradtest.watch(square).state_dict())
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "watcher")
    restored = gradtest.watch(square, every=5)
    restored.load_state_dict(state)
    assert _steps_checked(restored, range(3, 7)) == [3, 5]


@pytest.mark.core
def test_a_state_of_something_else_is_refused():
    watcher = gradtest.watch(quiet)
    watcher(0, _params(), BATCH)
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
        restored(1, _params(width=4), BATCH)


def test_a_summary_says_what_was_checked_when():
    watcher = gradtest.watch(_loss_with(wrong_clip), every=5, on_failure="log")
    assert "no check yet" in str(watcher)
    for step, factor in ((0, 0.5), (5, 8)):
        watcher(step, _scaled(_params(), factor), BATCH)
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
