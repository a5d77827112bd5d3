"""The cells of a comparison that run over several devices, or over one of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gradtest._src import jaxprs
from gradtest._src.cells.ways import (
    MESH_AXIS,
    Cell,
    Derivative,
    Examples,
    Parts,
    Run,
    pull,
)
from gradtest._src.inputs import Leaf
from gradtest._src.program import Values

# Devices are counted up to all there are.
_USUAL_COUNTS = (1, 2, 4)
# How many axes are sharded one at a time unless more are asked for: fewer of a large
# program, which takes longer to compile.
_MOST_AXES, _FEWEST_AXES, _EQUATIONS = 16, 2, 2500
_SPREAD = PartitionSpec(MESH_AXIS)


def counts(asked: Sequence[int], available: int) -> list[int]:
    """Returns the numbers of devices to run on, those that there are too few for too.

    Args:
      asked: Numbers that the user names.
      available: How many devices there are.
    """
    return sorted({*_USUAL_COUNTS, available, *asked})


def device_cells(
    derivative: Derivative,
    examples: Examples,
    numbers: Sequence[int],
    devices: Sequence[Any],
    obstacle: str,
    equations: int,
) -> list[Cell]:
    """Returns the cells over so many devices, mapped ones before sharded ones.

    Args:
      derivative: What runs.
      examples: Its points.
      numbers: How many devices to take.
      devices: All that there are.
      obstacle: Why none of them can run; empty where they can.
      equations: The size of the derivative's program.
    """
    cells: list[Cell] = []
    most = min(max(_EQUATIONS // equations, _FEWEST_AXES), _MOST_AXES)
    for make in (_pmapped, _in_regions, functools.partial(_sharded, most)):
        for number in numbers:
            lacks = obstacle or _shortage(number, len(devices))
            if lacks:
                cells += _lacking(make, number, lacks)
                continue
            larger = [n for n in numbers if number < n <= len(devices)]
            cells += make(derivative, examples, list(devices[:number]), larger)
    return cells


def _shortage(number: int, available: int) -> str:
    if number <= available:
        return ""
    return (
        f"there {'is' if available == 1 else 'are'} {available} "
        f"device{'s' * (available != 1)}; on a CPU set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={max(number, 8)}, or "
        f"jax_num_cpu_devices={max(number, 8)}, before JAX starts"
    )


def _lacking(make: Any, number: int, lacks: str) -> list[Cell]:
    count = str(number)
    if make is _pmapped:
        return [Cell("pmap", (count,), "", lacks=lacks)]
    if make is _in_regions:
        return [
            Cell("shard_map", (count, f"check_vma={checks}"), "", lacks=lacks)
            for checks in (True, False)
        ]
    return [Cell("sharded jit", (count,), "", lacks=lacks)] if number > 1 else []


def _pmapped(
    derivative: Derivative, examples: Examples, devices: list[Any], larger: list[int]
) -> list[Cell]:
    over = _over(len(devices))
    mesh = _mesh(devices)

    def mapped(function: Callable[..., Values]) -> Any:
        return jax.pmap(_as_core(function), axis_name=MESH_AXIS, devices=devices)

    return [
        Cell(
            "pmap",
            (str(len(devices)),),
            f"under jax.pmap{over}",
            tuple(examples.row(k) for k in range(len(devices))),
            mapped(derivative.fresh()),
            is_stacked=True,
            devices=len(devices),
            place=functools.partial(_placed, mesh, _SPREAD),
        )
    ]


def _in_regions(
    derivative: Derivative, examples: Examples, devices: list[Any], larger: list[int]
) -> list[Cell]:
    """Returns the cells in `shard_map`; the rarer ones over most devices alone."""
    mesh, over = _mesh(devices), _over(len(devices))
    rows = tuple(examples.row(k) for k in range(len(devices)))
    cells = []
    for checks in (True, False):
        region = functools.partial(
            jax.shard_map, mesh=mesh, out_specs=_SPREAD, check_vma=checks
        )
        says = f"inside of jax.shard_map(check_vma={checks}){over}"
        details = (str(len(devices)), f"check_vma={checks}")
        inside = derivative.fresh(_varying) if checks else derivative.fresh()
        alike = functools.partial(Cell, "shard_map", devices=len(devices))
        cells.append(
            alike(
                details,
                says,
                rows,
                jax.jit(region(_by_row(_as_core(inside)), in_specs=_SPREAD)),
                is_stacked=True,
                place=functools.partial(_placed, mesh, _SPREAD),
                values=region(_by_row(_values(derivative)), in_specs=_SPREAD),
            )
        )
        rare = functools.partial(alike, is_extra=bool(larger))
        everywhere = PartitionSpec()
        cells.append(
            rare(
                (*details, "replicated"),
                f"{says}, all of its arguments replicated",
                (rows[0],) * len(devices),
                jax.jit(
                    region(
                        _same_rows(_as_core(derivative.fresh())), in_specs=everywhere
                    )
                ),
                is_stacked=False,
                place=functools.partial(_placed, mesh, everywhere),
                values=region(_same_rows(_values(derivative)), in_specs=everywhere),
            )
        )
        cells.append(
            rare(
                (*details, "differentiated"),
                f"as the gradient of jax.shard_map(check_vma={checks}){over}",
                rows,
                jax.jit(_of_region(derivative, region)),
                is_stacked=True,
                place=functools.partial(_placed, mesh, _SPREAD),
                values=region(_by_row(_values(derivative)), in_specs=_SPREAD),
            )
        )
    return cells


def _as_core(derivative: Run) -> Run:
    """Marks what each device runs, so that it is found in the trace."""
    return jax.jit(derivative)


def _over(number: int) -> str:
    return f" over {number} device{'s' * (number != 1)}"


def _mesh(devices: list[Any]) -> Mesh:
    return Mesh(np.array(devices), (MESH_AXIS,), axis_types=(AxisType.Auto,))


def _placed(mesh: Mesh, spec: PartitionSpec, parts: Parts) -> Parts:
    return jax.device_put(parts, NamedSharding(mesh, spec))


def _values(derivative: Derivative) -> Run:
    return lambda moving, held, seed: derivative.program.call(moving, held)


def _varying(function: Callable[..., Values]) -> Callable[..., Values]:
    """Returns a function whose results vary over the devices, also constant ones.

    Each device has cotangents of its own, which must be of the results' types.
    """

    def varying(*moving: Any) -> Values:
        return [
            value
            if MESH_AXIS in jaxprs.vma(value)
            else lax.pcast(value, (MESH_AXIS,), to="varying")
            for value in function(*moving)
        ]

    return varying


def _by_row(run: Run) -> Run:
    """Returns what a device does with its row of stacked arguments."""

    def one(*parts: Any) -> Values:
        results = run(*([value[0] for value in part] for part in parts))
        return [result[None] for result in results]

    return one


def _same_rows(run: Run) -> Run:
    """Returns what a device does with arguments that all devices share."""
    return lambda *parts: [result[None] for result in run(*parts)]


def _of_region(derivative: Derivative, region: Any) -> Run:
    def run(moving: Any, held: Any, seed: Any) -> Values:
        def apart(xs: Any, zs: Any) -> Values:
            results = derivative.program.call([x[0] for x in xs], [z[0] for z in zs])
            return [result[None] for result in results]

        inside = region(apart, in_specs=_SPREAD)
        return pull(lambda *xs: inside(list(xs), held), moving, seed)

    return run


# --- sharded arguments ------------------------------------------------------------


def _sharded(
    most: int,
    derivative: Derivative,
    examples: Examples,
    devices: list[Any],
    larger: list[int],
) -> list[Cell]:
    """Returns the cells under jit with sharded arguments: together, then each axis."""
    number = len(devices)
    if number == 1:
        return []
    leaves = [*derivative.moving, *derivative.held]
    mesh, run = _mesh(devices), jax.jit(derivative.fresh())
    alike = functools.partial(
        Cell, "sharded jit", rows=(examples.row(0),), run=run, devices=number
    )

    def cell(what: str, axes: dict[int, int], is_extra: bool) -> Cell:
        return alike(
            details=(str(number), what),
            says=f"under jax.jit{_over(number)}, sharded on {what}",
            place=functools.partial(_sharded_on, mesh, axes, len(derivative.moving)),
            is_extra=is_extra,
        )

    single = list(_axes_that_divide(leaves, number))
    if not single:
        lacks = f"no axis of any argument divides into {number}"
        return [Cell("sharded jit", (str(number),), "", lacks=lacks)]

    def is_repeated(size: int) -> bool:
        return any(size % more == 0 for more in larger)

    together = [
        cell(what, axes, is_repeated(size) and not is_first)
        for what, axes, size, is_first in _together(leaves, number)
    ]
    # Each axis once, over as many devices as it divides into.
    largest = [(i, k) for i, k in single if not is_repeated(leaves[i].shape[k])]
    return together + [
        cell(f"{leaves[i].name} axis {k}", {i: k}, (i, k) not in largest[:most])
        for i, k in single
    ]


def _axes_that_divide(leaves: Sequence[Leaf], number: int) -> Iterator[tuple[int, int]]:
    for i, leaf in enumerate(leaves):
        for axis, size in enumerate(leaf.shape):
            if math.prod(leaf.shape) and size % number == 0:
                yield i, axis


def _together(
    leaves: Sequence[Leaf], number: int
) -> Iterator[tuple[str, dict[int, int], int, bool]]:
    """Yields leaves that are sharded together, each on one axis.

    First all that have an axis at the same place; then what looks like a batch, first
    axes of one size.

    Yields:
      What it is called, the axis of each leaf, a size that all axes divide by, and
      whether it is the first.
    """
    dividing = list(_axes_that_divide(leaves, number))
    is_first = True
    for axis in sorted({axis for _, axis in dividing}):
        members = [i for i, at in dividing if at == axis]
        if len(members) > 1:
            sizes = [leaves[i].shape[axis] for i in members]
            yield (
                f"axis {axis} of all",
                dict.fromkeys(members, axis),
                math.gcd(*sizes),
                is_first,
            )
            is_first = False
    firsts = [(i, leaves[i].shape[0]) for i, axis in dividing if axis == 0]
    for size in dict.fromkeys(size for _, size in firsts):
        members = [i for i, s in firsts if s == size]
        if 1 < len(members) < len(firsts):
            name = f"axis 0 of size {size}"
            yield name, dict.fromkeys(members, 0), size, False


def _sharded_on(mesh: Mesh, axes: dict[int, int], count: int, parts: Parts) -> Parts:
    """Lays the leaves of these numbers out along one axis each, the rest whole."""
    values = [*parts[0], *parts[1]]
    shardings = [NamedSharding(mesh, _spec(axes.get(i))) for i in range(len(values))]
    placed = jax.device_put(values, shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    return placed[:count], placed[count:], jax.device_put(parts[2], whole)


def _spec(axis: int | None) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*[None] * axis, MESH_AXIS)
