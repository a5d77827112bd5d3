"""Rules that differ on purpose are checked against what they are declared to be."""

import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict

pytestmark = pytest.mark.core

X = jnp.linspace(-1.3, 1.6, 6)


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


# A fwd that calls its own rule has it in second derivatives as well.
rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def flipped(x, strength):
    return x


flipped.defvjp(
    lambda x, strength: (flipped(x, strength), strength),
    lambda s, g: (-s * g, jnp.zeros_like(s)),
)


@jax.custom_jvp
def hard_step(x):
    return jnp.where(x > 0, 1.0, 0.0)


hard_step.defjvps(lambda t, value, x: t / (1 + x**2))

STRAIGHT = {"rounded": lambda x: x}
CLIP = {"clipped": gradtest.vjp(lambda primals, g: (jnp.clip(g, -0.1, 0.1),))}
FLIP = {"flipped": lambda x, strength: -jax.lax.stop_gradient(strength) * x}


def straight(x):
    return jnp.sum(jnp.sin(rounded(3 * x) + x) ** 2)


def clipping(x):
    return jnp.sum(jnp.tanh(clipped(x**2) * x) ** 2)


def flipping(x):
    return jnp.sum(jnp.cos(x) * flipped(jnp.sin(x), jnp.float32(0.3)))


def stepping(x):
    return jnp.sum(x * hard_step(x) + hard_step(x) ** 2)


DECLARED = [
    (straight, STRAIGHT),
    (clipping, CLIP),
    (flipping, FLIP),
    (stepping, {"hard_step": jnp.arctan}),
]


@pytest.mark.parametrize(("fn", "declared"), DECLARED)
@pytest.mark.parametrize("order", [1, 2])
def test_a_declared_rule_passes_the_main_assertion(fn, declared, order):
    report = gradtest.assert_autodiff_matches(
        fn, X, order=order, expect_differs=declared
    )
    assert report.verdict is Verdict.PASS
    assert report.smallest_seen < 1e-5


@pytest.mark.parametrize(("fn", "declared"), DECLARED)
def test_a_declared_rule_passes_its_audit(fn, declared):
    report = gradtest.assert_custom_rules_match(fn, X, expect_differs=declared)
    assert [rule.name for rule in report.rules] == list(declared)


@pytest.mark.parametrize(("fn", "declared"), DECLARED)
def test_an_undeclared_one_fails_with_a_hint_how_to_declare_it(fn, declared):
    (name,) = declared
    for assertion in (
        gradtest.assert_autodiff_matches,
        gradtest.assert_custom_rules_match,
    ):
        with pytest.raises(gradtest.GradientMismatch) as caught:
            assertion(fn, X)
        assert f"If {name} differs on purpose:" in str(caught.value)
        assert f"expect_differs={{'{name}': " in str(caught.value)


def test_the_hint_says_what_a_straight_through_rule_stands_in_for():
    with pytest.raises(
        gradtest.GradientMismatch, match=r"expect_differs={'rounded': lambda x: x}"
    ):
        gradtest.assert_custom_rules_match(straight, X)


@pytest.mark.parametrize(
    ("fn", "declared"),
    [
        (straight, {"rounded": lambda x: 1.01 * x}),
        (clipping, {"clipped": gradtest.vjp(lambda p, g: (jnp.clip(g, -0.1, 0.2),))}),
        (flipping, {"flipped": lambda x, s: -2 * jax.lax.stop_gradient(s) * x}),
        (flipping, {"flipped": lambda x, s: -s * x}),
        (stepping, {"hard_step": jnp.tanh}),
    ],
)
def test_a_rule_that_is_not_what_it_is_declared_to_be_fails(fn, declared):
    operands = (fn, X)
    if fn is flipping:
        operands = (lambda x, s: flipped(x, s).sum(), X, 0.3)
    for assertion in (
        gradtest.assert_autodiff_matches,
        gradtest.assert_custom_rules_match,
    ):
        with pytest.raises(gradtest.GradientMismatch):
            assertion(*operands, expect_differs=declared)
    with pytest.raises(gradtest.GradientMismatch, match="expect_differs declares"):
        gradtest.assert_custom_rules_match(*operands, expect_differs=declared)


