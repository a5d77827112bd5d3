"""The backward pass of a tape, and the equation at which it stops being finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradtest._src.lifting import is_inexact
from gradtest._src.nans.tape import Event, Node, Tape, Values

Index = tuple[int, ...]
_MOST_HOPS = 100_000


@dataclasses.dataclass(frozen=True)
class Part:
    """What one use of a value adds to its cotangent."""

    event: Event
    operand: int
    value: Any


class Backward:
    """The cotangents of every value of a tape.

    Attributes:
      tape: The tape.
      gradient: The cotangents of the leaves that move, in order; zeros for a leaf that
        takes no part.
    """

    def __init__(self, tape: Tape, cotangents: Sequence[Any]):
        self.tape = tape
        self._parts: dict[Node, list[Part]] = {}
        self._totals: dict[Node, Any] = {}
        for node, ct in zip(tape.outputs, cotangents, strict=True):
            self._add(node, np.asarray(ct).astype(node.value.dtype))
        with tape.settings():
            for event in reversed(tape.events):
                self._pull(event)
        self.gradient = [
            self._totals.get(node, np.zeros(np.shape(node.value), node.value.dtype))
            for node in tape.inputs
            if node.moves
        ]

    def _add(self, node: Node, value: Any) -> None:
        if node.moves and value is not None:
            held = self._totals.get(node)
            self._totals[node] = value if held is None else held + value

    def _pull(self, event: Event) -> None:
        cotangents = self.incoming(event)
        if all(ct is None for ct in cotangents):
            return
        pulled = self.tape.pull(event, cotangents)
        for i, (node, value) in enumerate(zip(event.operands, pulled, strict=True)):
            if node.moves and value is not None:
                self._parts.setdefault(node, []).append(Part(event, i, value))
                self._add(node, value)

    def incoming(self, event: Event) -> Values:
        """Returns the cotangents of an event's results; None for those without."""
        return [self._totals.get(node) for node in event.results]

    def origin(self, leaf: int, index: Index | None = None) -> Origin | None:
        """Returns where the cotangent of a leaf stops being finite.

        Args:
          leaf: The place of the leaf among those that move.
          index: The entry to ask about; by default the first that is not finite.
        """
        node = [node for node in self.tape.inputs if node.moves][leaf]
        total = self._totals.get(node)
        if total is None:
            return None
        index = first_bad(total) if index is None else index
        if index is None or is_finite(total[index]):
            return None
        entry, turned = index, None
        for _ in range(_MOST_HOPS):
            part = self._bad_part(node, index)
            if part is None:
                return None  # the sum of finite parts overflows
            use, index = part
            if turned is None and self._turns_to_nan(use):
                turned = use.event
            following = self._bad_result(use, index)
            if following is None:
                at_zero = self._is_at_zero(use, index)
                return Origin(
                    use.event, use.operand, index, turned, at_zero, leaf, entry
                )
            node, index = following
        return None

    def inside_of_rule(self, origin: Origin) -> tuple[Event, Index] | None:
        """Returns the event inside of a custom rule's derivative that is to blame.

        Args:
          origin: That the call of the rule is.
        """
        event = origin.event
        incoming = self.incoming(event)
        moving = [i for i, node in enumerate(event.operands) if node.moves]
        present = [k for k, ct in enumerate(incoming) if ct is not None]
        program = self.tape.derivative(event, moving, present)
        values = [node.value for node in event.operands]
        given = [incoming[k] for k in present]
        inner = Tape(program, [], [*values, *given], wide=self.tape.wide)
        made = inner.outputs[moving.index(origin.operand)].event
        return None if made is None else made_by(made, origin.index)

    def _bad_part(self, node: Node, index: Index) -> tuple[Part, Index] | None:
        """Returns a use of a value that spoils an entry of its cotangent."""
        parts = self._parts.get(node, [])
        for part in parts:
            if not is_finite(part.value[index]):
                return part, index
        for part in parts:
            found = first_bad(part.value)
            if found is not None:
                return part, found
        return None

    def _is_at_zero(self, part: Part, index: Index) -> bool:
        """Whether the cotangent that an event takes for an entry is zero."""
        incoming = [ct for ct in self.incoming(part.event) if ct is not None]
        entries = [entry_of(ct, index) for ct in incoming]
        return all(
            not np.asarray(ct if entry is None else entry).any()
            for ct, entry in zip(incoming, entries, strict=True)
        )

    def _turns_to_nan(self, part: Part) -> bool:
        incoming = [ct for ct in self.incoming(part.event) if ct is not None]
        was = any(np.isnan(np.asarray(ct)).any() for ct in incoming)
        return not was and bool(np.isnan(np.asarray(part.value)).any())

    def _bad_result(self, part: Part, index: Index) -> tuple[Node, Index] | None:
        """Returns a result of an event whose cotangent is not finite already."""
        event, shape = part.event, np.shape(part.value)
        for k, (node, ct) in enumerate(
            zip(event.results, self.incoming(event), strict=True)
        ):
            if ct is None:
                continue
            if event.name == "loop_parts":
                if index[0] == k:
                    return node, index[1:]
                continue
            at = _bad_at(ct, index)
            if at != index and event.name in _BY_ENTRY and np.shape(ct) == shape:
                at = None
            if at is not None:
                return node, at
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a gradient stops being finite.

    Attributes:
      event: The first one in the backward pass that makes what is not finite of finite
        cotangents.
      operand: Of which of its operands it is the derivative.
      index: At which entry of it.
      turned: The event whose derivative turns an infinity to NaN, if any does.
      is_at_zero: Whether the cotangent that it takes there is zero.
      leaf: The place of the leaf whose gradient was asked about.
      entry: Which entry of it.
    """

    event: Event
    operand: int
    index: Index
    turned: Event | None
    is_at_zero: bool
    leaf: int
    entry: Index

    def root(self) -> tuple[Event, Index]:
        """Returns the event that made what is not finite in the forward pass, if any.

        It is the origin's own event where all that this takes is finite.
        """
        return made_by(self.event, self.index)


def made_by(event: Event, index: Index) -> tuple[Event, Index]:
    """Follows values that are not finite back to the event that made the first one.

    Args:
      event: Where to begin.
      index: An entry of what it takes.

    Returns:
      An event of which all operands are finite, and the entry of what it takes.
    """
    for _ in range(_MOST_HOPS):
        found = None
        for node in event.operands:
            at = _bad_at(node.value, index)
            if at is not None and node.event is not None:
                found = node.event, at
                break
        if found is None:
            break
        event, index = found
    return event, index


def _bad_at(value: Any, index: Index) -> Index | None:
    """Returns an entry that is not finite: the one asked about, if it is one."""
    if not is_inexact(getattr(value, "dtype", None)):
        return None
    asked = entry_of(value, index)
    return index if asked is not None and not is_finite(asked) else first_bad(value)


def entry_of(value: Any, index: Index) -> np.ndarray | None:
    """Returns an entry of an array; None where it has none of this index."""
    array = np.asarray(value)
    fits = array.ndim == len(index) and all(
        i < n for i, n in zip(index, array.shape, strict=True)
    )
    return array[index] if fits else None


def is_finite(value: Any) -> bool:
    """Whether all entries of an array are finite."""
    return bool(np.isfinite(np.asarray(value)).all())


def first_bad(value: Any) -> Index | None:
    """Returns the first entry of an array that is not finite; None where all are."""
    bad = ~np.isfinite(np.asarray(value))
    return tuple(int(i) for i in np.argwhere(bad)[0]) if bad.any() else None


# Each entry of a result is computed of the same entry of the operands alone.
_BY_ENTRY = frozenset(
    ["abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2",
     "atanh", "cbrt", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma",
     "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "integer_pow", "lgamma",
     "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rem", "rsqrt",
     "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh"]
)  # fmt: skip
