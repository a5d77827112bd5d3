"""The arguments of a check: which leaves move, which are held, where they are drawn."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from gradtest import domains
from gradtest._src import seeding
from gradtest._src.devices import spanning
from gradtest._src.lifting import is_inexact, lifted_dtype, widen

PyTree = Any
Key = Any


class Role(enum.Enum):
    """What a check does with a leaf of the arguments."""

    MOVES = "moves"  # float or complex: differentiated
    HELD = "held"  # an array that stays as it is: integers, keys, other arguments
    STATIC = "static"  # no array: None, bool, int, str, ...


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """Values that one leaf had, to be taken in turn: one in each trial."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the arguments.

    Attributes:
      name: Its path in the user's names, such as `params['dense']['kernel']`.
      argument: Position of the argument that it belongs to.
      role: What the check does with it.
      source: The user's value, a `domains.Domain`, a `jax.ShapeDtypeStruct` or
        `Recorded` values.
      shape: Its shape; `()` for static leaves.
      dtype: Its dtype as JAX sees it; None for static leaves.
    """

    name: str
    argument: int
    role: Role
    source: Any
    shape: tuple[int, ...] = ()
    dtype: Any = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Point:
    """Values of the moving and the held leaves, in the order of `Inputs`."""

    moving: tuple[Any, ...]
    held: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The flattened arguments of the function under test."""

    leaves: tuple[Leaf, ...]
    treedef: Any
    names: tuple[str, ...]
    argnums: tuple[int, ...]
    unchecked: tuple[str, ...]

    @property
    def moving(self) -> tuple[Leaf, ...]:
        """The leaves that are differentiated."""
        return self.of_role(Role.MOVES)

    def of_role(self, role: Role) -> tuple[Leaf, ...]:
        """The leaves of one role, in tree order."""
        return tuple(leaf for leaf in self.leaves if leaf.role is role)

    def draw(self, key: Key, trial: int) -> Point:
        """Returns the values of one trial; leaves given as values stay as given."""
        values = [
            (leaf.role, _draw(leaf, key, trial))
            for leaf in self.leaves
            if leaf.role is not Role.STATIC
        ]
        return Point(
            tuple(value for role, value in values if role is Role.MOVES),
            tuple(value for role, value in values if role is Role.HELD),
        )

    def arguments(self, moving: Sequence[Any], held: Sequence[Any]) -> tuple:
        """Rebuilds the user's argument tuple around the given leaf values."""
        moves, holds = iter(moving), iter(held)
        picked: dict[Role, Iterator[Any]] = {Role.MOVES: moves, Role.HELD: holds}
        leaves = [
            leaf.source if leaf.role is Role.STATIC else next(picked[leaf.role])
            for leaf in self.leaves
        ]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def widened(self, point: Point) -> tuple[Inputs, Point]:
        """Returns the same inputs and values with every float in float64."""
        leaves = tuple(
            leaf
            if leaf.dtype is None or not is_inexact(leaf.dtype)
            else dataclasses.replace(leaf, dtype=lifted_dtype(leaf.dtype))
            for leaf in self.leaves
        )
        wide = Point(tuple(map(widen, point.moving)), tuple(map(widen, point.held)))
        return dataclasses.replace(self, leaves=leaves), wide

    def of_argument(self, argument: int) -> list[Leaf]:
        """Returns the leaves of one argument, in tree order."""
        return [leaf for leaf in self.leaves if leaf.argument == argument]

    def argument_tree(self, argument: int) -> Any:
        """Returns the tree structure of one argument; None counts as a leaf."""
        return self.treedef.children()[argument]