def test_second_derivatives_of_a_fwd_that_does_not_call_its_rule_are_right_too():
    @jax.custom_vjp
    def once(x):
        return jnp.round(x)

    once.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def fn(x):
        return jnp.sum(jnp.sin(once(3 * x) + x) ** 2)

    declared = {"once": lambda x: x}
    gradtest.assert_autodiff_matches(fn, X, expect_differs=declared, order=2)


def test_products_of_a_fwd_that_does_not_call_its_rule_are_right_in_second_order():
    @jax.custom_vjp
    def once(x):
        return x

    once.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))

    def fn(x):
        return jnp.sum(jnp.sin(once(3 * x)))

    declared = {once: gradtest.vjp(lambda p, g: (jnp.clip(g, -0.5, 0.5),))}
    gradtest.assert_autodiff_matches(fn, X, expect_differs=declared, order=2)


def test_a_declared_rule_can_be_wrong_in_second_order_alone():
    @jax.custom_vjp
    def gate(x):
        return jnp.round(x)

    def backward(x, g):
        return (g * jax.lax.stop_gradient(jnp.cos(x)),)

    gate.defvjp(lambda x: (jnp.round(x), x), backward)

    def fn(x):
        return jnp.sum(gate(x) + x**2)

    declared = {gate: jnp.sin}
    gradtest.assert_autodiff_matches(fn, X, expect_differs=declared)
    with pytest.raises(gradtest.GradientMismatch, match="second derivative"):
        gradtest.assert_autodiff_matches(fn, X, expect_differs=declared, order=2)


def test_a_mistake_elsewhere_is_seen_beside_a_declared_rule():
    @jax.custom_vjp
    def doubled(x):
        return jnp.sin(x)

    doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))

    for fn, declared in ((straight, STRAIGHT), (clipping, CLIP)):
        with pytest.raises(gradtest.GradientMismatch):
            gradtest.assert_autodiff_matches(
                lambda x, fn=fn: fn(x) + doubled(x).sum(), X, expect_differs=declared
            )


def test_rules_are_named_by_their_functions_too():
    gradtest.assert_autodiff_matches(straight, X, expect_differs={rounded: lambda x: x})


def test_check_takes_declarations_and_reports_without_raising():
    assert gradtest.check(straight, X).verdict is Verdict.FAIL
    report = gradtest.check(straight, X, expect_differs=STRAIGHT)
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize(
    "around",
    [
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c) + c, None), x, None, 3)[0],
        lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda _, c: f(c) + c, x),
        lambda f: lambda x: jax.lax.cond(x[0] < 0, f, jnp.sin, x),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.vmap(f, in_axes=1, out_axes=1)(jnp.stack([x, 2 * x])),
        lambda f: jax.checkpoint(f),
        lambda f: lambda x: f(x) + jax.lax.stop_gradient(jnp.exp(x)),
    ],
    ids=["scan", "fori", "cond", "vmap", "vmap over columns", "remat", "stops"],
)
@pytest.mark.parametrize(
    ("rule", "declared"),
    [(rounded, STRAIGHT), (clipped, CLIP)],
    ids=["function", "product"],
)
def test_declared_rules_pass_inside_loops_branches_and_batches(around, rule, declared):
    def fn(x):
        return jnp.sum(jnp.sin(around(rule)(2 * x)) ** 2)

    report = gradtest.assert_autodiff_matches(fn, X, expect_differs=declared)
    assert report.verdict is Verdict.PASS


def test_an_alternative_sees_batched_rows_one_at_a_time():
    @jax.custom_vjp
    def sorted_row(x):
        return jnp.round(x) * jnp.sum(x)

    sorted_row.defvjp(
        lambda x: (jnp.round(x) * jnp.sum(x), x),
        lambda x, g: (jnp.full_like(x, jnp.sum(g)),),
    )

    def fn(x):
        return jnp.sum(jax.vmap(sorted_row)(x.reshape(2, 3)) ** 2)

    # It mixes the entries of a row: over a batch at once it would be another function.
    declared = {"sorted_row": lambda x: jnp.full_like(x, jnp.sum(x))}
    gradtest.assert_autodiff_matches(fn, X, expect_differs=declared)


