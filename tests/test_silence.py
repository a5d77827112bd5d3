import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict

flow = gradtest.assert_grads_flow

ONES = jnp.ones(4)


def report_of(loss, *args, **options):
    """Returns the report of a loss that leaves something without a gradient."""
    with pytest.raises(gradtest.GradientMismatch) as caught:
        flow(loss, *args, **options)
    return caught.value.report


def _in_loop(body, length=200):
    """Returns a loss that carries its argument through a loop too long to unroll."""
    return lambda w: jax.lax.scan(lambda c, _: (body(c), None), w, None, length)[0]


# What cuts the gradient off, the cause that is named, and a part of what is said.
CUTS = {
    "relu": (lambda w: nn.relu(w - 5), "dead ReLU", "`nn.relu(w - 5)`"),
    "maximum": (lambda w: jnp.maximum(w - 5, 0), "dead ReLU", "largest is -4"),
    "clip from below": (lambda w: jnp.clip(w - 5, 0, 9), "dead ReLU", "all 4 entries"),
    "where": (lambda w: jnp.where(w - 5 > 0, w - 5, 0), "dead ReLU", "at or below"),
    "where of a function": (
        lambda w: jnp.where(w - 5 > 0, jnp.sqrt(jnp.abs(w - 5)), 0),
        "dead ReLU",
        "(the largest is -4)",
    ),
    "a factor of the sign": (lambda w: (w - 5) * (w - 5 > 0), "dead ReLU", "-4"),
    "leaky without leak": (lambda w: nn.leaky_relu(w - 5, 0.0), "dead ReLU", "-4"),
    "relu6 from above": (lambda w: nn.relu6(w + 8), "clipped", "above 6, at 9"),
    "hard tanh": (lambda w: nn.hard_tanh(w + 3), "clipped", "above 1, at 4"),
    "minimum": (lambda w: jnp.minimum(w, -3), "clipped", "above -3"),
    "clip": (lambda w: jnp.clip(w, 2, 3), "clipped", "below 2"),
    "tanh": (lambda w: jnp.tanh(5000 * w), "saturated", "`jnp.tanh(5000 * w)`"),
    "tanh in float32 alone": (lambda w: jnp.tanh(w * 15), "saturated", "float64"),
    "sigmoid": (lambda w: nn.sigmoid(-9000 * w), "saturated", "`logistic`"),
    "softmax": (
        lambda w: nn.softmax(w * jnp.array([9000.0, 1, 2, 3])) ** 2,
        "saturated",
        "`exp`",
    ),
    "elu": (lambda w: nn.elu(w - 3000), "saturated", "`expm1`"),
    "gelu": (lambda w: nn.gelu(w - 3000), "saturated", "`tanh`"),
    "a mask": (
        lambda w: w * (jnp.arange(4) > 7),
        "multiplied by zero",
        "a mask, `jnp.arange(4) > 7`",
    ),
    "a literal": (lambda w: 0 * w, "multiplied by zero", "a constant that is zero"),
    "a branch": (
        lambda w: jax.lax.cond(w[0] > 3, jnp.sum, lambda w: 1.0, w),
        "branch not taken",
        "takes branch 0",
    ),
    "dead in the branch taken": (
        lambda w: jax.lax.cond(w[0] > 0, lambda w: nn.relu(w - 9), lambda w: w, w),
        "dead ReLU",
        "`nn.relu(w - 9)`",
    ),
    "dead in a loop": (_in_loop(lambda c: nn.relu(c - 9)), "dead ReLU", "-8"),
    "dead in remat": (
        lambda w: jax.checkpoint(lambda w: nn.relu(w - 9))(w),
        "dead ReLU",
        "-8",
    ),
    "dead under vmap": (
        lambda w: jax.vmap(lambda each: nn.relu(each - 9))(w),
        "dead ReLU",
        "-8",
    ),
    "dead before softplus": (
        lambda w: nn.softplus(nn.relu(w - 9)),
        "dead ReLU",
        "`nn.relu(w - 9)`",
    ),
    "dead before a square": (
        lambda w: (2 * nn.relu(w - 9)) ** 2,
        "dead ReLU",
        "at or below zero",
    ),
    "dead beside living ones": (
        lambda w: nn.relu(jnp.concatenate([w - 9, jnp.ones(3)])),
        "dead ReLU",
        "all 4 entries that it reaches",
    ),
    "dead behind dropout": (
        lambda w: nn.relu(jnp.where(jnp.arange(4) > 1, w - 9, 0)),
        "dead ReLU",
        "at or below zero",
    ),
    "a square at zero": (lambda w: (w - 1) ** 2, "zero slope", "no slope at 0"),
    "a product with itself": (lambda w: (w - 1) * (w - 1), "zero slope", "at 0"),
    "used twice, to no effect": (lambda w: w - w, "cancels", "cancel exactly"),
}


