"""Formulas of several equations that have a guarded form of their own.

Recognised by their equations, whatever function they were written in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Place
from gradtest._src.lifting import Evaluator
from gradtest._src.nans.backward import Origin
from gradtest._src.nans.singular import guarded_forms, whole_guard
from gradtest._src.nans.tape import Compute, Event, Guard, Node, Tape, Values

# So far is a `where` looked for behind an equation.
_MOST_USES = 200
# Equations that only hand values on.
_LAYOUT = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape",
     "squeeze", "stop_gradient", "pvary"]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A guarded formula.

    Attributes:
      name: What it is called.
      code: How it is written.
      event: The event that it stands for.
      guard: How that is computed then.
    """

    name: str
    code: str
    event: Event
    guard: Guard

    def guards(self, tape: Tape) -> dict[int, Guard]:
        """Returns the guard by the equations of its line: they are one to its author.

        Args:
          tape: The program, run.
        """
        line, name = self.event.line, self.event.name
        alike = [
            event
            for event in tape.events
            if event.name == name and _is_same_line(event.line, line)
        ]
        return {id(event.eqn): self.guard for event in (self.event, *alike)}


def _is_same_line(line: Place | None, other: Place | None) -> bool:
    if line is None or other is None:
        return False
    return (line.file, line.number) == (other.file, other.number)


class Surroundings:
    """What is computed of what in a tape."""

    def __init__(self, tape: Tape):
        self._uses: dict[Node, list[Event]] = {}
        for event in tape.events:
            for node in event.operands:
                self._uses.setdefault(node, []).append(event)

    def uses(self, node: Node) -> Iterator[Event]:
        """Yields the events that take a value, as it is or in another layout."""
        for event in self._uses.get(node, []):
            if event.name in _LAYOUT:
                yield from self.uses(event.results[0])
            else:
                yield event

    def dropped_by(self, event: Event) -> Event | None:
        """Returns the first `where` that may drop what an event made."""
        seen: set[int] = set()
        waiting = list(event.results)
        while waiting and len(seen) < _MOST_USES:
            node = waiting.pop(0)
            for use in self._uses.get(node, []):
                if use.name == "select_n" and use.operands[0] is not node:
                    return use
                if id(use) not in seen:
                    seen.add(id(use))
                    waiting += use.results
        return None


def remedies(origin: Origin, tape: Tape) -> Iterator[Remedy]:
    """Yields the guarded formulas that may help, the likelier first."""
    around = Surroundings(tape)
    root, _ = origin.root()
    events = [root] if root is origin.event else [root, origin.event]
    for event in events:
        yield from _of_several(event, around)
    for event in events:
        yield from _double_where(event, around)
    for event in events:
        if event.name == "eigh":
            yield _remedy(event, "derivative of its own", _EIGH, _safe_eigh)


def _remedy(event: Event, name: str, code: str, guard: Guard) -> Remedy:
    return Remedy(name, code, event, guard)


def _double_where(event: Event, around: Surroundings) -> Iterator[Remedy]:
    taken = f"with s for what `{event.name}` takes"
    if event.name in ("div", "rem"):
        taken = "with s for the divisor"
    where = around.dropped_by(event)
    forms = guarded_forms(event)
    # What is not dropped must keep its value, and have no slope of another's.
    for form in sorted(forms, key=lambda form: form.is_whole == (where is not None)):
        outer = ""
        if where is not None and not form.is_whole:
            line = f" of line {where.line.number}" if where.line is not None else ""
            outer = f"; the outer `where`{line} stays"
        code = f"{form.code}, {taken}{outer}"
        yield _remedy(event, "double where", code, form.guard)


# --- what is computed of what -----------------------------------------------------


def _maker(node: Node, *names: str) -> Event | None:
    """Returns what made a value, if it is one of some primitives; layout is skipped."""
    event = node.event
    while event is not None and event.name in _LAYOUT:
        event = event.operands[0].event
    return event if event is not None and event.name in names else None


def _bare(node: Node) -> Node:
    """Returns a value as it was before its layout changed."""
    while node.event is not None and node.event.name in _LAYOUT:
        node = node.event.operands[0]
    return node


def _is_number(node: Node, number: float) -> bool:
    node = _bare(node)
    return node.event is None and not node.moves and _all_are(node.value, number)


def _all_are(value: Any, number: float) -> bool:
    array = np.asarray(value)
    return bool(array.size) and bool((array == number).all())


