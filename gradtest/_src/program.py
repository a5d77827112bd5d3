"""The function under test, traced: what it computes and what is claimed of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs, variants
from gradtest._src.inputs import Inputs, Leaf, Point, Role
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.lifting import Evaluator, Recorder, is_inexact

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
    """

    inputs: Inputs
    call: Callable[[Sequence[Any], Sequence[Any]], Values]
    mathematics: Mathematics
    jaxpr: Jaxpr
    outputs: tuple[Output, ...]
    order: int = 1
    extra: tuple[Any, ...] = ()

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for programs of the same structure."""
        return self.order, len(self.inputs.moving), jaxprs.structure_key(self.jaxpr)

    @functools.cached_property
    def has_rules(self) -> bool:
        """Whether a hand-written derivative of any kind is in the program."""
        held = jaxprs.CUSTOM_RULES | {jaxprs.LINEAR_SOLVE}
        return not held.isdisjoint(jaxprs.primitives(self.jaxpr))

    @property
    def is_scalar(self) -> bool:
        """Whether the function returns one real number."""
        (*others, first) = self.outputs
        return not others and first.shape == () and not _is_complex(first.dtype)

    def held(self, point: Point) -> tuple[Any, ...]:
        """Returns everything that stays as it is at this point."""
        return point.held + self.extra

    def gradient(self, cotangents: Sequence[Any]) -> Program:
        """Returns the gradient along `cotangents` as a program: one order higher."""
        count = len(self.inputs.of_role(Role.HELD)) + len(self.extra)

        def call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
            _, pull = jax.vjp(lambda *xs: self.call(xs, held[:count]), *moving)
            return list(pull(list(held[count:])))

        def mathematics(
            run: Evaluator, moving: Sequence[Any], held: Sequence[Any]
        ) -> Values:
            return derivative(
                self.mathematics, run, moving, held[:count], held[count:]
            )[1]

        outputs = tuple(
            Output(f"gradient of {leaf.name}", leaf.shape, leaf.dtype)
            for leaf in self.inputs.moving
        )
        return dataclasses.replace(
            self,
            call=call,
            mathematics=mathematics,
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
) -> Program:
    """Traces `fn` once at the types of `point`.

    Raises:
      TypeError: `fn` returns nothing that can be differentiated.
      Exception: Whatever `fn` itself raises, with a note that it was being traced.
    """
    outputs: list[Output] = []

    def call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
        returned = fn(*inputs.arguments(moving, held))
        return _differentiable(_without_aux(returned, has_aux))

    def first_call(moving: Sequence[Any], held: Sequence[Any]) -> Values:
        returned = fn(*inputs.arguments(moving, held))
        result = _without_aux(returned, has_aux)
        outputs.extend(_read_outputs(result))
        return _differentiable(result)

    with execution.user_code():
        try:
            jaxpr = jax.make_jaxpr(first_call)(point.moving, point.held)
        except BadOutputError:
            raise
        except Exception as error:
            error.add_note("gradtest: raised by `fn` itself, while it was traced.")
            raise

    def mathematics(
        run: Evaluator, moving: Sequence[Any], held: Sequence[Any]
    ) -> Values:
        return run(jaxpr, [*moving, *held])

    return Program(inputs, call, mathematics, jaxpr, tuple(outputs))


class BadOutputError(TypeError):
    """The function under test returns something that has no derivative."""


def _without_aux(returned: Any, has_aux: bool) -> Any:
    if not has_aux:
        return returned
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise BadOutputError(
            "`fn` must return a pair (result, auxiliary) when has_aux=True, got "
            f"{_describe(returned)}."
        )
    return returned[0]


def _differentiable(result: PyTree) -> Values:
    return [
        jnp.asarray(leaf)
        for leaf in jax.tree_util.tree_leaves(result)
        if is_inexact(jnp.result_type(leaf))
    ]


def _read_outputs(result: PyTree) -> list[Output]:
    flat, _ = jax.tree_util.tree_flatten_with_path(result)
    outputs = []
    for path, leaf in flat:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise BadOutputError(
                f"`fn` must return arrays, got {_describe(leaf)} at "
                f"result{jax.tree_util.keystr(path)}."
            ) from None
        if is_inexact(dtype):
            name = "result" + jax.tree_util.keystr(path)
            outputs.append(Output(name, jnp.shape(leaf), dtype))
    if not outputs:
        raise BadOutputError(
            "`fn` must return a float or complex array (or a tree with one), got "
            f"{_describe(result)}: there is nothing to differentiate."
        )
    return outputs


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__}"


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


# --- what is claimed ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """A derivative under test, traced.

    Attributes:
      mode: "rev" where it returns cotangents of the moving leaves, "fwd" where it
        returns tangents of the outputs.
      jaxpr: Takes moving leaves, held values and the seed (cotangents of the outputs,
        or tangents of the moving leaves); returns the function's results, where it
        has them, and then the derivative.
      call: The Python function that was traced, for running under a variant.
      has_value: Whether the results come first.
      variant: Whether `call` runs under a variant of the user's.
      devices: Length of the leading axis of devices that every result has; 0 where
        there is none.
      is_autodiff: Whether JAX made it, not a hand-written function.
    """

    mode: str
    jaxpr: Jaxpr
    call: Callable[..., Values]
    has_value: bool = True
    variant: bool = False
    devices: int = 0
    is_autodiff: bool = False

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for claims of the same structure."""
        return self.mode, self.is_autodiff, jaxprs.structure_key(self.jaxpr)