@pytest.mark.parametrize("case", CUTS)
def test_the_step_that_cuts_a_gradient_off_is_named(case):
    function, cause, says = CUTS[case]
    found = report_of(lambda w: jnp.sum(function(w)), ONES).leaf("w")
    assert (found.verdict, found.cause.name) == (Verdict.FAIL, cause)
    assert says in found.cause.says
    if cause not in ("cancels", "multiplied by zero"):
        assert found.line.file == __file__


@pytest.mark.parametrize("case", ["relu", "softmax", "a branch", "dead in a loop"])
def test_a_leaf_with_another_way_to_the_loss_passes(case):
    function, _, _ = CUTS[case]
    flow(lambda w: jnp.sum(function(w)) + jnp.sum(w * jnp.arange(4.0)), ONES)


def test_the_units_of_a_batch_are_counted():
    def loss(params, x):
        return jnp.sum(nn.relu(x @ params["w"] - 50) @ params["after"])

    params = {"w": jnp.ones((3, 8)), "after": jnp.ones((8, 2))}
    report = report_of(loss, params, jnp.ones((5, 3)))
    for name in params:
        says = report.leaf(f"params['{name}']").cause.says
        assert says.startswith("dead ReLU: all 8 units of `nn.relu(x @ params[")
        assert "for every example (the largest is -47)" in says


def test_a_layer_after_it_whose_weights_are_zero_is_named():
    def residual(params, x):
        return jnp.sum((x + jnp.tanh(x @ params["in"]) @ params["out"]) ** 2)

    params = {"in": jnp.ones((3, 8)), "out": jnp.zeros((8, 3))}
    found = report_of(residual, params, jnp.ones((2, 3))).leaf("params['in']")
    assert found.cause.name == "zero weights"
    assert "params['out'], which is zero in all 24 entries" in found.cause.says
    flow(residual, params, jnp.ones((2, 3)), exclude=["params['in']"])


def test_of_layers_with_zero_weights_the_next_one_is_named():
    def loss(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["in"]) @ layer["out"]
        return jnp.sum(x**2)

    params = [{"in": jnp.ones((3, 4)), "out": jnp.zeros((4, 3))} for _ in range(3)]
    report = report_of(loss, params, jnp.ones((2, 3)))
    for i in range(3):
        says = report.leaf(f"params[{i}]['in']").cause.says
        assert f"multiplied by params[{i}]['out']" in says
        assert "on another way" not in says


def test_experts_that_get_no_example_are_told_what_masks_them():
    def loss(params, x):
        outputs = jnp.stack([x * params["first"], x * params["second"]], axis=1)
        chosen = jax.nn.one_hot(jnp.zeros(len(x), int), 2)
        return jnp.sum(outputs * chosen)

    params = {"first": jnp.ones(()), "second": jnp.ones(())}
    found = report_of(loss, params, jnp.ones(3)).leaf("params['second']")
    assert found.cause.name == "multiplied by zero"
    assert "zero wherever a gradient arrives" in found.cause.says


def test_what_dead_units_leave_without_input_is_told_of_these():
    def loss(params, x):
        x = nn.relu(x @ params["first"] - 99)
        return jnp.sum(nn.relu(x @ params["second"]) @ params["third"])

    params = {name: jnp.ones((3, 3)) for name in ("first", "second", "third")}
    report = report_of(loss, params, jnp.ones((2, 3)))
    for name in params:
        cause = report.leaf(f"params['{name}']").cause
        assert cause.name == "dead ReLU"
        assert '`nn.relu(x @ params["first"] - 99)`' in cause.says


