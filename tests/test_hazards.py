"""Special points of the arguments: what is right there, and what is wrong there."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest import GradientMismatch, Verdict, domains

pytestmark = pytest.mark.core


def _normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _with_vjp(function, fwd, bwd):
    rule = jax.custom_vjp(function)
    rule.defvjp(fwd, bwd)
    return rule


def _wrong_at(fn, *args, **options):
    """Returns the failure of a function that is right at an ordinary point."""
    assert gradtest.check(fn, *args, **options).verdict is Verdict.PASS
    with pytest.raises(GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(fn, *args, hazards=True, **options)
    return caught.value


def _named(report, verdict):
    return [tried.name for tried in report.hazards if tried.verdict is verdict]


def _safe_norm(x):
    square = jnp.sum(x * x)
    positive = jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, jnp.sqrt(positive), 0.0)


@pytest.mark.parametrize(
    "fn",
    [jax.nn.softplus, jax.nn.relu, jax.nn.gelu, jax.nn.log_softmax, jnp.sort,
     jnp.median, jnp.var, jnp.max, jax.nn.logsumexp, _safe_norm],
    ids=lambda fn: fn.__name__,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_function_right_everywhere_passes_at_all_special_points(fn, dtype):
    x = _normal(3, 4).astype(dtype)
    report = gradtest.assert_autodiff_matches(fn, x, hazards=True)
    assert len(report.hazards) > 12
    assert not _named(report, Verdict.FAIL)


def test_no_special_point_is_tried_unless_asked():
    assert gradtest.check(jnp.sum, _normal(3)).hazards == ()


def _softplus(at_zero):
    @jax.custom_jvp
    def softplus(x):
        return jnp.logaddexp(x, 0 * x)

    @softplus.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        slope = jax.nn.sigmoid(x)
        return softplus(x), t * jnp.where(x == 0, at_zero, slope)

    return softplus


def test_a_rule_that_is_wrong_at_zero_alone_is_caught_there():
    failure = _wrong_at(_softplus(0.0), _normal(16))
    report = failure.report
    assert report.findings[0].hazard == "x: one zero"
    assert report.findings[0].cause.name == "wrong at exact zeros"
    assert "Where: x: one zero (" in str(failure)
    assert "hazards=True" in report.replay
    assert np.count_nonzero(np.asarray(dict(report.inputs)["x"]) == 0) == 1
    right = gradtest.assert_autodiff_matches(_softplus(0.5), _normal(16), hazards=True)
    assert right.verdict is Verdict.PASS


def test_the_same_rule_is_caught_at_its_own_operands():
    def model(x):
        return jnp.sum(_softplus(0.0)(2 * x + 1))

    with pytest.raises(GradientMismatch, match="Where: x: one zero") as caught:
        gradtest.assert_custom_rules_match(model, _normal(16), hazards=True)
    assert "softplus, x: one zero" in _named(caught.value.report, Verdict.FAIL)


def test_a_hand_written_gradient_is_tried_at_special_points():
    def largest(x):
        return jnp.max(x)

    def counts_ties_twice(x):
        return jnp.where(x == jnp.max(x), 1.0, 0.0)

    x = _normal(5)
    gradtest.assert_grad_matches(largest, counts_ties_twice, x)
    with pytest.raises(GradientMismatch) as caught:
        gradtest.assert_grad_matches(largest, counts_ties_twice, x, hazards=True)
    failed = _named(caught.value.report, Verdict.FAIL)
    assert "x: a tie at the maximum" in failed
    assert "x: a tie at the minimum" not in failed
    gradtest.assert_grad_matches(largest, jax.grad(largest), x, hazards=True)


def test_an_index_that_comes_twice_shows_a_scatter_that_forgets_to_add():
    def take(x, index):
        return x[index]

    def fwd(x, index):
        return x[index], (x, index)

    def bwd(adds, residuals, g):
        x, index = residuals
        zeros = jnp.zeros_like(x)
        spread = zeros.at[index].add(g) if adds else zeros.at[index].set(g)
        return spread, None

    index = jnp.array([4, 0, 2])
    wrong = _with_vjp(take, fwd, lambda *both: bwd(False, *both))
    failure = _wrong_at(wrong, _normal(6), index)
    assert failure.report.findings[0].hazard == "index: all the first index"
    right = _with_vjp(take, fwd, lambda *both: bwd(True, *both))
    gradtest.assert_autodiff_matches(right, _normal(6), index, hazards=True)


def test_a_mask_that_is_empty_shows_a_mean_over_nothing():
    def mean(x, mask):
        return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)

    def bwd(residuals, g):
        _, mask = residuals
        return jnp.where(mask, g, 0 * g / jnp.sum(mask)) / jnp.sum(mask), None

    rule = _with_vjp(mean, lambda x, mask: (mean(x, mask), (x, mask)), bwd)
    mask = jnp.array([True, False, True, True])
    failure = _wrong_at(rule, _normal(4), mask)
    assert failure.report.findings[0].hazard == "mask: all false"
    gradtest.assert_autodiff_matches(mean, _normal(4), mask, hazards=True)


def test_a_branch_not_taken_gives_nan_where_numbers_are_negative():
    def wrong(x):
        return jnp.where(x > 0.5, jnp.sqrt(x), x * x)

    def right(x):
        return jnp.where(x > 0.5, jnp.sqrt(jnp.where(x > 0.5, x, 1.0)), x * x)

    x = jnp.linspace(0.6, 2.0, 7)
    failure = _wrong_at(wrong, x)
    assert "x: all negative" in _named(failure.report, Verdict.FAIL)
    gradtest.assert_autodiff_matches(right, x, hazards=True)


def _log_beta(sorts):
    def fn(a, b):
        if sorts:
            a, b = jnp.minimum(a, b), jnp.maximum(a, b)
        return jax.lax.lgamma(a) + jax.lax.lgamma(b) - jax.lax.lgamma(a + b)

    return fn


def test_second_derivatives_are_tried_at_ties_between_arguments():
    args = jnp.array([1.0, 2.0, 1.5]), jnp.array([1.3, 0.7, 2.2])
    failure = _wrong_at(_log_beta(True), *args, order=2)
    assert "b: equal to a" in _named(failure.report, Verdict.FAIL)
    assert failure.report.findings[0].order == 2
    gradtest.assert_autodiff_matches(_log_beta(False), *args, order=2, hazards=True)


def _attention(narrow):
    def scores(q, k):
        return jnp.einsum("qd,kd->qk", q.astype("float32"), k.astype("float32"))

    @jax.custom_vjp
    def attention(q, k, v):
        weights = jax.nn.softmax(scores(q, k))
        return jnp.einsum("qk,kd->qd", weights, v.astype("float32")).astype(v.dtype)

    def fwd(q, k, v):
        total = jax.nn.logsumexp(scores(q, k), axis=-1, keepdims=True)
        return attention(q, k, v), (q, k, v, total)

    def bwd(residuals, g):
        q, k, v, total = residuals
        wide, g = v.astype("float32"), g.astype("float32")
        logits = scores(q, k)
        if narrow:
            logits = logits.astype(q.dtype).astype("float32")
        weights = jnp.exp(logits - total)
        slopes = jnp.einsum("qd,kd->qk", g, wide)
        own = jnp.sum(weights * slopes, axis=-1, keepdims=True)
        moved = weights * (slopes - own)
        grads = (
            jnp.einsum("qk,kd->qd", moved, k.astype("float32")),
            jnp.einsum("qk,qd->kd", moved, q.astype("float32")),
            jnp.einsum("qk,qd->kd", weights, g),
        )
        return tuple(grad.astype(q.dtype) for grad in grads)

    attention.defvjp(fwd, bwd)
    return attention


def test_saturated_logits_show_arithmetic_that_is_too_narrow():
    args = [0.3 * _normal(8, 16, seed=i).astype("bfloat16") for i in range(3)]
    failure = _wrong_at(_attention(True), *args)
    assert failure.report.findings[0].gap.value == "rounding"
    gradtest.assert_autodiff_matches(_attention(False), *args, hazards=True)


def test_a_kink_at_a_special_point_is_accepted_and_named():
    report = gradtest.assert_autodiff_matches(jnp.abs, _normal(4), hazards=True)
    kinks = [tried for tried in report.hazards if "kink" in tried.says]
    assert {tried.name for tried in kinks} >= {"x: one zero", "x: all zero"}
    assert "kink" in str(report)


def test_where_the_function_has_no_value_nothing_is_checked():
    report = gradtest.assert_autodiff_matches(
        jnp.log, domains.positive(4), hazards=True
    )
    assert report.verdict is Verdict.PASS
    report = gradtest.check(jnp.log, jnp.ones(4) * 2, hazards=True)
    assert "x: all negative" in _named(report, Verdict.NOT_CHECKED)
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("fn", [jnp.sqrt, jnp.arccos, lambda x: x**0.5 + x])
def test_an_edge_of_where_a_function_has_values_is_no_mistake(fn):
    def total(x):
        return jnp.sum(fn(x))

    inside = jnp.array([0.3, 0.5, 0.9])
    report = gradtest.assert_autodiff_matches(total, inside, hazards=True)
    assert _named(report, Verdict.NOT_CHECKED)
    ends = domains.uniform(3, 0.0, 1.0)
    failed = _named(gradtest.check(total, ends, hazards=True), Verdict.FAIL)
    assert failed[0] in ("x: one 0", "x: one 1")  # the user said that it goes there


def test_a_domain_brings_its_own_special_points():
    def entropy(p):
        return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))

    report = gradtest.check(entropy, domains.simplex(4), hazards=True)
    names = [tried.name for tried in report.hazards]
    assert "p: the centre" in names
    assert "p: all negative" not in names


def test_a_tree_of_many_leaves_goes_to_its_special_points_as_a_whole():
    params = {f"w{i}": _normal(2, 3, seed=i) for i in range(6)}

    def loss(params):
        return sum(jnp.sum(jnp.tanh(w)) for w in params.values())

    report = gradtest.assert_autodiff_matches(loss, params, hazards=True)
    names = [tried.name for tried in report.hazards]
    assert "all of params: all zero" in names
    assert len(names) < 25


def test_two_arguments_are_also_special_together():
    def angle(y, x):
        return jnp.arctan2(y, x)

    report = gradtest.check(angle, _normal(3), _normal(3, seed=1), hazards=True)
    failed = _named(report, Verdict.FAIL)
    assert "all arguments: all zero" in failed
    assert "y: all zero" not in failed


def test_a_report_with_special_points_survives_json():
    report = gradtest.check(jnp.abs, _normal(4), hazards=True)
    again = gradtest.Report.from_json(report.to_json())
    assert again == report
    assert again.hazards == report.hazards


def test_nothing_global_is_changed_and_no_warning_is_given():
    x = _normal(4)
    before = np.array(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradtest.check(jnp.sqrt, x, hazards=True)
    assert np.array_equal(before, x)
    assert not jax.config.jax_enable_x64


def test_a_rule_without_a_second_derivative_is_still_tried():
    def sine(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    rule = _with_vjp(sine, lambda x: (sine(x), x), lambda x, g: (g * jnp.cos(x),))
    report = gradtest.assert_custom_rules_match(
        lambda x: rule(x).sum(), _normal(3), hazards=True
    )
    assert len(report.hazards) > 10


def test_a_python_number_has_special_points_too():
    def fn(x):
        return jnp.sqrt(x * x)

    report = gradtest.check(fn, 3.0, hazards=True)
    assert "x: all negative" in [tried.name for tried in report.hazards]


@pytest.mark.parametrize("given", [1, "yes", None])
def test_what_is_no_choice_is_refused(given):
    with pytest.raises(TypeError, match="`hazards` must be True or False"):
        gradtest.check(jnp.tanh, _normal(3), hazards=given)


def test_traced_values_have_no_special_points():
    def fn(x):
        gradtest.assert_autodiff_matches(jnp.tanh, x, hazards=True)
        return x

    with pytest.raises(ValueError, match="`hazards` needs values"):
        jax.jit(fn)(_normal(3))


@pytest.mark.devices
def test_an_array_over_several_devices_stays_there_at_its_special_points():
    mesh = jax.make_mesh((8,), ("d",))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))

    @jax.shard_map(
        mesh=mesh, in_specs=over.spec, out_specs=jax.sharding.PartitionSpec()
    )
    def loss(x):
        return jax.lax.pmean(jnp.sum(jnp.tanh(x)), "d")

    x = jax.device_put(_normal(8, 4), over)
    report = gradtest.assert_autodiff_matches(loss, x, hazards=True)
    assert len(report.hazards) > 10
    assert not _named(report, Verdict.FAIL)
