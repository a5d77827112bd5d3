"""A plain function of arrays, evaluated in float64 whatever it was written for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.lifting import Evaluator, Jitter, is_inexact, widen

Values = list[Any]
_MOST_CONSTANTS = 16
# So many amounts of rounding are drawn, and taken in turn by operations.
JITTERS = 61
_RANDOM = frozenset(["random_bits", "threefry2x32", "rng_bit_generator"])
_FLOAT64_EPS = float(np.finfo(np.float64).eps)


class Lifted:
    """A function of flat arrays, traced for float64 inputs and evaluated in float64.

    Its Python runs once, with float64 arrays, so that constants such as 0.999 are what
    they say; casts to narrower dtypes are then lifted, so that a moment kept in
    bfloat16 is the mathematics that it stands for.
    """

    def __init__(self, fn: Callable[..., Values], example: Sequence[Any]):
        self._example = _at_home(example)
        self._jaxpr = _traced(fn, self._example)
        self._program = execution.lifted(self._run, [self._example])

    def _run(self, values: Values) -> Values:
        return Evaluator()(self._jaxpr, values)

    def __call__(self, values: Sequence[Any]) -> Values:
        """Returns the results as NumPy arrays in float64."""
        return execution.to_host(self._program(_at_home(values)))

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """Numbers that the program has in it, each once."""
        return tuple(dict.fromkeys(map(_value, self._literals)))

    @functools.cached_property
    def _literals(self) -> list[Any]:
        """The real numbers that stand in the program, at any depth."""
        return [
            atom
            for eqn in jaxprs.walk(self._jaxpr)
            for atom in eqn.invars
            if jaxprs.is_literal(atom) and _is_number(atom)
        ]

    @property
    def draws(self) -> bool:
        """Whether the program draws random numbers: others in each dtype."""
        return not _RANDOM.isdisjoint(jaxprs.primitives(self._jaxpr))

    def jittered(self, values: Sequence[Any], shifts: np.ndarray) -> Values:
        """Returns the results where each operation rounds as if by these amounts."""
        return execution.to_host(self._shaken(_at_home(values), shifts))

    @functools.cached_property
    def _shaken(self) -> Any:
        def run(values: Values, shifts: Any) -> Values:
            return Evaluator(jitter=Jitter(shifts))(self._jaxpr, values)

        return execution.lifted(run, [self._example, np.zeros(JITTERS)])

    def with_numbers(self, values: Sequence[Any], other: dict[float, float]) -> Values:
        """Returns the results of the program with other numbers in it.

        Args:
          values: As for a call.
          other: The numbers to replace, and what by.
        """
        given = [float(other.get(number, number)) for number in self.numbers]
        return execution.to_host(self._free(_at_home(values), np.array(given)))

    @functools.cached_property
    def _free(self) -> Any:
        places = {number: i for i, number in enumerate(self.numbers)}

        def run(values: Values, numbers: Any) -> Values:
            literals = {id(a): numbers[places[_value(a)]] for a in self._literals}
            return Evaluator(literals=literals)(self._jaxpr, values)

        numbers = np.array(self.numbers)
        return execution.lifted(run, [self._example, numbers])

    def reach(self, values: Sequence[Any]) -> list[Values]:
        """Returns how results move where constants of narrow dtypes round otherwise.

        Each such constant is moved by half a unit in its last place; the changes of
        one constant make one list.
        """
        narrow = self._narrow
        if not narrow:
            return []
        wide = _at_home(values)
        start = execution.to_host(self._moved(wide, np.zeros(len(narrow))))
        found = []
        for shift in np.eye(len(narrow)):
            moved = execution.to_host(self._moved(wide, shift))
            found.append([m - s for m, s in zip(moved, start, strict=True)])
        return found

    @functools.cached_property
    def _narrow(self) -> list[tuple[float, Any]]:
        """Constants that are rounded to less than float64, as value and dtype."""
        found: dict[tuple[float, Any], None] = {}
        for atom in self._literals:
            mantissa, _ = np.frexp(_value(atom))
            if _eps(atom.aval.dtype) > _FLOAT64_EPS and mantissa * 8 % 1:
                found.setdefault((_value(atom), atom.aval.dtype))
        for const in self._consts:
            found.setdefault((float(id(const)), const.dtype))
        return list(found)[:_MOST_CONSTANTS]

    @functools.cached_property
    def _consts(self) -> list[Any]:
        return [
            const
            for const in jaxprs.nested_consts(self._jaxpr)
            if is_inexact(getattr(const, "dtype", None))
            and _eps(const.dtype) > _FLOAT64_EPS
        ]

    @functools.cached_property
    def _moved(self) -> Any:
        places = {each: i for i, each in enumerate(self._narrow)}

        def run(values: Values, shifts: Any) -> Values:
            def moved(value: Any, place: int, dtype: Any) -> Any:
                return value * (1 + shifts[place] * _eps(dtype) / 2)

            literals = {
                id(atom): moved(value, places[value, atom.aval.dtype], atom.aval.dtype)
                for atom in self._literals
                if (value := _value(atom), atom.aval.dtype) in places
            }
            consts = {
                id(const): moved(widen(const), places[key], const.dtype)
                for const in self._consts
                if (key := (float(id(const)), const.dtype)) in places
            }
            return Evaluator(literals=literals, hoisted=consts)(self._jaxpr, values)

        shifts = np.zeros(len(self._narrow))
        return execution.lifted(run, [self._example, shifts])


def _at_home(values: Sequence[Any]) -> Values:
    return [execution.at_home(widen(value)) for value in values]


def _traced(fn: Callable[..., Values], wide: Values) -> Any:
    """Traces a function in float64; once more where JAX remembered narrower types."""
    with jax.enable_x64(True), execution.user_code():
        try:
            return jaxprs.expand_all(jax.make_jaxpr(_fresh(fn))(*wide))
        except TypeError:
            jax.clear_caches()
            return jaxprs.expand_all(jax.make_jaxpr(_fresh(fn))(*wide))


def _fresh(fn: Callable[..., Values]) -> Callable[..., Values]:
    """Returns a function that JAX has not traced before."""
    return lambda *values: fn(*values)


def _is_number(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or atom.aval.shape:
        return False
    return bool(np.isfinite(_value(atom)))


def _value(atom: Any) -> float:
    """Returns a number as the program rounds it."""
    return float(np.asarray(atom.val, dtype=atom.aval.dtype))


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)
