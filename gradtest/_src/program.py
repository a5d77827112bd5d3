"""The function under test, traced, and the mathematics it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.devices.replicas import on_replicas
from gradtest._src.execution import SlipError
from gradtest._src.inner import opened
from gradtest._src.inputs import Inputs, Point, Role
from gradtest._src.intentions import Intentions, stand_ins
from gradtest._src.jaxprs import Jaxpr, RuleSource
from gradtest._src.lifting import Evaluator, Recorder, is_inexact
from gradtest._src.stand_ins import StandIn
from gradtest._src.structure import structure_key

PyTree = Any
Values = list[Any]
# Evaluates the mathematics of a function, free of custom rules.
Mathematics = Callable[[Evaluator, Sequence[Any], Sequence[Any]], Values]


@dataclasses.dataclass(frozen=True)
class Output:
    """One differentiable result of the function."""

    name: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function of moving and held leaves, and the mathematics it stands for.

    Attributes:
      call: `call(moving, held)` runs the user's function, custom rules included, and
        returns its differentiable results as a flat list.
      mathematics: The same without any custom rule, evaluated from `jaxpr`.
      jaxpr: The traced function, of the moving leaves followed by the held ones.
      extra: Values that follow the held leaves: the cotangents of lower orders.
      outputs: The differentiable results.
      order: 1 for the function itself, 2 for its gradient.
      result: Everything that the function returns, as shapes and dtypes.
      declared: What stands in for rules that differ on purpose, by their calls' `id`.
      closed_over: Where rules close over traced values: the argument that has such a
        value, by its `id`.
      as_functions: The mathematics with declared products left out, where there are
        any: it is what differences can follow.
      opened: Rules of what the function differentiates itself: `jaxpr` does so without
        them.
      left: Others of these, which `jaxpr` does not do without.
      not_opened: Why it does without none; empty where that was no trouble.
    """

    inputs: Inputs
    call: Callable[[Sequence[Any], Sequence[Any]], Values]
    mathematics: Mathematics
    jaxpr: Jaxpr
    outputs: tuple[Output, ...]
    order: int = 1
    extra: tuple[Any, ...] = ()
    result: PyTree = None
    declared: Mapping[int, StandIn] = dataclasses.field(default_factory=dict)
    as_functions: Mathematics | None = None
    closed_over: Mapping[int, int] = dataclasses.field(default_factory=dict)
    opened: tuple[RuleSource, ...] = ()
    left: tuple[RuleSource, ...] = ()
    not_opened: str = ""

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for programs of the same structure."""
        own = structure_key(self.jaxpr)
        return self.order, len(self.inputs.moving), own, self._declared_key()

    def _declared_key(self) -> Hashable:
        if not self.declared:
            return ()
        return tuple(
            (
                place,
                self.declared[id(eqn)].is_product,
                self.declared[id(eqn)].is_once,
                structure_key(self.declared[id(eqn)].program),
                # Compiled in, so another array is another program.
                tuple(map(id, jaxprs.nested_consts(self.declared[id(eqn)].program))),
            )
            for place, eqn in enumerate(jaxprs.walk(self.jaxpr))
            if id(eqn) in self.declared
        )

    @functools.cached_property
    def has_rules(self) -> bool:
        """Whether a hand-written derivative of any kind is in the program."""
        held = jaxprs.CUSTOM_RULES | {jaxprs.LINEAR_SOLVE}
        is_called = not held.isdisjoint(jaxprs.primitives(self.jaxpr))
        return is_called or bool(self.opened)

    @property
    def is_scalar(self) -> bool:
        """Whether the function returns one real number."""
        (*others, first) = self.outputs
        return not others and first.shape == () and not _is_complex(first.dtype)

    def described_outputs(self) -> str:
        """Names the first results, with dtypes and shapes."""
        return ", ".join(
            f"{out.name}: {np.dtype(out.dtype).name}{list(out.shape)}"
            for out in self.outputs[:4]
        )

    def require_scalar(self, wanted: str, otherwise: str = "") -> None:
        """Raises TypeError where the function does not return one real number.

        Args:
          wanted: What must do so, and for what.
          otherwise: What to do about other functions.
        """
        if not self.is_scalar:
            rest = otherwise and f"; {otherwise}"
            raise TypeError(f"{wanted}, got {self.described_outputs()}{rest}.")

    def require_loss(self, wanted: str, otherwise: str = "") -> None:
        """Raises TypeError where the function returns not just one real number."""
        if not jax.tree_util.all_leaves([self.result]):
            flat, _ = jax.tree_util.tree_flatten_with_path(self.result)
            told = ", ".join(
                f"result{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
                for path, leaf in flat[:4]
            )
            raise TypeError(
                f"{wanted}, got {told}; with auxiliary data beside it say has_aux=True."
            )
        self.require_scalar(wanted, otherwise)

    def closed_over_values(self, point: Point) -> dict[int, Any]:
        """Returns the values that rules close over, by the `id` of their tracers."""
        if not self.closed_over:
            return {}
        arguments = self.inputs.arguments(point.moving, point.held)
        return {tracer: arguments[i] for tracer, i in self.closed_over.items()}

    def held(self, point: Point) -> tuple[Any, ...]:
        """Returns everything that stays as it is at this point."""
        return point.held + self.extra

    def declared_once(self) -> Program:
        """Returns the program with stand-ins for the first derivative alone."""
        declared = {
            key: dataclasses.replace(stand_in, is_once=True)
            for key, stand_in in self.declared.items()
        }
        return dataclasses.replace(
            self,
            mathematics=_evaluating(self.jaxpr, declared),
            declared=declared,
            as_functions=None,
        )

    def declared_outside(self) -> Program | None:
        """Returns the program with stand-ins but where it differentiates itself.

        There a rule's fwd may compute the function itself, and not call the rule. None
        where nothing is declared there.
        """
        inner = {id(eqn) for eqn in jaxprs.walk(self.jaxpr) if jaxprs.is_inner(eqn)}
        declared = {k: each for k, each in self.declared.items() if k not in inner}
        if len(declared) == len(self.declared):
            return None
        return dataclasses.replace(
            self, mathematics=_evaluating(self.jaxpr, declared), declared=declared
        )

    def gradient(self, cotangents: Sequence[Any]) -> Program:
        """Returns the gradient along `cotangents` as a program: one order higher."""
        count = len(self.inputs.of_role(Role.HELD)) + len(self.extra)
        lower_call = self.call

        def call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
            _, pull = jax.vjp(lambda *xs: lower_call(xs, held[:count]), *moving)
            return list(pull(list(held[count:])))

        def gradient_of(lower: Mathematics) -> Mathematics:
            def mathematics(
                run: Evaluator, moving: Sequence[Any], held: Sequence[Any]
            ) -> Values:
                return derivative(lower, run, moving, held[:count], held[count:])[1]

            return mathematics

        outputs = tuple(
            Output(f"gradient of {leaf.name}", leaf.shape, leaf.dtype)
            for leaf in self.inputs.moving
        )
        return dataclasses.replace(
            self,
            call=call,
            mathematics=gradient_of(self.mathematics),
            as_functions=self.as_functions and gradient_of(self.as_functions),
            outputs=outputs,
            order=self.order + 1,
            extra=(*self.extra, *cotangents),
        )


def derivative(
    mathematics: Mathematics,
    run: Evaluator,
    moving: Sequence[Any],
    held: Sequence[Any],
    cotangents: Sequence[Any],
) -> tuple[Values, Values]:
    """Returns the results of a program and its rule-free vector-Jacobian product.

    Stopped values that `run` records leave the differentiated function as auxiliary
    results, so that no tracer outlives its trace.
    """

    def results(*xs: Any) -> tuple[Values, Values]:
        recorder = Recorder() if isinstance(run.stops, Recorder) else run.stops
        values = mathematics(run.fork(stops=recorder), xs, held)
        kept = recorder.values if isinstance(recorder, Recorder) else []
        return values, kept

    values, pull, kept = jax.vjp(results, *moving, has_aux=True)
    if isinstance(run.stops, Recorder):
        for value in kept:
            run.stops.keep(value)
    return values, list(pull(list(cotangents)))


def trace_program(
    fn: Callable[..., Any],
    inputs: Inputs,
    point: Point,
    *,
    has_aux: bool = False,
    role: str = "fn",
    intentions: Intentions | None = None,
    variant: Callable[..., Any] | None = None,
    trusted: Container[str] = (),
) -> Program:
    """Traces `fn` at the types of `point`.

    Args:
      fn: The user's function.
      inputs: Its arguments.
      point: Values of their leaves.
      has_aux: Whether it returns a pair of result and auxiliary data.
      role: The argument of the assertion that it came as, for messages.
      intentions: Custom rules that differ on purpose, and what they claim.
      variant: What binds the named axes that `fn` uses, where it does not.
      trusted: Rules, by their identity, that `fn` may use where it differentiates
        itself; it does without all others.

    Raises:
      TypeError: `fn` returns nothing that can be differentiated.
      Exception: Whatever `fn` itself raises, with a note that it was being traced.
    """
    outputs: list[Output] = []
    results: list[PyTree] = []

    def call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
        returned = fn(*inputs.arguments(moving, held))
        return _differentiable(_without_aux(returned, has_aux, role))

    def first_call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
        returned = fn(*inputs.arguments(moving, held))
        result = _without_aux(returned, has_aux, role)
        outputs[:] = _read_outputs(result, role)
        results.append(jax.tree_util.tree_map(_shape_and_dtype, result))
        return _differentiable(result)

    at = (point.moving, point.held)
    with execution.user_code():
        try:
            found = opened(
                lambda: _traced(first_call, at, variant),
                intentions,
                lambda source: source.identity not in trusted,
            )
        except SlipError:
            raise
        except Exception as error:
            error.add_note(f"gradtest: raised by `{role}` itself, while it was traced.")
            if _is_about_axis(error):
                error.add_note(
                    f"gradtest: `{role}` uses an axis that is bound around it: hand "
                    "over what binds it as `variant`, or the function that is mapped."
                )
            if isinstance(error, jax.errors.ConcretizationTypeError):
                error.add_note(
                    f"gradtest: `{role}` must be one that jax.jit accepts: it can't "
                    "branch on values or use them as shapes."
                )
            raise

    declared: dict[int, StandIn] = {}
    if intentions:
        with execution.user_code():
            declared = stand_ins(found.jaxpr, intentions, found.left)
    functions = {key: each for key, each in declared.items() if not each.is_product}
    return Program(
        inputs,
        call,
        _evaluating(found.jaxpr, declared),
        found.jaxpr,
        tuple(outputs),
        result=results[-1],
        opened=found.rules,
        left=found.left,
        not_opened=found.trouble,
        declared=declared,
        as_functions=(
            _evaluating(found.jaxpr, functions)
            if len(functions) < len(declared)
            else None
        ),
    )


def _traced(call: Callable[..., Values], at: tuple[Any, Any], variant: Any) -> Jaxpr:
    """Traces a function by itself; the axes that it lacks are those of the variant."""
    try:
        return jaxprs.expand_all(jax.make_jaxpr(call)(*at))
    except NameError as error:
        bound = None
        if variant is not None and _is_about_axis(error):
            bound = on_replicas(call, variant, at)
        if bound is None:
            raise
    return jaxprs.expand_all(jax.make_jaxpr(bound)(*at))


def _is_about_axis(error: Exception) -> bool:
    return isinstance(error, NameError) and "axis name" in str(error)


def _evaluating(jaxpr: Jaxpr, declared: Mapping[int, StandIn]) -> Mathematics:
    def mathematics(
        run: Evaluator, moving: Sequence[Any], held: Sequence[Any]
    ) -> Values:
        at = run.fork(declared=declared) if declared else run
        return at(jaxpr, [*moving, *held])

    return mathematics


def _without_aux(returned: Any, has_aux: bool, role: str) -> Any:
    if not has_aux:
        return returned
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise SlipError(
            f"`{role}` must return a pair (result, auxiliary) when has_aux=True, got "
            f"{describe(returned)}."
        )
    return returned[0]


def _differentiable(result: PyTree) -> Values:
    return [
        jnp.asarray(leaf)
        for leaf in jax.tree_util.tree_leaves(result)
        if is_inexact(jnp.result_type(leaf))
    ]


def _shape_and_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _read_outputs(result: PyTree, role: str) -> list[Output]:
    flat, _ = jax.tree_util.tree_flatten_with_path(result)
    outputs = []
    for path, leaf in flat:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise SlipError(
                f"`{role}` must return arrays, got {describe(leaf)} at "
                f"result{jax.tree_util.keystr(path)}."
            ) from None
        if is_inexact(dtype):
            name = "result" + jax.tree_util.keystr(path)
            outputs.append(Output(name, jnp.shape(leaf), dtype))
    if outputs and not any(math.prod(output.shape) for output in outputs):
        raise SlipError(
            f"`{role}` must return at least one entry, got {describe(result)}: there "
            "is nothing to differentiate."
        )
    if not outputs:
        raise SlipError(
            f"`{role}` must return a float or complex array (or a tree with one), got "
            f"{describe(result)}: there is nothing to differentiate."
        )
    return outputs


def describe(value: Any) -> str:
    """Returns a short description of what a user's function returned."""
    if value is None:
        return "None"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))
