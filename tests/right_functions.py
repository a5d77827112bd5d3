"""Functions whose derivatives are right: linear algebra, solvers, loops, reductions.

Each `make(dtype)` returns `(fn, args)`. Where JAX has no half-precision kernel, the
function computes in float32 and casts the result back, as its users do.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.scipy.sparse import linalg as sparse

Fn = Callable[..., Any]
Made = tuple[Fn, tuple[Any, ...]]
Make = Callable[[Any], Made]


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _weights(*shape: int) -> jax.Array:
    """Fixed weights that make a scalar of an array without symmetry."""
    return jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


def _distinct(dtype: Any, *shape: int) -> jax.Array:
    """Values in random order without ties, all exact in bfloat16."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2) / 16 + 1 / 32
    shuffled = np.random.default_rng(0).permutation(values)
    return jnp.asarray(shuffled.reshape(shape), dtype)


def at_normal(*shapes: tuple[int, ...]) -> Callable[[Fn], Make]:
    """Turns a function into a maker of itself and normal arguments of `shapes`."""

    def decorate(fn: Fn) -> Make:
        def make(dtype: Any) -> Made:
            return fn, tuple(_normal(i, shape, dtype) for i, shape in enumerate(shapes))

        return make

    return decorate


def in_float32(fn: Fn) -> Fn:
    """Computes in float32 and casts the result back to the first argument's dtype."""

    @functools.wraps(fn)
    def wrapped(*args: jax.Array) -> Any:
        dtype = args[0].dtype
        out = fn(*(x.astype(jnp.float32) for x in args))
        return jax.tree.map(lambda y: y.astype(dtype), out)

    return wrapped


def _definite(root: jax.Array) -> jax.Array:
    """A well-conditioned symmetric positive definite matrix."""
    size = root.shape[0]
    return root @ root.T / size + jnp.eye(size, dtype=root.dtype)


# Linear algebra.


@at_normal((5, 4))
@in_float32
def make_svd(x: jax.Array) -> jax.Array:
    """Singular values and a reconstruction: free of the vectors' choice of sign."""
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    rebuilt = (u * jnp.tanh(s)) @ vh
    return jnp.log(s).sum() + (_weights(5, 4) * rebuilt).sum()


@at_normal((5, 5))
@in_float32
def make_eigh(x: jax.Array) -> jax.Array:
    """A function of a symmetric matrix, free of the vectors' choice of sign."""
    values, vectors = jnp.linalg.eigh((x + x.T) / 2)
    rebuilt = (vectors * jnp.tanh(values)) @ vectors.T
    return (values**3).sum() + (_weights(5, 5) * rebuilt).sum()


@at_normal((5, 4))
@in_float32
def make_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both factors of a tall matrix."""
    q, r = jnp.linalg.qr(x)
    return q, r


@at_normal((5, 5))
@in_float32
def make_cholesky(x: jax.Array) -> jax.Array:
    """The Cholesky factor of a definite matrix."""
    return jnp.linalg.cholesky(_definite(x))


@at_normal((5, 5), (5, 2))
@in_float32
def make_solve(x: jax.Array, b: jax.Array) -> jax.Array:
    """A dense solve, which holds its LU factors under `stop_gradient`."""
    return jnp.linalg.solve(_definite(x) + x / 4, b)


@at_normal((5, 5))
@in_float32
def make_inverse(x: jax.Array) -> jax.Array:
    """A matrix inverse."""
    return jnp.linalg.inv(_definite(x) + x / 4)


@at_normal((5, 5))
@in_float32
def make_slogdet(x: jax.Array) -> jax.Array:
    """The logarithm of a determinant that may be negative."""
    sign, logarithm = jnp.linalg.slogdet(x)
    return sign * logarithm


# Iterative solvers.


@at_normal((6, 6), (6,))
@in_float32
def make_cg(x: jax.Array, b: jax.Array) -> jax.Array:
    """Conjugate gradients at their default tolerance: the value is approximate."""
    return sparse.cg(_definite(x), b)[0]


@at_normal((6, 6), (6,))
@in_float32
def make_gmres(x: jax.Array, b: jax.Array) -> jax.Array:
    """GMRES at its default tolerance, on an unsymmetric matrix."""
    return sparse.gmres(_definite(x) + x / 4, b)[0]


@at_normal((6, 6), (6,))
@in_float32
def make_bicgstab(x: jax.Array, b: jax.Array) -> jax.Array:
    """BiCGSTAB at its default tolerance, on an unsymmetric matrix."""
    return sparse.bicgstab(_definite(x) + x / 4, b)[0]


@at_normal((5, 5), (5,))
@in_float32
def make_custom_linear_solve(x: jax.Array, b: jax.Array) -> jax.Array:
    """Jacobi's iteration for the system and for its transpose."""
    matrix = jnp.tanh(x) / 10 + 2 * jnp.eye(5, dtype=x.dtype)

    def jacobi(matvec: Fn, rhs: jax.Array) -> jax.Array:
        diagonal = jnp.diagonal(matrix)
        return jax.lax.fori_loop(
            0, 60, lambda _, y: y + (rhs - matvec(y)) / diagonal, jnp.zeros_like(rhs)
        )

    return jax.lax.custom_linear_solve(
        lambda y: matrix @ y, b, solve=jacobi, transpose_solve=jacobi
    )


