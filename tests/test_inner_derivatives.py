"""Functions that differentiate themselves, as a step of meta-learning does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
from gradtest import Verdict

pytestmark = pytest.mark.core


def sine(bwd, fwd=None):
    """Returns a sine with this backward pass."""

    @jax.custom_vjp
    def layer(x):
        return jnp.sin(x)

    layer.defvjp(fwd or (lambda x: (jnp.sin(x), x)), bwd)
    return layer


def right(x, g):
    return (g * jnp.cos(x),)


def stopped(x, g):
    return (g * jax.lax.stop_gradient(jnp.cos(x)),)


def scaled(x, g):
    return (1.1 * g * jnp.cos(x),)


PARAMS = {
    "w": np.linspace(-1.0, 1.2, 12, dtype=np.float32).reshape(3, 4),
    "v": np.linspace(0.3, -0.8, 4, dtype=np.float32),
}
X = np.linspace(-1.0, 1.0, 15, dtype=np.float32).reshape(5, 3)


def loss_of(layer):
    return lambda p: jnp.mean((layer(X @ p["w"]) @ p["v"] - 1.0) ** 2)


def after_steps(layer, outer=None):
    """Returns the loss after two steps of gradient descent, by a jitted step."""
    inner = loss_of(layer)

    @jax.jit
    def step(p):
        return jax.tree.map(lambda a, b: a - 0.3 * b, p, jax.grad(inner)(p))

    return lambda p: (outer or inner)(step(step(p)))


def squares(p):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


def in_scan(layer):
    inner = loss_of(layer)

    def body(p, _):
        return jax.tree.map(lambda a, b: a - 0.3 * b, p, jax.grad(inner)(p)), None

    return lambda p: squares(jax.lax.scan(body, p, None, length=2)[0])


def in_vmap(layer):
    def slopes(p):
        return jax.vmap(jax.grad(lambda x: jnp.sum(layer(x @ p["w"]) @ p["v"])))(X)

    return lambda p: jnp.sum(slopes(p) ** 2)


def of_vmap(layer):
    inner = loss_of(jax.vmap(layer))
    return lambda p: squares(jax.grad(inner)(p))


def by_vjp(layer):
    def fn(p):
        value, pull = jax.vjp(loss_of(layer), p)
        return value + squares(pull(jnp.ones(()))[0])

    return fn


def by_remat(layer):
    return lambda p: squares(jax.grad(jax.checkpoint(loss_of(layer)))(p))


WAYS = [after_steps, in_scan, in_vmap, of_vmap, by_vjp, by_remat]


@pytest.mark.parametrize("way", WAYS)
def test_a_right_rule_that_is_differentiated_inside_is_accepted(way):
    report = gradtest.check(way(sine(right)), PARAMS)
    assert report.verdict is Verdict.PASS
    assert max(finding.size for finding in report.findings) < 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_a_rule_that_is_wrong_at_second_order_alone_is_refused(way):
    report = gradtest.check(way(sine(stopped)), PARAMS)
    assert report.verdict is Verdict.FAIL
    cause = report.leaf("p['w']").cause
    assert "custom_vjp rule of layer" in cause.says
    assert "stop_gradient" in cause.remedy or "as if that were a constant" in cause.says


@pytest.mark.parametrize("way", [after_steps, of_vmap])
def test_a_rule_that_is_wrong_at_first_order_is_refused_inside_as_well(way):
    report = gradtest.check(way(sine(scaled)), PARAMS)
    assert report.verdict is Verdict.FAIL
    wrong = [f for f in report.findings if f.verdict is Verdict.FAIL]
    assert all("1.1 times too large" in finding.cause.says for finding in wrong)
    (value,) = [finding for finding in wrong if finding.name == "result"]
    assert "wrong derivative inside" not in [c.name for c in value.other_causes]
    assert "the value of" in str(report)
    assert "rests on a wrong derivative" in str(report)


def test_of_two_rules_inside_the_wrong_one_is_named():
    good, bad = sine(right), sine(stopped)

    def fn(p):
        inner = lambda p: jnp.sum(good(p["w"] @ bad(p["v"])) ** 2)  # noqa: E731
        return squares(jax.grad(inner)(p))

    report = gradtest.check(fn, PARAMS)
    assert "stop_gradient" in report.leaf("p['v']").line.code


def test_a_step_that_was_compiled_before_is_opened_all_the_same():
    fn = after_steps(sine(stopped), squares)
    jax.grad(fn)(PARAMS)
    verdicts = {gradtest.check(fn, PARAMS).verdict for _ in range(2)}
    assert verdicts == {Verdict.FAIL}
    jax.grad(fn)(PARAMS)  # and JAX's own derivative is what it was
    jax.jit(jax.grad(fn))(PARAMS)


def test_nothing_of_jax_is_left_changed_also_after_an_exception():
    fn = after_steps(sine(stopped))
    before = jax.grad(fn)(PARAMS)
    gradtest.check(fn, PARAMS)

    def breaks(p):
        jax.grad(loss_of(sine(right)))(p)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gradtest.check(breaks, PARAMS)
    after = jax.grad(after_steps(sine(stopped)))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_an_audit_sees_the_rules_of_what_a_function_differentiates():
    report = gradtest.assert_custom_rules_match(after_steps(sine(right)), PARAMS)
    assert {rule.name for rule in report.rules} == {"layer"}
    with pytest.raises(gradtest.GradientMismatch, match="second derivative"):
        gradtest.assert_custom_rules_match(after_steps(sine(stopped)), PARAMS)


def test_a_hand_written_meta_gradient_is_judged_against_the_rule_free_one():
    right_fn, wrong_fn = after_steps(sine(right)), after_steps(sine(stopped))
    gradtest.assert_grad_matches(wrong_fn, jax.grad(right_fn), PARAMS)
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(wrong_fn, jax.grad(wrong_fn), PARAMS)


def stopped_cotangent(x, g):
    return (jax.lax.stop_gradient(g) * jnp.cos(x),)


def half_stopped_cotangent(x, g):
    return ((g + jax.lax.stop_gradient(g)) / 2 * jnp.cos(x),)


@pytest.mark.parametrize("bwd", [stopped_cotangent, half_stopped_cotangent])
def test_a_cotangent_that_is_taken_for_a_constant_is_refused(bwd):
    report = gradtest.check(after_steps(sine(bwd)), PARAMS)
    assert report.verdict is Verdict.FAIL
    assert report.leaf("p['w']").cause.name == "cotangent taken for a constant"
    with pytest.raises(gradtest.GradientMismatch, match="look for a stop_gradient"):
        gradtest.assert_custom_rules_match(sine(bwd), X)
    gradtest.assert_custom_rules_match(sine(bwd), X, order=1)


# --- rules that differ on purpose -----------------------------------------------------


@jax.custom_vjp
def quantise(x):
    return jnp.round(4 * x) / 4


quantise.defvjp(lambda x: (jnp.round(4 * x) / 4, None), lambda _, g: (g,))


@jax.custom_vjp
def quantise_again(x):
    return jnp.round(4 * x) / 4


quantise_again.defvjp(lambda x: (quantise_again(x), None), lambda _, g: (g,))


@pytest.mark.parametrize("rule", [quantise, quantise_again])
def test_a_declared_rule_is_taken_for_what_it_stands_for_inside(rule):
    fn = after_steps(lambda x: rule(jnp.sin(x)))
    report = gradtest.check(fn, PARAMS, expect_differs={rule: lambda x: x})
    assert report.verdict is Verdict.PASS
    assert gradtest.check(fn, PARAMS).verdict is Verdict.FAIL
    wrong = gradtest.check(fn, PARAMS, expect_differs={rule: lambda x: 2 * x})
    assert wrong.verdict is Verdict.FAIL


def test_a_declared_product_stays_and_the_report_says_so():
    fn = after_steps(lambda x: quantise(jnp.sin(x)), squares)
    product = gradtest.vjp(lambda primals, g: (g,))
    report = gradtest.check(fn, PARAMS, expect_differs={"quantise": product})
    assert report.verdict is Verdict.PASS
    assert any("quantise" in line for line in report.unchecked)


def test_a_name_that_is_declared_in_vain_is_refused_with_those_there_are():
    with pytest.raises(TypeError, match="calls quantise"):
        gradtest.check(
            after_steps(quantise, squares),
            PARAMS,
            expect_differs={"other": lambda x: x},
        )


# --- functions without a derivative of their own --------------------------------------


@jax.custom_vjp
def root(a):
    """Solves x**3 + x = a by bisection, whose own derivative is zero."""

    def body(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_low = middle**3 + middle < a
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    ends = (jnp.full_like(a, -10.0), jnp.full_like(a, 10.0))
    return sum(jax.lax.fori_loop(0, 60, body, ends)) / 2


root.defvjp(lambda a: (root(a),) * 2, lambda x, g: (g / (3 * x**2 + 1),))


@jax.custom_vjp
def wrong_root(a):
    return root(a)


wrong_root.defvjp(lambda a: (wrong_root(a),) * 2, lambda x, g: (g / (2 * x**2 + 1),))


@jax.custom_vjp
def stopped_root(a):
    return root(a)


stopped_root.defvjp(
    lambda a: (root(a),) * 2,
    lambda x, g: (g / jax.lax.stop_gradient(3 * x**2 + 1),),
)


@jax.custom_vjp
def looping(x):
    return jax.lax.while_loop(
        lambda state: state[0] < 2, lambda state: (state[0] + 1, jnp.sin(state[1])),
        (0, x),
    )[1]  # fmt: skip


looping.defvjp(
    lambda x: (looping(x), x), lambda x, g: (g * jnp.cos(jnp.sin(x)) * jnp.cos(x),)
)


def one_step(layer):
    def fn(p):
        return jnp.sum((p - 0.1 * jax.grad(lambda p: jnp.sum(layer(p) ** 2))(p)) ** 3)

    return fn


POINT = np.array([1.3, -0.4, 2.0], np.float32)


def test_a_solver_that_is_right_by_itself_is_left_to_its_rule():
    report = gradtest.check(one_step(root), POINT)
    assert report.verdict is Verdict.PASS
    assert any(
        "right by themselves" in note and "root" in note for note in report.notes
    )


def test_a_solver_whose_rule_is_wrong_is_refused():
    report = gradtest.check(one_step(wrong_root), POINT)
    assert report.verdict is Verdict.FAIL
    assert "rule of wrong_root" in report.leaf("p").cause.says


def test_a_solver_that_is_wrong_at_second_order_alone_is_not_trusted():
    gradtest.assert_autodiff_matches(stopped_root, POINT)
    assert gradtest.check(one_step(stopped_root), POINT).verdict is Verdict.FAIL


def test_a_rules_second_derivative_is_judged_by_differences_where_nothing_else_can():
    def checks(rule):
        report = gradtest.assert_custom_rules_match(rule, POINT, only=rule.__name__)
        return {finding.check for finding in report.findings}

    assert "second order by differences" in checks(root)
    assert "second order by differences" not in checks(stopped_root)


def test_a_loop_without_derivative_stays_and_the_report_says_so():
    report = gradtest.check(one_step(looping), POINT)
    assert report.verdict is Verdict.PASS
    assert any("custom_vjp looping" in line for line in report.unchecked)


def test_a_step_of_an_optimiser_from_optax_is_opened():
    def fn(p, layer):
        tx = optax.adam(0.05)
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss_of(layer))(p), state, p)
            p = optax.apply_updates(p, updates)
        return loss_of(layer)(p)

    assert gradtest.check(lambda p: fn(p, sine(right)), PARAMS).verdict is Verdict.PASS
    assert (
        gradtest.check(lambda p: fn(p, sine(stopped)), PARAMS).verdict is Verdict.FAIL
    )
