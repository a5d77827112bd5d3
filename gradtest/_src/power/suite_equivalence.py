"""Whether a mutant that no test catches is wrong at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from gradtest._src.inputs import read_inputs
from gradtest._src.jaxprs import rule_objects
from gradtest._src.jaxprs.rule_objects import RuleArguments
from gradtest._src.lifting import is_inexact
from gradtest._src.power.equivalence import difference
from gradtest._src.power.suite_mutants import Mutant
from gradtest._src.program import trace_program
from gradtest._src.rules import RuleUse, find_rules


def is_equivalent(rule: Any, calls: Iterable[RuleArguments], mutant: Mutant) -> bool:
    """Whether the rule's derivatives are the same with a mutant in its place.

    They are compared as `gradtest.power` does it, at drawn and special values of each
    shape that the rule is called with; False too where that can't be done.
    """
    found = [_is_same(rule, arguments, mutant) for arguments in calls]
    known = [same for same in found if same is not None]
    return bool(known) and all(known)


def _is_same(rule: Any, arguments: RuleArguments, mutant: Mutant) -> bool | None:
    """Whether it is so at arguments of some shapes; None where that is not known."""
    try:
        right = _uses(rule, arguments)
        with mutant.in_place([rule]):
            broken = _uses(rule, arguments)
            found = difference(right, broken) if right else None
    except Exception:  # whatever a rule makes of values that its users don't give it
        return None
    return None if found is None or mutant.misfits else found.is_equivalent


def _uses(rule: Any, arguments: RuleArguments) -> list[RuleUse]:
    """Returns a rule's own call in a program that calls it alone."""
    generator = np.random.default_rng(0)
    args = jax.tree_util.tree_map(
        lambda leaf: _drawn(leaf, generator), arguments.moving
    )

    def program(*moving: Any) -> Any:
        return rule(*arguments.placed(moving))

    inputs = read_inputs(program, args)
    point = inputs.draw(0, 0)
    found = find_rules(trace_program(program, inputs, point), point)
    name = getattr(rule_objects.function_of(rule), "__name__", "")
    return [use for use in found if use.source.name == name and use.samples]


def _drawn(leaf: Any, generator: np.random.Generator) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if is_inexact(leaf.dtype):
        drawn = generator.standard_normal(leaf.shape)
        return jax.numpy.asarray(drawn, leaf.dtype)
    return jax.numpy.ones(leaf.shape, leaf.dtype)
