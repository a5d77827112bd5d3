"""Which steps the outputs are affine functions of, all else at rest."""

from __future__ import annotations

import functools
import operator

from gradtest._src.localise.steps import Constant, Slot, Step, Steps

_ALL = tuple(range(64))
# The operands in which a primitive is linear; of several, one at a time.
_LINEAR_IN: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ["add", "add_any", "sub", "neg", "mul", "dot_general", "reduce_sum",
         "conv_general_dilated", "concatenate", "reshape", "transpose", "squeeze",
         "expand_dims", "broadcast_in_dim", "convert_element_type", "reduce_precision",
         "copy", "copy_p", "rev", "cumsum", "conj", "real", "imag", "pvary",
         "reduce_window_sum", "scatter-add", "scatter_add", "sharding_constraint",
         "psum", "complex", "loop_part", "loop_whole"],
        _ALL,
    ),
    **dict.fromkeys(["div", "slice", "dynamic_slice", "gather"], (0,)),
    **dict.fromkeys(["pad", "dynamic_update_slice", "scatter"], (0, 1, 2)),
    "select_n": _ALL[1:],
    "triangular_solve": (1,),
}  # fmt: skip
# Linear in the two together as well, so that both may depend on one value.
_JOINTLY = frozenset(
    ["add", "add_any", "sub", "concatenate", "loop_whole", "select_n", "scatter-add",
     "scatter_add", "dynamic_update_slice", "pad", "scatter", "complex"]
)  # fmt: skip


def affine_steps(steps: Steps) -> set[int]:
    """Returns the steps whose first result the outputs are affine in.

    Every step on a way from it to an output is linear in what comes from it, and takes
    it in one operand alone or sums what it takes.
    """
    feeding = sorted(steps.feeding(steps.outputs))
    below: dict[Slot, int] = {}  # the slots that depend on each, as bits
    for i in reversed(feeding):
        step = steps.steps[i]
        for slot in step.results:
            below.setdefault(slot, 1 << slot)
        for atom in step.operands:
            if not isinstance(atom, Constant):
                below[atom] = below.get(atom, 1 << atom) | _united(step, below)
    found = set()
    for i in feeding:
        step = steps.steps[i]
        depends = below[step.results[0]]
        later = (steps.steps[j] for j in feeding if j > i)
        if all(_is_linear(each, depends) for each in later):
            found.add(i)
    return found


def _united(step: Step, below: dict[Slot, int]) -> int:
    return functools.reduce(operator.or_, (below[slot] for slot in step.results), 0)


def _is_linear(step: Step, depends: int) -> bool:
    """Whether a step is linear in its operands that are among some slots."""
    taken = [
        place
        for place, atom in enumerate(step.operands)
        if not isinstance(atom, Constant) and depends >> atom & 1
    ]
    allowed = _LINEAR_IN.get(step.name, ())
    if not all(place in allowed for place in taken):
        return False
    return len(taken) <= 1 or step.name in _JOINTLY