def test_trees_and_several_arguments_reach_the_alternative_as_they_are():
    @jax.custom_vjp
    def gate(params, x):
        return params["w"] * jnp.round(x)

    gate.defvjp(
        lambda p, x: (gate(p, x), (p, x)),
        lambda res, g: ({"w": g * jnp.round(res[1])}, g * res[0]["w"]),
    )
    product = gradtest.vjp(
        lambda primals, g: ({"w": g * jnp.round(primals[1])}, g * primals[0]["w"])
    )

    def fn(params, x):
        return jnp.sum(jnp.sin(gate(params, x)))

    params = {"w": jnp.linspace(0.5, 1.5, 6)}
    gradtest.assert_autodiff_matches(fn, params, X, expect_differs={"gate": product})
    gradtest.assert_custom_rules_match(fn, params, X, expect_differs={"gate": product})


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"round": lambda x: x}, "names 'round', which is no custom rule.*rounded"),
        ({"rounded": 3}, "a function whose derivative it should have, or gradtest.vjp"),
        ({3: lambda x: x}, "must name rules by their functions or names, got 3"),
        ([("rounded", 3)], "must be a mapping"),
        (
            {"rounded": lambda x: x[:2]},
            r"results like the rule's: wanted shapes \[\(6,",
        ),
        (
            {"rounded": gradtest.vjp(lambda p, g: g)},
            "returns a tuple with one cotangent",
        ),
        ({"rounded": gradtest.vjp(lambda p, g: (g[:2],))}, r"wanted \[6\], got \[2\]"),
    ],
)
def test_a_declaration_that_does_not_fit_is_an_error_that_says_so(declared, message):
    for assertion in (
        gradtest.assert_autodiff_matches,
        gradtest.assert_custom_rules_match,
    ):
        with pytest.raises(TypeError, match=message):
            assertion(straight, X, expect_differs=declared)


def test_a_product_must_be_callable():
    with pytest.raises(TypeError, match="`product` must be callable, got 3"):
        gradtest.vjp(3)


@pytest.mark.parametrize("out_axes", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
def test_batch_axes_of_results_are_those_that_jax_chose(out_axes, shape):
    @jax.custom_vjp
    def hard(x):
        return jax.nn.one_hot(jnp.argmax(x), x.shape[0])

    hard.defvjp(lambda x: (hard(x), x), lambda x, g: jax.vjp(jax.nn.softmax, x)[1](g))

    def fn(x):
        rows = jax.vmap(hard, in_axes=1, out_axes=out_axes)(x)
        return rows * jnp.arange(rows.size).reshape(rows.shape)

    x = jax.random.normal(jax.random.key(0), shape)
    declared = {hard: jax.nn.softmax}
    gradtest.assert_autodiff_matches(fn, x, expect_differs=declared)
    gradtest.assert_custom_rules_match(fn, x, expect_differs=declared)


def test_a_product_shared_by_a_batch_sums_its_cotangents():
    @jax.custom_vjp
    def scaled(x, w):
        return x * w

    scaled.defvjp(
        lambda x, w: (scaled(x, w), (x, w)),
        lambda res, g: (jnp.clip(g, -0.2, 0.2), g * res[0]),
    )
    product = gradtest.vjp(lambda p, g: (jnp.clip(g, -0.2, 0.2), g * p[0]))

    def fn(x, w):
        return jnp.sin(jax.vmap(scaled, in_axes=(1, None), out_axes=1)(x, w))

    x = jax.random.normal(jax.random.key(0), (5, 3))
    gradtest.assert_autodiff_matches(
        fn, x, jnp.arange(1.0, 6.0), expect_differs={scaled: product}
    )
