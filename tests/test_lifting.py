"""A lifted program computes in float64 what the program means, dtype for dtype.

Each row of the tables is traced at float32 (or at what its arguments are), lifted, and
compared with the same function called on float64 arguments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.lifted import Row, assert_lifted

pytestmark = pytest.mark.core

_VECTOR = np.linspace(-1.3, 1.7, 6, dtype=np.float32)
_MATRIX = np.cos(np.arange(12, dtype=np.float32)).reshape(3, 4)
_SQUARE = np.sin(np.arange(9, dtype=np.float32)).reshape(3, 3) + 3 * np.eye(
    3, dtype=np.float32
)
_IMAGE = np.sin(np.arange(50, dtype=np.float32)).reshape(1, 5, 5, 2)
_KERNEL = np.cos(np.arange(36, dtype=np.float32)).reshape(3, 3, 2, 2)
_COMPLEX = (_VECTOR + 1j * _VECTOR[::-1] ** 2).astype(np.complex64)
_INTEGERS = np.array([4, 0, 4, 2], dtype=np.int32)


# --- dtypes in parameters ---------------------------------------------------------


def _there_and_back(x):
    return jnp.sin(x.astype(jnp.bfloat16).astype(jnp.float32))


def _rounded(x):
    return jnp.exp(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3))


def _half_weights(x):
    return x @ jnp.ones((4, 2), jnp.bfloat16).astype(jnp.float32) * 0.5


def _dot(x, preferred):
    return lax.dot(x, x.T, preferred_element_type=preferred)


def _conv(x, kernel, dtype=None, preferred=None):
    dtype = dtype or x.dtype
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=preferred,
    )


_CASTS = (
    Row("convert to bfloat16 and back", _there_and_back, (_VECTOR,), jnp.sin),
    Row("convert to float16", lambda x: x.astype(jnp.float16) * 2, (_VECTOR,),
        lambda x: 2 * x),
    Row("convert to float8", lambda x: x.astype(jnp.float8_e4m3fn), (_VECTOR,),
        lambda x: x),
    Row("convert to an integer", lambda x: (4 * x).astype(jnp.int32) * x, (_VECTOR,)),
    Row("convert a boolean", lambda x: (x > 0).astype(jnp.float32) * x, (_VECTOR,),
        lambda x: jnp.maximum(x, 0)),
    Row("convert a complex number", lambda x: x.astype(jnp.complex64) ** 2, (_VECTOR,),
        lambda x: x.astype(jnp.complex128) ** 2),
    Row("reduce_precision", _rounded, (_VECTOR,), jnp.exp),
    Row("constants of a narrow dtype", _half_weights, (_MATRIX,),
        lambda x: x @ jnp.ones((4, 2)) * 0.5),
    Row("iota of floats", lambda x: x * lax.iota(jnp.float32, 6), (_VECTOR,),
        lambda x: x * jnp.arange(6)),
    Row("iota of bfloat16", lambda x: x * lax.iota(jnp.bfloat16, 6), (_VECTOR,),
        lambda x: x * jnp.arange(6)),
    Row("full", lambda x: x + jnp.full_like(x, 0.25), (_VECTOR,)),
    Row("bfloat16 throughout", lambda x: jnp.tanh(x * x),
        (_VECTOR.astype("bfloat16"),)),
    Row("complex numbers", lambda z: jnp.exp(1j * z) * jnp.conj(z), (_COMPLEX,)),
    Row("parts of complex numbers", lambda z: z.real * jnp.angle(z), (_COMPLEX,)),
    Row("integers", lambda n: n * n // 3, (_INTEGERS,)),
)  # fmt: skip

_PRODUCTS = (
    Row("dot_general", lambda x: x @ x.T, (_MATRIX,)),
    Row("dot_general that prefers float32 to bfloat16",
        lambda x: _dot(x, jnp.float32), (_MATRIX.astype("bfloat16"),),
        lambda x: x @ x.T),
    Row("dot_general that prefers bfloat16", lambda x: _dot(x, jnp.bfloat16),
        (_MATRIX,), lambda x: x @ x.T),
    Row("dot_general with a narrow algorithm",
        lambda x: lax.dot(x, x.T, precision=lax.DotAlgorithmPreset.F32_F32_F32),
        (_MATRIX,), lambda x: x @ x.T),
    Row("dot_general at the highest precision",
        lambda x: jnp.dot(x, x.T, precision="highest"), (_MATRIX,)),
    Row("dot_general of integers that prefers floats",
        lambda n: lax.dot(n, n, preferred_element_type=jnp.float32), (_INTEGERS,),
        lambda n: (n @ n).astype(float)),
    Row("einsum", lambda x: jnp.einsum("ij,kj->ik", x, x), (_MATRIX,)),
    Row("convolution", _conv, (_IMAGE, _KERNEL)),
    Row("convolution in bfloat16 that prefers float32",
        functools.partial(_conv, dtype=jnp.bfloat16, preferred=jnp.float32),
        (_IMAGE, _KERNEL), _conv),
    Row("Fourier transform", lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2, (_VECTOR,)),
    Row("Cholesky", lambda x: jnp.linalg.cholesky(x @ x.T), (_SQUARE,)),
    Row("solve", jnp.linalg.solve, (_SQUARE, _VECTOR[:3])),
    Row("triangular solve",
        lambda x, b: jax.scipy.linalg.solve_triangular(x, b, lower=True),
        (_SQUARE, _VECTOR[:3])),
    Row("determinant", jnp.linalg.det, (_SQUARE,)),
    Row("eigenvalues", lambda x: jnp.linalg.eigvalsh(x + x.T), (_SQUARE,)),
    Row("singular values", lambda x: jnp.linalg.svd(x)[1], (_MATRIX,)),
    Row("QR", lambda x: jnp.abs(jnp.linalg.qr(x)[1]), (_SQUARE,)),
    Row("eigenvalues of a general matrix",
        lambda x: jnp.sort(jnp.abs(jnp.linalg.eigvals(x))), (_SQUARE,)),
)  # fmt: skip


# --- programs in parameters -------------------------------------------------------


def _scatter(method, **options):
    def fn(x, updates):
        at = jnp.asarray(x).at[jnp.array([1, 3, 3])]
        return getattr(at, method)(updates, **options)

    return fn


def _scatter_apply(x):
    return jnp.asarray(x).at[jnp.array([1, 3])].apply(jnp.sin)


def _reduce_with(combine, start):
    return lambda x: lax.reduce(x, np.asarray(start, x.dtype), combine, (0,))


def _reduce_pair(x):
    """A reduction of two operands: the largest entry and its place."""

    def larger(left, right):
        keep = left[0] > right[0]
        return jnp.where(keep, left[0], right[0]), jnp.where(keep, left[1], right[1])

    operands = (x, jnp.arange(x.size, dtype=jnp.int32))
    start = (np.asarray(-np.inf, x.dtype), np.int32(-1))
    return lax.reduce(operands, start, larger, (0,))


def _windows(x, combine=lax.add, start=0.0):
    start = np.asarray(start, x.dtype)
    return lax.reduce_window(x, start, combine, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _sort_by_key(x):
    return lax.sort((x, jnp.cos(x)), num_keys=1)


_COMBINERS = (
    *(
        Row(f"scatter: {method}", _scatter(method), (_VECTOR, _VECTOR[:3]))
        for method in ("set", "add", "subtract", "multiply", "min", "max")
    ),
    Row("scatter of bfloat16", lambda x: jnp.zeros(9, x.dtype).at[::2].add(x[:5]),
        (_VECTOR.astype("bfloat16"),)),
    Row("scatter by a function", _scatter_apply, (_VECTOR,)),
    Row("gather", lambda x, n: x[n], (_VECTOR, _INTEGERS)),
    Row("reduce with a computation",
        _reduce_with(lambda a, b: a + b * 1.0 + 0 * jnp.sin(a), 0), (_VECTOR,),
        lambda x: jnp.sum(x)),
    Row("reduce of a pair", _reduce_pair, (_VECTOR,)),
    Row("reduce with logical and", lambda x: jnp.all(x > -2) * x, (_VECTOR,)),
    Row("reduce_window", _windows, (_IMAGE,)),
    Row("reduce_window of maxima",
        functools.partial(_windows, combine=lax.max, start=-np.inf), (_IMAGE,)),
    Row("reduce_window with a computation",
        functools.partial(_windows, combine=lambda a, b: a * b + 0 * a, start=1.0),
        (_IMAGE,)),
    Row("gradient of a maximum pooling (select_and_scatter)",
        jax.grad(lambda x: jnp.sum(
            jnp.sin(_windows(x, combine=lax.max, start=-np.inf)))), (_IMAGE,)),
    Row("sort", jnp.sort, (_VECTOR[::-1].copy(),)),
    Row("sort by a key", _sort_by_key, (_VECTOR[::-1].copy(),)),
    Row("argsort", lambda x: x[jnp.argsort(jnp.cos(x))], (_VECTOR,)),
    Row("top_k", lambda x: lax.top_k(x, 2), (_MATRIX,)),
    Row("argmax", lambda x: x[jnp.argmax(x)], (_VECTOR,)),
    Row("running sums", lambda x: (lax.cumsum(x), lax.cumprod(x), lax.cumlogsumexp(x)),
        (_VECTOR,)),
    Row("associative scan", lambda x: lax.associative_scan(jnp.add, x), (_VECTOR,)),
)  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name)
        for table in (_CASTS, _PRODUCTS, _COMBINERS)
        for row in table
    ],
)
def test_is_lifted(row):
    assert_lifted(row)
