"""Runs cells: traced, evaluated in float64 in few programs, and as they are.

Each cell is traced and compiled by itself, so that what fails is told of it alone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

from gradtest._src import execution, jaxprs, variants
from gradtest._src.cells.causes import first_line
from gradtest._src.cells.gaps import Part
from gradtest._src.cells.reference import (
    Core,
    LeakError,
    Reference,
    lift,
    run_lifted,
    trace,
)
from gradtest._src.cells.ways import Cell, Examples, Row
from gradtest._src.devices.copies import read_copies
from gradtest._src.devices.homes import NoHomeError
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.program import Values


class ShapeError(TypeError):
    """A transformation changes what the function returns: a slip of the user's."""


_TOLD_AT_ONCE = (ShapeError, execution.SlipError, variants.BackendRefusedError)


@dataclasses.dataclass(eq=False)
class Prepared:
    """A cell that was traced and compiled, or what kept it from that.

    Attributes:
      cell: The cell.
      jaxpr: What it runs in float64; None where that is the reference itself.
      like: Another cell, which runs the same at the same points.
      compiled: What it runs as it is; None where it is called.
      error: What it raised.
      lacks: Why it could not be run, where that is no fault of the function's.
      not_lifted: Why it was compared in working precision alone.
    """

    cell: Cell
    jaxpr: Jaxpr | None = None
    like: Prepared | None = None
    compiled: execution.Compiled | None = None
    error: Exception | None = None
    lacks: str = ""
    not_lifted: str = ""

    @property
    def is_open(self) -> bool:
        """Whether nothing keeps it from running."""
        return self.error is None and not self.lacks


class Runs:
    """All cells of a comparison, prepared once and run at several points."""

    def __init__(self, cells: Sequence[Cell], reference: Reference):
        self.reference = reference
        self._traced: dict[int, Prepared] = {}
        self._cores: list[tuple[Core, Prepared]] = []
        # Larger ones first: those that run the same on fewer devices are like them.
        order = sorted(range(len(cells)), key=lambda i: -len(cells[i].rows))
        prepared = {i: self._prepare(cells[i]) for i in order}
        self.prepared = [prepared[i] for i in range(len(cells))]
        self._lower()
        self._compile()

    def _prepare(self, cell: Cell) -> Prepared:
        """Traces a cell, and finds out whether its program is new."""
        each = Prepared(cell)
        if not cell.has_lifted:
            return each
        each.lacks = _lack_of_types(cell, self.reference)
        if each.lacks:
            return each
        first = self._traced.setdefault(id(cell.run), each)
        if first is not each:  # its arguments are laid out in another way alone
            each.like = first if first.jaxpr is not None else first.like
            each.error, each.lacks = first.error, first.lacks
            return each
        parts = _unplaced(cell).arguments(self.reference.examples)
        try:
            jaxpr = trace(cell.run, parts)
        except Exception as error:  # whatever the rule or JAX raises
            _blame(each, error)
            if each.error is not None and cell.values is not None:
                each.lacks = _lack_of_values(cell, parts)
            return each
        core = Core(jaxpr, is_region=cell.family in ("pmap", "shard_map"))
        if core == self.reference.core:
            return each
        each.jaxpr = jaxpr
        for known, other in self._cores:
            if core == known and set(cell.rows) <= set(other.cell.rows):
                each.jaxpr, each.like = None, other
                return each
        self._cores.append((core, each))
        return each

    def _lower(self) -> None:
        examples = self.reference.examples
        for each in self.prepared:
            run = each.cell.run
            if each.is_open and not each.cell.is_repeat and hasattr(run, "lower"):
                parts = each.cell.arguments(examples)
                try:
                    each.compiled = execution.working(run, parts)
                except Exception as error:  # whatever the rule or JAX raises
                    _blame(each, error)
        groups: dict[int, list[Prepared]] = {}
        for each in self.prepared:
            if each.is_open and each.jaxpr is not None:
                groups.setdefault(each.cell.devices, []).append(each)
        self._lifted = [_Lifted(group, examples) for group in groups.values()]

    def _compile(self) -> None:
        """Compiles side by side; a program that fails fails for itself."""
        jobs: list[tuple[Any, Any]] = [
            (each, each.compiled.compile) for each in self.prepared if each.compiled
        ]
        jobs += [(group, group.compile) for group in self._lifted]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(jobs))) as pool:
            done = [(each, pool.submit(job)) for each, job in jobs]
        for each, result in done:
            error = result.exception()
            if error is None:
                continue
            if not isinstance(error, Exception):
                raise error
            if isinstance(each, _Lifted):
                each.fail(error)
            else:
                _blame(each, error)

    def in_float64(self) -> dict[str, list[Part]]:
        """Returns what the cells give in float64, by name; those that are compared."""
        examples = self.reference.examples
        found: dict[str, list[Part]] = {}
        for group in self._lifted:
            for cell, results in group.run(examples):
                found[cell.name] = self._parts(cell, results)
        for each in self.prepared:
            if not each.is_open or not each.cell.has_lifted or each.jaxpr is not None:
                continue
            rows = each.cell.rows
            if each.like is None:
                found[each.cell.name] = self._as_reference(rows)
            elif each.like.cell.name in found:
                found[each.cell.name] = [
                    dataclasses.replace(part, places=len(rows))
                    for part in found[each.like.cell.name]
                    if part.row in rows and part.place < len(rows)
                ]
        return found

    def _as_reference(self, rows: Sequence[Row]) -> list[Part]:
        return [
            Part(item, place, len(rows), row, value)
            for place, row in enumerate(rows)
            for item, value in enumerate(self.reference.lifted(row))
        ]

    def as_they_run(self) -> dict[str, list[Part]]:
        """Returns what the cells give in working precision, by name."""
        found = {}
        for each in self.prepared:
            if not each.is_open or each.cell.is_repeat:
                continue
            parts = each.cell.arguments(self.reference.examples)
            try:
                if each.compiled is not None:
                    results = each.compiled(*parts)
                else:
                    with execution.working_precision():
                        results = each.cell.run(*parts)
                found[each.cell.name] = self._parts(each.cell, list(results))
            except Exception as error:  # whatever runs there
                _blame(each, error)
        return found

    def _parts(self, cell: Cell, results: Values) -> list[Part]:
        """Cuts results into one part for each item, and each row or device's copy."""
        wanted = self.reference.lifted(cell.rows[0])
        if len(results) != len(wanted):
            raise _shape_error(cell)
        found: list[Part] = []
        for item, (result, like) in enumerate(zip(results, wanted, strict=True)):
            if result.shape == like.shape:
                copies = read_copies(result, has_device_axis=False)
                for value, holders in zip(copies.values, copies.holders, strict=True):
                    place = holders[0] if len(copies.values) > 1 else 0
                    found.append(Part(item, place, copies.count, cell.rows[0], value))
                continue
            if result.shape[1:] != like.shape or not result.shape:
                raise _shape_error(cell)
            rows = cell.rows
            if len(rows) != len(result):  # a variant of the user's over its devices
                rows = (cell.rows[0],) * len(result)
            values = execution.to_host(result)
            found += [
                Part(item, place, len(rows), row, values[place])
                for place, row in enumerate(rows)
            ]
        return found


