"""Every broken rule is found, by name, place and cause; no right twin is accused."""

import functools

import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict
from tests import zoo_contracts, zoo_layers, zoo_tangents
from tests.broken_rules import BROKEN_RULES, MALFORMED
from tests.hiding_places import HIDING_PLACES
from tests.planted_lines import NAMED_BESIDE, is_planted
from tests.zoo_entry import cases, normal

_ALL = (*BROKEN_RULES, *MALFORMED)


def _audit(entry, right):
    rule = entry.make(right)
    return rule, gradtest.assert_custom_rules_match(entry.program(rule), *entry.args())


def _failed(report):
    return [found for found in report.findings if found.verdict is Verdict.FAIL]


@pytest.mark.parametrize("entry", cases(_ALL, pytest.mark.core))
def test_a_broken_rule_is_found_with_its_name_place_and_cause(entry):
    rule = entry.make(False)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_custom_rules_match(entry.program(rule), *entry.args())
    failed = _failed(caught.value.report)
    assert {found.rule.name for found in failed} == {rule.__name__}
    assert rule.__name__ in str(caught.value)
    assert entry.place(rule) in str(caught.value)
    assert {found.check for found in failed} & {*entry.checks}
    assert failed[0].cause.name in entry.causes  # the first that is named
    if entry in BROKEN_RULES:
        line = next((found.line for found in failed if found.line), None)
        named = is_planted(line, entry.make)
        assert named == (entry.name not in NAMED_BESIDE), line


def test_the_planted_line_is_named_in_four_of_five():
    assert {entry.name for entry in BROKEN_RULES} >= NAMED_BESIDE.keys()
    assert len(NAMED_BESIDE) <= len(BROKEN_RULES) / 5


@pytest.mark.parametrize("entry", cases(_ALL, pytest.mark.core))
def test_the_right_twin_passes_and_is_listed(entry):
    rule, report = _audit(entry, right=True)
    assert report.verdict is Verdict.PASS
    assert rule.__name__ in {found.rule.name for found in report.findings}
    assert rule.__name__ in str(report)


@pytest.mark.parametrize(
    "entry", cases(entry for entry in BROKEN_RULES if entry.looks_right_at)
)
def test_a_broken_rule_passes_at_the_points_where_it_is_right(entry):
    # Why a rule is audited at the values that reach it in the user's own program.
    fn = entry.program(entry.make(False))
    report = gradtest.assert_custom_rules_match(fn, *entry.looks_right_at())
    assert report.verdict is Verdict.PASS


def _twice(rule):
    return lambda x: rule(x) + rule(20 * x)


def _last_of_many(rule):
    return lambda x: sum(rule(factor * x) for factor in [0.1] * 29 + [20])


def _last_step(rule):
    def add(total, factor, x):
        return total + rule(factor * x), None

    factors = jnp.array([0.1] * 9 + [20])
    return lambda x: jax.lax.scan(functools.partial(add, x=x), x, factors)[0]


def _one_row(rule):
    return lambda x: jax.vmap(rule)(jnp.stack([x / 2, x, 20 * x, x]))


@pytest.mark.core
@pytest.mark.parametrize("program", [_twice, _last_of_many, _last_step, _one_row])
def test_a_mistake_that_one_call_of_many_shows_is_found(program):
    # Only what is clipped is wrong, and only one call clips.
    entry = zoo_layers.clip_that_leaks_outside
    x = normal(0, 6) / 8
    report = gradtest.assert_custom_rules_match(program(entry.make(True)), x)
    assert report.verdict is Verdict.PASS
    with pytest.raises(gradtest.GradientMismatch, match="clip"):
        gradtest.assert_custom_rules_match(program(entry.make(False)), x)


# One for each sort of mistake that can hide: by the derivative, its value, its order.
_HIDDEN = (
    zoo_layers.layer_norm_without_the_mean,
    zoo_layers.clip_that_leaks_outside,
    zoo_contracts.mish_whose_fwd_is_swish,
    zoo_contracts.tanh_with_a_squared_cotangent,
    zoo_contracts.sine_with_a_stopped_slope,
    zoo_tangents.softsign_whose_jvp_has_another_value,
    zoo_tangents.softplus_with_a_stopped_slope,
)


# Where the trace differs most from one version of JAX to the next.
_CORE_PLACES = ("map", "cond", "vmap", "nested", "linen_scan")


def _places():
    return [
        pytest.param(
            place,
            id=place.name,
            marks=[pytest.mark.core] if place.name in _CORE_PLACES else [],
        )
        for place in HIDING_PLACES
    ]


@pytest.mark.parametrize("entry", cases(_HIDDEN))
@pytest.mark.parametrize("place", _places())
def test_a_broken_rule_is_found_wherever_it_hides(place, entry):
    rule = entry.make(False)
    fn, args = place.make(rule)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_custom_rules_match(fn, *args)
    failed = [
        found
        for found in _failed(caught.value.report)
        if found.rule.name == rule.__name__
    ]
    assert {found.check for found in failed} & {*entry.checks}
    for name in place.path:
        assert any(name in str(found.rule.path) for found in failed)
    assert entry.place(rule) in str(caught.value)


@pytest.mark.parametrize("entry", cases(_HIDDEN))
@pytest.mark.parametrize("place", _places())
def test_a_right_rule_passes_wherever_it_hides(place, entry):
    rule = entry.make(True)
    fn, args = place.make(rule)
    report = gradtest.assert_custom_rules_match(fn, *args)
    assert report.verdict is Verdict.PASS
    assert rule.__name__ in {found.rule.name for found in report.findings}
