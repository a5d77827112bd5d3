"""Pallas kernels: how a call is cut into blocks, and its kernel as a pure program.

A kernel writes to references. Here it becomes a pure program, from the contents of all
its references to their contents afterwards, which can be lifted and differentiated as
any other program can. A kernel that has no such form is None.

Checked on jax 0.10.2 and 0.12.0; where they differ:

* a kernel is an open program on 0.10, and one that can hold constants on 0.12;
* on 0.12 references keep their memory space as pure values, unless told otherwise.

Pallas itself is imported by those who use it: importing it takes a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

PALLAS_CALL = "pallas_call"
RUN_SCOPED = "run_scoped"
# Both are answered from the place in the grid where a kernel runs.
PROGRAM_ID, NUM_PROGRAMS = "program_id", "num_programs"


@dataclasses.dataclass(frozen=True)
class Axis:
    """How one axis of an array is cut into blocks.

    Attributes:
      size: Of a block, in entries.
      stride: Entries from one block index to the next.
      padding: Entries that are added before and behind the array.
      is_squeezed: Whether the kernel doesn't see this axis.
    """

    size: int
    stride: int
    padding: tuple[int, int] = (0, 0)
    is_squeezed: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of an array that a kernel sees, as its place in the grid says.

    Attributes:
      index_map: Takes the place in the grid and the scalars; its first results are the
        index of the block, one for each axis.
      aval: Type of the whole array.
      is_written: Whether the kernel writes to it.
    """

    axes: tuple[Axis, ...]
    index_map: Any
    aval: Any
    is_written: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A `pallas_call` around a pure program.

    Attributes:
      program: From `*scalars, *inputs, *outputs, *scratch` to the same afterwards.
      scoped: The pure programs of its `run_scoped`s, by the `id` of their equations.
      grid: Its sizes; None for one that an operand gives.
      unseen: Axes of the grid that `vmap` made: a kernel does not count them.
      scalars: How many operands come before the blocks.
      inputs: Windows on the operands that follow them.
      outputs: Windows on the results.
      scratch: Types of the buffers that live as long as the call.
      aliases: The operand, counted from the first scalar, whose memory an output takes.
    """

    program: Any
    scoped: Mapping[int, Scoped]
    grid: tuple[int | None, ...]
    unseen: frozenset[int]
    scalars: int
    inputs: tuple[Window, ...]
    outputs: tuple[Window, ...]
    scratch: tuple[Any, ...]
    aliases: Mapping[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Scoped:
    """A `run_scoped`: a program of its operands and of the buffers that it makes."""

    program: Any
    buffers: tuple[Any, ...]
    results: int


@functools.lru_cache(maxsize=1024)
def read_pallas_call(eqn: Any) -> Kernel | None:
    """Reads a `pallas_call` equation; None where it has no pure form."""
    try:
        return _read(eqn)
    except Exception:  # whatever the internals raise where they differ, or give up
        return None


def interpreted(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a `pallas_call` that runs on a CPU."""
    return params if params["interpret"] else params | {"interpret": True}


def name_of(eqn: Any) -> str:
    """Returns what the user calls a kernel."""
    return eqn.params["name"] or eqn.params["jaxpr"].debug_info.func_name


def parts(eqn: Any) -> tuple[Any, ...]:
    """Returns all that tells one `pallas_call` from another, programs among it."""
    kernel = read_pallas_call(eqn)
    if kernel is None:
        return tuple(sorted(eqn.params.items()))
    held = ("jaxpr", "grid_mapping")
    others = [(name, value) for name, value in eqn.params.items() if name not in held]
    windows = tuple(
        (window.axes, window.index_map, window.aval, window.is_written)
        for window in (*kernel.inputs, *kernel.outputs)
    )
    scoped = tuple((each.program, each.buffers) for each in kernel.scoped.values())
    layout = (kernel.grid, kernel.unseen, kernel.scalars, kernel.scratch)
    return kernel.program, scoped, windows, layout, tuple(sorted(others))