def test_each_way_is_told_where_two_are_cut():
    def loss(w):
        return jnp.sum(nn.relu(w - 9)) + jnp.sum(jnp.tanh(9000 * w))

    says = report_of(loss, ONES).leaf("w").cause.says
    told = ("dead ReLU", "; on another way, ", "saturated")
    assert [part for part in told if part not in says] == []


def test_integers_keys_and_half_precision_are_followed():
    def loss(w, steps, key):
        noise = jax.random.normal(key, w.shape, w.dtype)
        return jnp.sum(nn.relu(w - 99 + 0 * noise) * steps).astype(jnp.float32)

    for dtype in ("float16", "bfloat16"):
        args = jnp.ones(4, dtype), jnp.arange(4), jax.random.key(0)
        assert report_of(loss, *args).leaf("w").cause.name == "dead ReLU"


def test_complex_leaves_are_followed():
    def loss(z):
        return jnp.sum(nn.relu(jnp.abs(z) - 99))

    z = jnp.ones(3, jnp.complex64)
    assert report_of(loss, z).leaf("z").cause.name == "dead ReLU"


def test_zero_weights_without_a_gradient_are_promised_no_update():
    def loss(params, x):
        return jnp.sum(x @ params["first"] @ params["second"] @ params["third"])

    params = {"first": jnp.ones((3, 3))}
    params |= {name: jnp.zeros((3, 3)) for name in ("second", "third")}
    remedy = report_of(loss, params, jnp.ones((2, 3))).leaf("params['first']").cause
    assert "its own gradient is zero as well" in remedy.remedy
    params["third"] = jnp.ones((3, 3))
    remedy = report_of(loss, params, jnp.ones((2, 3))).leaf("params['first']").cause
    assert "comes with the first update" in remedy.remedy


def test_rounding_noise_of_float64_is_no_underflow():
    def loss(w, x):
        h = nn.relu(x @ w)
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
        return jnp.sum(h * jax.random.normal(jax.random.key(0), h.shape))

    x = jax.random.normal(jax.random.key(1), (8, 4)) * 1e-30
    dead = report_of(lambda w, b: loss(w, x * 0 + b), jnp.zeros((4, 4)), x)
    assert dead.leaf("w").cause.name == "dead ReLU"


def test_a_gradient_that_underflows_is_told_of_it():
    def loss(params):
        return jnp.sum(params["w"] * 1e-30) * 1e-30 + jnp.sum(params["v"])

    report = report_of(loss, {"w": ONES, "v": ONES})
    assert report.leaf("params['w']").cause.name == "underflow"


def test_a_softmax_of_one_entry_is_named():
    cause = report_of(lambda w: jnp.sum(nn.softmax(w[:, None]) ** 2), ONES).leaf("w")
    assert cause.cause.name == "softmax of one entry"
    assert "the axis has one entry, its softmax is always 1" in cause.cause.says


def _losing(primal):
    """Returns a function whose rule returns zeros."""

    @jax.custom_vjp
    def losing(x):
        return primal(x)

    def losing_bwd(_, cotangent):
        return (0 * cotangent,)

    losing.defvjp(lambda x: (primal(x), None), losing_bwd)
    return losing


@pytest.mark.parametrize("primal", [jnp.tanh, jnp.sign])
def test_the_rule_that_loses_a_gradient_is_named_with_its_line(primal):
    losing = _losing(primal)
    cause = report_of(lambda w: jnp.sum(losing(w)), ONES).leaf("w").cause
    assert cause.name == "lost in a custom rule"
    line = _losing.__code__.co_firstlineno + 7
    assert f"losing (bwd at {__file__}:{line})" in cause.says


def test_a_rule_elsewhere_is_not_blamed_for_a_step_without_derivative():
    losing = _losing(jnp.sign)
    cause = report_of(lambda w: jnp.sum(jnp.sign(w)) + jnp.sum(losing(w)), ONES)
    assert cause.leaf("w").cause.name == "behind a step without derivative"


def test_auxiliary_data_that_is_not_declared_is_refused():
    def loss(w):
        return jnp.sum(w), {"count": 1}

    with pytest.raises(TypeError, match="beside it say has_aux=True"):
        flow(loss, ONES)
    assert flow(loss, ONES, has_aux=True).verdict is Verdict.PASS
