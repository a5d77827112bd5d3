"""Asks the true derivative at other arguments and for other cotangents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import dtypes

from gradtest._src import jaxprs
from gradtest._src.diagnosis.clues import Named, Scene
from gradtest._src.diagnosis.paths import Part, read_parts
from gradtest._src.differences import weighted
from gradtest._src.inputs import Point, Role
from gradtest._src.lifting import widen

if TYPE_CHECKING:
    from gradtest._src.case import Case
    from gradtest._src.program import Program, Values

# Questions about larger derivatives than these, or more of them, cost too much.
_MOST_ENTRIES = 200_000
_MOST_QUESTIONS = 96
# Constants of a program that may be labels, as arguments are.
_MOST_CONSTANTS = 8
_MOST_NUMBERS = 32


class Questions:
    """The rule-free derivative of a case, as a function of everything it is of."""

    def __init__(self, case: Case):
        self._case = case
        self._left = _MOST_QUESTIONS
        self._parts: list[Part] | None = None

    @property
    def point(self) -> Point:
        """Where the derivative was claimed."""
        return self._case.point

    @property
    def seed(self) -> Values:
        """The cotangents, in float64."""
        return [widen(value) for value in self._case.seed]

    def gradient(
        self,
        *,
        moving: Mapping[int, np.ndarray] | None = None,
        held: Mapping[int, np.ndarray] | None = None,
        seed: Values | None = None,
    ) -> Values | None:
        """Returns the true derivative with something put in another's place.

        Args:
          moving: Other values of leaves, by their places among those that move.
          held: Other values of held leaves.
          seed: Other cotangents.
        """
        if self._left <= 0:
            return None
        self._left -= 1
        point = self._case.point
        if moving or held:
            point = Point(
                tuple((moving or {}).get(i, x) for i, x in enumerate(point.moving)),
                tuple((held or {}).get(i, x) for i, x in enumerate(point.held)),
            )
        return self._case.bench.read(point, seed=seed).exact

    def pushed(self, leaf: int, tangent: np.ndarray) -> Values | None:
        """Returns what the function makes of a tangent of one leaf, by differences."""
        if self._left <= 0:
            return None
        self._left -= 1
        slope = self._case.measure({leaf: tangent}, float(np.linalg.norm(tangent)))
        return None if slope.is_kink else slope.outputs

    def is_right_forwards(self) -> bool:
        """Whether the claim's own tangents are what differences show."""
        case = self._case
        if case.readings.slopes is None:
            return False
        pushed = weighted(case.readings.slopes, case.weights)
        slope = case.measure(dict(enumerate(case.tangents)), abs(pushed))
        allowed = case.rtol * abs(slope.value) + 3 * slope.error
        return not slope.is_kink and slope.distance(pushed) <= allowed

    def has_path(self, leaf: int) -> bool:
        """Whether a leaf's claimed gradient is computed from the cotangents at all."""
        case = self._case
        body = jaxprs.open_body(case.claim.jaxpr)
        reached = set(body.invars[len(body.invars) - len(case.seed) :])
        for eqn in body.eqns:
            if any(not jaxprs.is_literal(a) and a in reached for a in eqn.invars):
                reached.update(eqn.outvars)
        result = body.outvars[len(body.outvars) - len(case.leaves) + leaf]
        return not jaxprs.is_literal(result) and result in reached

    def parts(self) -> list[Part]:
        """Returns what flows through each place of the program."""
        if self._parts is None:
            try:
                self._parts = read_parts(self._case)
            except Exception:  # a program that can't be taken apart
                self._parts = []
        return self._parts


def scene_of(case: Case) -> Scene:
    """Returns what is known around the derivative of a case; nothing raises."""
    try:
        return _scene(case)
    except Exception:  # a diagnosis must never hide the failure that it explains
        return Scene()


def _scene(case: Case) -> Scene:
    program = case.program
    leaves = [leaf for leaf in program.inputs.leaves if leaf.role is Role.HELD]
    arguments = _named([leaf.name for leaf in case.leaves], case.point.moving)
    arguments += _named([leaf.name for leaf in leaves], case.point.held)
    constants = _labels(program)
    outputs = _named([out.name for out in program.outputs], case.readings.values)
    cotangents: list[Named] = []
    if case.claim.mode == "rev" and not program.is_scalar:
        cotangents = [
            Named(f"the cotangent of {out.name}", widen(value))
            for out, value in zip(program.outputs, case.seed, strict=True)
        ]
    return Scene(
        names=tuple(leaf.name for leaf in case.leaves),
        arguments=(*arguments, *constants),
        cotangents=tuple(cotangents),
        outputs=tuple(outputs),
        numbers=_numbers(program),
        devices=_devices(case),
        order=program.order,
        questions=Questions(case) if _can_be_asked(case) else None,
    )


def forward_scene(case: Case) -> Scene:
    """Returns what is known around the outputs' tangents of a case."""
    scene = scene_of(case)
    tangents = [
        Named(f"the tangent of {leaf.name}", tangent)
        for leaf, tangent in zip(case.leaves, case.tangents, strict=True)
    ]
    return dataclasses.replace(
        scene,
        names=tuple(f"the tangent of {output.name}" for output in scene.outputs),
        cotangents=tuple(tangents),
        questions=None,
    )


def _devices(case: Case) -> int:
    copies = [each.count for each in case.readings.copies]
    mesh = len(jaxprs.mesh_devices(case.claim.jaxpr))
    return max(case.claim.devices, mesh, *copies, 1)


def _named(names: list[str], values: Any) -> list[Named]:
    found = []
    for name, value in zip(names, values, strict=False):
        array = np.asarray(widen(value)) if _is_plain(value) else None
        if array is not None:
            found.append(Named(name, array))
    return found


def _is_plain(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, bool | int | float | complex)
    return not dtypes.issubdtype(dtype, dtypes.extended) and dtype != dtypes.float0


def _labels(program: Program) -> list[Named]:
    """Returns the integer and bool arrays that a program holds as constants."""
    found = []
    for const in jaxprs.nested_consts(program.jaxpr):
        kind = getattr(getattr(const, "dtype", None), "kind", "")
        if kind in ("b", "i") and 1 < np.size(const) <= _MOST_ENTRIES:
            shape = list(np.shape(const))
            found.append(Named(f"the constant {const.dtype}{shape}", np.asarray(const)))
    return found[:_MOST_CONSTANTS]


def _numbers(program: Program) -> tuple[float, ...]:
    """Returns the sizes of the floating numbers that are written in a program."""
    found: dict[float, None] = {}
    for eqn in jaxprs.walk(program.jaxpr):
        for atom in eqn.invars:
            if jaxprs.is_literal(atom) and jaxprs.is_floating(atom):
                found[abs(complex(getattr(atom, "val", 0)))] = None
    return tuple(number for number in found if 0 < number < np.inf)[:_MOST_NUMBERS]


def _can_be_asked(case: Case) -> bool:
    total = sum(np.size(value) for value in case.point.moving)
    return (
        case.claim.mode == "rev"
        and not case.claim.is_apart
        and not case.claim.devices
        and case.readings.exact is not None
        and total <= _MOST_ENTRIES
    )
