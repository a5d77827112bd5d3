"""Programs and their equations: what they hold, and how they are bound again."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gradtest._src.devices import homes
from gradtest._src.jaxprs import kernels
from gradtest._src.jaxprs.holders import Eqn, Jaxpr, read_scan, read_while

LINEAR_CALL = "linear_call"
# From jax 0.11 on: a primitive that expands itself, and has rules of its own.
HIGH_PRIMITIVE = "call_hi_primitive"
CUSTOM_RULES = frozenset(
    {"custom_jvp_call", "custom_vjp_call", LINEAR_CALL, HIGH_PRIMITIVE}
)
CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint"}
    | {"eval_jaxpr", "custom_vmap_call"}
)
# They leave JAX: what they compute is fixed, in the dtypes that they were given.
CALLBACKS = frozenset({"pure_callback", "io_callback"})
# The same, compiled for one kind of device: foreign functions, and cuDNN's.
COMPILED = frozenset(
    {
        "ffi_call",
        "custom_call",
        "scaled_matmul_wrapper",
        *(
            f"dot_product_attention_{kind}{way}_wrapper"
            for kind in ("", "fp8_")
            for way in ("fwd", "bwd")
        ),
    }
)
# Their derivative is that of the distribution, by design, not of the sampler's steps.
SAMPLERS = frozenset({"random_gamma"})
WITH_SCALAR_PROGRAM = frozenset(
    {"scatter", "reduce", "reduce_window", "select_and_scatter"}
    | {
        f"scatter{sep}{op}"
        for sep in "-_"
        for op in ("add", "sub", "mul", "min", "max")
    }
)
_HALF = ("bfloat16", "float16")
# A forward-mode trace leaves this where a `custom_vjp` has no forward rule.
NO_FORWARD_RULE = "custom_lin"
STOP_GRADIENT = "stop_gradient"
LINEAR_SOLVE = "custom_linear_solve"


@dataclasses.dataclass(frozen=True)
class Body:
    """A program opened up: what binds its inputs, its equations and its results."""

    constvars: Sequence[Any]
    consts: Sequence[Any]
    invars: Sequence[Any]
    eqns: Sequence[Eqn]
    outvars: Sequence[Any]


def open_body(jaxpr: Jaxpr) -> Body:
    """Opens a closed or open jaxpr of any supported version of JAX."""
    consts = list(getattr(jaxpr, "consts", ()))
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    constvars = list(inner.constvars)
    # Constants without a value are handed over as the first arguments.
    extra, constvars = constvars[len(consts) :], constvars[: len(consts)]
    return Body(
        constvars, consts, extra + list(inner.invars), inner.eqns, inner.outvars
    )


def is_program(value: object) -> bool:
    """Whether a parameter of an equation is itself a program."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def has_side_effects(eqn: Eqn) -> bool:
    """Whether an equation does more than compute; to read an axis name is no effect."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def programs_in(value: object) -> Iterator[Jaxpr]:
    """Yields the programs inside one parameter: alone, in tuples, lists, dicts."""
    if is_program(value):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from programs_in(item)
    elif isinstance(value, dict):
        yield from programs_in(list(value.values()))


def subprograms(eqn: Eqn) -> Iterator[Jaxpr]:
    """Yields every program in the parameters of an equation.

    Those of a Pallas kernel are its pure form, where it has one.
    """
    if eqn.primitive.name == HIGH_PRIMITIVE:
        yield rule_free_program(eqn)
    if eqn.primitive.name == kernels.RUN_SCOPED:
        return  # a kernel's pure form comes with the programs of these
    if eqn.primitive.name == kernels.PALLAS_CALL:
        kernel = kernels.read_pallas_call(eqn)
        if kernel is not None:
            yield kernel.program
            yield from (scoped.program for scoped in kernel.scoped.values())
            return
    for value in eqn.params.values():
        yield from programs_in(value)


def entered(eqn: Eqn) -> list[Jaxpr]:
    """Returns the programs of a call, loop, branch or region, as it runs them.

    Those of a `while` are its condition and its body. Other primitives that hold
    programs (reductions, solvers, kernels) have none here.
    """
    name = eqn.primitive.name
    if name in CUSTOM_RULES:
        return [rule_free_program(eqn)]
    if name == "while":
        loop = read_while(eqn)
        return [loop.cond, loop.body]
    if name == "cond":
        return list(eqn.params["branches"])
    if name in CALLS or name in ("scan", "shard_map"):
        return list(subprograms(eqn))
    return []


def same_inside(eqn: Eqn, program: int) -> list[Any]:
    """Returns, for each input of an entered program, the operand that it equals.

    None where it is another value: a carry, a slice, a device's part.
    """
    name, count = eqn.primitive.name, len(entered(eqn)[program].in_avals)
    operands: list[Any] = list(eqn.invars)
    if name == "scan":
        operands = operands[: read_scan(eqn).num_consts]
    elif name == "while":
        first = read_while(eqn).cond_nconsts
        last = first + read_while(eqn).body_nconsts
        operands = operands[:first] if program == 0 else operands[first:last]
    elif name == "cond":
        operands = operands[1:]
    elif name == "shard_map":
        operands = []
    return operands + [None] * (count - len(operands))


def fits_together(jaxpr: Jaxpr) -> bool:
    """Whether every program that is entered takes what it is handed.

    Where a function was traced in the other mode before, `enable_x64` or not, JAX may
    put what it remembers of that trace into a new one.
    """
    return all(
        operand is None or _shape_and_dtype(operand.aval) == _shape_and_dtype(inside)
        for eqn in walk(jaxpr)
        for k, program in enumerate(entered(eqn))
        for operand, inside in zip(same_inside(eqn, k), program.in_avals, strict=True)
        if hasattr(inside, "shape") and hasattr(inside, "dtype")
    )


def equation_at(jaxpr: Jaxpr, place: Sequence[int]) -> Eqn:
    """Returns the equation at a place: equation, sub-program, equation, and so on."""
    eqn = open_body(jaxpr).eqns[place[0]]
    return equation_at(entered(eqn)[place[1]], place[2:]) if place[1:] else eqn


def walk(jaxpr: Jaxpr) -> Iterator[Eqn]:
    """Yields every equation of a program, those of its sub-programs included."""
    for eqn in open_body(jaxpr).eqns:
        yield eqn
        for inner in subprograms(eqn):
            yield from walk(inner)


def primitives(jaxpr: Jaxpr) -> frozenset[str]:
    """Returns the names of all primitives that a program uses, at any depth."""
    return frozenset(eqn.primitive.name for eqn in walk(jaxpr))


def is_literal(atom: object) -> bool:
    """Whether an operand is a literal number rather than a variable."""
    return isinstance(atom, core.Literal)


def half_literals(jaxpr: Jaxpr) -> list[Any]:
    """Returns the half-precision literals whose rounding may matter, each once.

    A literal of at most three significant bits (1, 2, 0.5, 3, ...) was most likely
    written so: it is exact in every dtype, and left out.
    """
    found: dict[int, Any] = {}
    for eqn in walk(jaxpr):
        for atom in eqn.invars:
            dtype = getattr(atom.aval, "dtype", None)
            if isinstance(atom, core.Literal) and str(dtype) in _HALF:
                mantissa, _ = math.frexp(float(np.asarray(atom.val)))
                if math.isfinite(mantissa) and mantissa * 8 % 1:
                    found[id(atom)] = atom
    return list(found.values())


def narrows(jaxpr: Jaxpr) -> bool:
    """Whether a program rounds any floating value to less than float64."""
    for eqn in walk(jaxpr):
        if eqn.params.get("mantissa_bits", 52) < 52:
            return True
        for var in eqn.outvars:
            dtype = getattr(var.aval, "dtype", None)
            if str(dtype) in ("float32", "complex64", *_HALF):
                return True
    return False


def computes_in_half(jaxpr: Jaxpr) -> bool:
    """Whether a program holds any floating value in 16 bits or fewer."""
    return any(
        str(getattr(var.aval, "dtype", None)) in _HALF
        for eqn in walk(jaxpr)
        for var in eqn.outvars
    )


def has_loop_on_floats(jaxpr: Jaxpr) -> bool:
    """Whether a `while` loop goes on for as long as floating values say.

    So do solvers that stop at a tolerance; a loop that counts does not.
    """
    return any(
        is_floating(atom)
        for eqn in walk(jaxpr)
        if eqn.primitive.name == "while"
        for inner in walk(read_while(eqn).cond)
        for atom in inner.invars
    )


def is_floating(atom: Any) -> bool:
    """Whether an operand is an array of floating numbers."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and bool(jax.numpy.issubdtype(dtype, np.inexact))


