"""Where custom rules come from: their authors' lines, arguments and batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gradtest._src.jaxprs.lines import folders_of
from gradtest._src.jaxprs.programs import (
    HIGH_PRIMITIVE,
    Eqn,
    bind,
    is_floating,
    operand_types,
    rule_free_program,
)

# Parameters that hold a rule's hand-written functions, by the name of their part.
_RULE_PARTS = {
    "fwd_jaxpr_thunk": "fwd",
    "bwd": "bwd",
    "jvp_jaxpr_fun": "jvp",
    "transpose_thunk": "transpose",
}
_RULE_KINDS = {"custom_vjp_call": "custom_vjp", "custom_jvp_call": "custom_jvp"}
_HI_PARTS = ("vjp_fwd", "vjp_bwd", "vjp_bwd_retval", "jvp", "lin", "transpose")
# What may be compared by how it is written.
_PLAIN = (int, float, complex, str, bytes, type(None), np.generic, np.dtype)
# JAX's wrapper of arguments that a rule takes as they are (`nondiff_argnums`).
_STATIC = "Unhashable"
# So deep is looked for values that rules hold.
_DEPTH = 4
# Wrappers of a library stand between JAX and the rule's author.
_WRAPPERS = ("jax", "flax")


@dataclasses.dataclass(frozen=True)
class RuleSource:
    """What a custom-rule equation knows of the rule it calls.

    Attributes:
      name: Name of the function that has the rule.
      kind: "custom_vjp", "custom_jvp", "linear_call" or "hi_primitive".
      identity: The function as "name at file:line"; equal for calls of one rule.
      where: The function, and its hand-written parts, each as "bwd at file:line".
      operands: A name for each operand that may be differentiated, as far as known.
      num_consts: How many leading operands are values that the function closes over.
      symbolic_zeros: Whether the rule sees which inputs and outputs take no part.
    """

    name: str
    kind: str
    identity: str
    where: tuple[str, ...]
    operands: tuple[str, ...]
    num_consts: int
    symbolic_zeros: bool


def read_rule(eqn: Eqn) -> RuleSource:
    """Reads where the rule of a `CUSTOM_RULES` equation was written."""
    params = eqn.params
    if eqn.primitive.name == HIGH_PRIMITIVE:
        return _read_high_rule(eqn)
    program = rule_free_program(eqn)
    parts = {
        part: params[param] for param, part in _RULE_PARTS.items() if param in params
    }
    primal: Any = getattr(program, "jaxpr", program)
    return source_of_parts(
        _RULE_KINDS.get(eqn.primitive.name, eqn.primitive.name),
        primal.debug_info,
        parts,
        bool(params.get("symbolic_zeros", False)),
        params.get("num_consts", params.get("num_callee_consts", 0)),
    )


def source_of_parts(
    kind: str,
    primal: Any,
    parts: dict[str, Any],
    symbolic_zeros: bool,
    num_consts: int = 0,
) -> RuleSource:
    """Returns where a rule was written.

    Args:
      kind: See `RuleSource`.
      primal: JAX's debugging information of the rule's function.
      parts: The rule's hand-written functions, as JAX wraps them, by name.
      symbolic_zeros: See `RuleSource`.
      num_consts: See `RuleSource`.
    """
    user = _user_code(primal.func_src_info)
    if not user and "fwd" in parts:
        user = _authors(parts["fwd"])[0]
    identity = user or primal.func_src_info or "unnamed rule"
    where = [
        f"{part} at {_place(author)}"
        for part, held in parts.items()
        for author in _authors(held)
    ]
    fwd = getattr(parts.get("fwd"), "debug_info", None)
    names = primal.arg_names or getattr(fwd, "arg_names", None) or ()
    return RuleSource(
        name=identity.rpartition(" at ")[0] or identity,
        kind=kind,
        identity=identity,
        where=(identity, *where),
        operands=tuple(names),
        num_consts=num_consts,
        symbolic_zeros=symbolic_zeros,
    )


def _read_high_rule(eqn: Eqn) -> RuleSource:
    primitive = eqn.params["_prim"]
    kind = type(primitive)
    where = []
    for part in _HI_PARTS:
        function = getattr(kind, part, None)
        source = _source_of(function) if callable(function) else ""
        if _user_code(source):
            where.append(f"{part} at {_place(source)}")
    return RuleSource(
        kind.__name__,
        "hi_primitive",
        f"{kind.__name__} at {_place(where[0]) if where else 'jax'}",
        tuple(where),
        (),
        0,
        False,
    )


def _place(source: str) -> str:
    return source.rpartition(" at ")[2]


def is_library(path: str) -> bool:
    """Whether a file belongs to a library that wraps rules for their authors."""
    return path.startswith(folders_of(_WRAPPERS))


def is_users(source: RuleSource) -> bool:
    """Whether a rule was written by a user, not by a library."""
    return any(map(_user_code, (source.identity, *source.where)))


def _user_code(source: str | None) -> str:
    """Returns a "name at file:line" unless a library's code stands there."""
    return source if source and not is_library(_place(source)) else ""