def _root_of_square(node: Node) -> Node | None:
    """Returns x where a value is x * x."""
    event = _maker(node, "square", "integer_pow", "mul")
    if event is None or event.eqn is None:
        return None
    if event.name == "integer_pow" and event.eqn.params["y"] != 2:
        return None
    if event.name == "mul" and event.operands[0] is not event.operands[1]:
        return None
    return event.operands[0]


def _added_to_one(event: Event | None) -> Node | None:
    """Returns x where an event computes 1 + x."""
    if event is None or event.name != "add":
        return None
    for one, other in (event.operands, event.operands[::-1]):
        if _is_number(one, 1.0):
            return other
    return None


# --- the formulas -----------------------------------------------------------------


def _of_several(event: Event, around: Surroundings) -> Iterator[Remedy]:
    if event.name == "sqrt":
        yield from _norms(event)
    elif event.name == "log":
        yield from _logs(event)
    elif event.name == "exp":
        yield from _exponentials(event, around)


def _norms(event: Event) -> Iterator[Remedy]:
    of = event.operands[0]
    added = _maker(of, "add", "add_any")
    if added is not None and None not in map(_root_of_square, added.operands):
        code = "`jnp.hypot(x, y)` in place of the root of x**2 + y**2"
        yield _remedy(event, "jnp.hypot", code, _hypot)
    chosen = _maker(of, "select_n")
    if chosen is not None:
        of = next((node for node in chosen.operands[1:] if node.moves), of)
    divided = _maker(of, "div", "mul")
    if not _sums_squares(divided.operands[0] if divided else of):
        return
    safe = "`jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0)`"
    if divided is None:
        code = f"{safe}, with s for the sum of squares"
        yield _remedy(event, "safe norm", code, whole_guard)
    else:
        code = f"{safe}, with s for the variance"
        yield _remedy(event, "safe standard deviation", code, whole_guard)


def _sums_squares(node: Node) -> bool:
    """Whether a value is a sum of squares, or a sum of such sums."""
    event = _maker(node, "reduce_sum", "dot_general", "add")
    if event is None:
        return False
    if event.name == "dot_general":
        return _bare(event.operands[0]) is _bare(event.operands[1])
    if event.name == "add":
        return any(map(_sums_squares, event.operands))
    return _is_square(event.operands[0])


def _is_square(node: Node) -> bool:
    """Whether a value is a square, or the sum of those of two parts of a number."""
    added = _maker(node, "add")
    if added is not None:
        return all(map(_is_square, added.operands))
    return _root_of_square(node) is not None