def nested_consts(jaxpr: Jaxpr) -> list[Any]:
    """Returns the array constants at any depth, each once, in order of appearance."""
    found: dict[int, Any] = {}

    def visit(program: Jaxpr) -> None:
        body = open_body(program)
        for const in body.consts:
            found.setdefault(id(const), const)
        for eqn in body.eqns:
            for inner in subprograms(eqn):
                visit(inner)

    visit(jaxpr)
    return list(found.values())


def stray_values(jaxpr: Jaxpr, known: Container[int] = ()) -> list[Any]:
    """Returns the values of other traces that a program has as constants.

    Args:
      jaxpr: The program.
      known: Identities of the values that are known where it runs.
    """
    return [
        const
        for const in nested_consts(jaxpr)
        if isinstance(const, jax.core.Tracer) and id(const) not in known
    ]


def mesh_devices(jaxpr: Jaxpr) -> tuple[Any, ...]:
    """Returns the devices of the first region over a mesh; none where there is none."""
    for eqn in walk(jaxpr):
        mesh = eqn.params.get("mesh")
        if isinstance(mesh, jax.sharding.Mesh):
            return tuple(mesh.devices.flat)
    return ()


def bind(eqn: Eqn, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Binds the primitive of an equation, in the equation's own context.

    In a lifted program meshes and shardings are laid over the devices of its home.
    """
    params = {name: homes.moved(value) for name, value in params.items()}
    bind_params = eqn.primitive.get_bind_params(params)
    mesh = eqn.ctx.cur_abstract_mesh
    with eqn.ctx.manager, jax.sharding.use_abstract_mesh(homes.moved(mesh)):
        results = eqn.primitive.bind(*operands, **bind_params)
    return list(results) if eqn.primitive.multiple_results else [results]


def rule_free_program(eqn: Eqn) -> Jaxpr:
    """Returns the primal program of a custom-rule call."""
    if eqn.primitive.name == HIGH_PRIMITIVE:
        return _expansion(eqn.params["_prim"])
    return eqn.params["callee" if eqn.primitive.name == LINEAR_CALL else "call_jaxpr"]


def _expansion(primitive: Any) -> Jaxpr:
    """Traces what a high-level primitive stands for; see `expand_all`."""
    types = tuple((aval.shape, aval.dtype) for aval in primitive.in_avals_flat)
    is_wide = any(dtype in _WIDE for _, dtype in types)
    own_mode: bool = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return _expanded(primitive, types, is_wide or own_mode)


# They exist under `enable_x64` alone.
_WIDE = tuple(map(np.dtype, ("float64", "complex128", "int64", "uint64")))


@functools.lru_cache(maxsize=1024)
def _expanded(primitive: Any, types: tuple[Any, ...], x64: bool) -> Jaxpr:
    def expand(*flat: Any) -> list[Any]:
        results = primitive.expand(*primitive.in_tree.unflatten(flat))
        return jax.tree_util.tree_leaves(results)

    with jax.enable_x64(x64):
        return jax.make_jaxpr(expand)(
            *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types)
        )


def expand_all(jaxpr: Jaxpr) -> Jaxpr:
    """Expands every high-level primitive of a program, and returns the program.

    To expand is to run Python again, so it is done under the settings of the trace
    itself; from then on the expansions are remembered.
    """
    for _ in walk(jaxpr):
        pass
    return jaxpr


def operand_types(eqn: Eqn) -> list[Any]:
    """Returns shapes and dtypes of an equation's operands."""
    return [_shape_and_dtype(atom.aval) for atom in eqn.invars]


def result_types(eqn: Eqn) -> list[Any]:
    """Returns shapes and dtypes of an equation's results."""
    return [_shape_and_dtype(var.aval) for var in eqn.outvars]


def _shape_and_dtype(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def vma(value: Any) -> frozenset[Any]:
    """Returns the mesh axes over which a value inside of a `shard_map` varies."""
    aval = value.aval if hasattr(value, "aval") else jax.typeof(value)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()))