def _read(eqn: Any) -> Kernel | None:
    params, mapping = eqn.params, eqn.params["grid_mapping"]
    foreign = (params["mesh"], mapping.local_grid_env, mapping.get_grid_indices)
    if any(part is not None for part in foreign) or any(map(_is_ref, eqn.invars)):
        return None
    written = {
        effect.input
        for effect in params["jaxpr"].effects
        if type(effect).__name__ in ("WriteEffect", "AccumEffect")
    }
    refs = params["jaxpr"].invars[mapping.num_index_operands :]
    scoped: dict[int, Scoped] = {}
    with mapping.trace_env(), _integers_of(params["jaxpr"]):
        program = _pure(params["jaxpr"])
        _read_scoped(program, scoped)
        windows = [
            _window(block, ref in written)
            for block, ref in zip(mapping.block_mappings, refs, strict=False)
        ]
    return Kernel(
        program,
        scoped,
        tuple(size if isinstance(size, int) else None for size in mapping.grid),
        frozenset(mapping.vmapped_dims),
        mapping.num_index_operands,
        tuple(windows[: mapping.num_inputs]),
        tuple(windows[mapping.num_inputs :]),
        tuple(_plain(aval) for aval in mapping.scratch_avals),
        {result: operand for operand, result in params["input_output_aliases"]},
    )


def _window(block: Any, is_written: bool) -> Window:
    if block.transforms:
        raise NotImplementedError("a reference that is seen through a transformation")
    axes = tuple(_axis(axis) for axis in block.block_shape)
    index_map = _pure(block.index_map_jaxpr)
    if index_map.consts:
        raise NotImplementedError("an index map that holds arrays")
    return Window(axes, index_map, _plain(block.array_aval), is_written)


def _axis(axis: Any) -> Axis:
    from jax.experimental import pallas as pl

    if isinstance(axis, pl.Squeezed):
        return Axis(1, 1, is_squeezed=True)
    if isinstance(axis, pl.Element):
        return Axis(axis.block_size, 1, axis.padding)
    if isinstance(axis, pl.Blocked):
        return Axis(axis.block_size, axis.block_size)
    raise NotImplementedError(f"a block of kind {type(axis).__name__}")


def _read_scoped(program: Any, found: dict[int, Scoped]) -> None:
    """Reads every `run_scoped` of a pure program, at any depth."""
    for eqn in _equations(program):
        if eqn.primitive.name != RUN_SCOPED:
            continue
        body = eqn.params["jaxpr"]
        inner = body.replace(constvars=[], invars=[*body.constvars, *body.invars])
        buffers = tuple(_plain(var.aval) for var in body.invars)
        pure = _pure(inner)
        found[id(eqn)] = Scoped(pure, buffers, len(body.outvars))
        _read_scoped(pure, found)


def _equations(program: Any) -> Iterator[Any]:
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield eqn
        if eqn.primitive.name == RUN_SCOPED:
            continue
        for value in eqn.params.values():
            items: Sequence[Any] = (
                value if isinstance(value, tuple | list) else (value,)
            )
            for item in items:
                if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                    yield from _equations(item)


def _pure(program: Any) -> Any:
    """Returns a program that takes and returns the contents of its references."""
    from jax._src.state import discharge

    closed = program
    if not isinstance(program, core.ClosedJaxpr):
        closed = core.ClosedJaxpr(program, ())
    options = inspect.signature(discharge.discharge_state).parameters
    strip = {"strip_memory_space": True} if "strip_memory_space" in options else {}
    return discharge.discharge_state(closed, **strip)


def _integers_of(program: Any) -> contextlib.AbstractContextManager[Any]:
    """The setting under which a kernel was traced, told from its own types.

    Reading it makes new indices, which must be of the type of the old ones.
    """
    body = getattr(program, "jaxpr", program)
    atoms = [*body.invars, *(var for eqn in body.eqns for var in eqn.outvars)]
    sizes = [_itemsize(getattr(atom.aval, "dtype", None)) for atom in atoms]
    return jax.enable_x64(max(sizes, default=0) == 8)


def _itemsize(dtype: Any) -> int:
    return 0 if dtype is None else getattr(np.dtype(dtype), "itemsize", 0)


def _is_ref(atom: Any) -> bool:
    return hasattr(atom.aval, "inner_aval")


def _plain(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array or of a reference to one."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        raise NotImplementedError(f"a buffer of {aval.dtype}")
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
