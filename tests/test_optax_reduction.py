"""Reductions of losses: right ones accepted, each broken promise named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import losses

import gradtest
import gradtest.optax

assert_reduction = gradtest.optax.assert_loss_reduction
_RNG = np.random.default_rng(0)


def _normal(*shape):
    return jnp.asarray(_RNG.normal(size=shape), jnp.float32)


P, T = _normal(7), _normal(7)
MASK = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
LOGITS, LABELS = _normal(3, 4, 5), jnp.asarray(_RNG.integers(0, 5, (3, 4)))
TOKENS = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]], bool)
cross_entropy = losses.softmax_cross_entropy_with_integer_labels


def squared(p, t):
    return (p - t) ** 2


def mean(p, t):
    return jnp.mean(squared(p, t))


def total(p, t):
    return jnp.sum(squared(p, t))


def masked_mean(p, t, mask):
    return jnp.sum(mask * squared(p, t)) / jnp.sum(mask)


def by_where(p, t, where):
    return jnp.mean(squared(p, t), where=where)


def masked_twice(p, t, mask):
    kept = jnp.where(mask, squared(jnp.where(mask, p, 0), t), 0)
    return jnp.sum(kept) / jnp.maximum(jnp.sum(mask), 1)


def token_mean(logits, labels, mask):
    return jnp.sum(cross_entropy(logits, labels) * mask) / jnp.sum(mask)


def bfloat_mean(p, t):
    return jnp.mean(squared(p.astype(jnp.bfloat16), t.astype(jnp.bfloat16)))


RIGHT = [
    (mean, (P, T), {}),
    (total, (P, T), {"reduction": "sum"}),
    (squared, (P, T), {"reduction": "none"}),
    (squared, (_normal(3, 2), _normal(3, 2)), {"reduction": "none", "axis": (0, 1)}),
    (mean, (_normal(3, 2), _normal(3, 2)), {"axis": 1}),
    (mean, (P.astype(jnp.bfloat16), T.astype(jnp.bfloat16)), {}),
    (masked_mean, (P, T), {"where": MASK}),
    (masked_mean, (P, T), {"where": MASK.astype(jnp.float32)}),
    (by_where, (P, T), {"where": MASK}),
    (masked_twice, (P, T), {"where": MASK, "strict_mask": True}),
    (masked_twice, (P.at[2].set(jnp.nan), T), {"where": MASK}),
    (token_mean, (LOGITS, LABELS), {"where": TOKENS}),
    (lambda p, t: (mean(p, t), {"p": p}), (P, T), {"has_aux": True}),
    (lambda p, more: mean(p["a"], more["t"]) + 0 * more["n"],
     ({"a": P, "none": None}, {"t": T, "n": 2}), {}),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "args", "options"), RIGHT)
def test_right_reductions_pass(loss, args, options):
    assert assert_reduction(loss, *args, **options).findings


def test_params_that_have_as_many_rows_by_chance_are_left_whole():
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    args = (_normal(3), _normal(3, 3), _normal(3))
    assert_reduction(loss, *args, batched=(1, 2))


WRONG = [
    (total, {}, "it is the sum of 7 losses, 7 times too large"),
    (mean, {"reduction": "sum"}, "it is the mean of 7 losses, 7 times too small"),
    (lambda p, t: mean(p, t) / len(p), {}, "divided by 7 once more"),
    (lambda p, t, mask: jnp.mean(squared(p, t) * mask), {"where": MASK},
     "the sum of 5 unmasked losses is divided by all 7"),
    (lambda p, t, mask: mean(p, t), {"where": MASK}, "the 2 masked ones count as well"),
    (lambda p, t, mask: total(p, t) / jnp.sum(mask), {"where": MASK},
     "all 7 losses are added, and divided by the 5"),
    (lambda p, t, mask: by_where(p, t, ~mask), {"where": MASK},
     "those that the mask keeps have none"),
    (lambda p, t: mean(p[:, None], t), {}, "over all 49 pairs"),
    (lambda p, t: mean(p - jnp.mean(p), t), {}, "one depends on other examples"),
    (mean, {"reduction": "none"}, "one number, where one for each of 7"),
    (squared, {}, "one value for each example, where a mean is promised"),
    (lambda p, t: squared(p[:, None], t), {"reduction": "none"},
     "one value for each pair of examples"),
    (masked_mean, {"where": MASK, "strict_mask": True}, "NaN in a masked entry makes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "options", "says"), WRONG, ids=[wrong[2] for wrong in WRONG]
)
def test_a_broken_promise_is_named(loss, options, says):
    with pytest.raises(gradtest.GradientMismatch, match=says) as caught:
        assert_reduction(loss, P, T, **options)
    names = {f.name for f in caught.value.report.findings if f.cause is not None}
    assert names <= {"p", "result"}


def test_a_mean_of_means_of_unequal_rows_is_named():
    def loss(logits, labels, mask):
        each = cross_entropy(logits, labels) * mask
        return jnp.mean(jnp.sum(each, 1) / jnp.sum(mask, 1))

    with pytest.raises(gradtest.GradientMismatch, match="which keep 2, 3 and 1"):
        assert_reduction(loss, LOGITS, LABELS, where=TOKENS)


def test_a_loss_over_the_wrong_axis_is_named():
    hot = jax.nn.one_hot(jnp.array([0, 2, 1]), 4)
    with pytest.raises(gradtest.GradientMismatch, match="no axis for the 3 examples"):
        assert_reduction(
            lambda x: losses.softmax_cross_entropy(x, hot, axis=0),
            _normal(3, 4),
            reduction="none",
            per_example=None,
        )


def test_nan_that_stands_in_a_masked_entry_must_not_leak():
    with pytest.raises(gradtest.GradientMismatch, match="there is one in the argumen"):
        assert_reduction(masked_mean, P.at[2].set(jnp.nan), T, where=MASK)


def test_the_report_tells_what_a_mask_does_not_promise():
    notes = assert_reduction(masked_mean, P, T, where=MASK).notes
    assert any("NaN in a masked entry makes 2 of 7" in note for note in notes)
    assert any("a mask that keeps nothing makes the gradient" in n for n in notes)


def test_a_tiny_gradient_of_a_masked_entry_is_seen():
    def leaky(p, t, mask):
        return masked_mean(p, t, mask) + 1e-12 * jnp.sum(p)

    with pytest.raises(gradtest.GradientMismatch, match="is masked has a gradient"):
        assert_reduction(leaky, P, T, where=MASK)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reduction": "max"}, ValueError, "`reduction` must be"),
        ({"where": MASK}, ValueError, "say which argument it is by `where_name="),
        ({"where": ~MASK & MASK}, ValueError, "it is all false"),
        ({"axis": -1}, ValueError, "`axis` must be an integer"),
        ({"axis": 3}, ValueError, "no argument of the loss has an axis"),
        ({"batched": 4}, ValueError, "`batched` must name some of 2"),
        ({"per_example": 3}, TypeError, "`per_example` must be callable"),
    ],
)
def test_bad_input_is_named(options, error, says):
    with pytest.raises(error, match=says):
        assert_reduction(mean, P, T, **options)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`where` .* \[7\].* \[5\].*axis 0"):
        assert_reduction(masked_mean, P, T, where=MASK[:5])
    with pytest.raises(ValueError, match=r"`where_name` must name .*'mask'.*'weights'"):
        assert_reduction(masked_mean, P, T, where=MASK, where_name="weights")


@pytest.mark.parametrize(
    ("loss", "args", "options"),
    [
        (total, (P[:1], T[:1]), {}),
        (mean, (P[:1], T[:1]), {"reduction": "sum"}),
        (masked_mean, (P, T), {"where": jnp.arange(7) == 3}),
    ],
)
def test_one_example_tells_nothing_of_a_reduction(loss, args, options):
    with pytest.raises(
        gradtest.GradientInconclusive, match=r"one example.*same number"
    ):
        assert_reduction(loss, *args, **options)


def test_a_slip_shows_in_one_example_too():
    with pytest.raises(gradtest.GradientMismatch):
        assert_reduction(
            lambda p, t, mask: jnp.mean(squared(p, t) * mask), P, T,
            where=jnp.arange(7) == 3,
        )  # fmt: skip


def test_a_mask_that_keeps_everything_is_told_to_prove_nothing():
    report = assert_reduction(masked_mean, P, T, where=jnp.ones(7, bool))
    assert any("`where`: it keeps everything" in each for each in report.unchecked)
    report = assert_reduction(masked_mean, P, T, where=MASK)
    assert not any("`where`" in each for each in report.unchecked)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, t: jnp.mean(squared(p, t)[:-1]),
        lambda p, t: jnp.mean(squared(p, t)) / jnp.std(t),
    ],
)
def test_a_loss_of_one_example_that_is_nan_is_told_apart(loss):
    with pytest.raises(
        gradtest.GradientInconclusive,
        match=r"(?s)one example alone is NaN.*per_example=",
    ):
        assert_reduction(loss, P, T)


def test_no_line_is_named_by_a_fitted_number():
    def contrastive(p, t):
        scores = p[:, None] * t
        return jnp.mean(jax.nn.logsumexp(scores, 1) - jnp.diag(scores))

    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_reduction(contrastive, P, T)
    assert all(finding.line is None for finding in caught.value.report.findings)
    assert "derivative is right" not in str(caught.value)
