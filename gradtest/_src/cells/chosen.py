"""Which cells a comparison has: all that are possible, or those that are named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradtest._src import variants as chex_variants
from gradtest._src.cells.ways import BATCH, Cell

FAMILIES = (
    "repeat",
    "eager",
    "jit",
    "remat",
    "vmap",
    "scan",
    "donated",
    "pmap",
    "shard_map",
    "sharded jit",
)
Transformation = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One name that the user chose: a family, and what its cells' details include."""

    text: str
    family: str
    details: tuple[str, ...]

    def covers(self, cell: Cell) -> bool:
        """Whether a cell is one of those that the name stands for."""
        return cell.family == self.family and set(self.details) <= set(cell.details)

    def lacks(self, cell: Cell) -> bool:
        """Whether a cell says why those that the name stands for can't be had."""
        at_all = bool(cell.lacks) and cell.family == self.family
        return at_all and set(cell.details) <= set(self.details)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `variants=` says.

    Attributes:
      names: The cells that are wanted; None for all.
      own: The user's own transformations, by name.
    """

    names: tuple[Wanted, ...] | None
    own: Mapping[str, Transformation]

    @property
    def numbers(self) -> list[int]:
        """The numbers of devices that the names ask for."""
        details = [d for wanted in self.names or () for d in wanted.details]
        return [int(d) for d in details if d.isdecimal() and int(d)]

    def pick(self, cells: Sequence[Cell]) -> list[Cell]:
        """Returns the cells that are wanted, in their own order.

        Raises:
          ValueError: A name stands for none of them.
        """
        if self.names is None:
            return [cell for cell in cells if not cell.is_extra]
        picked: dict[str, Cell] = {}
        for wanted in self.names:
            exact = [cell for cell in cells if cell.name == wanted.text]
            found = exact or [cell for cell in cells if wanted.covers(cell)]
            found = found or [cell for cell in cells if wanted.lacks(cell)]
            if not found:
                raise _unknown(wanted.text, cells)
            picked |= {cell.name: cell for cell in found}
        return [cell for cell in cells if cell.name in picked]


def read_choice(variants: Any) -> Choice:
    """Reads `variants=`: None, names, the user's transformations, or a mapping of them.

    Raises:
      TypeError: It is none of these.
      ValueError: It is empty, or names no family that there is.
    """
    if variants is None:
        return Choice(None, {})
    if isinstance(variants, str) or callable(variants):
        variants = [variants]
    if isinstance(variants, Mapping):
        return Choice((), _read_own(variants))
    try:
        items = list(variants)
    except TypeError:
        raise TypeError(
            "`variants` must be None, names of variants, transformations, or a mapping "
            f"of names to transformations, got {variants!r}."
        ) from None
    if not items:
        raise ValueError("`variants` is empty: name at least one, or leave it out.")
    names: list[Wanted] = []
    own: dict[str, Transformation] = {}
    for item in items:
        if isinstance(item, str):
            names.append(_read_name(item))
        elif callable(item):
            own[_free_name(_name_of(item), [*FAMILIES, *own])] = item
        else:
            raise TypeError(
                "`variants` must hold names and transformations (callables that take "
                f"a function and return one), got {item!r}."
            )
    return Choice(tuple(names), own)


def _read_own(variants: Mapping[Any, Any]) -> dict[str, Transformation]:
    if not variants:
        raise ValueError("`variants` is empty: name at least one, or leave it out.")
    for name, transformation in variants.items():
        if not isinstance(name, str):
            raise TypeError(f"`variants` must have names as keys, got {name!r}.")
        if not callable(transformation):
            raise TypeError(
                f"`variants[{name!r}]` must be callable: it takes a function and "
                f"returns one, got {transformation!r}."
            )
    return dict(variants)


def _name_of(variant: Transformation) -> str:
    """Returns what a transformation is called, whatever of it is fixed already."""
    name = chex_variants.describe_variant(variant)
    while isinstance(variant, functools.partial) and name == "partial":
        variant = variant.func
        name = chex_variants.describe_variant(variant)
    return name


def _free_name(name: str, taken: Sequence[str]) -> str:
    """Returns a name that is not taken yet: "pmap", "pmap (2)", ..."""
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name} ({count})"
    return free


def _read_name(text: str) -> Wanted:
    family, _, rest = text.partition("[")
    if family not in FAMILIES or bool(rest) != text.endswith("]"):
        raise _unknown(text)
    details = rest.removesuffix("]")
    return Wanted(text, family, tuple(details.split(", ")) if details else ())


def _unknown(text: str, cells: Sequence[Cell] = ()) -> ValueError:
    family = text.partition("[")[0]
    names = [cell.name for cell in cells if cell.family == family and not cell.lacks]
    there_are = ", ".join(map(repr, names[:12])) + ", …" * (len(names) > 12)
    if not names:
        there_are = ", ".join(map(repr, FAMILIES)) + (
            "; each with what tells its cells apart, as in 'pmap[4]' or "
            "'shard_map[2, check_vma=False]'"
        )
    return ValueError(
        f"`variants` names {text!r}, which is none: there are {there_are}."
    )


def stacking(variant: Transformation) -> tuple[int, int]:
    """Returns how many points a transformation maps over, and how many devices.

    `jax.vmap` and `jax.pmap` themselves take stacked arguments, others (Chex's too)
    one point: for these both numbers are 0.
    """
    keywords: dict[str, Any] = {}
    while isinstance(variant, functools.partial):
        keywords = {**variant.keywords, **keywords}
        variant = variant.func
    if variant is jax.vmap:
        return keywords.get("axis_size") or BATCH, 0
    if variant is jax.pmap:
        devices = keywords.get("devices")
        count = len(devices) if devices else jax.local_device_count()
        return count, count
    return 0, 0
