"""Gradients that are not finite beside a finite value: where, and what mends it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradtest
from gradtest._src.nans.singular import SINGULAR, guarded_forms
from gradtest._src.nans.tape import Event, Node
from tests.bad_formulas import BAD, ZERO, norm, root, sigmoid


def failure(fn: Callable[..., Any], *args: Any, **options: Any) -> gradtest.Report:
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grads_finite(fn, *args, **options)
    assert len(str(caught.value).splitlines()) <= 8
    return caught.value.report


def chief(report: gradtest.Report) -> Any:
    return next(f for f in report.findings if f.verdict is gradtest.Verdict.FAIL)


def as_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        jnp.asarray(a, jnp.float32) if np.asarray(a).dtype == np.float64 else a
        for a in args
    )


@pytest.mark.parametrize("name", BAD)
def test_the_equation_is_named_and_a_verified_remedy_offered(name: str) -> None:
    bad = BAD[name]
    finding = chief(failure(bad.fn, *as_float32(bad.args), argnums=0))
    assert finding.cause.name in ("NaN gradient", "infinite gradient")
    assert f"`{bad.equation}`" in finding.cause.says
    assert bad.code in finding.line.code
    assert finding.cause.remedy.startswith(f"{bad.remedy}: `")
    assert "(verified: with it the value is the same" in finding.cause.remedy
    assert ("slope is infinite" in finding.cause.says) == bad.infinite
    assert ("where the slope is infinite" in finding.cause.remedy) == bad.infinite


def test_two_terms_are_given_to_hypot_where_that_is_guarded() -> None:
    def distance(x, y):
        return jnp.sqrt(x**2 + y**2)

    remedy = chief(failure(distance, 0.0, 0.0)).cause.remedy
    is_guarded = np.isfinite(jax.grad(jnp.hypot)(0.0, 0.0))
    assert remedy.startswith("jnp.hypot: " if is_guarded else "double where: ")


def test_the_table_of_the_docs_names_every_primitive_and_every_remedy() -> None:
    table = Path(__file__).parents[1].joinpath("docs", "nans.md").read_text("utf-8")
    for name in SINGULAR:
        assert f"`{name}`" in table
    for bad in BAD.values():
        assert bad.remedy.replace("double where", "double `where`") in table


def test_the_message_of_the_docs_is_as_it_is_printed(tmp_path, monkeypatch) -> None:
    table = Path(__file__).parents[1].joinpath("docs", "nans.md").read_text("utf-8")
    code, message = re.findall(r"```(?:python|text)\n(.*?)```", table, re.DOTALL)[:2]
    source = tmp_path / "loss.py"
    source.write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        exec(compile(code, str(source), "exec"), {})
    assert f"{caught.value}\n" == message


# --- what is offered is right as it is written ------------------------------------

AT = {
    "log1p": -1.0, "acos": 1.0, "asin": -1.0, "atanh": 1.0, "acosh": 1.0,
    "erf_inv": -1.0, "exp": 100.0, "exp2": 200.0,
}  # fmt: skip
INSIDE = {"acosh": 1.5, "erf_inv": 0.3, "log1p": 0.3}


def event_of(name: str, value: float) -> Event:
    second = {"pow": 0.5, "atan2": None}.get(name)
    node = Node(np.float32(value), None, True)
    other = Node(np.float32(second or 0.0), None, False)
    operands = [other, node] if name in ("div", "rem", "atan2") else [node, other]
    eqn: Any = None
    if name == "integer_pow":
        eqn = jax.make_jaxpr(lambda s: s**-2)(1.0).eqns[0]
    return Event(name, eqn, operands, [], None)


@pytest.mark.parametrize("name", SINGULAR)
def test_the_code_that_is_offered_has_a_finite_gradient_as_it_is_written(
    name: str,
) -> None:
    forms = guarded_forms(event_of(name, 0.0))
    assert {form.is_whole for form in forms} == {True, False}
    singular = jnp.float32(AT.get(name, 0.0))
    ordinary = jnp.float32(INSIDE.get(name, 0.5))
    for form in forms:
        guarded, plain = as_function(form.code), as_function(unguarded(forms[0].code))
        assert np.isfinite(jax.grad(guarded)(singular))
        assert guarded(ordinary) == pytest.approx(plain(ordinary))
        assert jax.grad(guarded)(ordinary) == pytest.approx(jax.grad(plain)(ordinary))
        if form.is_whole:
            kept = guarded(singular), plain(singular)
            assert np.array_equal(*kept, equal_nan=True)


def as_function(code: str) -> Callable[[Any], Any]:
    names = {"jnp": jnp, "jax": jax, "a": 0.0, "y": 0.0, "abs": jnp.abs}
    return lambda s: eval(code.strip("`"), {**names, "s": s})


def unguarded(code: str) -> str:
    return re.sub(r"jnp.where\([^,]*, s, [-0-9.]+\)", "s", code)


# --- nothing is offered that would be wrong ---------------------------------------


def test_a_guard_that_the_slope_contradicts_is_not_offered() -> None:
    def identity(x):
        return jnp.sqrt(x) ** 2  # its slope at 0 is 1, and a guard would make it 0

    finding = chief(failure(identity, 0.0))
    assert "`sqrt`" in finding.cause.says
    assert "verified" not in finding.cause.remedy
    assert "no guarded form" in finding.cause.remedy


def test_eigenvectors_of_equal_eigenvalues_are_named_and_have_no_remedy() -> None:
    def first(x):
        return jnp.sum(jnp.linalg.eigh(x)[1][0])

    finding = chief(failure(first, jnp.eye(3)))
    assert "`eigh`" in finding.cause.says
    assert "equal eigenvalues" in finding.cause.says
    assert "verified" not in finding.cause.remedy


def test_a_rule_by_hand_is_named_with_its_line_inside() -> None:
    @jax.custom_vjp
    def own_root(x):
        return jnp.sqrt(x)

    def bwd(x, ct):
        return (ct / (2 * jnp.sqrt(x)),)

    own_root.defvjp(lambda x: (jnp.sqrt(x), x), bwd)
    finding = chief(failure(lambda x: jnp.sum(own_root(x)), jnp.array([1.0, 0.0])))
    assert "inside of the rule of `own_root`, `div`" in finding.cause.says
    assert "ct / (2 * jnp.sqrt(x))" in finding.line.code
    assert "verified" not in finding.cause.remedy


def test_a_rule_of_a_library_is_named_and_its_user_not_asked_to_change_it() -> None:
    finding = chief(failure(jax.scipy.special.entr, jnp.array([0.0, 2.0])))
    assert "inside of the rule of `_xlogx`, `log` takes 0 at [0]" in finding.cause.says
    assert "slope is infinite" in finding.cause.says
    assert finding.cause.remedy.startswith("see what `log` takes there")


def test_an_exponent_below_a_negative_number_is_named() -> None:
    def powers(x, p):
        return jnp.sum(x**p)

    report = failure(powers, jnp.array([-2.0, 2.0]), jnp.array([2.0, 2.0]))
    finding = report.leaf("p")
    assert "`pow`" in finding.cause.says
    assert "takes -2 at [0]" in finding.cause.says
    assert "verified" not in finding.cause.remedy


def test_a_nan_that_a_where_stops_behind_is_not_taken_for_the_cause() -> None:
    def both(x):
        stopped = jnp.sqrt(jnp.where(x > 5, x, 1.0))  # right
        dropped = jnp.where(x > 0, 1.0 / x, 0.0)
        return jnp.sum(stopped + dropped)

    finding = chief(failure(both, jnp.array([0.0, 6.0])))
    assert "`div`" in finding.cause.says
    assert "1.0 / x" in finding.line.code


# --- inside of models -------------------------------------------------------------


class Normalised(nn.Module):
    """A layer that divides by a norm."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(4)(x)
        size = jnp.sqrt(jnp.sum(hidden**2, axis=-1, keepdims=True))
        return hidden / (size + 1e-6)