def _hypot(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    added = _maker(event.operands[0], "add", "add_any")
    found = [_root_of_square(node) for node in added.operands] if added else []
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return [found[0], found[1]], lambda x, y: [jnp.hypot(x, y)]


def _logs(event: Event) -> Iterator[Remedy]:
    of = event.operands[0]
    if _exponent_of_sum(of) is not None:
        code = "`jax.nn.logsumexp(x)` in place of log(sum(exp(x)))"
        yield _remedy(event, "logsumexp", code, _logsumexp)
    if _softmax_of(of) is not None:
        code = "`jax.nn.log_softmax(x)` in place of log(softmax(x))"
        yield _remedy(event, "log_softmax", code, _log_softmax)
    if _maker(of, "logistic") is not None:
        code = "`jax.nn.log_sigmoid(x)` in place of log(sigmoid(x))"
        yield _remedy(event, "log_sigmoid", code, _log_sigmoid)


def _exponent_of_sum(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """Returns x and the axes where a value is sum(exp(x))."""
    summed = _maker(node, "reduce_sum")
    made = _maker(summed.operands[0], "exp") if summed is not None else None
    if summed is None or made is None or summed.eqn is None:
        return None
    return made.operands[0], tuple(summed.eqn.params["axes"])


def _logsumexp(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    found = _exponent_of_sum(event.operands[0])
    if found is None:
        return None
    x, axes = found
    shape = np.shape(event.operands[0].value)
    return [x], lambda x: [jax.nn.logsumexp(x, axis=axes).reshape(shape)]


def _softmax_of(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """Returns x and the axes where a value is softmax(x)."""
    rule = _maker(node, *jaxprs.CUSTOM_RULES)
    if rule is not None and rule.eqn is not None:
        return _softmax_rule(rule)
    divided = _maker(node, "div")
    made = _maker(divided.operands[0], "exp") if divided is not None else None
    if divided is None or made is None:
        return None
    summed = _maker(divided.operands[1], "reduce_sum")
    if summed is None or summed.eqn is None:
        return None
    if _bare(summed.operands[0]) is not made.results[0]:
        return None
    shifted = _maker(made.operands[0], "sub")
    x = shifted.operands[0] if shifted is not None else made.operands[0]
    return x, tuple(summed.eqn.params["axes"])


def _softmax_rule(event: Event) -> tuple[Node, tuple[int, ...]] | None:
    """Reads the call of a rule that computes a softmax of its last operand."""
    (program,) = jaxprs.entered(event.eqn)  # type: ignore[arg-type]
    names = [eqn.primitive.name for eqn in jaxprs.walk(program)]
    sums = [e for e in jaxprs.walk(program) if e.primitive.name == "reduce_sum"]
    if len(sums) != 1 or "exp" not in names or "div" not in names:
        return None
    return event.operands[-1], tuple(sums[0].params["axes"])


def _log_softmax(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    found = _softmax_of(event.operands[0])
    if found is None or np.shape(found[0].value) != np.shape(event.operands[0].value):
        return None
    x, axes = found
    return [x], lambda x: [jax.nn.log_softmax(x, axis=axes)]


def _log_sigmoid(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    made = _maker(event.operands[0], "logistic")
    if made is None:
        return None
    return [made.operands[0]], lambda x: [jax.nn.log_sigmoid(x)]


def _exponentials(event: Event, around: Surroundings) -> Iterator[Remedy]:
    """The sigmoid and the softplus, written out with an exponential that overflows."""
    sigmoid = "`jax.nn.sigmoid(x)` in place of 1 / (1 + exp(-x))"
    softplus = "`jax.nn.softplus(x)` in place of log(1 + exp(x))"
    for use in around.uses(event.results[0]):
        if use.name == "log1p":
            yield _remedy(use, "softplus", softplus, _softplus)
        if _added_to_one(use) is None:
            continue
        for last in around.uses(use.results[0]):
            if last.name == "log":
                yield _remedy(last, "softplus", softplus, _softplus)
            elif _inverts(last) and _exponent_over_one(last) is not None:
                yield _remedy(last, "sigmoid", sigmoid, _sigmoid)


def _inverts(event: Event) -> bool:
    if event.name == "integer_pow" and event.eqn is not None:
        return event.eqn.params["y"] == -1
    return event.name == "div"


def _exponent_over_one(event: Event) -> Node | None:
    """Returns x where an event divides by 1 + exp(x)."""
    below = event.operands[-1]
    other = _added_to_one(_maker(below, "add"))
    made = _maker(other, "exp") if other is not None else None
    return made.operands[0] if made is not None else None


def _sigmoid(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    x = _exponent_over_one(event)
    if x is None:
        return None
    if event.name == "integer_pow":
        return [x], lambda x: [jax.nn.sigmoid(-x)]

    def compute(above: Any, x: Any) -> Values:
        return [above * jax.nn.sigmoid(-x)]

    return [event.operands[0], x], compute


def _softplus(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    other: Node | None = event.operands[0]
    if event.name == "log":
        other = _added_to_one(_maker(event.operands[0], "add"))
    made = _maker(other, "exp") if other is not None else None
    if made is None:
        return None
    return [made.operands[0]], lambda x: [jax.nn.softplus(x)]


# --- eigenvectors -----------------------------------------------------------------

_EIGH = (
    "give `eigh` a derivative of its own (jax.custom_jvp) in which 1 / (w[j] - w[i]) "
    "is 0 for equal eigenvalues"
)


def _safe_eigh(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    eqn = event.eqn
    if eqn is None or len(event.results) != 2:
        return None
    is_values = [np.ndim(node.value) for node in event.results]
    at = int(np.argmin(is_values))

    @jax.custom_jvp
    def decompose(a: Any) -> Any:
        found = run.apply(eqn, [a])
        return found[at], found[1 - at]

    @decompose.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        w, v = decompose(*primals)
        inner = jnp.swapaxes(v.conj(), -1, -2) @ tangents[0] @ v
        gaps = w[..., None, :] - w[..., :, None]
        inverse = jnp.where(gaps == 0, 0, 1 / jnp.where(gaps == 0, 1, gaps))
        moved = jnp.real(jnp.diagonal(inner, axis1=-2, axis2=-1))
        return (w, v), (moved.astype(w.dtype), v @ (inverse.astype(v.dtype) * inner))

    def compute(a: Any) -> Values:
        found = decompose(a)
        return [found[at], found[1 - at]]

    return event.operands, compute
