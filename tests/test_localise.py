"""Which line a failure names, and that looking for it leaves nothing behind."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src import source_info_util

import gradtest
from gradtest._src import jaxprs

pytestmark = pytest.mark.core

_X = jnp.array([0.5, -1.0, 1.5, 2.0])


def _line(assertion, *args, **options):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assertion(*args, **options)
    report = caught.value.report
    wrong = [f for f in report.findings if f.verdict is gradtest.Verdict.FAIL]
    return next(finding.line for finding in wrong if finding.line)


def _cubes(x):
    return jnp.sum(x**3)


def test_a_number_in_a_gradient_by_hand():
    def gradient(x):
        square = x * x
        return 2 * square

    line = _line(gradtest.assert_grad_matches, _cubes, gradient, _X)
    assert line.code == "return 2 * square"
    assert "with 3 in place of 2" in line.says
    assert line.likelihood > 0.5


def test_a_number_that_is_mapped_over_a_tree():
    def loss(tree):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))

    def gradient(tree):
        return jax.tree.map(
            lambda leaf: 3 * leaf,
            tree,
        )

    line = _line(gradtest.assert_grad_matches, loss, gradient, {"a": _X, "b": _X[:2]})
    assert line.code == "lambda leaf: 3 * leaf,"
    assert "with 2 in place of 3" in line.says


def _averaged(sign):
    """An exponential average whose backward pass is a loop by hand."""

    @jax.custom_vjp
    def averaged(x, decay):
        def step(carry, row):
            carry = decay * carry + (1 - decay) * row
            return carry, carry

        return jax.lax.scan(step, jnp.zeros(x.shape[1]), x)[1]

    def fwd(x, decay):
        y = averaged(x, decay)
        return y, (x, y, decay)

    def bwd(kept, g):
        x, y, decay = kept
        before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])

        def back(carry, rows):
            moved, total = carry
            moved = moved + rows[0]
            change = jnp.sum(moved * (rows[2] - rows[1]))
            total = total + change if sign > 0 else total - change
            return (decay * moved, total), (1 - decay) * moved

        start = jnp.zeros(x.shape[1]), 0.0
        (_, total), dx = jax.lax.scan(back, start, (g, x, before), reverse=True)
        return dx, total

    averaged.defvjp(fwd, bwd)
    return averaged


def test_a_line_inside_of_a_loop():
    args = gradtest.domains.normal((6, 3)), 0.7
    gradtest.assert_custom_rules_match(_averaged(1), *args)
    line = _line(gradtest.assert_custom_rules_match, _averaged(-1), *args)
    assert line.code.startswith("total = total + change")
    assert "with + in place of -" in line.says


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def _product(x, y):
    return _sine(x) * y


def _product_bwd(kept, g):
    x, _ = kept
    pull = jax.vjp(_sine, x)[1]
    return pull(g)[0], g * jnp.sin(x)


_product.defvjp(lambda x, y: (_product(x, y), (x, y)), _product_bwd)


def test_a_rule_that_is_right_is_not_blamed_for_the_one_that_calls_it():
    line = _line(gradtest.assert_custom_rules_match, _product, _X, 1 + _X)
    assert line.code == "return pull(g)[0], g * jnp.sin(x)"


def test_in_a_whole_program_the_wrong_rule_is_named():
    @jax.custom_vjp
    def halved(x):
        return x / 2

    halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g,))
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(lambda x: jnp.sum(_sine(halved(x)) ** 2), _X)
    cause = caught.value.report.leaf("x").cause
    assert cause.name == "constant factor"
    assert cause.says.startswith("the custom_vjp rule of halved (bwd at ")


def test_a_function_that_both_passes_share_is_not_blamed():
    def turned(x, way):
        return way * jnp.roll(x, 1)

    @jax.custom_vjp
    def turn(x):
        return turned(x, 1)

    def bwd(_, g):
        return (turned(jnp.roll(g, -2), -1),)

    turn.defvjp(lambda x: (turned(x, 1), None), bwd)
    line = _line(gradtest.assert_custom_rules_match, turn, _X)
    assert line.code == "return (turned(jnp.roll(g, -2), -1),)"


def test_what_jax_was_told_to_tell_is_put_back_after_an_exception():
    before = source_info_util.current

    def fail():
        with jaxprs.hand_written_lines():
            assert source_info_util.current is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert source_info_util.current is before


def test_a_tracer_of_the_users_stays():
    def tracer(frame, event, arg):
        return None

    @jax.custom_vjp
    def looks(x):
        return x**2

    def bwd(x, g):
        if isinstance(g, jax.core.Tracer):
            return (2 * x * g,)
        return (3 * x * g,)

    looks.defvjp(lambda x: (x**2, x), bwd)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        line = _line(gradtest.assert_custom_rules_match, looks, _X)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert line.code == "if isinstance(g, jax.core.Tracer):"


def test_a_passing_check_looks_for_no_line(monkeypatch):
    from gradtest._src import explain

    def fail(*_, **__):
        raise AssertionError("looked for a line")

    monkeypatch.setattr(explain, "guilty_line", fail)
    monkeypatch.setattr(explain, "exhibits_of", fail)
    gradtest.assert_custom_rules_match(functools.partial(_sine), _X)
    gradtest.assert_grad_matches(_cubes, lambda x: 3 * x**2, _X)