class Rooted(nnx.Module):
    """A layer that takes a root."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return jnp.sum(jnp.sqrt(self.linear(x) ** 2))


def test_a_line_inside_of_a_linen_module_is_named_and_mended() -> None:
    model = Normalised()
    x = jnp.zeros((2, 3))
    params = model.init(jax.random.key(0), x)
    report = failure(lambda p: jnp.sum(model.apply(p, x) ** 2), params)
    finding = report.leaf("p['params']['Dense_0']['kernel']")
    assert "size = jnp.sqrt(" in finding.line.code
    assert finding.cause.remedy.startswith("safe norm: ")


def test_a_line_inside_of_an_nnx_module_is_named_and_mended() -> None:
    graph, state = nnx.split(Rooted(nnx.Rngs(0)))
    report = failure(lambda s: nnx.merge(graph, s)(jnp.zeros((2, 3))), state)
    finding = chief(report)
    assert "jnp.sqrt(self.linear(x)" in finding.line.code
    assert "verified" in finding.cause.remedy


def test_many_equations_of_one_line_are_mended_as_one() -> None:
    def penalty(params):
        return sum(jnp.sqrt(jnp.sum(w**2)) for w in params)

    report = failure(penalty, [jnp.zeros(2 + i) for i in range(6)])
    remedy = report.leaf("params[0]").cause.remedy
    assert remedy.startswith("safe norm: ")
    assert remedy.count("safe norm") == 1


# --- the other assertions ---------------------------------------------------------


@pytest.mark.parametrize("name", ["sqrt at 0", "where with log", "norm at 0"])
def test_other_assertions_tell_the_same(name: str) -> None:
    bad = BAD[name]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(bad.fn, *as_float32(bad.args))
    finding = caught.value.report.leaf("x")
    assert f"`{bad.equation}`" in finding.cause.says
    assert "verified" in finding.cause.remedy
    assert bad.code in finding.line.code


def test_an_overflow_in_working_precision_is_told_of_and_mended() -> None:
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(sigmoid, jnp.array([-100.0, 0.5]))
    finding = caught.value.report.leaf("x")
    assert finding.cause.name == "overflow in working precision"
    assert "`exp`" in finding.cause.says
    assert "jax.nn.sigmoid" in finding.cause.remedy


def test_half_precision_and_complex_numbers_are_looked_into_as_well() -> None:
    half = chief(failure(root, jnp.asarray(ZERO, jnp.bfloat16)))
    assert "verified" in half.cause.remedy
    wavy = chief(failure(lambda z: jnp.sum(jnp.abs(jnp.sqrt(z))), jnp.zeros(2) + 0j))
    assert "`sqrt`" in wavy.cause.says


def test_a_special_point_is_told_of_with_equation_and_remedy() -> None:
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(
            norm, gradtest.domains.normal((3,)), hazards=True
        )
    finding = chief(caught.value.report)
    assert finding.hazard
    assert "`sqrt`" in finding.cause.says
    assert finding.cause.remedy.startswith("safe norm: ")


def test_every_trial_and_every_leaf_is_looked_into_where_it_fails() -> None:
    def loss(x, y):
        return jnp.sum(jnp.sqrt(x)) + jnp.linalg.norm(y)

    report = failure(loss, jnp.zeros(2), jnp.zeros(3), trials=2)
    assert "double where" in report.leaf("x").cause.remedy
    assert "jnp.linalg.norm(y)" in report.leaf("y").line.code
