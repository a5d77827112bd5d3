"""What could be changed in one step of a program: the slips that authors make.

An edit gives a step's result another value, made of what the step is given. It names
no cause by itself: it is tried, and counts only where it closes the gap at more points
than one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gradtest._src import execution
from gradtest._src.lifting import Evaluator
from gradtest._src.localise.scene import Scene
from gradtest._src.localise.steps import Atom, Constant, Slot, Step

Array = np.ndarray
# The result that the step of a number has in a scene; None where it has none there.
NewResult = Callable[[Scene, int], Array | None]


@dataclasses.dataclass(frozen=True)
class Edit:
    """Another value of one step's result.

    Attributes:
      number: The step's number.
      says: What the edit does, as a clause about the line.
      weight: How often authors slip so, beside other edits.
      value: The result that the step then has.
      is_general: Whether it can be made in every step of the same expression.
      factor: What it multiplies the result by, if that is all it does.
      borrows: The operand that it replaces, and the value that it takes for it.
    """

    number: int
    says: str
    weight: float
    value: NewResult
    is_general: bool = True
    factor: float | None = None
    borrows: tuple[Atom, Slot] | None = None


def plain_edits(scene: Scene, number: int) -> Iterator[Edit]:
    """Yields the edits of one step that need no other value of the program."""
    step = scene.step(number)
    for propose in _PROPOSALS:
        for says, weight, value in propose(scene, step):
            yield Edit(number, says, weight, value)


def times(number: int, factor: float, weight: float) -> Edit:
    """Makes the edit that multiplies a step's result by a number."""
    value = _of(lambda operands, result: result * factor)
    return Edit(number, f"times {factor:.6g}", weight, value, factor=factor)


# What an edit says, how usual it is, and the result that it gives.
_Proposal = tuple[str, float, NewResult]


def _of(function: Callable[[list[Array], Array], Array]) -> NewResult:
    """Returns a function of a step's operands and its result as one of the scene."""

    def value(scene: Scene, number: int) -> Array:
        step = scene.step(number)
        return function(scene.operands(step), scene.result(step))

    return value


def _with_operand(place: int, change: Callable[[Array], Any]) -> NewResult:
    """Returns the step's result with one of its operands changed."""

    def value(scene: Scene, number: int) -> Array:
        step = scene.step(number)
        return evaluated(scene, step, place, change(scene.read(step.operands[place])))

    return value


# --- signs, terms and factors ----------------------------------------------------


def _signs(scene: Scene, step: Step) -> Iterator[_Proposal]:
    weight = {"neg": 1.0, "sub": 0.6}.get(step.name, 0.5)
    yield "with the other sign", weight, _of(lambda operands, result: -result)
    yield "left out (zero)", 0.3, _of(lambda operands, result: np.zeros_like(result))
    if np.iscomplexobj(scene.result(step)):
        weight = 0.9 if step.name == "conj" else 0.7
        yield "conjugated", weight, _of(lambda operands, result: np.conj(result))


_PARTS = {"add": "term", "add_any": "term", "sub": "term", "mul": "factor",
          "div": "factor", "max": "bound", "min": "bound",
          "select_n": "mask"}  # fmt: skip


def _parts(scene: Scene, step: Step) -> Iterator[_Proposal]:
    """Without one of its terms, factors, bounds or masks."""
    what = _PARTS.get(step.name)
    if what is None:
        return
    first = 1 if step.name == "select_n" else 0
    shape = scene.result(step).shape
    for i in range(first, len(step.operands)):
        if scene.read(step.operands[i]).shape != shape:
            continue
        others = [j for j in range(first, len(step.operands)) if j != i]
        is_written = any(isinstance(step.operands[j], Constant) for j in others)
        weight = 0.8 if is_written else 0.7
        sign = -1 if step.name == "sub" and i == 1 else 1
        alone = functools.partial(_alone, i, sign)
        yield f"without the other {what}", weight, _of(alone)


def _alone(place: int, sign: int, operands: list[Array], result: Array) -> Array:
    return sign * operands[place]


# --- other operators and numbers -------------------------------------------------

