"""What a cut means: dead units, saturation, a zero factor, a branch not taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from gradtest._src.findings import Cause, Line
from gradtest._src.localise.steps import Constant, Step
from gradtest._src.silence.cuts import (
    Cancelled,
    Cut,
    amount,
    gate_of,
    is_gate,
)
from gradtest._src.silence.observed import Observed, Seen, called, line_of

_DEAD = (
    "give them a smaller negative bias, another initialisation or scale of the input, "
    "or a function with a slope below zero (leaky_relu, gelu); a large step of the "
    "optimiser may have killed them"
)
_FRACTION = "scale its input down: its weights, a normalisation before it"
_FACTOR = "see where that zero comes from; draw other points (`trials`)"
_MOVE = "draw other points (`trials`, gradtest.domains)"
_INITIAL = (
    "if that is meant (a residual branch that begins as nothing), the gradient comes "
    "with the first update of it: check after one, or name the others in `exclude`"
)
_BRANCH = "give inputs for which it is taken (`trials`, gradtest.domains)"
# Steep in the middle, flat outside.
_SATURATING = frozenset({"tanh", "logistic", "erf", "erfc", "erf_inv", "atan"})
_EXPONENTIAL = frozenset({"exp", "exp2", "expm1", "log1p"})
_FLAT_AT_ZERO = frozenset({"abs", "square", "integer_pow", "pow", "cos", "cosh"})
_FACTORS = frozenset({"mul", "dot_general", "conv_general_dilated", "div"})


@dataclasses.dataclass(frozen=True)
class Silence:
    """Why one leaf has no gradient.

    Attributes:
      cause: The reason.
      line: The line of source at which the gradient is lost, where one does it.
    """

    cause: Cause
    line: Line | None = None


def reason(observed: Observed, cut: Cut) -> Silence:
    """Says what a cut means."""
    explain = _OF.get(cut.step.name)
    if cut.step.name in _FACTORS:
        explain = _factor
    if cut.step.name in _SATURATING | _EXPONENTIAL:
        explain = _saturated
    if cut.step.name in _FLAT_AT_ZERO:
        explain = _flat_at_zero
    found = explain(observed, cut) if explain is not None else None
    return found or _other(observed, cut)


def cancelled(observed: Observed, found: Cancelled) -> Silence:
    """Says that gradients cancel at a value."""
    step = observed.maker(found.value)
    if step is None:
        what = "its uses hand it gradients"
    else:
        what = f"the uses of {called(step)} hand it gradients"
    is_softmax = step is not None and step.name in _EXPONENTIAL
    remedy = "use it in one of them alone, or leave it out of the parameters"
    says = f"{what} that cancel exactly"
    if is_softmax and _is_over_one_entry(found.value):
        says += ": the axis has one entry, its softmax is always 1"
        remedy = "normalise over another axis, or by a sigmoid"
        return Silence(Cause("softmax of one entry", says, remedy), line_of(step))
    if is_softmax:
        says += ": one entry of a softmax has all the weight"
        remedy = _FRACTION
    cause = Cause("saturated" if is_softmax else "cancels", says, remedy)
    return Silence(cause, line_of(step))


def _is_over_one_entry(value: Seen) -> bool:
    """Whether a value is added up along axes of size 1."""
    shape = value.level.steps.types[value.atom].shape  # type: ignore[index]
    return any(
        step.name == "reduce_sum"
        and value.atom in step.operands[:1]
        and math.prod(shape[axis] for axis in step.params["axes"]) == 1
        for step in value.level.steps.steps
        if not any(isinstance(atom, Constant) for atom in step.operands[:1])
    )


def _say(name: str, says: str, remedy: str, step: Step | None) -> Silence:
    return Silence(Cause(name, says, remedy), line_of(step))


def _other(observed: Observed, cut: Cut) -> Silence:
    return _say(
        "zero slope",
        f"the derivative of {called(cut.step)} is zero in {amount(observed, cut)}",
        _MOVE,
        cut.step,
    )


def _number(value: float) -> str:
    return f"{value:.3g}"


def _span(low: float, high: float) -> str:
    if _number(low) == _number(high):
        return f"at {_number(low)}"
    return f"from {_number(low)} to {_number(high)}"


def _are(entries: str) -> str:
    return "is" if entries.startswith("the only") else "are"


def _dead(observed: Observed, cut: Cut, high: float) -> Silence:
    before = _dead_before(observed, cut)
    if before is not None:
        return before
    units = amount(observed, cut)
    every = " for every example" if "units" in units else ""
    says = (
        f"dead ReLU: {units} of {called(cut.step)} {_are(units)} at or below zero"
        f"{every} (the largest is {_number(high)})"
    )
    return _say("dead ReLU", says, _DEAD, cut.step)


def _dead_before(observed: Observed, cut: Cut) -> Silence | None:
    """Explains a ReLU that is handed nothing but zeros, by dead units before it."""
    own = observed.operands(cut.level, cut.step)[cut.operand]
    if not observed.is_zero(own):
        return None
    first = observed.zero_before(own)
    maker = observed.maker(first)
    if maker is None or maker is cut.step:
        return None
    return _gate(observed, first, maker)


def _larger(observed: Observed, cut: Cut) -> Silence | None:
    """Explains `max`, and `min`, the other way round."""
    own = observed.operand_range(cut.level, cut.number, cut.operand)
    other = observed.operands(cut.level, cut.step)[1 - cut.operand]
    low, high = observed.range(other)
    if cut.step.name == "max" and low == high == 0:
        return _dead(observed, cut, own[1])
    side = "above" if cut.step.name == "min" else "below"
    limit = f"{side} {_number(low)}" if low == high else f"{side} the other operand"
    return _beyond(observed, cut, own, limit)


def _beyond(
    observed: Observed, cut: Cut, own: tuple[float, float], limit: str
) -> Silence:
    entries = amount(observed, cut)
    says = (
        f"{entries} of {called(cut.step)} {_are(entries)} clipped: what goes in lies "
        f"{limit}, {_span(*own)}"
    )
    remedy = "scale its input, or widen the limits"
    return _say("clipped", says, remedy, cut.step)


def _clamped(observed: Observed, cut: Cut) -> Silence | None:
    if cut.operand != 1:
        return None
    lower, _, upper = observed.operands(cut.level, cut.step)
    own = observed.operand_range(cut.level, cut.number, 1)
    if observed.range(lower) == (0.0, 0.0) and own[1] <= 0:
        return _dead(observed, cut, own[1])
    low, high = observed.range(lower)[0], observed.range(upper)[1]
    return _beyond(observed, cut, own, f"outside of {_number(low)} to {_number(high)}")


def _selected(observed: Observed, cut: Cut) -> Silence | None:
    gate = gate_of(observed, cut)
    if gate is not None and gate.limit == 0 >= gate.high:
        return _dead(observed, cut, gate.high)
    if gate is not None and (gate.low >= gate.limit or gate.high <= gate.limit):
        side = "above" if gate.low >= gate.limit else "below"
        limit = f"{side} {_number(gate.limit)}"
        return _beyond(observed, cut, (gate.low, gate.high), limit)
    text = called(cut.step)
    condition = Seen(cut.level, cut.step.operands[0])
    test = observed.maker(observed.settled(condition))
    why = f", by {called(test)}" if test is not None and called(test) != text else ""
    says = f"{text} takes the other branch wherever a gradient arrives{why}"
    return _say("branch not taken", says, _BRANCH, cut.step)


def _branched(observed: Observed, cut: Cut) -> Silence | None:
    low, high = observed.range(Seen(cut.level, cut.step.operands[0]))
    taken = f"branch {low:.0f}" if low == high else "another branch"
    says = f"only another branch of {called(cut.step)} uses it: here it takes {taken}"
    return _say("branch not taken", says, _BRANCH, cut.step)


def _saturated(observed: Observed, cut: Cut) -> Silence | None:
    own = observed.operand_range(cut.level, cut.number, 0)
    says = (
        f"{called(cut.step)} is saturated in {amount(observed, cut)}: the slope of "
        f"`{cut.step.name}` is zero there, {_span(*own)}"
    )
    return _say("saturated", says, _FRACTION, cut.step)


def _flat_at_zero(observed: Observed, cut: Cut) -> Silence | None:
    if observed.operand_range(cut.level, cut.number, 0) != (0.0, 0.0):
        return None
    entries = amount(observed, cut)
    lie = "lies" if entries.startswith("the only") else "lie"
    says = f"{called(cut.step)} has no slope at 0, where {entries} {lie}"
    first = observed.zero_before(observed.operands(cut.level, cut.step)[0])
    leaf, step = observed.leaf(first), observed.maker(first)
    dead = _gate(observed, first, step) if step is not None else None
    if dead is not None:
        cause = dead.cause
        cause = dataclasses.replace(cause, says=f"{cause.says}; so {says}")
        return Silence(cause, dead.line)
    if leaf is not None:
        says += f", because {leaf.name} is zero"
    return _say("zero slope", says, _MOVE, cut.step)


def _factor(observed: Observed, cut: Cut) -> Silence | None:
    operands = observed.operands(cut.level, cut.step)
    own, other = operands[cut.operand], operands[1 - cut.operand]
    if cut.step.name == "div" and cut.operand == 0:
        return None
    if observed.are_same(own, other):
        return _flat_at_zero(observed, cut)
    gate = gate_of(observed, cut)
    if gate is not None and gate.limit == 0 >= gate.high:
        return _dead(observed, cut, gate.high)
    if observed.is_zero(other):
        return _origin(observed, other, cut.step)
    if cut.alive.get(1 - cut.operand):
        return _say(
            "underflow",
            f"{called(cut.step)} multiplies two numbers so small that nothing is left",
            "scale the loss, or compute in a dtype with a wider range",
            cut.step,
        )
    made = _name(observed, other)
    says = f"it is multiplied by {made}, which is zero wherever a gradient arrives"
    return _say("multiplied by zero", says, _FACTOR, cut.step)


def _name(observed: Observed, seen: Seen) -> str:
    seen = observed.settled(seen)
    leaf, step = observed.leaf(seen), observed.maker(seen)
    if leaf is not None:
        return leaf.name
    return called(step) if step is not None else "a constant"


def _origin(observed: Observed, zero: Seen, user: Step | None = None) -> Silence:
    """Says why a value is zero that something is multiplied by."""
    first = observed.zero_before(zero)
    leaf, step = observed.leaf(first), observed.maker(first)
    if leaf is not None:
        return _zero_leaf(leaf.name, leaf.role.value == "moves", leaf.shape, user)
    if step is None:
        if isinstance(first.atom, Constant):
            where = f", at {called(user)}" if user is not None else ""
            says = f"it is multiplied by a constant that is zero{where}"
            return _say("multiplied by zero", says, _FACTOR, user)
        return _say("multiplied by zero", "it is multiplied by what a loop carries, "
                    "which is zero", _FACTOR, user)  # fmt: skip
    gate = _gate(observed, first, step)
    if gate is not None:
        return gate
    comparison = observed.comparison(first)
    if comparison is not None or step.name in ("and", "or", "not", "xor"):
        says = f"it is multiplied by a mask, {called(step)}, that is zero everywhere"
        return _say("multiplied by zero", says, _FACTOR, step)
    says = f"it is multiplied by {called(step)}, which is zero in every entry"
    return _say("multiplied by zero", says, _FACTOR, step)


def _zero_leaf(
    name: str, moves: bool, shape: tuple[int, ...], user: Step | None
) -> Silence:
    count = math.prod(shape)
    entries = f"in all {count} entries" if count > 1 else "itself"
    where = f", at {called(user)}" if user is not None else ""
    says = f"all that comes back to it is multiplied by {name}, which is zero {entries}"
    if moves:
        return _say("zero weights", f"{says}{where}", _INITIAL, user)
    return _say("multiplied by zero", f"{says}{where}", _FACTOR, user)


def _gate(observed: Observed, value: Seen, step: Step) -> Silence | None:
    """Explains a zero that a ReLU or a `where` returns."""
    number = value.level.steps.steps.index(step)
    entries = math.prod(observed.shape(value))
    for k, own in enumerate(observed.operands(value.level, step)):
        cut = Cut(value.level, number, k, entries, {}, is_whole=True)
        if isinstance(own.atom, Constant) or observed.is_zero(own):
            continue
        if step.name in ("max", "clamp") or is_gate(observed, cut):
            found = _OF[step.name](observed, cut)
            if found is not None and found.cause.name == "dead ReLU":
                return found
    return None


_OF: dict[str, Callable[[Observed, Cut], Silence | None]] = {
    "max": _larger,
    "min": _larger,
    "clamp": _clamped,
    "select_n": _selected,
    "cond": _branched,
}