def _newton(residual: Fn, start: jax.Array) -> jax.Array:
    """Newton's method until the residual stops falling, in whichever precision."""
    derivative = jax.grad(lambda x: residual(x).sum())

    def size(x: jax.Array) -> jax.Array:
        return jnp.abs(residual(x)).max()

    def is_falling(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return size(state[1]) < size(state[0])

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = state[1]
        return x, x - residual(x) / derivative(x)

    first = step((start, start))
    return jax.lax.while_loop(is_falling, step, first)[0]


@at_normal((5,), (5,))
@in_float32
def make_custom_root(a: jax.Array, b: jax.Array) -> jax.Array:
    """The root of a cubic, by a Newton loop that has no reverse mode of its own.

    From `b` the iterates approach the root from one side, so the residual only falls.
    """
    coefficient = 1 + a * a

    def residual(x: jax.Array) -> jax.Array:
        return x**3 + coefficient * x - b

    def tangent_solve(linear: Fn, y: jax.Array) -> jax.Array:
        return y / linear(jnp.ones_like(y))

    return jax.lax.custom_root(residual, b, _newton, tangent_solve)


@at_normal((3,), (3, 3))
@in_float32
def make_odeint(start: jax.Array, matrix: jax.Array) -> jax.Array:
    """An adaptive integrator whose gradient solves the adjoint equation."""

    def velocity(y: jax.Array, _: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.tanh(matrix @ y) - y / 2

    return odeint(velocity, start, jnp.linspace(0.0, 1.0, 4), matrix)


def _bisect(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solves x**3 + a x = b by halving until the precision is used up."""

    def middle(bracket: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (bracket[0] + bracket[1]) / 2

    def can_shrink(bracket: tuple[jax.Array, jax.Array]) -> jax.Array:
        mid = middle(bracket)
        return jnp.any((bracket[0] < mid) & (mid < bracket[1]))

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mid = middle(bracket)
        is_high = mid**3 + a * mid > b
        return jnp.where(is_high, bracket[0], mid), jnp.where(is_high, mid, bracket[1])

    bound = 1 + jnp.abs(b)
    return middle(jax.lax.while_loop(can_shrink, halve, (-bound, bound)))


@jax.custom_vjp
def _implicit_root(a: jax.Array, b: jax.Array) -> jax.Array:
    return _bisect(a, b)


def _implicit_root_forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    x = _bisect(a, b)
    return x, (a, x)


def _implicit_root_backward(residuals: Any, cotangent: jax.Array) -> Any:
    a, x = residuals
    db = cotangent / (3 * x * x + a)
    return -db * x, db


_implicit_root.defvjp(_implicit_root_forward, _implicit_root_backward)


@at_normal((5,), (5,))
@in_float32
def make_bisection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Bisection, whose rule-free derivative is zero, with its implicit derivative."""
    return _implicit_root(1 + a * a, b)


# Fourier transforms and complex numbers.


@at_normal((16,))
@in_float32
def make_rfft(x: jax.Array) -> jax.Array:
    """A weighted power spectrum of a real signal."""
    return _weights(9) * jnp.abs(jnp.fft.rfft(x)) ** 2


@at_normal((8,), (8,))
@in_float32
def make_fft(real: jax.Array, imag: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A transform of a complex signal given, and returned, by its parts."""
    spectrum = jnp.fft.fft(jax.lax.complex(real, imag))
    return spectrum.real, spectrum.imag


def make_complex_loss(_: Any) -> Made:
    """A real function of complex numbers that is not holomorphic."""

    def loss(z: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(z * w) ** 2 + jnp.real(z**3) + jnp.angle(w) * z.imag)

    z = jax.lax.complex(_normal(0, (4,)), _normal(1, (4,)))
    return loss, (z, jax.lax.complex(2 + jnp.tanh(_normal(2, (4,))), _normal(3, (4,))))


def make_complex_map(_: Any) -> Made:
    """A complex function of complex numbers, holomorphic in one of the two."""

    def fn(z: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.exp(1j * z) * w + jnp.conj(w) ** 2

    z = jax.lax.complex(_normal(0, (4,)), _normal(1, (4,)))
    return fn, (z, jax.lax.complex(_normal(2, (4,)), _normal(3, (4,))))


# Selection, control flow, stopped gradients.


def make_top_k(dtype: Any) -> Made:
    """The largest entries of each row."""
    return lambda x: jax.lax.top_k(x, 3)[0] ** 2, (_distinct(dtype, 3, 8),)


def make_sort(dtype: Any) -> Made:
    """A weighted sum of order statistics."""

    def fn(x: jax.Array) -> jax.Array:
        return jnp.sort(x, axis=-1) * _weights(8).astype(x.dtype)

    return fn, (_distinct(dtype, 3, 8),)


def make_median(dtype: Any) -> Made:
    """The middle of an odd, and the mean of the two middles of an even number."""
    return lambda x: (jnp.median(x, 0), jnp.median(x, 1)), (_distinct(dtype, 3, 8),)


@at_normal((12,))
def make_straight_through(x: jax.Array) -> jax.Array:
    """Rounding with the gradient of the identity, written with `stop_gradient`."""
    return (x + jax.lax.stop_gradient(jnp.round(x) - x)) ** 2


@at_normal((6,), (6,))
def make_cond(x: jax.Array, y: jax.Array) -> jax.Array:
    """A branch on the data, differentiated on the side that it takes."""
    return jax.lax.cond(x.sum() > 0, lambda: jnp.sin(x) * y, lambda: jnp.cos(x * y))


def make_switch(dtype: Any) -> Made:
    """A branch chosen by an integer argument."""

    def fn(which: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.switch(which, [jnp.sin, jnp.tanh, jnp.exp], x)

    return fn, (jnp.int32(1), _normal(0, (6,), dtype))


def make_segment_sum(dtype: Any) -> Made:
    """Sums by segment, one of them empty, with ids as an argument."""

    def fn(x: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.sin(x), ids, num_segments=5)

    return fn, (_normal(0, (12, 2), dtype), jnp.arange(12) % 4)


# Reductions, convolutions and elementwise functions.


@at_normal((3, 6))
def make_softmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp and softmax, which stop the gradient of their maximum."""
    return jax.nn.logsumexp(x, axis=-1), jax.nn.softmax(x, axis=-1)


@at_normal((3, 6))
def make_cumulative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Running sums and products."""
    return jnp.cumsum(x, axis=1), jnp.cumprod(1 + jnp.tanh(x) / 2, axis=1)


@at_normal((2, 5, 5, 3), (3, 3, 3, 4))
def make_conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A transposed convolution with stride 2."""
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")


@at_normal((2, 6, 6, 3))
def make_avg_pool(x: jax.Array) -> jax.Array:
    """Mean pooling with overlapping windows."""
    return nn.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME") ** 2


@at_normal((2, 3, 4), (2, 4, 5), (3, 5))
def make_einsum(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """A contraction of three arrays, two of them batched."""
    return jnp.einsum("bij,bjk,ik->bi", x, y, z)


@at_normal((8,))
def make_erf(x: jax.Array) -> jax.Array:
    """The error function, whose constants are rounded to the dtype."""
    return jax.lax.erf(x)


@at_normal((8,))
def make_exact_gelu(x: jax.Array) -> jax.Array:
    """The GELU by the error function, not by its approximation."""
    return nn.gelu(x, approximate=False)


@at_normal((8,))
def make_cube_root(x: jax.Array) -> jax.Array:
    """The real cube root, away from zero."""
    return jnp.cbrt(jnp.where(x < 0, x - 0.5, x + 0.5))


@at_normal((8,))
def make_erf_inv(x: jax.Array) -> jax.Array:
    """The inverse error function inside (-1, 1)."""
    return jax.lax.erf_inv(jnp.tanh(x) * 0.9)
