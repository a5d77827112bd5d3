"""What can be broken inside of a rule's own program: its terms, factors and sums."""

from __future__ import annotations

import dataclasses
import linecache
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src import kit as _kit  # noqa: F401  registers every primitive
from gradtest._src.jaxprs import Eqn
from gradtest._src.lifting import Evaluator, is_inexact

# The results of an equation, of its operands, that take the place of its own.
Change = Callable[[Eqn, Sequence[Any]], list[Any]]
# Numbers below this guard a division; without them nothing visible changes.
_GUARD = 1e-5


@dataclasses.dataclass(frozen=True)
class Edit:
    """Other results for one equation of a simplified program.

    Attributes:
      number: Which equation, in the order of `_editable`.
      primitive: What it is, so that it is known again.
      place: Its line, as "file:line"; empty where that is not known.
      says: What is done to it.
      change: The results that it then has.
    """

    number: int
    primitive: str
    place: str
    says: str
    change: Change


NO_EDIT = Edit(-1, "", "", "", lambda eqn, operands: [])


def edits_of(program: Any, linear: int = 0) -> Iterator[Edit]:
    """Yields what can be broken of a simplified program, equation by equation.

    Args:
      program: The program.
      linear: How many of its last inputs are tangents, which it is to stay linear in:
        JAX refuses to transpose what is not.
    """
    moving = _moving(program, linear)
    for number, eqn in enumerate(_editable(program)):
        if not eqn.outvars:
            continue
        (result, *_) = eqn.outvars
        if not is_inexact(getattr(result.aval, "dtype", None)):
            continue
        for says, dropped, change in _changes(eqn):
            if dropped is not None and id(eqn.invars[dropped]) in moving:
                continue
            yield Edit(number, eqn.primitive.name, _line(eqn), says, change)


def _moving(program: Any, linear: int) -> set[int]:
    """Returns the variables, by identity, that depend on the last inputs."""
    body = jaxprs.open_body(program)
    moving = {id(var) for var in body.invars[len(body.invars) - linear :]}
    for eqn in body.eqns if linear else ():
        if any(id(atom) in moving for atom in eqn.invars):
            moving |= {id(var) for var in eqn.outvars}
    return moving


def edited(program: Any, args: Sequence[Any], edit: Edit) -> list[Any]:
    """Evaluates a simplified program with one of its equations changed.

    A program in which that equation is another one is evaluated as it is.
    """
    eqns = list(_editable(program))
    chosen: dict[int, Change] = {}
    if 0 <= edit.number < len(eqns):
        eqn = eqns[edit.number]
        if eqn.primitive.name == edit.primitive:
            chosen[id(eqn)] = edit.change
    return _Editing(chosen)(program, args)


def _editable(program: Any) -> Iterator[Eqn]:
    """Yields the equations of a program and of its loops, branches and kernels."""
    for eqn in jaxprs.open_body(program).eqns:
        yield eqn
        if eqn.primitive.name in jaxprs.CUSTOM_RULES:
            continue
        if eqn.primitive.name == jaxprs.kernels.PALLAS_CALL or jaxprs.entered(eqn):
            for inner in jaxprs.subprograms(eqn):
                yield from _editable(inner)


class _Editing(Evaluator):
    """Evaluates a program as it is, but for the equations that are changed."""

    def __init__(self, changes: Mapping[int, Change], **settings: Any):
        super().__init__(**({"wide": False} | settings))
        self._changes = changes

    def fork(self, **changes: Any) -> _Editing:
        """Returns an evaluator like this one for a loop's body."""
        plain = super().fork(**changes)
        copy = _Editing(self._changes)
        copy.__dict__.update(plain.__dict__)
        return copy

    def apply(self, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
        """Returns the results of one equation, changed or not."""
        with jaxprs.in_the_name_of(eqn):
            change = self._changes.get(id(eqn))
            if change is not None:
                return change(eqn, operands)
            if any(id(inner) in self._changes for inner in _inside(eqn)):
                return super().apply(eqn, operands)
            return jaxprs.bind(eqn, operands, eqn.params)


def _inside(eqn: Eqn) -> Iterator[Eqn]:
    if eqn.primitive.name not in jaxprs.CUSTOM_RULES:
        for inner in jaxprs.subprograms(eqn):
            yield from _editable(inner)


# --- the changes ----------------------------------------------------------------------

_ORDINALS = ("1st", "2nd")


def _changes(eqn: Eqn) -> Iterator[tuple[str, int | None, Change]]:
    """Yields what is done, the factor that it takes out if any, and how."""
    name = eqn.primitive.name
    if name in ("add", "add_any", "sub"):
        for i in range(2):
            if not _is_small(eqn.invars[i]):
                sign = -1 if name == "sub" and i == 0 else 1
                yield f"without its {_ORDINALS[i]} term", None, _other_alone(i, sign)
    elif name == "mul":
        for i in range(2):
            yield f"without its {_ORDINALS[i]} factor", i, _other_alone(i, 1)
    elif name == "div":
        yield "without its divisor", None, _other_alone(1, 1)
    elif name == "reduce_sum" and _reduced_size(eqn) > 1:
        axes = ", ".join(map(str, eqn.params["axes"]))
        says = f"the first entry along axis {axes} in place of the sum"
        yield says, None, _first_entry


def _is_small(atom: Any) -> bool:
    if not jaxprs.is_literal(atom):
        return False
    value = abs(complex(np.asarray(atom.val).astype(complex)))
    return value < _GUARD


def _other_alone(dropped: int, sign: int) -> Change:
    def change(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
        (result,) = jaxprs.result_types(eqn)
        kept = jnp.broadcast_to(jnp.asarray(operands[1 - dropped]), result.shape)
        return [(sign * kept).astype(result.dtype)]

    return change


def _reduced_size(eqn: Eqn) -> int:
    shape = jaxprs.operand_types(eqn)[0].shape
    return int(np.prod([shape[axis] for axis in eqn.params["axes"]]))


def _first_entry(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
    (value,) = operands
    axes = sorted(eqn.params["axes"], reverse=True)
    for axis in axes:
        value = lax.index_in_dim(value, 0, axis, keepdims=False)
    return [value]


# --- the lines ------------------------------------------------------------------------


def _line(eqn: Eqn) -> str:
    """Returns the line of an equation, and what is written there."""
    place = jaxprs.users_place(eqn)
    if place is None:
        return ""
    text = linecache.getline(place.file, place.number)
    start, end = place.column
    written = text.encode()[start:end].decode(errors="replace") if end > start else text
    where = f"{os.path.relpath(place.file)}:{place.number}"
    if place.file.startswith(os.sep) and where.startswith(os.pardir):
        where = f"{place.file}:{place.number}"
    return f"`{written.strip()}` at {where}" if written.strip() else where
