"""How each domain draws: in float64 or complex128, with NumPy.

Every sampler takes a generator, a shape in numbers and the dtype its result will be
cast to, and keeps its promise (inside, at least so far away, invertible, …) through
that cast.
"""

import math
from collections.abc import Iterable

import numpy as np

Shape = tuple[int, ...]

# Positive numbers, eigenvalues and singular values are spread over this range and its
# inverse: wide enough to tell entries apart, and far enough from 0 that a matrix
# survives bfloat16 and a difference step stays inside the domain.
_SPREAD = 4.0

# Distance that entries of the unit interval keep from its ends, for the same reasons.
_INSET = 1 / 64


def normal(generator: np.random.Generator, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Draws standard normal entries, real and imaginary part each for itself.

    Of two and more, not all have one sign: a function has a branch for each.
    """
    real = _of_both_signs(generator.standard_normal(shape))
    if dtype.kind != "c":
        return real
    return real + 1j * _of_both_signs(generator.standard_normal(shape))


def _of_both_signs(drawn: np.ndarray) -> np.ndarray:
    """Turns the sign of every second entry where all have the same."""
    if drawn.size < 2 or not (np.all(drawn > 0) or np.all(drawn < 0)):
        return drawn
    signs = 1 - 2 * (np.arange(drawn.size) % 2)
    return drawn * signs.reshape(drawn.shape)


def uniform(
    generator: np.random.Generator,
    shape: Shape,
    dtype: np.dtype,
    *,
    low: float,
    high: float,
) -> np.ndarray:
    """Draws uniformly between `low` and `high`."""
    return generator.uniform(low, high, shape)


def positive(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Draws numbers whose logarithm is uniform."""
    return _SPREAD ** generator.uniform(-1, 1, shape)


def unit_interval(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Draws uniformly inside the unit interval, away from both ends."""
    return generator.uniform(_INSET, 1 - _INSET, shape)


def integers(
    generator: np.random.Generator,
    shape: Shape,
    dtype: np.dtype,
    *,
    low: int,
    high: int,
) -> np.ndarray:
    """Draws integers from `low`, included, to `high`, excluded."""
    return generator.integers(low, high, shape, dtype=dtype)


def spd(generator: np.random.Generator, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Draws symmetric (Hermitian) positive definite matrices."""
    basis = orthogonal(generator, shape, dtype)
    matrix = (basis * _spectrum(generator, shape)[..., None, :]) @ _adjoint(basis)
    # Rounding leaves the product a little asymmetric, and rules may rely on symmetry.
    return (matrix + _adjoint(matrix)) / 2


def invertible(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype, *, det: str
) -> np.ndarray:
    """Draws matrices with singular values between 1/4 and 4 and the sign of `det`."""
    left = orthogonal(generator, shape, dtype)
    right = orthogonal(generator, shape, dtype)
    matrix = (left * _spectrum(generator, shape)[..., None, :]) @ right
    if det == "any":
        return matrix
    if shape[-1] == 0 and det == "negative":
        raise ValueError(
            "`det` must not be 'negative' for empty matrices: their determinant is 1"
        )
    wanted = 1 if det == "positive" else -1
    sign = np.linalg.slogdet(matrix)[0]
    # One column negated changes the sign of the determinant, and nothing else.
    matrix[..., :1] *= (wanted * sign)[..., None, None]
    return matrix


def orthogonal(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Draws orthogonal (unitary) matrices, all directions alike.

    Source: Mezzadri, "How to Generate Random Matrices from the Classical Compact
    Groups", Notices of the AMS 54(5), 2007, "A Correct and Efficient Algorithm".
    """
    basis, triangle = np.linalg.qr(normal(generator, shape, dtype))
    diagonal = np.diagonal(triangle, axis1=-2, axis2=-1)
    # QR alone fixes the signs of the diagonal by convention, not by chance.
    return basis * (diagonal / np.abs(diagonal))[..., None, :]


def simplex(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Draws probabilities along the last axis, none below a fifth of the mean."""
    size = _nonempty_last_axis(shape)
    weights = generator.dirichlet(np.ones(size), shape[:-1])
    return 0.8 * weights + 0.2 / size


def one_hot(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Draws a single one along the last axis, zeros elsewhere."""
    size = _nonempty_last_axis(shape)
    chosen = generator.integers(size, size=shape[:-1])
    return chosen[..., None] == np.arange(size)


def away_from(
    generator: np.random.Generator,
    shape: Shape,
    dtype: np.dtype,
    *,
    values: tuple[float, ...],
    margin: float,
) -> np.ndarray:
    """Draws normal entries, and those too close to one of `values` again."""
    samples = np.empty(math.prod(shape))
    (pending,) = np.nonzero(np.ones(samples.shape, bool))
    while pending.size:
        # Judged after rounding to `dtype`, which can move an entry over the margin.
        drawn = generator.standard_normal(pending.size).astype(dtype).astype(float)
        samples[pending] = drawn
        near = [np.abs(drawn - value) < margin for value in values]
        pending = pending[np.any(near, axis=0)]
    return samples.reshape(shape)


def normal_mass_away_from(values: Iterable[float], margin: float) -> float:
    """Returns the probability that a normal number is `margin` away from `values`."""
    excluded, end = 0.0, -math.inf
    for value in sorted(values):
        # Overlapping intervals must not count twice.
        start, end = max(end, value - margin), max(end, value + margin)
        excluded += (math.erf(end / math.sqrt(2)) - math.erf(start / math.sqrt(2))) / 2
    return 1.0 - excluded


def _spectrum(generator: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draws distinct eigenvalues or singular values, in falling order.

    They lie one to a stratum of the logarithmic range with a gap between strata:
    derivatives of eigenvectors divide by the differences of eigenvalues.
    """
    size = shape[-1]
    strata = (np.arange(size) + generator.uniform(0.25, 0.75, shape[:-1])) / max(
        size, 1
    )
    return _SPREAD ** (1 - 2 * strata)


def _adjoint(matrix: np.ndarray) -> np.ndarray:
    """Returns the conjugate transpose."""
    return matrix.conj().swapaxes(-1, -2)


def _nonempty_last_axis(shape: Shape) -> int:
    """Returns the size of the last axis, which a name may have bound to 0."""
    if shape[-1] == 0:
        raise ValueError(
            f"`sizes` must leave a last axis of size 1 or more, got the shape {shape!r}"
        )
    return shape[-1]
