"""The step at which a derivative first stops being finite."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.lifting import Evaluator, is_inexact, widen
from gradtest._src.localise.steps import Constant, Step
from gradtest._src.localise.target import Target

_SOUND, _INFINITE, _NAN = range(3)
_WORDS = {_INFINITE: "infinite", _NAN: "NaN"}


def first_not_finite(target: Target) -> tuple[Step | None, str]:
    """Returns the first step that makes infinities or NaN of finite operands."""
    steps = target.steps
    constants = target.case.bench.lifted_constants(target.point)
    moving, held, _ = target.case.bench.lifted_arguments(target.point)
    arguments = [*moving, *held, *map(widen, target.seed)]

    def states(arguments: Any, consts: Any) -> Any:
        hoisted = dict(zip(constants, consts, strict=True))
        _, env = steps.run(Evaluator(hoisted=hoisted), arguments)
        return {slot: _state(value) for slot, value in env.items()}

    program = execution.lifted(
        states, [arguments, list(constants.values())], mesh=target.claim.mesh
    )
    found = program(arguments, list(constants.values()))
    known = {slot: int(np.asarray(state)) for slot, state in found.items()}
    feeding = steps.feeding([steps.outputs[i] for i in target.wrong])
    for i in sorted(feeding):
        step = steps.steps[i]
        state = max((known[slot] for slot in step.results), default=_SOUND)
        operands = [known[a] for a in step.operands if not isinstance(a, Constant)]
        if state and step.place and not any(operands):
            return step, f"the first result that is {_WORDS[state]} is made here"
    return None, ""


def _state(value: Any) -> Any:
    if not is_inexact(getattr(value, "dtype", None)):
        return jnp.array(_SOUND)
    infinite = jnp.isinf(value).any() * _INFINITE
    return jnp.maximum(jnp.isnan(value).any() * _NAN, infinite)