def _authors(held: Any) -> list[str]:
    """Returns "name at file:line" of each function that a part's author wrote.

    JAX and Flax wrap them several times over; `defjvps` holds one for each argument.
    Where nothing but libraries' functions is found, the rule is the library's own.
    """
    debug = getattr(held, "debug_info", None)
    own = str(getattr(debug, "func_src_info", None) or "unknown")
    if _user_code(own):
        return [own]
    for level in _levels(held):
        functions = filter(inspect.isfunction, level)
        found = [source for f in functions if (source := _user_code(_source_of(f)))]
        if found:
            return list(dict.fromkeys(found))
    return [own]


def _source_of(function: Any) -> str:
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    return f"{function.__name__} at {code.co_filename}:{code.co_firstlineno}"


def source_of(function: Any) -> str:
    """Returns a function, with a rule or without, as "name at file:line"; or ""."""
    return _source_of(function) if callable(function) else ""


def _held_by(item: Any) -> Iterator[Any]:
    """Yields what a function or a wrapped one closes over."""
    if hasattr(item, "transforms") and hasattr(item, "f"):  # a linear_util.WrappedFun
        for _, arguments in item.transforms:
            yield from arguments
        yield item.f
    if inspect.isfunction(item):
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                yield cell.cell_contents
    if isinstance(item, tuple | list):
        yield from item
    if isinstance(item, functools.partial):
        yield item.func


def _levels(start: Any, depth: int = 12) -> Iterator[list[Any]]:
    """Yields what a wrapped function holds, then what that holds, and so on."""
    seen: set[int] = set()
    level = [start]
    for _ in range(depth):
        level = [item for item in level if id(item) not in seen]
        seen.update(map(id, level))
        yield level
        level = [held for item in level for held in _held_by(item)]


def inside(start: Any) -> Iterator[Any]:
    """Yields everything that a wrapped function holds, outermost first."""
    return (item for level in _levels(start) for item in level)


def captured(eqn: Eqn) -> Any:
    """Returns what a rule's hand-written parts hold beside their code, to compare.

    Rules that one factory made stand on the same lines and may do different things:
    what tells them apart is in closures, defaults and arguments that are not arrays.
    """
    parts = [eqn.params[param] for param in _RULE_PARTS if param in eqn.params]
    found = []
    for part in parts:
        for item in inside(part):
            if inspect.isfunction(item) and _user_code(_source_of(item)):
                found.append(_held_values(item, _DEPTH))
            if type(item).__name__ == _STATIC:
                found.append(_told(item.val, _DEPTH))
    return tuple(found)


def _held_values(function: Any, depth: int) -> Any:
    """Returns the values of a function's closure and defaults."""
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            held.append(cell.cell_contents)
    return tuple(_told(value, depth - 1) for value in held)


