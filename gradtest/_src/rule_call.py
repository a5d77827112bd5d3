"""A rule's call as a function that can be checked at the values that reach it."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs, rules
from gradtest._src.inputs import Recorded
from gradtest._src.lifting import is_inexact
from gradtest._src.rules import RuleUse


class RuleCall:
    """A rule's call as a function of its operands, finite where they move.

    An operand that holds infinities (masked logits) moves in its finite entries; the
    others are handed over as further arguments. Results are zero where the rule's own
    are infinite.
    """

    def __init__(self, use: RuleUse):
        self.use = use
        self.call = use.call
        self.__name__ = use.rule.name
        self._split = [
            i
            for i in self.argnums()
            if not all(_is_finite(sample[i]) for sample in use.samples)
        ]

    def __call__(self, *arguments: Any) -> list[Any]:
        count = len(self.call.eqn.invars)
        operands, rest = list(arguments[:count]), list(arguments[count:])
        for i in self._split:
            mask, held = rest.pop(0), rest.pop(0)
            operands[i] = jnp.where(mask, operands[i], held)
        results = list(rules.as_function(self.call)(*operands))
        for k in self._infinite:
            results[k] = jnp.where(rest.pop(0), results[k], 0)
        return results

    @functools.cached_property
    def _results(self) -> list[list[Any]]:
        """The rule's results at each sample, where it was given infinities."""
        if not self._split:
            return []
        with execution.working_precision():
            return [
                [np.asarray(value) for value in rules.as_function(self.call)(*sample)]
                for sample in self.use.samples
            ]

    @functools.cached_property
    def _infinite(self) -> list[int]:
        """The results that have infinite entries."""
        columns = zip(*self._results, strict=True)
        return [
            k
            for k, column in enumerate(columns)
            if is_inexact(column[0].dtype) and any(map(_has_infinity, column))
        ]

    def argnums(self) -> tuple[int, ...]:
        """Returns the operands that are differentiated."""
        found = [
            i
            for i, aval in enumerate(jaxprs.operand_types(self.use.call.eqn))
            if i >= self.use.source.num_consts and is_inexact(aval.dtype) and aval.size
        ]
        reached = [i for i in found if self.use.moving[i]]
        return tuple(reached or found)

    def names(self) -> list[str]:
        """Returns the names of the arguments."""
        known, first = self.use.source.operands, self.use.source.num_consts
        count = len(self.call.eqn.invars)
        fits = len(known) == count - first
        names = [
            known[i - first] if fits and i >= first else f"operand {i}"
            for i in range(count)
        ]
        extra = [f"{names[i]}.{part}" for i in self._split for part in ("mask", "rest")]
        return [*names, *extra, *(f"result[{k}].mask" for k in self._infinite)]

    def arguments(self) -> tuple[Recorded, ...]:
        """Returns the values of the arguments, one for each sample."""
        columns = [list(column) for column in zip(*self.use.samples, strict=True)]
        extra = []
        for i in self._split:
            masks = [np.isfinite(_wide(value)) for value in columns[i]]
            extra += [masks, columns[i]]
            columns[i] = [
                np.where(mask, value, np.zeros((), value.dtype))
                for mask, value in zip(masks, columns[i], strict=True)
            ]
        for k in self._infinite:
            extra.append([np.isfinite(_wide(row[k])) for row in self._results])
        return tuple(Recorded(tuple(column)) for column in [*columns, *extra])


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.complex128 if value.dtype.kind == "c" else np.float64)


def _is_finite(value: np.ndarray) -> bool:
    return bool(np.isfinite(_wide(value)).all())


def _has_infinity(value: np.ndarray) -> bool:
    return bool(np.isinf(_wide(value)).any())
