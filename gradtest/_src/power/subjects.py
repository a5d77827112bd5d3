"""The custom rules of a program, as they can be broken, and the broken programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradtest._src import execution, jaxprs, rules
from gradtest._src.inputs import Inputs, Point
from gradtest._src.jaxprs import BoundRule, RuleSource
from gradtest._src.power.mutations import Mutation
from gradtest._src.power.seen import JVP, SeenRule, seen_jvp, seen_vjp
from gradtest._src.program import Program, trace_program
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rules import RuleUse

RuleKey = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(eq=False)
class Subject:
    """One custom rule of a program: what can be broken, and what is known of it.

    Rules that one factory made stand on the same lines: they are one here.

    Attributes:
      source: Where it was written.
      seen: What can be broken of it; None where nothing can.
      uses: Its calls that the program makes, with values, one for each set of shapes.
      trouble: Why it can't be broken, or why nothing reaches it; empty where neither.
    """

    source: RuleSource
    seen: SeenRule | None = None
    uses: list[RuleUse] = dataclasses.field(default_factory=list)
    trouble: str = ""

    @property
    def key(self) -> RuleKey:
        """What tells this rule from all others."""
        return key_of(self.source)

    def part_at(self, part: str) -> str:
        """Returns where a part of the rule stands, as "bwd at file:line"."""
        places = [text for text in self.source.where if text.startswith(f"{part} at ")]
        return rules.shorten(places[0] if places else self.source.where[0])


def key_of(source: RuleSource) -> RuleKey:
    """Returns what tells a rule from all others."""
    return source.kind, source.identity, source.where


def find_subjects(
    fn: Callable[..., Any], inputs: Inputs, point: Point, options: Mapping[str, Any]
) -> list[Subject]:
    """Returns every custom rule that a function calls.

    Args:
      fn: The function.
      inputs: Its arguments.
      point: Values of their leaves.
      options: Those of the assertion; `has_aux` says how to read the result.
    """
    program = trace_program(fn, inputs, point, has_aux=_has_aux(options))
    found: dict[RuleKey, Subject] = {}
    for use in rules.find_rules(program, point):
        subject = found.setdefault(key_of(use.source), Subject(use.source))
        subject.uses.append(use)
    looker = _Looker(found)
    with execution.user_code(), jaxprs.rules_met(looker.look):
        jax.make_jaxpr(lambda *p: fn(*inputs.arguments(*p)))(point.moving, point.held)
    for subject in found.values():
        _settle(subject)
    return list(found.values())


class _Looker:
    """Looks at every rule that is bound while a function is traced."""

    def __init__(self, found: dict[RuleKey, Subject]):
        self._found = found
        self._is_looking = False

    def look(self, rule: BoundRule) -> None:
        """Looks at a rule that was not seen yet."""
        subject = self._found.setdefault(key_of(rule.source), Subject(rule.source))
        if self._is_looking or (subject.seen is not None and subject.seen.returned):
            return  # it was seen, at arguments that are not empty
        self._is_looking = True
        try:
            subject.seen, subject.trouble = _seen(rule, subject), ""
        except Exception as error:  # whatever a malformed rule makes JAX raise
            first = (str(error).splitlines() or [""])[0]
            subject.trouble = f"it could not be traced: {type(error).__name__}: {first}"
        finally:
            self._is_looking = False


def _seen(rule: BoundRule, subject: Subject) -> SeenRule:
    operands = _with_values(rule, subject)
    names = rule.source.operands
    try:
        if rule.source.kind == "custom_jvp":
            seen = seen_jvp(rule.jvp, operands, names=names)
        else:
            moving = _moving(subject, len(operands))
            seen = seen_vjp(rule.fwd, rule.bwd, operands, names=names, moving=moving)
    finally:
        rule.forget()
    return dataclasses.replace(seen, source=rule.source)


def _with_values(rule: BoundRule, subject: Subject) -> Sequence[Any]:
    """Returns a call's operands, with values that reach such a call where known."""
    types = [(aval.shape, aval.dtype) for aval in map(jax.typeof, rule.operands)]
    for use in subject.uses:
        for sample in use.samples:
            own = sample[use.source.num_consts :]
            if [(value.shape, value.dtype) for value in own] == types:
                return own
    return rule.operands


def _moving(subject: Subject, count: int) -> list[bool]:
    """Returns which operands the program's inputs reach, in any call; else all."""
    flags = [False] * count
    for use in subject.uses:
        own = use.moving[use.source.num_consts :]
        if len(own) == count:
            flags = [a or b for a, b in zip(flags, own, strict=True)]
    return flags if any(flags) else [True] * count


def _settle(subject: Subject) -> None:
    """Says why a rule is not broken, where it is not."""
    if subject.seen is None:
        kind = subject.source.kind
        subject.trouble = (
            subject.trouble or f"a {kind} is not broken: it has other parts"
        )
    elif subject.uses and not any(use.samples for use in subject.uses):
        subject.trouble = subject.uses[0].trouble
    elif not subject.seen.returned:
        subject.trouble = "it has no derivative to break"


def _has_aux(options: Mapping[str, Any]) -> bool:
    return bool(options.get("has_aux", False))


class BrokenProgram:
    """A function that calls one rule broken: with its name and its signature.

    Attributes:
      times: How often the broken rule was bound.
    """

    def __init__(self, fn: Callable[..., Any], subject: Subject, mutation: Mutation):
        with contextlib.suppress(AttributeError, TypeError):
            functools.update_wrapper(self, fn)
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.times = 0
        self._fn, self._subject, self._mutation = fn, subject, mutation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function; the rule is broken in whatever is traced meanwhile."""
        with jaxprs.rules_met(self._broken):
            return self._fn(*args, **kwargs)

    def _broken(self, rule: BoundRule) -> dict[str, Any] | None:
        seen = self._subject.seen
        if seen is None or key_of(rule.source) != self._subject.key:
            return None
        self.times += 1
        count = seen.count if seen.kind == JVP else seen.tree.num_leaves
        return rule.broken(self._mutation.part, self._mutation.applied, count)


def broken_uses(
    broken: BrokenProgram,
    subject: Subject,
    inputs: Inputs,
    point: Point,
    options: Mapping[str, Any],
) -> tuple[list[RuleUse], TracedAnew]:
    """Returns the calls of a rule in the broken program, and what traces it anew.

    The values that reach them are those of the right program: a derivative was broken.
    """

    def trace(inputs: Inputs, point: Point) -> Program:
        return trace_program(broken, inputs, point, has_aux=_has_aux(options))

    program = trace(inputs, point)
    found = []
    for use in subject.uses:
        if use.samples:
            eqn = jaxprs.equation_at(program.jaxpr, use.call.place)
            if key_of(jaxprs.read_rule(eqn)) != subject.key:
                raise ValueError("the broken program is another one")
            call = dataclasses.replace(use.call, eqn=eqn)
            found.append(dataclasses.replace(use, calls=(call, *use.calls[1:])))
    return found, TracedAnew(trace, inputs, point)
