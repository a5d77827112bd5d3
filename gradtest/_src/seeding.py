"""Random numbers that depend on a key and a name, and on nothing else."""

import hashlib
import operator
from typing import Any

import jax
import numpy as np

from gradtest._src.devices import spanning

# An old-style key is an array of words, whose number tells the kind.
_OLD_STYLE_KINDS = {2: "threefry2x32", 4: "rbg"}


def generator(key: jax.Array | int, *context: str | int) -> np.random.Generator:
    """Returns the NumPy generator that belongs to `key` and `context`.

    Equal arguments give equal streams, in every process and on every device; other
    arguments give an independent stream. So a leaf drawn under its own name keeps its
    values when leaves are added beside it. NumPy draws, not JAX: nothing is compiled,
    and the values are the same with and without `jax_enable_x64`.

    Keys with the same data are one key: `jax.random.key(0)` and
    `jax.random.PRNGKey(0)` give the same stream, the integer 0 another one.

    Args:
      key: An integer, a typed key (`jax.random.key`) or an old-style one
        (`jax.random.PRNGKey`); one key, not a batch.
      *context: What the numbers are for: a trial's number, a leaf's name, …

    Raises:
      TypeError: `key` or an entry of `context` is of another kind.

    Source: Philox4x64: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy
      as 1, 2, 3", SC 2011. The key is the first half of a SHA-256 digest.

    Example:
      >>> from gradtest._src import seeding
      >>> one = seeding.generator(0, 1, "params/bias").integers(1000, size=3)
      >>> two = seeding.generator(0, 1, "params/bias").integers(1000, size=3)
      >>> bool((one == two).all())
      True
    """
    digest = hashlib.sha256()
    for part in (_key_bytes(key), *map(_context_bytes, context)):
        # With its length before each part, no two lists of parts can read alike.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    words = int.from_bytes(digest.digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=words))


def normal(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """Draws normal numbers of a dtype; complex ones with independent parts."""
    draw = generator.standard_normal(shape, dtype=np.float32)
    if jax.numpy.issubdtype(dtype, np.complexfloating):
        draw = draw + 1j * generator.standard_normal(shape, dtype=np.float32)
    return np.asarray(draw).astype(dtype)


def describe(key: jax.Array | int) -> str:
    """Returns an expression that makes `key` again: for the line that replays a check.

    Args:
      key: As for `generator`.

    Raises:
      TypeError: `key` is not one key.

    Example:
      >>> import jax
      >>> from gradtest._src import seeding
      >>> seeding.describe(0)
      '0'
      >>> seeding.describe(jax.random.key(7))
      'jax.random.key(7)'
    """
    checked = _checked_key(key)
    if isinstance(checked, int):
        return str(checked)
    words = _words(checked).tolist()
    typed = _is_typed(checked)
    kind = str(jax.random.key_impl(checked)) if typed else _OLD_STYLE_KINDS[len(words)]
    default = jax.config.values["jax_default_prng_impl"]
    # A threefry key is its seed in two words; the other kinds spread theirs.
    if kind == default == "threefry2x32" and words[0] == 0:
        return f"jax.random.{'key' if typed else 'PRNGKey'}({words[1]})"
    array = f'jax.numpy.array({words}, dtype="uint32")'
    return f"jax.random.wrap_key_data({array}, impl={kind!r})" if typed else array


def _key_bytes(key: jax.Array | int) -> bytes:
    """Encodes a key, integers apart from arrays."""
    checked = _checked_key(key)
    if isinstance(checked, int):
        return f"int:{checked}".encode()
    return b"key:" + _words(checked).astype("<u4").tobytes()


def _context_bytes(part: str | int) -> bytes:
    """Encodes one entry of the context, integers apart from strings."""
    if isinstance(part, str):
        return b"str:" + part.encode()
    number = _as_integer(part)
    if number is None:
        raise TypeError(
            f"`context` must hold strings and integers, got {type(part).__name__}: "
            f"{part!r}"
        )
    return f"int:{number}".encode()


def _checked_key(key: jax.Array | int) -> jax.Array | int:
    """Returns an integer as an int, and one typed or old-style key as it is."""
    number = _as_integer(key)
    if number is not None:
        return number
    problem = _problem(key)
    if problem:
        raise TypeError(
            "`key` must be an integer, a `jax.random.key` or a `jax.random.PRNGKey`, "
            f"got {problem}"
        )
    return key


def _words(key: jax.Array) -> np.ndarray:
    """Returns the uint32 words of one key."""
    return spanning.own_copy(jax.random.key_data(key) if _is_typed(key) else key)


def _problem(key: object) -> str | None:
    """Says what keeps `key` from being one key."""
    if isinstance(key, jax.core.Tracer):
        return f"a traced value, which has no number yet: {jax.typeof(key)}"
    if not isinstance(key, jax.Array | np.ndarray):
        return f"{type(key).__name__}: {key!r}"
    if _is_typed(key):
        return f"a batch of keys of shape {key.shape}" if key.shape else None
    if key.dtype != np.uint32 or key.ndim != 1 or key.size not in _OLD_STYLE_KINDS:
        return f"an array of shape {key.shape} and dtype {key.dtype}"
    return None


def _is_typed(key: jax.Array | np.ndarray) -> bool:
    """Tells a key of `jax.random.key` from an array of words."""
    return jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def _as_integer(value: object) -> int | None:
    """Returns a Python or NumPy integer as an int, None for all else, bools too."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        return None
    return operator.index(value)
