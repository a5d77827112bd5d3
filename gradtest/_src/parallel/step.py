"""Data-parallel steps: their gradient, on every device, against the full batch's.

The step is traced as it is called, on the user's own arrays, and evaluated in float64
on as many devices as it runs on; the loss of the full batch is evaluated on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradtest._src import execution, program
from gradtest._src.approximation import explain_gaps
from gradtest._src.case import Case
from gradtest._src.check import Check
from gradtest._src.claiming import Claims
from gradtest._src.claims import output_seed, trace_claim
from gradtest._src.devices import spanning
from gradtest._src.execution import SlipError
from gradtest._src.findings import Finding, Verdict
from gradtest._src.formula import judge_formula
from gradtest._src.inputs import Inputs, Point, Role
from gradtest._src.lifting import is_inexact
from gradtest._src.options import Options
from gradtest._src.parallel.causes import explain_step
from gradtest._src.parallel.layout import Layout, read_layout
from gradtest._src.parallel.parts import Parts
from gradtest._src.primal import solver_findings
from gradtest._src.program import Program, Values, describe
from gradtest._src.rounding import judge_rounding

PyTree = Any
# Of a tree's structure no more characters are shown in a message.
_MOST_TEXT = 200


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What a step returned: gradients like the parameters, and a loss, if any.

    Attributes:
      gradients: The gradients of the leaves that are checked, in their order.
      loss: The loss that came beside them; None where there is none.
      devices: Length of the leading axis of devices that they have; 0 without one.
    """

    gradients: Values
    loss: Any
    devices: int


class ParallelCheck(Check):
    """Checks that a step's gradient is that of the full batch's loss."""

    def __init__(
        self,
        step: Callable[..., Any],
        loss: Callable[..., Any],
        args: tuple[PyTree, PyTree],
        mesh: Any,
        options: Options,
    ):
        if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {mesh!r}.")
        self.step = step
        self.mesh = mesh
        self._losses: set[str] = set()
        self._layout = Layout({})
        options = dataclasses.replace(options, argnums=0)
        super().__init__(loss, args, self._claim, options, names=("params", "batch"))

    def _trace(self, inputs: Inputs, point: Point) -> Program:
        """Traces the loss as one device computes it."""
        traced = program.trace_program(
            self.fn,
            inputs,
            _away_from_devices(point),
            has_aux=self.options.has_aux,
            role="loss",
            intentions=self.options.expect_differs,
        )
        traced.require_scalar(
            "`loss` must return one real number, the loss of the full batch",
            "reduce it over the batch",
        )
        return traced

    def _claim(self, traced: Program, point: Point) -> Claims:
        """Traces the step: a claim about the gradient of the loss."""
        inputs = traced.inputs

        def call(moving: Values, held: Values, seed: Values) -> Values:
            try:
                returned = self.step(*inputs.arguments(moving, held))
            except Exception as error:
                self._complain_of_batch(error, inputs)
                error.add_note("gradtest: raised by `step` itself.")
                raise
            found = read_step(returned, inputs)
            if found.loss is None:
                return found.gradients
            return [_beside(found.loss, found.devices), *found.gradients]

        with execution.on_mesh(self.mesh):
            claim = trace_claim(
                "rev", traced, point, call, output_seed(traced), self.options.variant,
                has_value=None,
            )  # fmt: skip
        self._layout = read_layout(claim.jaxpr, self.mesh, [*point.moving, *point.held])
        return Claims(dataclasses.replace(claim, is_apart=True, mesh=self.mesh), None)

    def _complain_of_batch(self, error: Exception, inputs: Inputs) -> None:
        """Raises where a step fails on a batch that the devices do not divide."""
        rows = [
            f"{leaf.name} has {leaf.shape[0]} rows"
            for leaf in inputs.of_argument(1)
            if leaf.shape
        ]
        if not rows or not _is_about_shapes(error):
            return
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`batch` does not divide over the devices of `step`: {', '.join(rows)}; "
            "pad it and mask the rest, or use fewer devices. The step raised "
            f"{type(error).__name__}: {first}"
        ) from error

    def _judge_case(self, level: int, case: Case, claims: Claims) -> list[Finding]:
        self._compare_loss(case)
        found = explain_gaps(case, judge_formula(case), judge_formula)
        found = judge_rounding(case, found, self.options.rounding_rtol)
        self.surroundings.add(case)  # once more: what each device held is known now
        if any(finding.verdict is Verdict.FAIL for finding in found):
            parts = Parts(
                self.fn, self._programs[0], _gathered(case.point), self.options
            )
            found = explain_step(case, found, self._layout, parts)
        return [*found, *solver_findings(case)]

    def _compare_loss(self, case: Case) -> None:
        """Notes a loss that is not the full batch's: steps may report their part's."""
        readings = case.readings
        if readings.claimed_values is None:
            return
        claimed, true = float(readings.claimed_values[0]), float(readings.values[0])
        if abs(claimed - true) > case.rtol * max(abs(true), abs(claimed)):
            self._losses.add(
                f"the step returns a loss of {claimed:.6g} on one of its devices, the "
                f"full batch's is {true:.6g}: only gradients are checked"
            )

    def _subject(self) -> str:
        return getattr(self.step, "__name__", type(self.step).__name__)

    @property
    def _loss_name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _not_compared(self) -> list[str]:
        if self._layout.size > 1:
            return []
        return [
            f"several devices: the step ran on one of {jax.device_count()} (XLA_FLAGS="
            "--xla_force_host_platform_device_count=8 simulates eight)"
        ]

    def _notes(self) -> list[str]:
        against = f"compared with the gradient of {self._loss_name} of the full batch"
        over = [f"the step runs over {self._layout}"] if self._layout.axes else []
        return [against, *over, *super()._notes(), *sorted(self._losses)]

    def _hint(self, findings: list[Finding]) -> str:
        """Says how the rules of the user's that the loss calls are looked at."""
        if not any(f.verdict is Verdict.FAIL for f in findings):
            return ""
        named = self._users_rules()
        if not named:
            return ""
        return (
            f"{self._loss_name} calls custom rules ({', '.join(named[:3])}): "
            "assert_custom_rules_match tells whether they are right"
        )

    def _replay(self, assertion: str, name: str, findings: list[Finding]) -> str:
        return super()._replay(assertion, f"{name}, {self._loss_name}", findings)


