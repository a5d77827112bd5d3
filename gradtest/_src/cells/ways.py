"""The cells of a comparison: the ways in which JAX may run one derivative.

A cell runs the derivative of a function at one point or at several, which are stacked
along a leading axis, and says at which point each row of its result should be what the
derivative is by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from gradtest._src.devices import spanning
from gradtest._src.inputs import Leaf, Point, Role
from gradtest._src.lifting import is_inexact
from gradtest._src.program import Program, Values

BATCH = 3
# The axis of the meshes that cells run over.
MESH_AXIS = "devices"
# So many arguments are batched alone: each compiles the derivative once more.
_MOST_ALONE = 4

# Moving leaves, held values and cotangents.
Parts = tuple[list[Any], list[Any], list[Any]]
Run = Callable[[list[Any], list[Any], list[Any]], Values]


@dataclasses.dataclass(frozen=True)
class Row:
    """The numbers of the points that a result's arguments are taken from.

    Attributes:
      moving: One for each moving leaf.
      held: One for each held leaf.
      seed: That of the cotangents.
    """

    moving: tuple[int, ...]
    held: tuple[int, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Examples:
    """Several points of one function, with cotangents of its results at each."""

    points: Sequence[Point]
    seeds: Sequence[Values]
    _made: dict[Any, Parts] = dataclasses.field(default_factory=dict)

    def row(self, k: int) -> Row:
        """Returns the row that has all its arguments from one point."""
        k %= len(self.points)
        first = self.points[0]
        return Row((k,) * len(first.moving), (k,) * len(first.held), k)

    def at(self, row: Row) -> Parts:
        """Returns the arguments of one row."""
        return (
            [_own(self.points[k].moving[i]) for i, k in enumerate(row.moving)],
            [_own(self.points[k].held[i]) for i, k in enumerate(row.held)],
            [_own(value) for value in self.seeds[row.seed]],
        )

    def shared(self, rows: Sequence[Row], *, is_stacked: bool) -> Parts:
        """Returns the arguments of rows, made once for all that only read them."""
        key = (tuple(rows), is_stacked)
        if key not in self._made:
            self._made[key] = self.stacked(rows) if is_stacked else self.at(rows[0])
        return self._made[key]

    def stacked(self, rows: Sequence[Row]) -> Parts:
        """Returns the arguments of several rows, stacked along a leading axis."""
        each = [self.at(row) for row in rows]
        moving, held, seed = (
            [
                _stack(column)
                for column in zip(*(parts[i] for parts in each), strict=True)
            ]
            for i in range(3)
        )
        return moving, held, seed


def _own(value: Any) -> Any:
    """Returns a value in a buffer of its own: what runs may donate what it is given.

    By way of the host, where that loses nothing: there nothing is compiled to copy it.
    """
    if spanning.spans(value) or _is_plain(value):
        return jax.device_put(np.array(spanning.whole(value)))
    return jnp.array(value, copy=True)


def _stack(column: Sequence[Any]) -> Any:
    if all(map(_is_plain, column)):
        return jax.device_put(np.stack([np.asarray(value) for value in column]))
    return jnp.stack(column)


def _is_plain(value: Any) -> bool:
    """Whether a NumPy array holds all that a value is."""
    aval = jax.typeof(value)
    return not (aval.weak_type or dtypes.issubdtype(aval.dtype, dtypes.extended))


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One way to run a derivative.

    Attributes:
      family: "jit", "vmap", "pmap", ...
      details: What tells it from others of its family: "4", "check_vma=True", ...
      says: How it runs, for messages.
      rows: Where each row of the result is compared.
      run: Takes moving leaves, held values and cotangents; returns values and
        gradients. Compiled as a whole where it can be lowered, called otherwise.
      is_stacked: Whether arguments and results have a leading axis of rows.
      devices: Over how many devices it runs.
      place: Lays the arguments over devices.
      values: The function itself, without derivative, run in the same way; None where
        it need not be asked.
      has_lifted: Whether it is compared in float64 as well.
      consumes: Whether it may donate its arguments, so that it needs its own.
      is_own: Whether it is a transformation of the user's.
      is_extra: Whether it runs only where it is asked for.
      lacks: Why it can't run here; empty where it can.
    """

    family: str
    details: tuple[str, ...]
    says: str
    rows: tuple[Row, ...] = ()
    run: Any = None
    is_stacked: bool = False
    devices: int = 1
    place: Callable[[Parts], Parts] | None = None
    values: Run | None = None
    has_lifted: bool = True
    consumes: bool = False
    is_own: bool = False
    is_extra: bool = False
    lacks: str = ""

    @property
    def name(self) -> str:
        """Its name: the family, and in brackets the details."""
        return self.family + (f"[{', '.join(self.details)}]" if self.details else "")

    @property
    def is_repeat(self) -> bool:
        """Whether it shows that tracing again gives the same program, and no more."""
        return self.family == "repeat" and not self.is_own

    def arguments(self, examples: Examples) -> Parts:
        """Returns the arguments that it takes, laid out as it takes them."""
        if self.consumes:
            stacked = self.is_stacked
            parts = (
                examples.stacked(self.rows) if stacked else examples.at(self.rows[0])
            )
        else:
            parts = examples.shared(self.rows, is_stacked=self.is_stacked)
        return parts if self.place is None else self.place(parts)