_EXCHANGED = "its operands exchanged"
_OTHER_OPERATORS: dict[str, dict[str, Callable[..., Array]]] = {
    "add": {"- in place of +": np.subtract, "* in place of +": np.multiply},
    "add_any": {"- in place of +": np.subtract},
    "sub": {"+ in place of -": np.add, _EXCHANGED: lambda a, b: b - a},
    "mul": {"/ in place of *": np.divide, "+ in place of *": np.add},
    "div": {"* in place of /": np.multiply, _EXCHANGED: lambda a, b: b / a},
    "max": {"min in place of max": np.minimum},
    "min": {"max in place of min": np.maximum},
    "sin": {"cos in place of sin": np.cos},
    "cos": {"sin in place of cos": np.sin},
    "sinh": {"cosh in place of sinh": np.cosh},
    "cosh": {"sinh in place of cosh": np.sinh},
    "exp": {"exp(-x) in place of exp(x)": lambda x: np.exp(-x)},
    "sqrt": {
        "no square root": lambda x: x,
        "1/sqrt in place of sqrt": lambda x: x**-0.5,
    },
    "rsqrt": {
        "sqrt in place of 1/sqrt": np.sqrt,
        "1/x in place of 1/sqrt": lambda x: 1 / x,
    },
    "log": {"log1p in place of log": np.log1p},
    "abs": {"no abs": lambda x: x},
    "tanh": {"the logistic function in place of tanh": lambda x: 1 / (1 + np.exp(-x))},
    "logistic": {"tanh in place of the logistic function": np.tanh},
}


def _operators(scene: Scene, step: Step) -> Iterator[_Proposal]:
    for says, function in _OTHER_OPERATORS.get(step.name, {}).items():
        weight = 0.5 if says == _EXCHANGED else 0.8
        yield f"with {says}", weight, _of(functools.partial(_applied, function))
    if step.name == "select_n" and len(step.operands) == 3:
        yield "with its mask turned round", 0.8, _of(_masked_otherwise)
        for branch in (1, 2):
            zero = functools.partial(_without_branch, branch)
            yield "with zero where that branch is taken", 0.6, _of(zero)


def _applied(function: Any, operands: list[Array], result: Array) -> Array:
    return function(*operands)


def _masked_otherwise(operands: list[Array], result: Array) -> Array:
    return np.where(operands[0].astype(bool), operands[1], operands[2])


def _without_branch(branch: int, operands: list[Array], result: Array) -> Array:
    return np.where(operands[0].astype(bool) == (branch == 2), 0, result)


def _numbers(scene: Scene, step: Step) -> Iterator[_Proposal]:
    """With another number in place of one that is written there."""
    for place in step.literals:
        atom = step.operands[place]
        assert isinstance(atom, Constant)
        if atom.value.size != 1 or atom.value.dtype.kind not in "fiu":
            continue
        number = float(atom.value)
        for other in _meant_by(number):
            says = f"with {other:g} in place of {number:g}"
            # A count is seldom meant to be negative.
            weight = 0.45 if other == -number and number > 1 else 1.0
            replaced = functools.partial(_replaced, other)
            yield says, weight, _with_operand(place, replaced)
    exponent = step.params.get("y") if step.name == "integer_pow" else None
    if exponent is not None:
        for other in (exponent - 1, exponent + 1, -exponent, 2 * exponent):
            says = f"with the exponent {other} in place of {exponent}"
            yield says, 0.9, _of(functools.partial(_raised, float(other)))


def _replaced(number: float, there: Array) -> float:
    return number


def _raised(exponent: float, operands: list[Array], result: Array) -> Array:
    return operands[0] ** exponent


def _meant_by(number: float) -> list[float]:
    """Returns the numbers that an author may have meant by another."""
    meant = [number + 1, number - 1, -number, 1 - number]
    meant += [number * k for k in (2, 3, 4, 10)] + [number / k for k in (2, 3, 4, 10)]
    if number:
        meant += [1 / number, number**2]
    if number > 0:
        meant.append(number**0.5)
    meant += [0.0, 1.0, 2.0, 0.5, -1.0]
    return [other for other in dict.fromkeys(meant) if other != number]


# --- axes and reductions ---------------------------------------------------------