def read_inputs(
    fn: Callable[..., Any],
    args: tuple[PyTree, ...],
    *,
    argnums: int | Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    names: Sequence[str] | None = None,
    traced: bool = False,
) -> Inputs:
    """Sorts the leaves of `args` into those that move and those that are held.

    Args:
      fn: The function under test; its parameter names name the leaves.
      args: Its arguments; leaves may be arrays, numbers, keys, None,
        `jax.ShapeDtypeStruct` or `gradtest.domains` entries.
      argnums: Arguments to differentiate; None takes each with a float or complex leaf.
      exclude: Names of leaves, or of whole sub-trees, that are held and not checked.
      names: Names of the arguments, in place of the parameters of `fn`.
      traced: Whether leaves may be traced values.

    Raises:
      TypeError: `fn` is not callable, or `args` holds traced values that it may not.
      ValueError: `argnums` or `exclude` names nothing, or no leaf can move.
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable, got {fn!r}.")
    wanted = read_argnums(argnums, len(args))
    flat, treedef = jax.tree_util.tree_flatten_with_path(args, is_leaf=_is_leaf)
    if names is None:
        names = argument_names(fn, len(args))
    excluded = _Exclusion(exclude)
    leaves = []
    for path, value in flat:
        argument = path[0].idx
        name = names[argument] + jax.tree_util.keystr(path[1:])
        leaf = _read_leaf(name, argument, value, traced)
        checked = argument in wanted and not excluded.covers(leaf)
        if leaf.role is Role.MOVES and not checked:
            leaf = dataclasses.replace(leaf, role=Role.HELD)
        leaves.append(leaf)
    if not traced and is_tracing():
        raise TypeError(
            "the assertion was called while JAX traces a function: call it outside of "
            "jit, grad, vmap and pmap, and hand the variant over as `variant=`."
        )
    excluded.raise_on_unused(leaves)
    moving = {leaf.argument for leaf in leaves if leaf.role is Role.MOVES}
    _check_moving(leaves, wanted, moving, argnums, excluded.covered)
    used = wanted if argnums is not None else tuple(sorted(moving))
    return Inputs(tuple(leaves), treedef, tuple(names), used, tuple(excluded.covered))


def is_tracing() -> bool:
    """Whether JAX traces a function now: then constants are traced values too."""
    with jax.transfer_guard("allow"):
        return isinstance(jax.device_put(np.zeros(())), jax.core.Tracer)


def _is_drawn(value: Any) -> bool:
    return isinstance(value, domains.Domain | jax.ShapeDtypeStruct | Recorded)


def _is_leaf(value: Any) -> bool:
    return value is None or _is_drawn(value)


def read_argnums(argnums: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Returns the positions that `argnums` names among so many arguments."""
    if argnums is None:
        return tuple(range(count))
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers:
        raise ValueError("`argnums` is empty: name at least one argument.")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"`argnums` must hold integers, got {number!r}.")
        if not -count <= number < count:
            raise ValueError(
                f"`argnums` names argument {number}, but the call has {count} "
                f"argument{'s' * (count != 1)}: wanted {-count} <= argnums < {count}."
            )
    read = tuple(int(number) % count for number in numbers)
    if len(set(read)) < len(read):
        raise ValueError(f"`argnums` names an argument twice, got {argnums!r}.")
    return read


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Returns the parameter names of `fn`, or `args[i]` where it has none."""
    names: list[str] = []
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    for parameter in parameters:
        if parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(count)]


def _read_leaf(name: str, argument: int, value: Any, traced: bool) -> Leaf:
    if isinstance(value, jax.core.Tracer) and not traced:
        raise TypeError(
            f"`{name}` is a traced value ({value.aval}): call the assertion outside "
            "of jit, grad, vmap and pmap, and hand the variant over as `variant=`."
        )
    if isinstance(value, Recorded):
        aval = jax.typeof(value.values[0])
        shape, dtype = aval.shape, aval.dtype
    elif isinstance(value, domains.Domain):
        shape, dtype = value.sized_shape(), dtypes.canonicalize_dtype(value.dtype)
    elif isinstance(value, float | complex | np.generic | np.ndarray | jax.Array):
        aval = jax.typeof(value)
        shape, dtype = aval.shape, aval.dtype
    elif isinstance(value, jax.ShapeDtypeStruct):
        shape, dtype = value.shape, value.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"`{name}` is a jax.ShapeDtypeStruct of dtype {dtype}: only float and "
                "complex ones can be drawn; use gradtest.domains.integers."
            )
    else:
        return Leaf(name, argument, Role.STATIC, value)
    moves = not dtypes.issubdtype(dtype, dtypes.extended) and jnp.issubdtype(
        dtype, jnp.inexact
    )
    role = Role.MOVES if moves else Role.HELD
    return Leaf(name, argument, role, value, tuple(shape), dtype)


def _draw(leaf: Leaf, key: Key, trial: int) -> Any:
    source = leaf.source
    if isinstance(source, Recorded):
        source = source.values[trial % len(source.values)]
    if isinstance(source, jax.ShapeDtypeStruct):
        source = domains.normal(source.shape, dtype=source.dtype)
    if isinstance(source, domains.Domain):
        drawn = source.draw(seeding.generator(key, "point", trial, leaf.name))
        return drawn.astype(dtypes.canonicalize_dtype(drawn.dtype))
    if leaf.role is Role.MOVES and not isinstance(source, jax.core.Tracer):
        _check_finite(leaf, source)
    return source


def _check_finite(leaf: Leaf, value: Any) -> None:
    array = spanning.own_part(value)
    finite = np.isfinite(
        array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    )
    if finite.all():
        return
    wanted = f"`{leaf.name}` must be finite where it is differentiated, got"
    if not array.shape:
        raise ValueError(f"{wanted} {array[()]}.")
    if spanning.spans(value):
        wanted = wanted.replace(", got", ": this process's part has")
        raise ValueError(f"{wanted} {array[~finite][0]}.")
    index = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise ValueError(
        f"{wanted} {array[index]} at index {list(index)} ({int((~finite).sum())} of "
        f"{array.size} entries are not finite)."
    )


class _Exclusion:
    """Matches leaf names against the user's `exclude`, exactly or as a sub-tree."""

    def __init__(self, exclude: Sequence[str]):
        if isinstance(exclude, str):
            raise TypeError(
                f"`exclude` must be a sequence of leaf names, got the string "
                f"{exclude!r}; write exclude=({exclude!r},)."
            )
        self.patterns = tuple(exclude)
        self.covered: list[str] = []
        self._used: set[str] = set()

    def covers(self, leaf: Leaf) -> bool:
        """Whether the leaf is excluded; remembers the moving ones that are."""
        for pattern in self.patterns:
            rest = leaf.name.removeprefix(pattern)
            if rest != leaf.name and (not rest or rest[0] in "[."):
                self._used.add(pattern)
                if leaf.role is Role.MOVES:
                    self.covered.append(leaf.name)
                return True
        return False

    def raise_on_unused(self, leaves: Sequence[Leaf]) -> None:
        """Raises where a pattern names no leaf: a typo would check too little."""
        for pattern in self.patterns:
            if pattern not in self._used:
                names = ", ".join(leaf.name for leaf in leaves[:8])
                raise ValueError(
                    f"`exclude` names {pattern!r}, which is no leaf of the arguments: "
                    f"there are {names}{', …' * (len(leaves) > 8)}."
                )