class Derivative:
    """Values and gradients of a traced function, as functions of arrays alone."""

    def __init__(self, program: Program):
        self.program = program
        self.moving: tuple[Leaf, ...] = program.inputs.moving
        self.held: tuple[Leaf, ...] = program.inputs.of_role(Role.HELD)

    def fresh(self, transform: Callable[[Any], Any] = lambda function: function) -> Run:
        """Returns the derivative of the function, transformed, as a new function.

        A new one each time, so that JAX traces it anew.
        """

        def derivative(moving: Any, held: Any, seed: Any) -> Values:
            function = transform(lambda *xs: self.program.call(xs, held))
            return pull(function, moving, seed)

        return derivative


def pull(function: Callable[..., Values], moving: Any, seed: Any) -> Values:
    """Returns the results of a function and its vector-Jacobian product."""
    values, back = jax.vjp(function, *moving)
    return [*values, *back(list(seed))]


# --- on one device ----------------------------------------------------------------


def single_cells(derivative: Derivative, examples: Examples) -> list[Cell]:
    """Returns the cells that need one device, cheap and basic ones first."""
    first = (examples.row(0),)
    some = tuple(examples.row(k) for k in range(BATCH))
    one = functools.partial(Cell, rows=first)
    batch = functools.partial(Cell, rows=some, is_stacked=True)
    return [
        one("repeat", (), "traced a second time", run=jax.jit(derivative.fresh())),
        one(
            "eager",
            (),
            "run without jit",
            run=derivative.fresh(),
            has_lifted=False,
            consumes=True,
        ),
        one("jit", (), "under jax.jit", run=jax.jit(derivative.fresh())),
        one(
            "remat",
            (),
            "under jax.checkpoint",
            run=jax.jit(derivative.fresh(jax.checkpoint)),
        ),
        Cell(
            "vmap",
            ("1",),
            "under jax.vmap over one point",
            first,
            _vmapped(derivative),
            is_stacked=True,
        ),
        batch(
            "vmap",
            (str(BATCH),),
            f"under jax.vmap over {BATCH} points",
            run=_vmapped(derivative),
        ),
        batch(
            "vmap",
            (str(BATCH), "differentiated"),
            f"as the gradient of jax.vmap over {BATCH} points",
            run=jax.jit(_of_batch(derivative)),
        ),
        *_batched_alone(derivative, examples),
        Cell(
            "vmap",
            (str(BATCH), "cotangents alone"),
            "under jax.vmap over cotangents alone",
            tuple(dataclasses.replace(first[0], seed=row.seed) for row in some),
            _vmapped(derivative, batched=frozenset({"cotangents"})),
            is_stacked=True,
        ),
        batch(
            "scan",
            (str(BATCH),),
            f"inside of jax.lax.scan over {BATCH} points",
            run=jax.jit(_scanned(derivative)),
        ),
        batch(
            "scan",
            (str(BATCH), "differentiated"),
            f"as the gradient of jax.lax.scan over {BATCH} points",
            run=jax.jit(_of_scan(derivative)),
        ),
        one(
            "donated",
            (),
            "under jax.jit with donated arguments",
            run=jax.jit(derivative.fresh(), donate_argnums=0),
            consumes=True,
        ),
    ]


