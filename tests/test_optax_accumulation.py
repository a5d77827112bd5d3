"""Accumulated gradients: right ones accepted, each mistake named with its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
import gradtest.optax

assert_match = gradtest.optax.assert_accumulated_grads_match
_RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(_RNG.normal(size=3), jnp.float32),
    "b": jnp.zeros(()),
    "none": None,
}
BATCH = {
    "x": jnp.asarray(_RNG.normal(size=(16, 3)), jnp.float32),
    "y": jnp.asarray(_RNG.normal(size=16), jnp.float32),
    "mask": jnp.arange(16) % 5 != jnp.arange(16) // 4,
    "scale": 2,
    "weights": jnp.array([1.0, 2.0]),
    "nothing": None,
}


def rows(batch, low, high):
    cut = {key: batch[key][low:high] for key in ("x", "y", "mask")}
    return {**batch, **cut}


def errors(params, batch):
    found = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return batch["scale"] * (found - batch["y"]) ** 2


def loss(params, batch):
    return jnp.mean(errors(params, batch))


def masked_loss(params, batch):
    kept = jnp.where(batch["mask"], errors(params, batch), 0)
    return jnp.sum(kept) / jnp.sum(batch["mask"])


def add(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def times(factor, tree):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def gradients(params, batch, size, fn=loss):
    count = len(batch["x"])
    return [
        jax.grad(fn)(params, rows(batch, low, low + size))
        for low in range(0, count, size)
    ]


def weighed(params, batch):
    parts = gradients(params, batch, 6)
    sizes = (6, 6, 4)
    return add(*(times(n / 16, g) for n, g in zip(sizes, parts, strict=True)))


def scanned(params, batch):
    """As `jax.value_and_grad` returns it: a pair of a value and gradients."""
    pieces = {key: batch[key].reshape(4, 4, *batch[key].shape[1:]) for key in "xy"}

    def body(total, piece):
        value, gradient = jax.value_and_grad(loss)(params, {**batch, **piece})
        return add(total, gradient), value

    total, values = jax.lax.scan(body, times(0.0, params), pieces)
    return values.mean(), times(0.25, total)


def with_aux(params, batch):
    return weighed(params, batch), {"steps": 3}


def in_half_precision(params, batch):
    parts = [
        jax.tree.map(lambda g: g.astype(jnp.bfloat16), part)
        for part in gradients(params, batch, 2)
    ]
    return jax.tree.map(lambda g: g.astype(jnp.float32) / 8, add(*parts))


def moving(params, batch):
    total, at = times(0.0, params), params
    for low in range(0, 16, 4):
        gradient = jax.grad(loss)(at, rows(batch, low, low + 4))
        total, at = add(total, gradient), add(at, times(-0.05, gradient))
    return times(0.25, total)


def own_accumulator(inner, count, *, resets=True, early=False):
    """A hand-written wrapper, and two ways to get it wrong."""

    def init(params):
        return inner.init(params), times(0.0, params), jnp.zeros((), jnp.int32)

    def update(grads, state, params=None):
        own, total, step = state
        total, is_last = add(total, times(1 / count, grads)), step == count - 1
        updates, moved = inner.update(total, own, params)
        if not early:
            moved = jax.tree.map(lambda a, b: jnp.where(is_last, b, a), own, moved)
        kept = times(1.0 - is_last, total) if resets else total
        return times(1.0 * is_last, updates), (moved, kept, (step + 1) % count)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("accumulate", [weighed, scanned, jax.jit(weighed)])
def test_right_accumulations_pass(accumulate):
    assert assert_match(accumulate, loss, PARAMS, BATCH).findings


def test_auxiliary_data_may_come_beside_the_gradients():
    def loss_and_more(params, batch):
        return loss(params, batch), batch["x"]

    assert_match(with_aux, loss_and_more, PARAMS, BATCH, has_aux=True)


def test_a_list_of_micro_batches_is_handed_on():
    def accumulate(params, batches):
        return times(0.5, add(*(jax.grad(loss)(params, each) for each in batches)))

    batches = [rows(BATCH, 0, 8), rows(BATCH, 8, 16)]
    assert_match(accumulate, loss, PARAMS, batches, micro_batches="list")


def test_rows_may_lie_on_another_axis():
    def mean(w, batch):
        return jnp.mean((w @ batch) ** 2)

    def accumulate(w, batch):
        return (jax.grad(mean)(w, batch[:, :8]) + jax.grad(mean)(w, batch[:, 8:])) / 2

    args = (PARAMS["w"], BATCH["x"].T)
    assert_match(accumulate, mean, *args, batch_axis=1)
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    assert_match(tx, mean, *args, batch_axis=1)


MULTI_STEPS = {
    "adam": optax.MultiSteps(optax.adam(0.1), 4),
    "as a transformation": optax.MultiSteps(
        optax.adamw(0.1), 4
    ).gradient_transformation(),
    "skipping": optax.MultiSteps(
        optax.sgd(0.1, momentum=0.9), 4, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("tx", MULTI_STEPS.values(), ids=MULTI_STEPS.keys())
def test_multi_steps_pass_and_their_number_is_found(tx):
    report = assert_match(tx, loss, PARAMS, BATCH)
    assert "over 4 micro-batches of 4, 4, 4 and 4 rows" in report.notes


def test_a_wrapper_of_ones_own_is_judged_by_what_it_wraps():
    adam = optax.adam(0.1)
    own = own_accumulator(adam, 4)
    assert_match(own, loss, PARAMS, BATCH, micro_batches=4, inner=adam)
    bare = own_accumulator(optax.identity(), 4)
    assert_match(bare, loss, PARAMS, BATCH, micro_batches=4)


def _alike(params, batch):
    return times(1 / 3, add(*gradients(params, batch, 6)))


def _masked_alike(params, batch):
    return times(1 / 4, add(*gradients(params, batch, 4, masked_loss)))


def _summed(params, batch):
    return add(*gradients(params, batch, 4))


def _left_out(params, batch):
    return times(1 / 4, add(*gradients(params, batch, 4)[:-1]))


def _last_alone(params, batch):
    return gradients(params, batch, 4)[-1]


def _twice(params, batch):
    parts = gradients(params, batch, 4)
    return times(1 / 4, add(parts[0], *parts))


def _dropped(params, batch):
    return times(1 / 2, add(*gradients(params, batch, 6)[:2]))


MISTAKES = [
    (_alike, loss, "which count alike: 6, 6 and 4 rows"),
    (_masked_alike, masked_loss, r"batch\['mask'\] keeps 3, 3, 4 and 3"),
    (_summed, loss, "4 times too large, the number of micro-batches: it is their sum"),
    (_left_out, loss, "all of 4 micro-batches but the last of 4 rows"),
    (_last_alone, loss, "the last of 4 micro-batches alone"),
    (_twice, loss, "the first of 4 micro-batches of 4 rows counts twice"),
    (_dropped, loss, "the first 12 of 16 rows"),
    (moving, loss, "gradient descent moves in between, at a rate of 0.05"),
    (in_half_precision, loss, "accumulated in half precision"),
]


@pytest.mark.parametrize(("accumulate", "fn", "says"), MISTAKES)
def test_a_mistake_is_named(accumulate, fn, says):
    with pytest.raises(gradtest.GradientMismatch, match=says) as caught:
        assert_match(accumulate, fn, PARAMS, BATCH)
    wrong = {f.name for f in caught.value.report.findings if f.verdict.value == "FAIL"}
    assert wrong <= {"params['w']", "params['b']"}
    assert wrong


WRONG_STEPS = [
    ({"micro_batches": [6, 6, 4]}, 3, {}, loss, "count alike: 6, 6 and 4 rows"),
    ({}, 4, {}, masked_loss, r"batch\['mask'\] keeps 3, 3, 4 and 3"),
    ({}, 4, {"use_grad_mean": False}, loss, "it is their sum"),
    ({"micro_batches": 2}, 4, {}, loss, "no update: it waits for more"),
    ({"micro_batches": 8}, 4, {}, loss, "after micro-batch 4 of 8 it returns an"),
    (
        {},
        4,
        {"should_skip_update_fn": lambda u, g, p: (u["b"] > -1e9, ())},
        loss,
        "should_skip_update_fn left out 4",
    ),
]


@pytest.mark.parametrize(("options", "count", "made", "fn", "says"), WRONG_STEPS)
def test_multi_steps_that_are_not_the_full_batch_are_refused(
    options, count, made, fn, says
):
    options = {"micro_batches": count, **options}
    tx = optax.MultiSteps(optax.adam(0.1), count, **made)
    with pytest.raises(gradtest.GradientMismatch, match=says):
        assert_match(tx, fn, PARAMS, BATCH, **options)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"early": True}, "the update is not that of `inner`"),
     ({"resets": False}, "the accumulator does not start anew")],
)  # fmt: skip
def test_what_a_wrapper_of_ones_own_gets_wrong_is_seen(wrong, says):
    adam = optax.adam(0.1)
    with pytest.raises(gradtest.GradientMismatch, match=says):
        assert_match(
            own_accumulator(adam, 4, **wrong), loss, PARAMS, BATCH,
            micro_batches=4, inner=adam,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("accumulate", "options", "error", "says"),
    [
        (3, {}, TypeError, "`accumulate` must be a function"),
        (weighed, {"inner": optax.sgd(1.0)}, TypeError, "`inner` is for"),
        (weighed, {"micro_batches": 17}, ValueError, "from 1 to the 16 rows"),
        (weighed, {"micro_batches": [8, 7]}, ValueError, "add up to the 16 rows"),
        (weighed, {"batch_axis": -1}, ValueError, "`batch_axis` must be"),
        (weighed, {"micro_batches": "list"}, TypeError, "wants a list of batches"),
        (optax.sgd(0.1), {}, ValueError, "`micro_batches` must say"),
        (lambda p, b: p["w"], {}, TypeError, "gradients like `params`"),
    ],
)
def test_bad_input_is_named(accumulate, options, error, says):
    with pytest.raises(error, match=says):
        assert_match(accumulate, loss, PARAMS, BATCH, **options)