def _told(value: Any, depth: int) -> Any:
    """Returns a value, or what of it may be compared: arrays are what they are."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, jax.core.Tracer) or depth <= 0:
        return type(value).__name__
    if isinstance(value, jax.Array | np.ndarray):
        return id(value)
    if inspect.isfunction(value):
        return _source_of(value), _held_values(value, depth)
    if isinstance(value, tuple | list):
        return tuple(_told(each, depth - 1) for each in value)
    fields = value.items() if isinstance(value, dict) else _fields(value)
    plain = [(str(k), repr(v)) for k, v in fields if isinstance(v, _PLAIN)]
    return type(value).__name__, tuple(sorted(plain))


def _fields(value: Any) -> Any:
    return getattr(value, "__dict__", {}).items()


def closed_over(eqn: Eqn) -> dict[int, Any]:
    """Returns the traced values that a rule's hand-written parts close over.

    They belong to the trace that made the call: once it has ended, they must be given
    values for the rule to be run again.

    Returns:
      The variable of the program that each one is, by the value's `id`; None where
      that is not known.
    """
    parts = [eqn.params[param] for param in _RULE_PARTS if param in eqn.params]
    return {
        id(item): getattr(item, "val", None)
        for part in parts
        for item in inside(part)
        if isinstance(item, jax.core.Tracer)
    }


@dataclasses.dataclass(frozen=True)
class Batch:
    """The batch axes of one `vmap`; None where there is none.

    Attributes:
      operands: Those of the operands.
      results: Those of the results; empty where JAX does not tell.
    """

    operands: tuple[int | None, ...]
    results: tuple[int | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class RuleLayout:
    """How the flat operands of a rule's call make up its author's arguments.

    Attributes:
      tree: Structure of the tuple of arguments; None where it is not known.
      batches: Each `vmap` around the call, outermost first.
    """

    tree: Any
    batches: tuple[Batch, ...]


def rule_layout(eqn: Eqn) -> RuleLayout:
    """Reads how a custom-rule call was flattened and batched."""
    _differentiate(eqn)
    held = eqn.params.get("bwd", eqn.params.get("jvp_jaxpr_fun"))
    tree, batches = None, []
    for item in inside(held) if held is not None else ():
        if inspect.isfunction(item) and item.__name__ == "new_bwd":
            batches.append(_vjp_batch(item, len(eqn.outvars)))
        stores = getattr(item, "stores", ())
        for k, (transform, arguments) in enumerate(getattr(item, "transforms", ())):
            name = getattr(transform, "__name__", "")
            if name.startswith(("_flatten_bwd", "_flatten_jvp")) and tree is None:
                trees = [a for a in arguments if isinstance(a, _PyTreeDef)]
                tree = trees[0] if trees else None
            elif name == "batch_custom_jvp_subtrace":
                results = getattr(stores[k], "val", ())
                is_known = isinstance(results, tuple | list)
                batches.append(
                    Batch(tuple(arguments[-1]), tuple(results) if is_known else ())
                )
    return RuleLayout(tree, tuple(batches))


def _vjp_batch(new_bwd: Any, count: int) -> Batch:
    """Reads one `vmap` off the function that JAX has made of a batched bwd."""
    cells = inspect.getclosurevars(new_bwd).nonlocals
    results: tuple[int | None, ...] = ()
    with contextlib.suppress(Exception):  # fwd has not been traced, or could not be
        # The axes of residuals, then those of the cotangents: as of the results.
        known = cells["in_dims"]
        axes = known() if callable(known) else known
        results = tuple(axes[len(axes) - count :])
    return Batch(tuple(cells["out_dim_dests"]), results)


def _differentiate(eqn: Eqn) -> None:
    """Traces the derivative of a call: JAX then knows trees and axes of its results."""
    moving = [i for i, atom in enumerate(eqn.invars) if is_floating(atom)]

    def derivative(*operands: Any) -> Any:
        def call(*values: Any) -> Any:
            whole = list(operands)
            for i, value in zip(moving, values, strict=True):
                whole[i] = value
            return bind(eqn, whole, eqn.params)

        return jax.vjp(call, *[operands[i] for i in moving])[0]

    with contextlib.suppress(Exception):  # a malformed rule is told of elsewhere
        jax.eval_shape(derivative, *operand_types(eqn))


def rule_out_tree(eqn: Eqn) -> Any:
    """Returns the tree of a rule's results: one array alone, or as far as known."""
    count = len(eqn.outvars)
    plain = jax.tree_util.tree_structure(0 if count == 1 else (0,) * count)
    trees = eqn.params.get("out_trees")
    if trees is None or count == 1:
        return plain
    _differentiate(eqn)
    with contextlib.suppress(Exception):  # unknown while fwd is not traced
        found = trees()[0]
        return found if found.num_leaves == count else plain
    return plain


_PyTreeDef = type(jax.tree_util.tree_structure(0))