def _is_key(leaf: Leaf) -> bool:
    """Whether a leaf is a typed key: examples share it.

    The bits that some generators draw for a batch of keys are not those of each.
    """
    return bool(dtypes.issubdtype(leaf.dtype, dtypes.prng_key))


def _vmapped(derivative: Derivative, batched: frozenset[Any] | None = None) -> Any:
    """Returns the derivative mapped over stacked arguments.

    Args:
      derivative: What is mapped.
      batched: Numbers of the arguments that have a batch, "cotangents" for theirs; the
        others are shared. None for all.
    """

    def axis(key: Any) -> int | None:
        return 0 if batched is None or key in batched else None

    axes = (
        [axis(leaf.argument) for leaf in derivative.moving],
        [None if _is_key(leaf) else axis(leaf.argument) for leaf in derivative.held],
        [axis("cotangents")] * len(derivative.program.outputs),
    )
    function = derivative.fresh()

    def mapped(*parts: Any) -> Values:
        at = [
            [value if k == 0 else value[0] for value, k in zip(part, own, strict=True)]
            for part, own in zip(parts, axes, strict=True)
        ]
        return jax.vmap(function, in_axes=axes)(*at)

    return jax.jit(mapped)


def _batched_alone(derivative: Derivative, examples: Examples) -> list[Cell]:
    """Returns a cell for each argument, which alone has a batch."""
    # Integers are the same at all points: as a batch they show nothing.
    leaves = (*derivative.moving, *derivative.held)
    arguments = sorted({leaf.argument for leaf in leaves if is_inexact(leaf.dtype)})
    if len({leaf.argument for leaf in leaves}) < 2:
        return []
    names = derivative.program.inputs.names
    cells = []
    for place, argument in enumerate(arguments):
        rows = tuple(
            Row(
                tuple(k if at.argument == argument else 0 for at in derivative.moving),
                tuple(k if at.argument == argument else 0 for at in derivative.held),
                0,
            )
            for k in range(BATCH)
        )
        cells.append(
            Cell(
                "vmap",
                (str(BATCH), f"{names[argument]} alone"),
                f"under jax.vmap over {names[argument]} alone",
                rows,
                _vmapped(derivative, batched=frozenset({argument})),
                is_stacked=True,
                is_extra=place >= _MOST_ALONE,
            )
        )
    return cells


def _of_batch(derivative: Derivative) -> Run:
    keys = [_is_key(leaf) for leaf in derivative.held]
    axes = [None if is_key else 0 for is_key in keys]

    def run(moving: Any, held: Any, seed: Any) -> Values:
        shared = [
            value[0] if is_key else value
            for value, is_key in zip(held, keys, strict=True)
        ]

        def batch(*xs: Any) -> Values:
            # A fresh function: JAX is to trace it anew.
            call = lambda ys, zs: derivative.program.call(ys, zs)  # noqa: E731
            return jax.vmap(call, in_axes=(0, axes))(list(xs), shared)

        return pull(batch, moving, seed)

    return run


def _scanned(derivative: Derivative) -> Run:
    function = derivative.fresh()

    def run(*parts: Any) -> Values:
        return lax.scan(lambda _, at: (None, function(*at)), None, parts)[1]

    return run


def _of_scan(derivative: Derivative) -> Run:
    def run(moving: Any, held: Any, seed: Any) -> Values:
        def loop(*xs: Any) -> Values:
            def body(carry: Any, example: Any) -> Any:
                return carry, derivative.program.call(*example)

            return lax.scan(body, None, (list(xs), held))[1]

        return pull(loop, moving, seed)

    return run