def reverse_claim(
    program: Program, point: Point, variant: Callable[..., Any] | None = None
) -> Claim:
    """Traces what JAX's reverse mode makes of the program, custom rules expanded.

    Raises:
      Exception: Whatever JAX raises where the program has no reverse mode.
    """

    def call(moving: Values, held: Values, cotangents: Values) -> Values:
        values, pull = jax.vjp(lambda *xs: program.call(xs, held), *moving)
        return [*values, *pull(list(cotangents))]

    return _trace_claim("rev", program, point, call, output_seed(program), variant)


def forward_claim(
    program: Program, point: Point, variant: Callable[..., Any] | None = None
) -> Claim:
    """Traces what JAX's forward mode makes of the program.

    Raises:
      TypeError: The program has no forward mode: a `custom_vjp` is in it.
    """

    def call(moving: Values, held: Values, tangents: Values) -> Values:
        values, slopes = jax.jvp(
            lambda *xs: program.call(xs, held), tuple(moving), tuple(tangents)
        )
        return [*values, *slopes]

    seed = [jnp.asarray(value) for value in point.moving]
    claim = _trace_claim("fwd", program, point, call, seed, variant)
    if jaxprs.NO_FORWARD_RULE in jaxprs.primitives(claim.jaxpr):
        raise TypeError("a custom_vjp function has no forward-mode derivative")
    return claim


def _trace_claim(
    mode: str,
    program: Program,
    point: Point,
    call: Callable[..., Values],
    seed: Values,
    variant: Callable[..., Any] | None,
) -> Claim:
    arguments = [list(point.moving), list(program.held(point)), seed]
    shapes = [item.shape for item in program.outputs]
    shapes += [
        item.shape
        for item in (program.inputs.moving if mode == "rev" else program.outputs)
    ]
    return _claim(mode, call, arguments, shapes, variant, has_value=True)


def _claim(
    mode: str,
    call: Callable[..., Values],
    arguments: list[Any],
    shapes: list[tuple[int, ...]],
    variant: Callable[..., Any] | None,
    *,
    has_value: bool,
) -> Claim:
    """Traces a claim; under a variant, as the variant makes it."""
    run = call if variant is None else variants.apply_variant(variant, call)
    traced = run
    if variant is not None and variants.only_places_arguments(variant):
        traced = call
    with execution.user_code():
        jaxpr = jax.make_jaxpr(traced)(*arguments)
    found = [tuple(aval.shape) for aval in jaxpr.out_avals]
    devices = 0
    if found != shapes:
        devices = found[0][0] if found and found[0] else 0
        if found != [(devices, *shape) for shape in shapes]:
            raise TypeError(
                f"`variant` must return the results of the function it is given, with "
                f"or without an axis of devices: wanted shapes {shapes}, got {found}."
            )
    return Claim(mode, jaxpr, run, has_value, variant is not None, devices, has_value)


