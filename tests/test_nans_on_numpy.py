"""Equations that NumPy computes where a gradient is not finite: as JAX does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradtest
from gradtest._src.lifting import Evaluator
from gradtest._src.nans import on_numpy, slopes
from gradtest._src.nans.on_numpy import QuickEvaluator

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, -3.25, 100.0, -200.0, np.inf, -np.inf, np.nan]
X = np.array(SPECIAL, np.float32)
PAIRS = tuple(np.meshgrid(X, X))
TABLE = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7
WHOLE = np.array([[3, -2], [0, 7]], np.int32)
FLAGS = np.array([[True, False], [False, False]])
PRODUCT = (((2,), (1,)), ((0,), (0,)))

CASES: dict[str, tuple[Any, ...]] = {
    "add": (lax.add, *PAIRS),
    "sub": (lax.sub, *PAIRS),
    "mul": (lax.mul, *PAIRS),
    "div": (lax.div, *PAIRS),
    "div of integers": (lax.div, WHOLE, np.int32([[2, 3], [4, -5]])),
    "max": (lax.max, *PAIRS),
    "min": (lax.min, *PAIRS),
    "pow": (lax.pow, *PAIRS),
    "eq": (lax.eq, *PAIRS),
    "ne": (lax.ne, *PAIRS),
    "lt": (lax.lt, *PAIRS),
    "le": (lax.le, *PAIRS),
    "gt": (lax.gt, *PAIRS),
    "ge": (lax.ge, *PAIRS),
    "neg": (lax.neg, X),
    "sqrt": (lax.sqrt, X),
    "rsqrt": (lax.rsqrt, X),
    "square": (lax.square, X),
    "exp": (lax.exp, X),
    "expm1": (lax.expm1, X),
    "log": (lax.log, X),
    "log1p": (lax.log1p, X),
    "logistic": (lax.logistic, X),
    "tanh": (lax.tanh, X),
    "sin": (lax.sin, X),
    "cos": (lax.cos, X),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), X),
    "integer_pow below 0": (lambda x: lax.integer_pow(x, -2), X),
    "and": (lax.bitwise_and, FLAGS, ~FLAGS),
    "or": (lax.bitwise_or, WHOLE, WHOLE + 1),
    "not": (lax.bitwise_not, FLAGS),
    "copy": (lambda x: lax.copy_p.bind(x), X),
    "select_n": (lax.select, FLAGS, TABLE[:, :2, 0], TABLE[:, 1:, 1]),
    "convert_element_type": (lambda x: x.astype(jnp.float32), FLAGS),
    "convert to integers": (lambda x: x.astype(jnp.int32), X),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (5, 2, 2), (1, 2)), WHOLE),
    "reshape": (lambda x: lax.reshape(x, (4, 6)), TABLE),
    "slice": (lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 2)), TABLE),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), TABLE[:, :1]),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), TABLE),
    "reduce_sum": (lambda x: jnp.sum(x, (0, 2)), TABLE),
    "reduce_max": (lambda x: jnp.max(x, (0, 2)), TABLE),
    "reduce_min": (lambda x: jnp.min(x), X),
    "dot_general": (
        lambda x, y: lax.dot_general(x, y, PRODUCT), TABLE, TABLE.transpose(0, 2, 1),
    ),
    "dot of vectors": (jnp.dot, TABLE[0, 0], TABLE[1, 1]),
    "subnormal numbers": (lambda x: x * 1e-30, np.float32([1e-10, 1.0])),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_equation_has_the_result_that_jax_gives(name: str, wide: bool) -> None:
    function, *arguments = CASES[name]
    program = jax.make_jaxpr(function)(*arguments)
    with jax.enable_x64(wide), np.errstate(all="ignore"):
        if wide:
            arguments = [
                a.astype("f8") if a.dtype.kind == "f" else a for a in arguments
            ]
        (found,) = QuickEvaluator(wide=wide)(program, arguments)
        (wanted,) = Evaluator(wide=wide)(program, arguments)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


@pytest.mark.core
def test_every_equation_of_the_tables_is_compared() -> None:
    tabled = {*on_numpy._EXACT, *on_numpy._ROUNDED} - {"add_any"}
    assert tabled <= set(CASES)


def test_a_nan_that_a_mask_multiplies_is_seen_though_xla_drops_it() -> None:
    def mean(x: Any, mask: Any) -> Any:
        count = jnp.where(mask, 1.0, 0.0).sum(1)
        return jnp.where(count > 0, (x * mask).sum(1) / count, 0.0).sum()

    assert np.isnan(jax.grad(mean)(TABLE[:, :2, 0], FLAGS)).any()
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grads_finite(mean, TABLE[:, :2, 0], FLAGS)
    assert "`div`" in str(caught.value)
    assert "verified" in str(caught.value)


def test_a_key_among_the_arguments_does_not_hinder_a_remedy() -> None:
    def root(x: Any, key: Any) -> Any:
        return jnp.sqrt(x * jax.random.uniform(key, (2,))).sum()

    with pytest.raises(gradtest.GradientMismatch, match="verified"):
        gradtest.assert_grads_finite(root, jnp.array([1.0, 0.0]), jax.random.key(3))


def test_minus_infinities_beside_nans_are_not_called_nan() -> None:
    def angle(x: Any) -> Any:
        return jnp.arccos(x @ jnp.array([1.0, 0.0, 0.0]))

    with pytest.raises(gradtest.GradientMismatch, match=r"3 of 3 .* NaN or infinite"):
        gradtest.assert_grads_finite(angle, jnp.array([1.0, 0.0, 0.0]))


@pytest.mark.core
@pytest.mark.parametrize(
    ("function", "is_infinite"),
    [
        (lambda x: np.sqrt(np.abs(x)), True),
        (lambda x: x * np.log(np.abs(x) + 1e-300), True),
        (lambda x: x / (np.abs(x) + 1e-6), False),
        (np.abs, False),
    ],
)
def test_a_slope_is_infinite_only_where_it_goes_on_growing(
    function: Any, is_infinite: bool
) -> None:
    def value(point: Any) -> float:
        return float(function(point[0][0]))

    assert slopes.sides(value, [np.zeros(1)], 0, (0,)).is_infinite == is_infinite
