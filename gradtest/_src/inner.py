"""Functions that differentiate: what they stand for without the rules of what they use.

A step of meta-learning calls `jax.grad` itself. In its trace the rules of what it
differentiates are gone, and the equations that they wrote stand in their place, right
or wrong. Traced once more, with every such rule opened, the function is what it should
be: its derivatives, and its values too, can then be judged like any other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gradtest._src import intentions, jaxprs
from gradtest._src.execution import SlipError
from gradtest._src.intentions import Intentions, Product
from gradtest._src.jaxprs import Eqn, Jaxpr, RuleSource

# Where a rule's function has these, its own derivative may not exist.
_OFTEN_WITHOUT_DERIVATIVE = (
    jaxprs.CALLBACKS | jaxprs.COMPILED | {"while", "pallas_call"}
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A function's trace, free of the rules of what it differentiates itself.

    Attributes:
      jaxpr: The trace.
      rules: The users' rules that were opened, in the order of their calls.
      left: Those that the function still differentiates by their own rules.
      trouble: Why no rule could be opened; empty where that was no trouble.
    """

    jaxpr: Jaxpr
    rules: tuple[RuleSource, ...] = ()
    left: tuple[RuleSource, ...] = ()
    trouble: str = ""


def opened(
    trace: Callable[[], Jaxpr],
    expect_differs: Intentions | None,
    wanted: Callable[[RuleSource], bool],
) -> Opened:
    """Traces a function, free of the rules of what it differentiates itself.

    Rules of JAX's own stay: they choose conventions at kinks, and how to round. So do
    those whose function has no derivative of its own to take.

    Args:
      trace: Traces the function.
      expect_differs: Rules that differ on purpose. A function that one stands for takes
        its place; one with a declared product stays.
      wanted: Says of a rule whether it is to be opened.
    """
    plain = trace()
    if not jaxprs.differentiates(plain):
        return Opened(plain)
    found = _Rules(expect_differs or {}, wanted)
    try:
        with jaxprs.rules_opened(found.replacement):
            whole = trace()
    except SlipError:
        raise
    except Exception as error:  # as where a function has no derivative but its rule's
        kept = (*found.opened.values(), *found.left.values())
        return Opened(plain, (), kept, f"{type(error).__name__}: {error}")
    opened_rules, left = tuple(found.opened.values()), tuple(found.left.values())
    return Opened(whole if opened_rules else plain, opened_rules, left)


class _Rules:
    """The rules of what a function differentiates, and what becomes of them."""

    def __init__(
        self, expect_differs: Intentions, wanted: Callable[[RuleSource], bool]
    ):
        self._expect_differs = expect_differs
        self._wanted = wanted
        self.opened: dict[str, RuleSource] = {}
        self.left: dict[str, RuleSource] = {}

    def replacement(self, eqn: Eqn) -> Jaxpr | None:
        """Returns what a call is differentiated through; None for its own rule."""
        source = jaxprs.read_rule(eqn)
        if not jaxprs.is_users(source):
            return None
        program = self._program(eqn, source)
        kept = self.left if program is None else self.opened
        kept.setdefault(source.identity, source)
        return program

    def _program(self, eqn: Eqn, source: RuleSource) -> Jaxpr | None:
        for rule, alternative in self._expect_differs.items():
            if intentions.names(rule, source):
                if isinstance(alternative, Product):
                    return None
                return intentions.stand_in(eqn, source, alternative).program
        own = jaxprs.rule_free_program(eqn)
        is_smooth = _OFTEN_WITHOUT_DERIVATIVE.isdisjoint(jaxprs.primitives(own))
        return own if is_smooth and self._wanted(source) else None
