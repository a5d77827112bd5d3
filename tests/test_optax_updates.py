"""Transformations against plain references: right ones accepted, wrong explained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
from gradtest import domains
from gradtest.optax import assert_update_matches

RATE = 0.1
_KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(_KEY, (4, 3)), "b": jnp.full(3, 0.5), "none": None}
GRADS = {
    "w": jax.random.normal(jax.random.key(1), (4, 3)),
    "b": jnp.array([0.3, -1.0, 0.7]),
    "none": None,
}
WARMUP = optax.warmup_cosine_decay_schedule(0.0, RATE, 2, 10)


def _warmed_up(step):
    return RATE * (step / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / 8)) / 2)


def _adam(decay=0.0, l2=0.0, rate=lambda step: RATE, eps=1e-8, corrected=True):
    def leaf(p, *grads):
        m = v = 0 * p
        for t, g in enumerate(grads, 1):
            g = g + l2 * p
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m, v
            if corrected:
                m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            p = p - rate(t - 1) * (m_hat / (v_hat**0.5 + eps) + decay * p)
        return p

    return lambda params, grads: jax.tree.map(leaf, params, *grads)


def _momentum(params, grads):
    trace = jax.tree.map(lambda p: 0 * p, params)
    for each in grads:
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, each)
        params = jax.tree.map(lambda p, m: p - RATE * m, params, trace)
    return params


def _clipped(params, grads, by_leaf=False, most=1.0):
    for each in grads:
        whole = sum(jnp.sum(g**2) for g in jax.tree.leaves(each)) ** 0.5

        def step(p, g, whole=whole):
            size = jnp.sum(g**2) ** 0.5 if by_leaf else whole
            return p - RATE * g * jnp.minimum(1.0, most / size)

        params = jax.tree.map(step, params, each)
    return params


def _numpy_descent(params, grads):
    found = {}
    for name, value in params.items():
        if value is not None:
            value = np.array(value)
            for each in grads:
                value -= RATE * each[name]  # in place: JAX can't trace it
        found[name] = value
    return found


def _in_pairs(params, grads):
    for one, other in zip(grads[::2], grads[1::2], strict=False):
        params = jax.tree.map(
            lambda p, a, b: p - RATE * (a + b) / 2, params, one, other
        )
    return params


RIGHT = {
    "adam": (optax.adam(RATE), _adam()),
    "adam with a moment in bfloat16": (optax.adam(RATE, mu_dtype="bfloat16"), _adam()),
    "adamw": (optax.adamw(RATE, weight_decay=0.01), _adam(decay=0.01)),
    "a schedule": (optax.adam(WARMUP), _adam(rate=_warmed_up)),
    "clipping": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)), _clipped,
    ),
    "two micro-batches": (optax.MultiSteps(optax.sgd(RATE), 2), _in_pairs),
    "momentum": (optax.sgd(RATE, momentum=0.9), _momentum),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(RATE), 3), _adam()),
    "a reference in NumPy": (optax.sgd(RATE), _numpy_descent),
}  # fmt: skip
DTYPES = {
    "float32": {"w": jnp.float32, "b": jnp.float32},
    "bfloat16": {"w": jnp.bfloat16, "b": jnp.bfloat16},
    "mixed": {"w": jnp.bfloat16, "b": jnp.float32},
}


def _cast(tree, dtypes):
    return {
        name: value if value is None else value.astype(dtypes[name])
        for name, value in tree.items()
    }


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [*((name, "mixed") for name in RIGHT), ("adam", "float32"), ("adamw", "bfloat16")],
)
def test_a_right_transformation_is_accepted(name, dtypes):
    tx, reference = RIGHT[name]
    params, grads = (_cast(tree, DTYPES[dtypes]) for tree in (PARAMS, GRADS))
    report = assert_update_matches(tx, reference, params, grads, steps=4)
    assert {finding.name for finding in report.findings} == {
        "params['w']", "params['b']",
    }  # fmt: skip
    if name != "adam with a moment in bfloat16":
        assert max(finding.size for finding in report.findings) < 1e-7


def test_hyperparams_in_the_state_are_accepted():
    tx = optax.inject_hyperparams(optax.adam)(WARMUP)
    assert_update_matches(tx, _adam(rate=_warmed_up), PARAMS, GRADS, steps=4)


def _transformation(kind):
    """Momentum with a slip; right where there is none of this name."""
    calls = [0]

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"trace": zeros, "step": jnp.zeros([], jnp.int32)}

    def update(grads, state, params=None):
        old, step = state["trace"], state["step"] + 1
        share = 0.1 if kind == "dampened" else 1.0
        trace = jax.tree.map(lambda m, g: 0.9 * m + share * g, old, grads)
        moved = trace
        if kind == "looks ahead":
            moved = jax.tree.map(lambda m, g: 0.9 * m + g, trace, grads)
        if kind == "counts its calls":
            calls[0] += 1
            moved = jax.tree.map(lambda m: m * calls[0], trace)
        if kind == "branches" and float(step) > 2:
            moved = jax.tree.map(jnp.zeros_like, trace)
        if kind == "writes into its arguments":
            grads["w"] = 2 * grads["w"]
        if kind == "other dtype":
            trace = jax.tree.map(lambda m: m.astype(jnp.float16), trace)
        state = (
            state if kind == "keeps the old state" else {"trace": trace, "step": step}
        )
        return jax.tree.map(lambda m: -RATE * m, moved), state

    return optax.GradientTransformation(init, update)


def _late():
    return optax.adam(lambda step: RATE / (step + 1))


def _rates(shift):
    return lambda step: RATE / (step + 1 + shift)


_two_rates = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01),
                         optax.scale(-RATE))  # fmt: skip
WRONG = {
    "twice the rate": (optax.adam(2 * RATE), _adam(), "constant factor", "step 1"),
    "the other way": (optax.sgd(-RATE, momentum=0.9), _momentum, "sign flipped",
                      "step 1"),
    "no bias correction": (
        optax.chain(
            optax.scale_by_adam(), optax.scale(-RATE),
        ), _adam(corrected=False), "bias correction added", "step 1",
    ),
    "no second bias correction": (
        optax.chain(
            optax.ema(0.9, debias=True), optax.scale(-RATE),
        ), lambda params, grads: _ema(params, grads), "bias correction added", "step 1",
    ),
    "no decay": (optax.adam(RATE), _adam(decay=0.01), "weight decay missing", "step 1"),
    "a decay too many": (optax.adamw(RATE, weight_decay=0.01), _adam(),
                         "weight decay added", "step 1"),
    "a decay without the rate": (
        optax.chain(optax.adam(RATE), optax.add_decayed_weights(-0.01)),
        _adam(decay=0.01), "weight decay scaled otherwise", "step 1",
    ),
    "L2 for a decay": (
        optax.chain(optax.add_decayed_weights(0.01), optax.adam(RATE)),
        _adam(decay=0.01), "weight decay elsewhere", "step 1",
    ),
    "epsilon inside": (optax.adam(RATE, eps=0.0, eps_root=1e-8), _adam(),
                       "epsilon elsewhere", "step 1"),
    "another epsilon": (optax.adam(RATE, eps=1e-6), _adam(), "another epsilon",
                        "step 1"),
    "another decay": (optax.adam(RATE, b2=0.99), _adam(), "another constant", "step 2"),
    "a schedule off by one": (_late(), _adam(rate=_rates(1)), "off by one", "step 1"),
    "dampened": (_transformation("dampened"), _momentum, "constant factor", "step 1"),
    "looks ahead": (_transformation("looks ahead"), _momentum, "constant factor",
                    "step 1"),
    "keeps the old state": (_transformation("keeps the old state"), _momentum,
                            "state not carried", "step 2"),
    "norms by leaf": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)),
        functools.partial(_clipped, by_leaf=True), "factor by leaf", "step 1",
    ),
    "another threshold": (
        optax.chain(optax.clip_by_global_norm(20.0), optax.sgd(RATE)),
        functools.partial(_clipped, most=40.0), "another constant", "step 1",
    ),
    "no update": (optax.set_to_zero(), _momentum, "no update", "step 1"),
}  # fmt: skip


def _ema(params, grads):
    trace = jax.tree.map(lambda p: 0 * p, params)
    for each in grads:
        trace = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, trace, each)
        params = jax.tree.map(lambda p, m: p - RATE * m, params, trace)
    return params


def _refused(*args, **keywords):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_update_matches(*args, **keywords)
    return caught.value


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_transformation_is_refused_with_its_cause(name):
    tx, reference, cause, step = WRONG[name]
    error = _refused(tx, reference, PARAMS, GRADS)
    chief = error.report.leaf("params['w']")
    assert cause in [each.name for each in (chief.cause, *chief.other_causes)]
    assert chief.cause.name == cause
    assert chief.check == step
    assert f"{step} of params['" in str(error)


def test_one_wrong_leaf_is_named_and_the_other_is_right():
    def label(params):
        return {"w": "slow", "b": "fast", "none": "fast"}

    tx = optax.partition({"slow": optax.sgd(RATE / 2), "fast": optax.sgd(RATE)}, label)
    report = _refused(tx, _numpy_descent, PARAMS, GRADS).report
    assert report.leaf("params['w']").verdict.value == "FAIL"
    assert report.leaf("params['b']").verdict.value == "PASS"


BROKEN = {
    "other dtype": ("state changes kind", "state['trace']['b']"),
    "counts its calls": ("not pure", "params['b']"),
    "branches": ("raises under jit", "updates"),
    "writes into its arguments": ("argument changed", "grads['w']"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_contract_is_named(kind):
    cause, leaf = BROKEN[kind]
    params, grads = (_cast(tree, DTYPES["float32"]) for tree in (PARAMS, GRADS))
    report = _refused(_transformation(kind), _momentum, params, grads).report
    assert report.leaf(leaf).cause.name == cause
    assert jnp.array_equal(grads["w"], GRADS["w"])


def test_a_counter_that_tracing_freezes_is_found():
    seen = []

    def update(grads, state, params=None):
        if not isinstance(grads["w"], jax.core.Tracer):
            return jax.tree.map(lambda g: -RATE * g, grads), state
        seen.append(1)
        return jax.tree.map(lambda g: -2 * RATE * g, grads), state

    tx = optax.GradientTransformation(lambda params: (), update)
    report = _refused(tx, _numpy_descent, PARAMS, GRADS).report
    assert report.findings[0].cause.name == "differs under jit"
    assert seen


def test_an_update_that_loses_its_accuracy_is_refused():
    def update(grads, state, params=None):
        def coarse(g):
            return (-RATE * g.astype(jnp.bfloat16)).astype(g.dtype)

        return jax.tree.map(coarse, grads), state

    tx = optax.GradientTransformation(lambda params: (), update)
    error = _refused(tx, _numpy_descent, PARAMS, GRADS)
    assert "loses its accuracy" in str(error)


def test_hyperparams_that_round_to_one_in_bfloat16_are_found():
    # optax.inject_hyperparams casts b2 = 0.999 to the params' dtype: 1 - b2 is 0.
    params, grads = (_cast(tree, DTYPES["bfloat16"]) for tree in (PARAMS, GRADS))
    tx = optax.inject_hyperparams(optax.adam)(RATE)
    assert "NaN" in str(_refused(tx, _adam(), params, grads))


def test_a_gradient_of_zeros_is_drawn_around():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    assert_update_matches(optax.adam(RATE), _adam(), PARAMS, zeros)
    wrong = _refused(optax.adam(RATE), _adam(decay=0.1), PARAMS, zeros)
    assert wrong.report.leaf("params['w']").cause.name == "weight decay missing"


def test_an_update_of_nan_at_a_zero_gradient_is_found():
    grads = GRADS | {"b": GRADS["b"].at[1].set(0)}

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -RATE * g * g / g, updates), state

    tx = optax.GradientTransformation(lambda params: (), update)
    report = _refused(tx, _numpy_descent, PARAMS, grads).report
    assert report.leaf("params['b']").cause.name == "update not finite"


def test_shapes_domains_integers_and_scalars_are_taken():
    params = {
        "shape": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "domain": domains.positive((4,)),
        "count": jnp.arange(3),
        "scalar": 1.5,
    }
    grads = params | {"count": jnp.zeros(3, int), "scalar": 0.5}
    mask = {"shape": True, "domain": True, "count": False, "scalar": True}

    def reference(params, grads):
        moved = {
            name: value - RATE * sum(each[name] for each in grads)
            for name, value in params.items()
        }
        return moved | {"count": params["count"]}

    report = assert_update_matches(
        optax.masked(optax.sgd(RATE), mask), reference, params, grads
    )
    assert "params['count'] (int32: held)" in report.unchecked
    assert len(report.findings) == 3


def test_extra_arguments_are_handed_on():
    tx = optax.polyak_sgd()

    def reference(params, grads):
        for each in grads:
            square = sum(jnp.sum(g**2) for g in jax.tree.leaves(each))
            step = jnp.minimum(0.05 / square, 1.0)
            params = jax.tree.map(lambda p, g, s=step: p - s * g, params, each)
        return params

    def of_params(params):
        return {"value": 0.05}

    for extra in ({"value": 0.05}, of_params):
        report = assert_update_matches(tx, reference, PARAMS, GRADS, extra_args=extra)
        assert report.findings


def test_small_gradients_can_be_left_out():
    tx = optax.adam(RATE, eps=1e-9)
    assert _refused(tx, _adam(), PARAMS, GRADS).report
    report = assert_update_matches(tx, _adam(), PARAMS, GRADS, scales=(1.0,))
    assert report.verdict.value == "PASS"


def test_an_excluded_leaf_is_listed_and_not_compared():
    report = assert_update_matches(
        optax.masked(optax.set_to_zero(), {"w": False, "b": True, "none": False}),
        lambda params, grads: params | {"w": params["w"] + sum(g["w"] for g in grads)},
        PARAMS, GRADS, exclude=["params['b']"],
    )  # fmt: skip
    assert "params['b'] (excluded)" in report.unchecked
    assert [finding.name for finding in report.findings] == ["params['w']"]


def test_nothing_is_concluded_from_a_reference_that_is_not_finite():
    with pytest.raises(gradtest.GradientInconclusive, match="NaN or infinite"):
        assert_update_matches(
            optax.sgd(RATE),
            lambda params, grads: jax.tree.map(lambda p: p * jnp.nan, params),
            PARAMS, GRADS,
        )  # fmt: skip


BAD_INPUT = {
    "`tx` must be": lambda: assert_update_matches(3, _adam(), PARAMS, GRADS),
    "`reference` must be callable": lambda: assert_update_matches(
        optax.sgd(RATE), None, PARAMS, GRADS
    ),
    "`reference` must return a tree": lambda: assert_update_matches(
        optax.sgd(RATE), lambda params, grads: 3, PARAMS, GRADS
    ),
    "`grads` must be a tree like": lambda: assert_update_matches(
        optax.sgd(RATE), _adam(), PARAMS, {"w": GRADS["w"]}
    ),
    "`steps` must be": lambda: assert_update_matches(
        optax.sgd(RATE), _adam(), PARAMS, GRADS, steps=0
    ),
    "`scales` must be": lambda: assert_update_matches(
        optax.sgd(RATE), _adam(), PARAMS, GRADS, scales=(0.0,)
    ),
    "`extra_args` must be": lambda: assert_update_matches(
        optax.sgd(RATE), _adam(), PARAMS, GRADS, extra_args=3
    ),
    "`params` must hold": lambda: assert_update_matches(
        optax.sgd(RATE), _adam(), {}, {}
    ),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_INPUT[message]()


def test_a_message_reads_as_those_of_other_assertions():
    error = _refused(optax.adam(RATE), _adam(decay=0.01), PARAMS, GRADS)
    lines = str(error).splitlines()
    assert lines[0] == (
        "assert_update_matches failed: the update of tx is wrong at params['w'] "
        "(float32[4, 3])."
    )
    assert "a decay of -0.001 times the params is missing" in lines[2]
    assert (
        "gradtest.optax.assert_update_matches(tx, reference, ..., key=0)" in lines[-1]
    )
    assert 2 <= len(lines) <= 8
