"""Functions that read one triangle of a symmetric matrix, Cholesky's among them."""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import pytest

import gradtest

pytestmark = pytest.mark.core

_K = jnp.array([[2.0, 0.5, 0.1], [0.5, 3.0, 0.2], [0.1, 0.2, 1.5]])


def _likelihood(matrix):
    y = jnp.ones(3)
    factor = jsl.cho_factor(matrix)
    logdet = 2 * jnp.sum(jnp.log(jnp.diag(factor[0])))
    return 0.5 * (y @ jsl.cho_solve(factor, y) + logdet)


def _textbook(matrix):
    inverse = jnp.linalg.inv(matrix)
    weights = inverse @ jnp.ones(3)
    return 0.5 * (inverse - jnp.outer(weights, weights))


@pytest.mark.parametrize(
    "fn", [jsl.cholesky, _likelihood, lambda k: jsl.solve(k, k[0], assume_a="pos")]
)
def test_a_derivative_along_symmetric_matrices_is_right(fn):
    gradtest.assert_autodiff_matches(fn, _K)


def test_a_textbook_gradient_is_right_and_told_to_be_one():
    report = gradtest.assert_grad_matches(_likelihood, _textbook, _K)
    (finding,) = report.findings
    assert "symmetric changes" in " ".join(finding.notes)


def test_a_wrong_textbook_gradient_is_refused():
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(_likelihood, lambda k: 2 * _textbook(k), _K)


def test_a_transposed_gradient_is_refused_at_a_symmetric_point():
    weights = jnp.arange(9.0).reshape(3, 3)

    def fn(matrix):
        return jnp.sum(weights * jnp.sin(matrix))

    with pytest.raises(gradtest.GradientMismatch, match="transpose"):
        gradtest.assert_grad_matches(fn, lambda k: jax.grad(fn)(k).T, _K)
