"""How small a mistake is still refused, and that right half precision is accepted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.sparse import linalg as sparse

import gradtest
from tests.right_models import RIGHT_MODELS, leaf_paths, scaled_leaf

_ALMOST_ONE = 1 + 1e-4
_ONE_ULP_AND_MORE = 1 + 2**-6
# They take long to trace anew; benchmarks/sensitivity.py tries every factor on them.
_SLOW = frozenset({"cnn", "transformer", "lstm", "batch_norm_and_dropout", "gmres"})


def _path(model, args):
    """A leaf whose gradient is not zero: a kernel, where there are any."""
    paths = leaf_paths(args)
    kernels = [path for path in paths if "kernel" in path]
    return kernels[0] if kernels else paths[len(paths) // 2]


def _cases(dtype, without=frozenset()):
    return [
        pytest.param(
            model,
            id=model.name,
            marks=[pytest.mark.devices] if model.devices > 1 else [],
        )
        for model in RIGHT_MODELS
        if dtype in model.dtypes and model.name not in without
    ]


def _refused(fn, args, path):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(fn, *args)
    wrong = [f for f in caught.value.report.findings if f.cause]
    assert len({f.name for f in wrong}) == 1
    name = wrong[0].name
    # A path is `[0]['w']`, a name `params['w']`.
    assert path.split("]", 1)[1] == name[len(name.split("[")[0]) :]
    return wrong[0]


@pytest.mark.parametrize("model", _cases(jnp.float32))
def test_a_leaf_one_part_in_ten_thousand_too_large_is_refused_in_float32(model):
    fn, args = model.make(jnp.float32)
    path = _path(model, args)
    _refused(scaled_leaf(fn, path, _ALMOST_ONE), args, path)


@pytest.mark.parametrize("model", _cases(jnp.bfloat16))
def test_a_leaf_one_part_in_ten_thousand_too_large_is_refused_in_bfloat16(model):
    fn, args = model.make(jnp.bfloat16)
    path = _path(model, args)
    wrong = scaled_leaf(fn, path, _ALMOST_ONE, compute_dtype=jnp.float32)
    _refused(wrong, args, path)


@pytest.mark.parametrize("model", _cases(jnp.bfloat16, without=_SLOW))
def test_a_factor_written_in_bfloat16_is_refused(model):
    fn, args = model.make(jnp.bfloat16)
    path = _path(model, args)
    _refused(scaled_leaf(fn, path, _ONE_ULP_AND_MORE), args, path)


@pytest.mark.core
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_one_wrong_entry_among_a_million_is_refused_and_located(factor):
    w = jax.random.normal(jax.random.key(0), (1024, 1024)) / 32
    x = jax.random.normal(jax.random.key(1), (4, 1024))

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    gradient = np.abs(np.asarray(jax.grad(loss)(w, x)))
    # The entry of median size: no larger than half of all.
    flat = int(np.argsort(gradient.ravel())[gradient.size // 2])
    index = tuple(int(i) for i in np.unravel_index(flat, gradient.shape))
    wrong = scaled_leaf(loss, "[0]", factor, index=index)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(wrong, w, x)
    finding = caught.value.report.leaf("w")
    assert finding.entry.index == index
    assert finding.entry.claimed == pytest.approx(factor * finding.entry.true, rel=1e-3)
    assert finding.cause.name == "some entries wrong"


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_leaf_with_a_millionth_of_the_gradient_does_not_hide(dtype):
    params = {
        "large": jax.random.normal(jax.random.key(0), (32, 8)).astype(dtype),
        "small": jax.random.normal(jax.random.key(1), (8,)).astype(dtype),
    }

    def loss(params):
        main = jnp.sum(jnp.sin(params["large"].astype(jnp.float32)))
        return main + 1e-6 * jnp.sum(jnp.cos(params["small"].astype(jnp.float32)))

    gradtest.assert_autodiff_matches(loss, params)
    wrong = scaled_leaf(loss, "[0]['small']", 3.0)
    finding = _refused(wrong, (params,), "[0]['small']")
    assert finding.cause.name == "constant factor"
    assert "3 times too large" in finding.cause.says


def _lu_solve(matrix, rhs):
    return jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(matrix), rhs)


def _direct(factor, forward_factor=1.0):
    def fn(matrix, rhs):
        fixed = jax.lax.stop_gradient(matrix)
        return jax.lax.custom_linear_solve(
            lambda x: matrix @ x,
            rhs,
            solve=lambda _, b: forward_factor * _lu_solve(fixed, b),
            transpose_solve=lambda _, b: factor * _lu_solve(fixed.T, b),
        )

    return fn


def _iterative(factor, forward_factor=1.0):
    def fn(matrix, rhs):
        solve = functools.partial(sparse.cg, tol=1e-6)
        return jax.lax.custom_linear_solve(
            lambda x: matrix @ x,
            rhs,
            solve=lambda matvec, b: forward_factor * solve(matvec, b)[0],
            transpose_solve=lambda vecmat, b: factor * solve(vecmat, b)[0],
        )

    return fn


@pytest.fixture
def system():
    root = jax.random.normal(jax.random.key(0), (6, 6))
    return root @ root.T / 6 + jnp.eye(6), jax.random.normal(jax.random.key(1), (6,))


@pytest.mark.core
@pytest.mark.parametrize("solver", [_direct, _iterative])
def test_a_right_linear_solve_is_accepted(solver, system):
    gradtest.assert_autodiff_matches(solver(1.0), *system, modes=["rev"])


@pytest.mark.core
@pytest.mark.parametrize("solver", [_direct, _iterative])
@pytest.mark.parametrize("factor", [1.01, 1.5, 0.99])
def test_a_transposed_solver_that_is_too_large_is_refused_by_name(
    solver, factor, system
):
    with pytest.raises(gradtest.GradientMismatch, match="transpose_solve") as caught:
        gradtest.assert_autodiff_matches(solver(factor), *system, modes=["rev"])
    finding = caught.value.report.leaf("transpose_solve")
    assert finding.verdict is gradtest.Verdict.FAIL
    assert finding.cause.name == "wrong solver"


@pytest.mark.core
def test_a_direct_solver_that_is_too_large_is_refused_by_name(system):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(_direct(1.0, 1.01), *system, modes=["rev"])
    assert caught.value.report.leaf("solve").verdict is gradtest.Verdict.FAIL


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "fn",
    [
        jax.lax.erf,
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: jnp.cbrt(x + 2),
        lambda x: jax.lax.erf_inv(x / 2),
    ],
    ids=["erf", "exact_gelu", "cbrt", "erf_inv"],
)
def test_functions_with_rounded_constants_are_accepted_in_half_precision(fn, dtype):
    x = jnp.asarray(np.linspace(-1.5, 1.5, 11), dtype)
    report = gradtest.assert_autodiff_matches(fn, x)
    assert report.modes == ("rev", "fwd")


@pytest.mark.core
def test_an_absolute_error_far_below_float32_rounding_is_still_seen():
    # No other way to see it: float32 rounds at 6e-8, this mistake is 1e-5.
    x = jax.random.normal(jax.random.key(0), (1000,))
    wrong = scaled_leaf(lambda x: jnp.sum(jnp.exp(x)), "[0]", 1 + 1e-5)
    finding = _refused(wrong, (x,), "[0]")
    assert finding.size == pytest.approx(1e-5, rel=1e-2)
