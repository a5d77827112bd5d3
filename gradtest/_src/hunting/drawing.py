"""Arrays of a domain that are special in many ways at once. NumPy alone.

A special point has one thing that is special, everywhere. What is drawn here mixes
them: some entries special and others not, entries that repeat, rows that do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradtest._src.domain import Domain
from gradtest._src.hunting import kinds

Generator = np.random.Generator
Recipe = Callable[[Domain, Generator], np.ndarray]


def ordinary(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws an ordinary array."""
    return domain.draw(generator)


def simple(domain: Domain, generator: Generator) -> np.ndarray:
    """Returns the simplest array that is easily found."""
    drawn = domain.draw(generator)
    if domain.name in kinds.ENTRYWISE:
        entries = kinds.special_entries(domain)
        return np.full(drawn.shape, entries[0], domain.dtype) if entries else drawn
    found = kinds.specials(domain, drawn)
    return next(iter(found.values()), drawn)


def special(domain: Domain, generator: Generator) -> np.ndarray:
    """Returns one of the domain's special points."""
    drawn = domain.draw(generator)
    found = list(kinds.specials(domain, drawn).values())
    return found[generator.integers(len(found))] if found else drawn


def mixed(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws an array in which some entries, or matrices, are special."""
    drawn = domain.draw(generator)
    if domain.name not in kinds.ENTRYWISE:
        return _of_parts(domain, generator, drawn)
    chosen = generator.random(drawn.shape) < generator.choice([0.15, 0.5, 0.85])
    return np.where(chosen, _some(domain, generator, drawn.shape, 12), drawn)


def few(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws an array of two or three different entries, special ones for the most."""
    drawn = domain.draw(generator)
    if domain.name not in kinds.ENTRYWISE:
        return _of_parts(domain, generator, drawn)
    return _some(domain, generator, drawn.shape, int(generator.integers(2, 4)))


def repeated(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws an array in which ordinary entries, or rows, are there several times."""
    drawn = domain.draw(generator)
    if not drawn.ndim or drawn.size < 2:
        return drawn
    if drawn.ndim > 1 and (generator.random() < 0.5 or not _is_free(domain)):
        if domain.name in kinds.SQUARE and drawn.ndim < 3:
            return drawn
        return drawn[generator.integers(drawn.shape[0], size=drawn.shape[0])]
    if not _is_free(domain):
        return drawn
    pool = drawn.ravel()[: max(1, drawn.shape[-1] // 2)]
    return generator.choice(pool, drawn.shape)


def scaled(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws an ordinary array of another size, or one whose rows differ in size."""
    drawn = domain.draw(generator)
    if domain.name not in ("normal", "positive", "nonnegative"):
        return mixed(domain, generator)
    sizes = np.array([1e-4, 0.1, 4.0, 10.0, 30.0, 100.0])
    shape = drawn.shape[:-1] if generator.random() < 0.3 else ()
    factor = generator.choice(sizes, shape)
    factor = factor[..., None] if shape else factor
    return (drawn.astype(_wide(drawn)) * factor).astype(domain.dtype)


def one_sided(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws ordinary entries of one sign, or in order."""
    drawn = domain.draw(generator)
    if domain.name not in ("normal", "uniform", "integers", "away_from"):
        return drawn
    if drawn.ndim and generator.random() < 0.4:
        return np.sort(drawn, axis=-1)[..., :: generator.choice([-1, 1])]
    turned = np.abs(drawn) * generator.choice([-1, 1])
    return turned if kinds.contains(domain, turned) else drawn


def sparse(domain: Domain, generator: Generator) -> np.ndarray:
    """Draws a constant array but for a few entries."""
    drawn, fill = domain.draw(generator), simple(domain, generator)
    if domain.name not in kinds.ENTRYWISE or not drawn.size:
        return drawn
    chosen = generator.random(drawn.shape) < min(0.3, 3 / drawn.size)
    return np.where(chosen, drawn, fill)


# From simple arrays to rich ones.
RECIPES: tuple[Recipe, ...] = (
    simple, sparse, few, special, repeated, one_sided, mixed, scaled, ordinary,
)  # fmt: skip


def draw(domain: Domain, recipe: Recipe, generator: Generator) -> np.ndarray:
    """Draws by a recipe; an ordinary array where that leaves the domain.

    Args:
      domain: With its shape in numbers.
      recipe: One of `RECIPES`.
      generator: Fixes the draw.
    """
    with np.errstate(all="ignore"):
        array = np.asarray(recipe(domain, generator), domain.dtype)
        if kinds.contains(domain, array):
            return array
        return ordinary(domain, generator)


def _is_free(domain: Domain) -> bool:
    return domain.name in kinds.ENTRYWISE


def _wide(array: np.ndarray) -> type:
    return complex if np.iscomplexobj(array) else float


def _some(
    domain: Domain, generator: Generator, shape: tuple[int, ...], count: int
) -> np.ndarray:
    """Draws entries from so many special ones."""
    entries = kinds.special_entries(domain)
    if not entries:
        return domain.draw(generator)
    # The simple ones, zero above all, are where most goes wrong.
    weights = 1.0 / np.arange(2, len(entries) + 2)
    picked = generator.choice(
        len(entries), min(count, len(entries)), False, weights / weights.sum()
    )
    return np.asarray(entries)[generator.choice(picked, shape)]


def _of_parts(domain: Domain, generator: Generator, drawn: np.ndarray) -> np.ndarray:
    """Returns an array whose matrices, or rows, come from several special points."""
    inner = 2 if domain.name in kinds.SQUARE else 1
    found = [drawn, *kinds.specials(domain, drawn).values()]
    outer = drawn.shape[: drawn.ndim - inner]
    picked = generator.integers(len(found), size=outer)
    mask = picked.reshape(outer + (1,) * inner)
    mixture = drawn
    for number, array in enumerate(found):
        mixture = np.where(mask == number, array, mixture)
    return mixture
