"""The equations whose derivative is not finite at some operands, and how to guard them.

Two forms of the double `where`: the operand alone is replaced where the derivative is
not finite, for a result that is not used there; or the result keeps its value there as
well, as a constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src.lifting import Evaluator
from gradtest._src.nans.tape import Compute, Event, Guard, Node, Values


@dataclasses.dataclass(frozen=True)
class Singular:
    """Where the derivative of a primitive is not finite.

    Attributes:
      operand: The operand that matters.
      sound: Says of the operands' values, entry by entry, where it is finite.
      safe: A number at which it is.
      test: What `sound` says, as code, of the operand named `s`.
      call: The primitive as code, of `{}`.
      keeps: The value that the guarded form has elsewhere, as code.
    """

    operand: int
    sound: Callable[..., Any]
    safe: float
    test: str
    call: str
    keeps: str = ""


def _real(value: Any) -> Any:
    """Returns what can be compared with zero: a size, of a complex number."""
    return jnp.abs(value) if jnp.iscomplexobj(value) else value


def _is_not_zero(*operands: Any) -> Any:
    return operands[0] != 0


# A derivative that is not finite at zero alone, at zero and below, outside of -1 to 1.
_ZERO = Singular(0, _is_not_zero, 1.0, "s != 0", "")
_BELOW = Singular(0, lambda *s: _real(s[0]) > 0, 1.0, "s > 0", "")
_OUTSIDE = Singular(0, lambda *s: jnp.abs(s[0]) < 1, 0.0, "abs(s) < 1", "")
_DIVISOR = Singular(1, lambda a, s: s != 0, 1.0, "s != 0", "a / {}")


def _of(kind: Singular, call: str, keeps: str = "") -> tuple[Singular, ...]:
    return (dataclasses.replace(kind, call=call, keeps=keeps),)


# By the name of the primitive; the usual one first.
SINGULAR: dict[str, tuple[Singular, ...]] = {
    "sqrt": _of(_BELOW, "jnp.sqrt({})", "0"),
    "rsqrt": _of(_BELOW, "jax.lax.rsqrt({})"),
    "cbrt": _of(_ZERO, "jnp.cbrt({})", "0"),
    "log": _of(_BELOW, "jnp.log({})"),
    "log1p": (Singular(0, lambda s: _real(s) > -1, 0.0, "s > -1", "jnp.log1p({})"),),
    "div": (_DIVISOR,),
    "rem": (dataclasses.replace(_DIVISOR, call="jnp.fmod(a, {})"),),
    "pow": (_ZERO, _BELOW),
    "integer_pow": (_ZERO,),
    "acos": _of(_OUTSIDE, "jnp.arccos({})"),
    "asin": _of(_OUTSIDE, "jnp.arcsin({})"),
    "atanh": _of(_OUTSIDE, "jnp.arctanh({})"),
    "acosh": (Singular(0, lambda s: s > 1, 2.0, "s > 1", "jnp.arccosh({})", "0"),),
    "atan2": (
        Singular(
            1,
            lambda y, s: (s != 0) | (y != 0),
            1.0,
            "(s != 0) | (y != 0)",
            "jnp.arctan2(y, {})",
            "0",
        ),
    ),
    "exp": (
        Singular(0, lambda s: jnp.isfinite(jnp.exp(s)), 0.0, "s < 80", "jnp.exp({})"),
    ),
    "exp2": (
        Singular(
            0, lambda s: jnp.isfinite(jnp.exp2(s)), 0.0, "s < 120", "jnp.exp2({})"
        ),
    ),
    "erf_inv": _of(_OUTSIDE, "jax.lax.erf_inv({})"),
    "lgamma": _of(_BELOW, "jax.lax.lgamma({})"),
    "digamma": _of(_BELOW, "jax.lax.digamma({})"),
}


def _safe(of: Singular, operands: Values) -> tuple[Any, Values]:
    """Returns where operands are sound, and the operands made safe elsewhere."""
    sound = of.sound(*map(lax.stop_gradient, operands))
    value = operands[of.operand]
    safe = list(operands)
    safe[of.operand] = jnp.where(sound, value, jnp.full_like(value, of.safe))
    return sound, safe


def whole_guard(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
    """Guards an event by a double `where` that keeps its value."""
    return _guards(SINGULAR[event.name][0])[1](event, run)


def _guards(of: Singular) -> tuple[Guard, Guard]:
    """Returns the guard of the operand alone, and the one that keeps the value."""

    def inner(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
        def compute(*operands: Any) -> Values:
            eqn: Any = event.eqn
            return list(run.apply(eqn, _safe(of, list(operands))[1]))

        return event.operands, compute

    def whole(event: Event, run: Evaluator) -> tuple[list[Node], Compute] | None:
        def compute(*operands: Any) -> Values:
            eqn: Any = event.eqn
            sound, safe = _safe(of, list(operands))
            at_rest = run.apply(eqn, list(map(lax.stop_gradient, operands)))[0]
            moving = run.apply(eqn, safe)[0]
            return [jnp.where(sound, moving, lax.stop_gradient(at_rest))]

        return event.operands, compute

    return inner, whole


@dataclasses.dataclass(frozen=True)
class Form:
    """A guarded form of one equation.

    Attributes:
      guard: How it is computed.
      code: How it is written.
      is_whole: Whether it keeps the equation's value.
    """

    guard: Guard
    code: str
    is_whole: bool


def guarded_forms(event: Event) -> list[Form]:
    """Returns the double `where`s for an event; none where it is not in the table."""
    forms = []
    for of in SINGULAR.get(event.name, ()):
        call, keeps = of.call, of.keeps
        if event.name in ("pow", "integer_pow"):
            call = f"{{}} ** {_power(event)}"
        inner = call.format(f"jnp.where({of.test}, s, {of.safe:g})")
        keeps = keeps or f"jax.lax.stop_gradient({call.format('s')})"
        outer = f"jnp.where({of.test}, {inner}, {keeps})"
        for guard, code in zip(_guards(of), (inner, outer), strict=True):
            forms.append(Form(guard, f"`{code}`", code is outer))
    return forms


def _power(event: Event) -> str:
    """Writes the exponent of a power."""
    if event.eqn is not None and "y" in event.eqn.params:
        return str(event.eqn.params["y"])
    node = event.operands[1]
    power = np.asarray(node.value)
    is_number = not node.moves and power.size and (power == power.flat[0]).all()
    return f"{power.flat[0]:g}" if is_number else "p"