class _Lifted:
    """The float64 forms of the cells on so many devices, as one program.

    Where that fails, each cell is tried by itself.
    """

    def __init__(self, group: list[Prepared], examples: Examples):
        self._group = group
        self._examples = examples
        self._failed = False
        self._alone: list[_Lifted] = []
        try:
            self._compiled, self._consts = lift(
                [each.jaxpr for each in group], self._arguments(examples), set()
            )
        except Exception as error:  # what can't be rebuilt, or has no home
            self.fail(error)

    def _arguments(self, examples: Examples) -> list[Any]:
        return [_unplaced(each.cell).arguments(examples) for each in self._group]

    def compile(self) -> None:
        """Compiles the program, if there is one."""
        if not self._failed:
            self._compiled.compile()

    def fail(self, error: Exception) -> None:
        """Tries each cell alone; one that fails is left to working precision."""
        self._failed = True
        if len(self._group) > 1:
            self._alone = [_Lifted([each], self._examples) for each in self._group]
            return
        says = error.says if isinstance(error, NoHomeError) else first_line(error)
        self._group[0].not_lifted = says

    def run(self, examples: Examples) -> list[tuple[Cell, Values]]:
        """Returns the cells with their results; none that failed."""
        if not self._failed:
            try:
                results = run_lifted(
                    self._compiled, self._arguments(examples), self._consts
                )
                cells = [each.cell for each in self._group]
                return list(zip(cells, results, strict=True))
            except Exception as error:
                self.fail(error)
        return [pair for lifted in self._alone for pair in lifted.run(examples)]


def _unplaced(cell: Cell) -> Cell:
    return dataclasses.replace(cell, place=None)


def _blame(each: Prepared, error: Exception) -> None:
    """Takes note of an exception: JAX's own lack, or a failure of the cell."""
    if isinstance(error, _TOLD_AT_ONCE):
        raise error
    if isinstance(error, NotImplementedError) or "ordered" in first_line(error):
        each.lacks = f"JAX: {first_line(error)}"
    else:
        each.error = error


def _lack_of_types(cell: Cell, reference: Reference) -> str:
    """Says why JAX mistakes what a function returns in a cell; empty where it doesn't.

    What a callback returns it takes for the same on every device, and so it sums the
    cotangents of all.
    """
    calls = {"pure_callback", "io_callback"} & jaxprs.primitives(reference.jaxpr)
    checks = cell.family == "shard_map" and "check_vma=True" in cell.details
    if not calls or not checks or cell.is_own or "replicated" in cell.details:
        return ""
    return f"under check_vma=True JAX takes what {min(calls)} returns for replicated"


def _lack_of_values(cell: Cell, parts: Any) -> str:
    """Says why the function itself can't run in a cell; empty where it can.

    Then there is no derivative there that could depart.
    """
    assert cell.values is not None
    try:
        trace(cell.values, parts)
    except LeakError:
        return ""
    except Exception as error:
        return f"the function itself does not run there: {first_line(error)}"
    return ""


def _shape_error(cell: Cell) -> ShapeError:
    return ShapeError(
        f"`variants` has {cell.name!r}, which changes what the function returns: it "
        "must take a function and return one with the same results, with or without "
        "an axis of devices."
    )
