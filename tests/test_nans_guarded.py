"""Functions that are guarded as they should be: nothing is reported of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy import special
from optax import losses

import gradtest

# Zeros, ties, saturation either way, and ordinary values among them.
POINTS = {
    "zeros": jnp.zeros((2, 3)),
    "ties": jnp.full((2, 3), 0.7),
    "saturated": jnp.array([[100.0, -100.0, 0.3], [-100.0, -100.0, -100.0]]),
    "mixed": jnp.array([[0.0, 1.0, -1.0], [30.0, -30.0, 1e-8]]),
}
NAMES = [
    "celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu",
    "log_sigmoid", "log_softmax", "logsumexp", "mish", "relu", "relu6", "selu",
    "sigmoid", "silu", "soft_sign", "softmax", "softplus", "sparse_plus",
    "sparse_sigmoid", "squareplus", "standardize",
]  # fmt: skip
ONE_HOT = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
SIGNS = 2 * ONE_HOT - 1
LABELS = jnp.array([1, 0])
SHARES = jnp.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])

# Each a function of logits, scores or predictions; targets are exact zeros and ones.
LOSSES: dict[str, Callable[[Any], Any]] = {
    "cosine_distance": lambda x: losses.cosine_distance(x, ONE_HOT, epsilon=1e-6),
    "hinge_loss": lambda x: losses.hinge_loss(x, SIGNS),
    "huber_loss": lambda x: losses.huber_loss(x, ONE_HOT),
    "kl_divergence": lambda x: losses.kl_divergence(jax.nn.log_softmax(x), SHARES),
    "kl_divergence_with_log_targets": lambda x: losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(x), jax.nn.log_softmax(SHARES)
    ),
    "l2_loss": lambda x: losses.l2_loss(x, x[::-1]),
    "log_cosh": lambda x: losses.log_cosh(x, ONE_HOT),
    "multiclass_hinge_loss": lambda x: losses.multiclass_hinge_loss(x, LABELS),
    "multiclass_perceptron_loss": lambda x: losses.multiclass_perceptron_loss(
        x, LABELS
    ),
    "multiclass_sparsemax_loss": lambda x: losses.multiclass_sparsemax_loss(x, LABELS),
    "perceptron_loss": lambda x: losses.perceptron_loss(x, SIGNS),
    "poly_loss_cross_entropy": lambda x: losses.poly_loss_cross_entropy(x, ONE_HOT),
    "ranking_softmax_loss": lambda x: losses.ranking_softmax_loss(x, ONE_HOT),
    "safe_softmax_cross_entropy": lambda x: losses.safe_softmax_cross_entropy(
        x, ONE_HOT
    ),
    "sigmoid_binary_cross_entropy": lambda x: losses.sigmoid_binary_cross_entropy(
        x, ONE_HOT
    ),
    "sigmoid_focal_loss": lambda x: losses.sigmoid_focal_loss(x, ONE_HOT),
    "softmax_cross_entropy": lambda x: losses.softmax_cross_entropy(x, SHARES),
    "softmax_cross_entropy_with_integer_labels": (
        lambda x: losses.softmax_cross_entropy_with_integer_labels(x, LABELS)
    ),
    "sparsemax_loss": lambda x: losses.sparsemax_loss(x, ONE_HOT),
    "squared_error": lambda x: losses.squared_error(x, ONE_HOT),
}


def _safe_sqrt(x: Any) -> Any:
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


# What users write, guarded; and where.
OWN: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "double where of sqrt": (_safe_sqrt, np.array([0.0, 1.0, -1.0])),
    "double where of log": (
        lambda x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), 0.0),
        np.array([0.0, 1.0, -2.0]),
    ),
    "safe norm": (lambda x: _safe_sqrt(jnp.sum(x**2)), np.zeros(3)),
    "optax.safe_norm": (lambda x: optax.safe_norm(x, 1e-6), np.zeros(3)),
    "root of a square plus epsilon": (
        lambda x: jnp.sqrt(jnp.sum(x**2) + 1e-12),
        np.zeros(3),
    ),
    "clipped arccos": (
        lambda x: jnp.arccos(jnp.clip(x, -0.999, 0.999)),
        np.array([1.0, -1.0, 0.2]),
    ),
    "sinc": (jnp.sinc, np.array([0.0, 0.5])),
    "guarded division": (
        lambda x: jnp.where(x != 0, x / jnp.where(x != 0, x, 1.0), 0.0),
        np.array([0.0, 2.0]),
    ),
    "entropy by xlogy, clipped": (
        lambda x: -special.xlogy(x, jnp.maximum(x, 1e-30)),
        np.array([0.0, 0.3, 1.0]),
    ),
    "mean over an empty mask": (
        lambda x: jnp.sum(x * jnp.zeros(3)) / jnp.maximum(jnp.sum(jnp.zeros(3)), 1.0),
        np.ones(3),
    ),
    "logsumexp under a mask": (
        lambda x: jax.nn.logsumexp(x, where=np.array([True, False, True])),
        np.array([0.0, 1e4, -1e4]),
    ),
    "softmax under a mask": (
        lambda x: jax.nn.softmax(x, where=np.array([True, False, True])),
        np.array([100.0, 3.0, -100.0]),
    ),
    "vmap of cond": (
        lambda x: jax.vmap(lambda a: jax.lax.cond(a > 0, jnp.log, lambda b: 2 * b, a))(
            x
        ),
        np.array([0.0, 1.0]),
    ),
    "root of relu at zero": (lambda x: jnp.sqrt(jax.nn.relu(x)), np.array([0.0, 1.0])),
    "integer power": (lambda x: x**0 + x**1 + x**2, np.zeros(3)),
    "maximum of ties": (jnp.max, np.zeros(4)),
    "abs at zero": (jnp.abs, np.zeros(3)),
    "sorted ties": (lambda x: jnp.sort(x) * jnp.arange(4.0), np.ones(4)),
    "product with zeros": (jnp.prod, np.zeros(3)),
    "variance of constants": (jnp.var, np.ones(4)),
    "a NaN that a where stops": (
        lambda x: jnp.sqrt(jnp.where(x > 0, x, 1.0)),
        np.array([0.0, 4.0]),
    ),
    "eigenvalues alone": (lambda x: jnp.linalg.eigvalsh(x), np.eye(3)),
    "expm1 for small numbers": (
        lambda x: jnp.expm1(x) + jnp.log1p(x),
        np.array([0.0, 1e-30]),
    ),
    "logaddexp far away": (
        lambda x: jnp.logaddexp(x, 0.0),
        np.array([1e4, -1e4, 0.0]),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_reported_of_what_jax_nn_offers(name: str) -> None:
    fn = getattr(jax.nn, name)
    for point in POINTS.values():
        report = gradtest.assert_grads_finite(fn, point)
        assert report.verdict is gradtest.Verdict.PASS
        assert report.findings[0].line is None


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_reported_of_the_losses_of_optax(name: str) -> None:
    for point in POINTS.values():
        report = gradtest.assert_grads_finite(LOSSES[name], point)
        assert report.verdict is gradtest.Verdict.PASS


@pytest.mark.parametrize("name", OWN)
def test_nothing_is_reported_of_guarded_formulas(name: str) -> None:
    fn, point = OWN[name]
    report = gradtest.assert_grads_finite(fn, jnp.asarray(point, jnp.float32))
    assert report.verdict is gradtest.Verdict.PASS


def test_a_value_that_is_not_finite_is_inconclusive_and_not_explained() -> None:
    with pytest.raises(gradtest.GradientInconclusive) as caught:
        gradtest.assert_grads_finite(jnp.log, jnp.zeros(2))
    (finding,) = caught.value.report.findings
    assert finding.cause is not None
    assert finding.cause.name == "infinite value"
    assert finding.line is None
