"""Evaluates a program with every floating value widened to float64.

Lifting binds primitives from a jaxpr and never runs the user's Python again. Custom
rules are entered through their primal program, so what comes out is rule-free: to
differentiate it is to differentiate the mathematics.

A value's lifted dtype depends on its dtype in the program alone, so the bodies of
loops keep their types. What has no float64 form runs in its own precision and is
remembered by name: see `Evaluator.islands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from gradtest._src import jaxprs
from gradtest._src.devices import spanning
from gradtest._src.jaxprs import Eqn, Jaxpr

Handler = Callable[["Evaluator", Eqn, list[Any]], Sequence[Any]]
# The operands, or results, at each point that is evaluated: see `points_of`.
Points = list[list[Any]]


def lifted_dtype(dtype: Any) -> Any:
    """Returns float64 for a floating dtype, complex128 for a complex one."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    return dtype


def is_inexact(dtype: Any) -> bool:
    """Whether values of this dtype can be differentiated."""
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def as_dtype(value: Any, dtype: Any) -> Any:
    """Casts a floating or complex value; leaves everything else alone."""
    if not hasattr(value, "dtype") or value.dtype == dtype or not is_inexact(dtype):
        return value
    return lax.convert_element_type(value, dtype)


def widen(value: Any) -> Any:
    """Returns a value as a lifted program takes it: floats as float64 on the host."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        value = np.asarray(value)
        dtype = dtypes.canonicalize_dtype(value.dtype)
        value = value.astype(dtype)
    if dtypes.issubdtype(dtype, dtypes.extended):
        return value
    array = spanning.whole(value)
    return array.astype(lifted_dtype(array.dtype), copy=False)


class Evaluator:
    """Evaluates programs equation by equation, lifted or as they are.

    Attributes:
      wide: Whether floating values are widened to float64.
      stops: What happens to values under `stop_gradient`; None stops their
        derivatives and nothing else. See `Recorder` and `Replayer`.
      overrun: How many steps each `while` loop goes on after it has ended.
      overruns_scans: Whether scans without inputs or outputs step by step, as of
        `fori_loop`, go on as well.
      islands: Names of the primitives that ran in their own precision.
      place: Inside a Pallas kernel, where in the grid it runs; see `grid.Place`.
      declared: What stands in for custom rules that differ on purpose, by the `id` of
        their call; see `stand_ins.StandIn`.
      jitter: Moves every rounded result by a unit in the last place; None leaves them.
      keeps: Says which equations run as the program has them, their rules included.
      residual: Under a `solver_audit`, the largest relative residual of the linear
        solves met, float64[4] by `solvers.SolveKind`; None otherwise.
    """

    def __init__(
        self,
        *,
        wide: bool = True,
        hoisted: dict[int, Any] | None = None,
        stops: Recorder | Replayer | None = None,
        solver_only: frozenset[int] = frozenset(),
        solver_audit: Callable[..., Any] | None = None,
        literals: dict[int, Any] | None = None,
        overrun: int = 0,
        overruns_scans: bool = False,
        islands: set[str] | None = None,
        place: Any = None,
        declared: Mapping[int, Any] | None = None,
        jitter: Jitter | None = None,
        keeps: Callable[[Eqn], bool] | None = None,
    ):
        self.wide = wide
        self.hoisted = hoisted or {}
        self.stops = stops
        self.solver_only = solver_only
        self.solver_audit = solver_audit
        self.literals = literals or {}
        self.overrun = overrun
        self.overruns_scans = overruns_scans
        self.islands = set() if islands is None else islands
        self.place = place
        self.declared = declared or {}
        self.jitter = jitter
        self.keeps = keeps
        self.residual: Any = None if solver_audit is None else jnp.zeros(4)

    def fork(self, **changes: Any) -> Evaluator:
        """Returns an evaluator like this one, with its own audit, for a loop's body."""
        settings: dict[str, Any] = {
            "wide": self.wide,
            "hoisted": self.hoisted,
            "stops": self.stops,
            "solver_only": self.solver_only,
            "solver_audit": self.solver_audit,
            "literals": self.literals,
            "overrun": self.overrun,
            "overruns_scans": self.overruns_scans,
            "islands": self.islands,
            "place": self.place,
            "declared": self.declared,
            "jitter": self.jitter,
            "keeps": self.keeps,
        }
        return Evaluator(**(settings | changes))

    def __call__(self, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
        """Returns the results of a program at `args`, which have lifted dtypes."""
        body = jaxprs.open_body(jaxpr)
        env: dict[Any, Any] = {}
        for var, const in zip(body.constvars, body.consts, strict=True):
            env[var] = self.widen(self.hoisted.get(id(const), const), var.aval)
        env.update(zip(body.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return self._literal(atom) if jaxprs.is_literal(atom) else env[atom]

        for eqn in body.eqns:
            results = self.apply(eqn, [read(atom) for atom in eqn.invars])
            for var, result in zip(eqn.outvars, results, strict=True):
                env[var] = self.widen(result, var.aval)
        return [read(atom) for atom in body.outvars]

    def widen(self, value: Any, aval: Any) -> Any:
        """Gives a value the dtype that a variable of this type has here."""
        dtype = getattr(aval, "dtype", None)
        if dtype is None or not is_inexact(dtype):
            return value
        return as_dtype(value, lifted_dtype(dtype) if self.wide else dtype)

    def narrow(self, values: Sequence[Any], atoms: Sequence[Any]) -> list[Any]:
        """Gives operands the dtypes that they have in the program itself."""
        return [
            as_dtype(value, getattr(atom.aval, "dtype", None))
            for value, atom in zip(values, atoms, strict=True)
        ]

    def in_own_precision(self, eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
        """Runs an equation exactly as the program has it, and remembers its name."""
        if self.wide:
            self.islands.add(eqn.primitive.name)
        return jaxprs.bind(eqn, self.narrow(operands, eqn.invars), eqn.params)

    def _literal(self, atom: Any) -> Any:
        if id(atom) in self.literals:
            return self.literals[id(atom)]
        value = np.asarray(atom.val, dtype=atom.aval.dtype)
        if self.wide and is_inexact(value.dtype):
            return value.astype(lifted_dtype(value.dtype))
        return value

    def apply(self, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
        """Returns the results of one equation."""
        if self.keeps is not None and self.keeps(eqn):
            return jaxprs.bind(eqn, self.narrow(operands, eqn.invars), eqn.params)
        handler = HANDLERS.get(eqn.primitive.name)
        if handler is not None:
            return handler(self, eqn, operands)
        if jaxprs.has_side_effects(eqn) or any(True for _ in jaxprs.subprograms(eqn)):
            return self.in_own_precision(eqn, operands)
        if not self.wide:
            return jaxprs.bind(eqn, operands, eqn.params)
        return self._bind_lifted(eqn, operands)

    def _bind_lifted(self, eqn: Eqn, operands: list[Any]) -> Sequence[Any]:
        """Binds a primitive in float64, where it proves to have such a form."""
        try:
            results = jaxprs.bind(eqn, operands, lifted_params(eqn.params))
        except (TypeError, ValueError, NotImplementedError):
            return self.in_own_precision(eqn, operands)
        for var, result in zip(eqn.outvars, results, strict=True):
            wanted = getattr(var.aval, "dtype", None)
            if is_inexact(wanted) and result.dtype != lifted_dtype(wanted):
                return self.in_own_precision(eqn, operands)
        if self.jitter is not None and eqn.primitive.name in _ROUNDED:
            return [self.jitter(result) for result in results]
        return results


class Jitter:
    """Moves results by a unit in the last place, another way for each equation.

    All entries of one result move alike: equal ones stay equal, so that no tie breaks.

    Attributes:
      shifts: Relative amounts, float64[n]: equations take them in turn.
    """

    def __init__(self, shifts: Any):
        self.shifts = shifts
        self._turn = 0

    def __call__(self, value: Any) -> Any:
        """Returns a floating value as another rounding of it might be."""
        if not is_inexact(value.dtype):
            return value
        self._turn += 1
        return value * (1 + self.shifts[self._turn % len(self.shifts)])


# What rounds, beside moving values from place to place.
_ROUNDED = frozenset(
    [
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "rem",
        "pow",
        "integer_pow",
        "square",
        "sqrt",
        "rsqrt",
        "cbrt",
        "exp",
        "exp2",
        "log",
        "log1p",
        "expm1",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "atan2",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "logistic",
        "erf",
        "erfc",
        "erf_inv",
        "lgamma",
        "digamma",
        "polygamma",
        "zeta",
        "igamma",
        "igammac",
        "bessel_i0e",
        "bessel_i1e",
        "regularized_incomplete_beta",
        "reduce_sum",
        "reduce_prod",
        "cumsum",
        "cumprod",
        "cumlogsumexp",
        "dot_general",
        "conv_general_dilated",
        "scatter-add",
    ]
)


def lifted_params(params: dict[str, Any]) -> dict[str, Any]:
    """Returns an equation's parameters with every floating dtype in them widened."""
    return {name: _lifted_param(name, value) for name, value in params.items()}


def _lifted_param(name: str, value: Any) -> Any:
    if name == "weak_type":
        return False
    if name == "accuracy":
        return None
    if name == "precision":
        return _lifted_precision(value)
    if isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return lifted_dtype(np.dtype(value))
    return value


def _lifted_precision(value: Any) -> Any:
    """Drops a dot algorithm that names narrow types; keeps plain precisions."""
    plain = value is None or isinstance(value, lax.Precision | str)
    if plain or (isinstance(value, tuple) and all(map(_is_precision, value))):
        return value
    return None


def _is_precision(value: Any) -> bool:
    return value is None or isinstance(value, lax.Precision)


# --- stopped values ---------------------------------------------------------------


class Recorder:
    """Keeps the stopped values of the base point, in the order they are met."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def keep(self, value: Any) -> None:
        """Appends a value, or the operands of a loop that stops values inside."""
        self.values.append(value)


class Replayer:
    """Hands the base point's stopped values to the evaluation of a moved point."""

    def __init__(self, values: Sequence[Any]):
        self._values: Iterator[Any] = iter(values)

    def take(self) -> Any:
        """Returns what the recorder kept at this place of the program."""
        return next(self._values)


def stops_inside(run: Evaluator, eqn: Eqn) -> bool:
    """Whether a loop or branch stops values that a difference must freeze."""
    return run.stops is not None and any(
        _stops(run, inner)
        for program in jaxprs.subprograms(eqn)
        for inner in jaxprs.walk(program)
    )


def _stops(run: Evaluator, eqn: Eqn) -> bool:
    if id(eqn) in run.declared:
        stand_in = run.declared[id(eqn)]
        return not (stand_in.is_product or stand_in.is_once)
    is_stop = eqn.primitive.name == jaxprs.STOP_GRADIENT
    return is_stop and id(eqn) not in run.solver_only


def evaluate_pair(
    run: Evaluator, jaxpr: Jaxpr, base: Sequence[Any], moved: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Evaluates a program at both points; the moved one takes the base's stops."""
    recorder = Recorder()
    at_base = run.fork(stops=recorder)(jaxpr, base)
    at_moved = run.fork(stops=Replayer(recorder.values))(jaxpr, moved)
    return at_base, at_moved


def points_of(run: Evaluator, eqn: Eqn, operands: list[Any]) -> Points:
    """Returns the operands at each point that has to be evaluated together."""
    if not stops_inside(run, eqn):
        return [operands]
    if isinstance(run.stops, Recorder):
        run.stops.keep(operands)
        return [operands]
    assert run.stops is not None
    return [run.stops.take(), operands]


def at_points(run: Evaluator, program: Jaxpr, points: Points) -> tuple[Points, Any]:
    """Evaluates a body at each point; returns the results and the solver audit."""
    inner = run.fork(stops=None)
    if len(points) == 1:
        return [inner(program, points[0])], inner.residual
    return list(evaluate_pair(inner, program, *points)), inner.residual


# --- the table of primitives that need care ---------------------------------------

HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers a handler for the primitives of these names."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register