def _layouts(scene: Scene, step: Step) -> Iterator[_Proposal]:
    """With axes exchanged or turned round."""
    result = scene.result(step)
    if _is_square(result):
        weight = 0.9 if step.name == "transpose" else 0.6
        yield "transposed", weight, _of(lambda operands, result: _turned(result))
    for axis in range(min(result.ndim, 4)):
        if result.shape[axis] > 1:
            flipped = functools.partial(_flipped, axis)
            weight = 0.9 if step.name == "rev" else 0.4
            yield f"turned round along axis {axis}", weight, _of(flipped)
    if step.name == "cumsum":
        yield "summed from the other end", 1.0, _summed_from_the_other_end
    if step.name == "scatter":
        yield "adding where it overwrites", 1.0, _added
    first = scene.read(step.operands[0]) if step.operands else result
    if step.name in ("rev", "transpose") and first.shape == result.shape:
        yield f"without `{step.name}`", 0.9, _of(functools.partial(_alone, 0, 1))
    if step.name in ("dot_general", "mul", "div"):
        for place in (0, 1):
            if _is_square(scene.read(step.operands[place])):
                says = f"with its operand {place} transposed"
                yield says, 0.9, _with_operand(place, _turned)


def _is_square(array: Array) -> bool:
    return array.ndim >= 2 and array.shape[-1] == array.shape[-2] > 1


def _turned(array: Array) -> Array:
    return np.swapaxes(array, -1, -2)


def _flipped(axis: int, operands: list[Array], result: Array) -> Array:
    return np.flip(result, axis)


def _summed_from_the_other_end(scene: Scene, number: int) -> Array:
    step = scene.step(number)
    (operand,), axis = scene.operands(step), step.params["axis"]
    if step.params.get("reverse"):
        return np.cumsum(operand, axis)
    return np.flip(np.cumsum(np.flip(operand, axis), axis), axis)


def _added(scene: Scene, number: int) -> Array:
    step = scene.step(number)
    operand, indices, updates = scene.operands(step)[:3]
    with execution.float64():
        added = jax.lax.scatter_add(
            operand,
            indices,
            updates,
            dimension_numbers=step.params["dimension_numbers"],
            mode=step.params["mode"],
        )
        return np.asarray(added)


_REDUCTIONS = {"sum": np.sum, "mean": np.mean, "max": np.max}


def _reductions(scene: Scene, step: Step) -> Iterator[_Proposal]:
    """With a sum where a mean, a maximum or one slice is, and the other way round."""
    if not step.operands:
        return
    operand, result = scene.read(step.operands[0]), scene.result(step)
    if operand.size == result.size or not result.size:
        return
    if step.name.startswith("reduce_") and "axes" in step.params:
        axes = tuple(step.params["axes"])
        for says, reduce in _REDUCTIONS.items():
            if step.name != f"reduce_{says}":
                value = functools.partial(_reduced, reduce, axes, False)
                yield f"with a {says} in its place", 0.8, _of(value)
    if step.name in ("slice", "dynamic_slice"):
        pairs = list(zip(operand.shape, result.shape, strict=True))
        axes = tuple(i for i, (n, m) in enumerate(pairs) if m == 1 < n)
        if axes and all(n == m or i in axes for i, (n, m) in enumerate(pairs)):
            over = ", ".join(map(str, axes))
            for says in ("sum", "mean"):
                value = functools.partial(_reduced, _REDUCTIONS[says], axes, True)
                text = f"with the {says} over axis {over} in place of one slice"
                yield text, 1.0, _of(value)


def _reduced(
    reduce: Any, axes: Any, keepdims: bool, operands: list[Array], result: Array
) -> Array:
    return reduce(operands[0], axis=axes, keepdims=keepdims)


_PROPOSALS = (_signs, _parts, _operators, _numbers, _layouts, _reductions)

# By NumPy, where a step must be evaluated many times.
_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": np.divide, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "exp": np.exp, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sign": np.sign,
    "square": np.square, "sqrt": np.sqrt, "log": np.log, "pow": np.power,
    "abs": np.abs,
}  # fmt: skip


def evaluated(scene: Scene, step: Step, place: int, value: Any) -> Array:
    """Returns a step's first result with another value for one of its operands."""
    operands = scene.operands(step)
    there = operands[place]
    operands[place] = np.broadcast_to(np.asarray(value, there.dtype), there.shape)
    function = _ELEMENTWISE.get(step.name)
    if function is not None and operands[0].dtype.kind in "fc":
        return np.asarray(function(*operands))
    if step.eqn is None:
        raise TypeError("it is no equation of the program")
    with execution.float64():
        return np.asarray(Evaluator().apply(step.eqn, operands)[0])