def _check_moving(
    leaves: Sequence[Leaf],
    wanted: tuple[int, ...],
    moving: set[int],
    argnums: int | Sequence[int] | None,
    excluded: Sequence[str],
) -> None:
    """Raises where there is nothing to differentiate."""
    if excluded and not moving:
        raise ValueError("`exclude` leaves nothing to check: every leaf is excluded.")
    if not wanted:
        raise ValueError("`args` is empty: there is no argument to differentiate.")
    moved = [leaf for leaf in leaves if leaf.role is Role.MOVES]
    if moved and not any(math.prod(leaf.shape) for leaf in moved):
        raise ValueError(
            f"`args` has no entry to differentiate: {', '.join(map(str, moved[:4]))}."
        )
    missing = [n for n in wanted if n not in moving]
    if not missing or (argnums is None and moving):
        return
    found = [_describe(leaf) for leaf in leaves if leaf.argument in missing]
    plural = "s" * (len(missing) != 1)
    raise ValueError(
        f"`args` has no leaf to differentiate in argument{plural} "
        f"{', '.join(map(str, missing))}: wanted a float or complex array, got "
        f"{', '.join(found[:4]) or 'an empty tree'}."
    )


def _describe(leaf: Leaf) -> str:
    if leaf.dtype is not None:
        return str(leaf)
    if type(leaf.source) is int:
        return f"{leaf.name}: {leaf.source} (an int: write {leaf.source}.0)"
    return f"{leaf.name}: {leaf.source!r}"