def read_step(returned: Any, inputs: Inputs) -> Stepped:
    """Sorts what a step returned into gradients and loss.

    Raises:
      SlipError: It is neither gradients like the parameters nor a pair of a loss and
        such gradients.
    """
    wanted = inputs.argument_tree(0)
    loss, gradients = None, returned
    if _structure(returned) != wanted and _is_pair(returned):
        loss, gradients = returned
        if isinstance(loss, tuple) and loss:  # a loss with auxiliary data
            loss = loss[0]
    if _structure(gradients) != wanted:
        raise SlipError(
            "`step` must return gradients like `params`, or a pair (loss, gradients): "
            f"wanted a tree like {_shortened(wanted)}, got "
            f"{_shortened(_structure(returned))}."
        )
    leaves = jax.tree_util.tree_leaves(gradients, is_leaf=_is_none)
    pairs = [
        (leaf, value)
        for leaf, value in zip(inputs.of_argument(0), leaves, strict=True)
        if leaf.role is Role.MOVES
    ]
    devices = _device_axis(pairs)
    if loss is not None and (hasattr(loss, "shape") or isinstance(loss, float)):
        shape: tuple[int, ...] = jnp.shape(loss)
        is_number = shape == () or shape == (devices,)
        if not is_number or not is_inexact(jnp.result_type(loss)):
            raise SlipError(
                "`step` must return gradients like `params`, or a pair (loss, "
                "gradients): wanted one real number for the loss, or one for each "
                f"device, got {describe(loss)}."
            )
    else:
        loss = None  # metrics, or whatever else comes beside the gradients
    return Stepped([jnp.asarray(value) for _, value in pairs], loss, devices)


def _device_axis(pairs: Sequence[tuple[Any, Any]]) -> int:
    """Returns the length of the devices' axis that all gradients lead with, or 0."""
    found = set()
    for leaf, value in pairs:
        shape = None if value is None else jnp.shape(value)
        has_axis = shape is not None and len(shape) > len(leaf.shape)
        if shape is None or (shape[1:] if has_axis else shape) != leaf.shape:
            raise SlipError(
                "`step` must return gradients of the shapes of `params`, with or "
                f"without a leading axis of devices: wanted {_listed(*leaf.shape)} or "
                f"{_listed('devices', *leaf.shape)} for {leaf.name}, got "
                f"{'None' if shape is None else _listed(*shape)}. A shard_map with "
                "out_specs=P('axis') has such an axis where it returns gradient[None]."
            )
        if not is_inexact(jnp.result_type(value)):
            raise SlipError(
                f"`step` must return float or complex gradients: wanted {leaf.dtype} "
                f"for {leaf.name}, got {jnp.result_type(value)}."
            )
        found.add(shape[0] if has_axis else 0)
    if len(found) > 1:
        raise SlipError(
            "`step` must return all gradients with one leading axis of devices, or all "
            f"without: got axes of lengths {sorted(found)} (0 for none)."
        )
    return found.pop() if found else 0


def _beside(loss: Any, devices: int) -> Any:
    return jnp.broadcast_to(loss, (devices,)) if devices else jnp.asarray(loss)


def _shortened(structure: Any) -> str:
    text = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _listed(*sizes: Any) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _structure(tree: PyTree) -> Any:
    return jax.tree_util.tree_structure(tree, is_leaf=_is_none)


def _is_none(value: Any) -> bool:
    return value is None


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_about_shapes(error: Exception) -> bool:
    text = str(error)
    return any(words in text for words in ("divisible by", "evenly div"))


def _away_from_devices(point: Point) -> Point:
    """Returns a point to trace at: types in place of what is spread over devices."""

    def typed(value: Any) -> Any:
        if execution.spread_of(value) is None:
            return value
        return jax.ShapeDtypeStruct(value.shape, value.dtype)

    return Point(tuple(map(typed, point.moving)), tuple(map(typed, point.held)))


def _gathered(point: Point) -> Point:
    """Returns a point with what is spread over devices as NumPy arrays."""
    return Point(tuple(map(_gather, point.moving)), tuple(map(_gather, point.held)))


def _gather(value: Any) -> Any:
    is_key = jax.dtypes.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    if is_key or execution.spread_of(value) is None:
        return value
    return spanning.whole(value)