def output_seed(program: Program) -> Values:
    """Returns cotangents of the right shapes and dtypes for the outputs: ones."""
    return [np.ones(out.shape, dtype=out.dtype) for out in program.outputs]


def hand_written_claim(
    program: Program,
    point: Point,
    grad_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    variant: Callable[..., Any] | None = None,
) -> Claim:
    """Traces a hand-written gradient of a scalar function.

    Raises:
      TypeError: `grad_fn` is not callable, or returns another tree, shape or dtype
        than the arguments it differentiates.
    """
    inputs = program.inputs
    single = isinstance(argnums, int)

    def call(moving: Values, held: Values, seed: Values) -> Values:
        returned = grad_fn(*inputs.arguments(moving, held))
        trees = (returned,) if single else returned
        if not single and not isinstance(trees, tuple):
            raise TypeError(
                "`grad_fn` must return a tuple with one tree for each of argnums="
                f"{tuple(argnums)}, got {_describe(returned)}."  # type: ignore[arg-type]
            )
        if len(trees) != len(inputs.argnums):
            raise TypeError(
                f"`grad_fn` must return {len(inputs.argnums)} trees, one for each of "
                f"`argnums`, got {len(trees)}."
            )
        found: Values = []
        for position, argument in enumerate(inputs.argnums):
            label = "grad_fn(...)" + ("" if single else f"[{position}]")
            found += _match_gradient(inputs.of_argument(argument), inputs, argument,
                                     trees[position], label)  # fmt: skip
        order = _moving_order(inputs)
        return [found[i] for i in order]

    if not callable(grad_fn):
        raise TypeError(f"`grad_fn` must be callable, got {grad_fn!r}.")
    arguments = [list(point.moving), list(program.held(point)), output_seed(program)]
    shapes = [leaf.shape for leaf in inputs.moving]
    return _claim("rev", call, arguments, shapes, variant, has_value=False)


def _moving_order(inputs: Inputs) -> list[int]:
    """Where each moving leaf stands when arguments are visited in argnums' order."""
    visited = [
        leaf.name
        for argument in inputs.argnums
        for leaf in inputs.of_argument(argument)
        if leaf.role is Role.MOVES
    ]
    return [visited.index(leaf.name) for leaf in inputs.moving]


def _match_gradient(
    leaves: list[Leaf], inputs: Inputs, argument: int, tree: PyTree, label: str
) -> Values:
    """Checks one argument's gradient tree against the argument; returns its leaves."""
    wanted = inputs.argument_tree(argument)
    found = jax.tree_util.tree_structure(tree, is_leaf=lambda node: node is None)
    if found != wanted:
        raise TypeError(
            f"`grad_fn` must return a tree like the argument it differentiates: "
            f"wanted {wanted}, got {found} in {label}."
        )
    values = jax.tree_util.tree_leaves(tree, is_leaf=lambda node: node is None)
    return [
        _match_leaf(leaf, value, label)
        for leaf, value in zip(leaves, values, strict=True)
        if leaf.role is Role.MOVES
    ]


def _match_leaf(leaf: Leaf, value: Any, label: str) -> Any:
    shape, dtype = jnp.shape(value), jnp.result_type(value) if value is not None else ""
    if value is None or shape != leaf.shape:
        raise TypeError(
            f"`grad_fn` must return the shape of the argument: wanted "
            f"{list(leaf.shape)} for {leaf.name}, got "
            f"{'None' if value is None else list(shape)} in {label}."
        )
    if dtype != leaf.dtype:
        raise TypeError(
            f"`grad_fn` must return the dtype of the argument: wanted {leaf.dtype} for "
            f"{leaf.name}, got {dtype} in {label}."
        )
    return jnp.asarray(value)
