"""All of `optax.losses`: each promise of a reduction holds, and no loss is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax_losses
import pytest
from optax import losses
from optax_losses import PROMISES

import gradtest
import gradtest.optax

pytestmark = pytest.mark.filterwarnings("ignore:The function convex_kl_divergence")


def test_every_public_loss_has_a_promise():
    assert {promise.loss for promise in PROMISES} == optax_losses.public_losses()


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_a_loss_keeps_its_promise(promise):
    report = gradtest.optax.assert_loss_reduction(
        promise.fn, *promise.args, **promise.options
    )
    assert report.findings
    assert report.smallest_seen < 1e-5


# --- what is wrong in Optax, so that its day of mending is seen -----------------------


def test_the_triplet_loss_forgets_the_sign_of_differences_in_odd_norms():
    near, far = jnp.ones((1, 2)), 2 * jnp.ones((1, 2))
    anchors = jnp.zeros((1, 2))

    def by_absolute_values(i, a):
        gaps = jnp.abs(a[i] - near[i]).sum() - jnp.abs(a[i] - far[i]).sum()
        return jnp.maximum(gaps + 3, 0)

    with pytest.raises(gradtest.GradientMismatch, match="not its examples' losses"):
        gradtest.optax.assert_loss_reduction(
            lambda a: losses.triplet_margin_loss(
                a, near, far, norm_degree=1, margin=3.0
            ),
            anchors + 0.25,
            reduction="none",
            per_example=by_absolute_values,
        )
    cubed = jax.grad(
        lambda a: losses.triplet_margin_loss(a, near, far, norm_degree=3).sum()
    )
    assert np.isnan(cubed(anchors)).all()


def test_a_dice_loss_of_probabilities_cannot_be_jitted():
    targets = jax.nn.one_hot(jnp.array([0, 1]), 2)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda x: losses.dice_loss(x, targets, apply_softmax=False))(targets)


def test_a_row_that_is_masked_makes_the_cosines_gradient_nan():
    where = np.array([[True, True], [False, False]])
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def similarity(x):
        return losses.cosine_similarity(x, x[::-1], where=where).sum()

    assert np.isfinite(similarity(x))
    assert np.isnan(jax.grad(similarity)(x)).any()
