"""`gradtest.power`: which broken rules an assertion catches, and which it lets pass."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import gradtest
from gradtest.domains import normal

KINDS = ["scale 1.01", "sign flip", "stop_gradient"]
X = jnp.linspace(-1.0, 2.0, 6).reshape(2, 3)


@jax.custom_vjp
def cube(x: jax.Array) -> jax.Array:
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * g * x**2,))


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    return jnp.log1p(jnp.exp(x))


@softplus.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


def summed(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(cube(x)))


def in_jit(x: jax.Array) -> jax.Array:
    return jax.jit(summed)(x)


def in_a_scan(x: jax.Array) -> jax.Array:
    def step(carry: jax.Array, row: jax.Array) -> Any:
        return carry + cube(row), None

    return jnp.sum(jax.lax.scan(step, jnp.zeros(3), x)[0])


def in_a_branch(x: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] < 0, summed, lambda x: jnp.sum(x), x)


def under_vmap_and_remat(x: jax.Array) -> jax.Array:
    return jnp.sum(jax.checkpoint(jax.vmap(lambda row: cube(row) * row))(x))


def in_a_gradient(x: jax.Array) -> jax.Array:
    return jnp.sum(jax.grad(summed)(x) * jnp.cos(x))


def made_inside(x: jax.Array) -> jax.Array:
    def own(x: jax.Array) -> jax.Array:
        return x**3

    rule = jax.custom_vjp(own)
    rule.defvjp(lambda x: (own(x), x), lambda x, g: (3 * g * x**2,))
    return jnp.sum(rule(x))


def by_a_jvp(x: jax.Array) -> jax.Array:
    return jnp.sum(softplus(x))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(summed, marks=pytest.mark.core),
        in_jit,
        in_a_scan,
        in_a_branch,
        under_vmap_and_remat,
        in_a_gradient,
        made_inside,
        by_a_jvp,
    ],
    ids=lambda fn: fn.__name__,
)
def test_a_rule_is_broken_and_caught_wherever_it_is_called(fn: Any):
    found = gradtest.power(fn, X, mutations=KINDS, scales=False)
    assert len(found.caught) == 3
    assert found.rate == 1
    assert not found.survived
    assert not found.second_order
    assert not found.malformed


def test_the_whole_gradient_of_a_program_sees_a_rule_that_it_differentiates_itself():
    found = gradtest.power(
        in_a_gradient,
        X,
        assertion=gradtest.assert_autodiff_matches,
        mutations=KINDS,
        scales=False,
    )
    assert [mutant.name for mutant in found.caught] == KINDS


def test_survivors_are_told_with_their_line_and_meaning():
    def looks_at_the_first_entry(fn: Any, x: jax.Array) -> None:
        np.testing.assert_allclose(
            jax.grad(fn)(x)[0, 0], jax.grad(lambda x: jnp.sum(x**3))(x)[0, 0], 1e-4
        )

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(cube(x))

    found = gradtest.power(
        plain, X, assertion=looks_at_the_first_entry, mutations=["zero*", "scale 1.01"]
    )
    (caught,) = found.caught
    assert caught.says == "dx times 1.01"
    (entry, rows) = found.survived
    assert entry.says == "dx zero at [1, 2]"
    assert entry.at.startswith("bwd at tests/test_power.py:")
    assert entry.error > 0.1
    assert rows.says == "dx zero in row 1"
    text = str(found)
    first = (
        "Power of looks_at_the_first_entry on plain: 1 of 3 mutants caught; 2 survived."
    )
    assert text.startswith(first)
    assert f"SURVIVED  {entry.at}: dx zero at [1, 2] (off by " in text
    assert found.rules[0].smallest_scale == pytest.approx(1e-3)


def test_a_first_order_check_does_not_count_what_second_derivatives_show():
    found = gradtest.power(
        summed,
        X,
        assertion=lambda fn, x: jax.test_util.check_grads(
            fn, (x,), order=1, modes=["rev"]
        ),
        mutations="stop_gradient",
        scales=False,
    )
    (mutant,) = found.second_order
    assert mutant.outcome.value == "seen at second order only"
    assert not found.caught
    assert not found.survived
    ours = gradtest.power(summed, X, mutations="stop_gradient", scales=False, order=1)
    assert len(ours.second_order) == 1


def test_what_no_point_of_the_test_shows_has_survived():
    @jax.custom_vjp
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    doubled.defvjp(
        lambda x: (2 * x, jnp.ones_like(x)),
        lambda ones, g: (2 * g * jnp.where(ones > 50, ones, 1.0),),
    )
    found = gradtest.power(doubled, X, mutations="wrong residual", scales=False)
    (mutant,) = found.survived  # the result is above 50 at large numbers alone
    assert mutant.says == "the result in place of residual"
    assert mutant.error > 1


def test_what_changes_nothing_is_equivalent_and_explained():
    @jax.custom_vjp
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    doubled.defvjp(
        lambda x: (2 * x, jnp.ones_like(x)),
        lambda ones, g: (2 * g + 0 * ones,),
    )
    found = gradtest.power(doubled, X, mutations="wrong residual", scales=False)
    says = [mutant.says for mutant in found.equivalent]
    assert says == ["zero in place of residual", "the result in place of residual"]
    for mutant in found.equivalent:
        assert "is the same, to 1e-12, at" in mutant.why
        assert "32 of them drawn" in mutant.why
    assert found.rate == 1
    assert not found.survived


def test_a_rule_in_a_branch_that_is_not_taken_is_listed():
    found = gradtest.power(
        lambda x: in_a_branch(x) + jnp.sum(softplus(x)), X + 5, mutations=KINDS[:1]
    )
    (unreached,) = found.unreached
    assert unreached.name == "cube"
    assert "not reached" in unreached.trouble
    assert [mutant.at.split()[0] for mutant in found.caught] == ["jvp"]


def test_the_smallest_error_of_scale_is_found():
    found = gradtest.power(summed, X, mutations="sign flip")
    assert found.smallest_scale == pytest.approx(1e-5)


def test_a_test_that_fails_before_anything_is_broken_is_told():
    wrong = jax.custom_vjp(lambda x: x**3)
    wrong.defvjp(lambda x: (x**3, x), lambda x, g: (2 * g * x**2,))
    with pytest.raises(ValueError, match=r"fails on .* before any rule is broken"):
        gradtest.power(lambda x: jnp.sum(wrong(x)), X)


def test_a_mutant_that_raises_something_else_is_malformed():
    def crashes(fn: Any, x: jax.Array) -> None:
        if float(jnp.sum(jax.grad(fn)(x))) < 0:
            raise RuntimeError("no assertion")

    found = gradtest.power(
        lambda x: jnp.sum(cube(x)),
        jnp.abs(X),
        assertion=crashes,
        mutations="sign flip",
        scales=False,
    )
    (mutant,) = found.malformed
    assert mutant.why == "RuntimeError: no assertion"


def test_a_sample_is_drawn_by_the_key():
    def drawn(key: int) -> list[str]:
        found = gradtest.power(
            summed, normal((2, 3)), mutations=3, key=key, scales=False
        )
        assert found.rules[0].made > 3
        return [mutant.says for mutant in found.mutants]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(key)) for key in range(4)}) > 1


def test_only_the_rules_that_are_named_are_broken():
    def both(x: jax.Array) -> jax.Array:
        return jnp.sum(cube(x) * softplus(x))

    found = gradtest.power(both, X, rules="soft*", mutations="sign flip", scales=False)
    assert [rule.name for rule in found.rules] == ["softplus"]
    with pytest.raises(ValueError, match="it calls cube, softplus"):
        gradtest.power(both, X, rules="quintic")


def test_nothing_is_left_behind():
    before = cube.fwd, cube.bwd
    right = jax.grad(in_jit)(X)
    told: list[Any] = []
    from gradtest._src import session

    with session.watching(told.append):
        gradtest.power(in_jit, X, mutations=KINDS[:2], scales=False)
    assert not told
    assert (cube.fwd, cube.bwd) == before
    np.testing.assert_array_equal(jax.grad(in_jit)(X), right)
    np.testing.assert_array_equal(jax.jit(jax.grad(in_jit))(X), right)


def test_the_report_can_be_kept_as_json():
    found = gradtest.power(summed, X, mutations="sign flip", scales=False)
    plain = json.loads(found.to_json())
    assert plain["schema"] == "gradtest.power/1"
    assert plain["rules"][0]["mutants"][0]["outcome"] == "caught"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"assertion": 3}, TypeError, "`assertion` must be callable"),
        ({"mutations": 0}, ValueError, "`mutations` must be 1 or more, got 0"),
        ({"mutations": 2.5}, TypeError, "`mutations` must be None or names, or a"),
        ({"mutations": []}, ValueError, "`mutations` is empty"),
        ({"mutations": "no such"}, ValueError, "`mutations` names no such"),
        ({"rules": [cube]}, TypeError, "`rules` must be None or names"),
    ],
)
def test_a_slip_in_the_call_is_told(options: Any, error: Any, says: str):
    with pytest.raises(error, match=says):
        gradtest.power(summed, X, **options)


def test_a_function_without_rules_is_refused():
    with pytest.raises(ValueError, match="calls no custom rule"):
        gradtest.power(lambda x: jnp.sum(x**2), X)


def test_half_precision_is_broken_as_any_other():
    found = gradtest.power(
        summed, X.astype(jnp.bfloat16), mutations=["scale 1.01", "drop a leaf"]
    )
    assert len(found.caught) == 2
    assert found.smallest_scale is not None
    assert found.smallest_scale < 1e-2
