"""A module's variables before and after one call."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.findings import Line
from gradtest._src.inputs import Role, read_inputs
from gradtest._src.lifting import Evaluator
from gradtest._src.modules.averages import Average, Dataflow, is_real
from gradtest._src.modules.subject import Subject

PyTree = Any
_ABSENT = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One variable.

    Attributes:
      name: Its name, such as `batch_stats['BatchNorm_0']['mean']`.
      path: The collection, and the path in it.
      before: What it was.
      after: What the call leaves.
      result: Its number among the results of the traced call; None where it has none.
      source: Its number among the inputs; None where it has none.
    """

    name: str
    path: tuple[str, ...]
    before: Any
    after: Any
    result: int | None
    source: int | None

    @property
    def collection(self) -> str:
        """The collection that it belongs to."""
        return self.path[0]

    @property
    def is_there_before(self) -> bool:
        """Whether there is such a variable before the call."""
        return self.before is not _ABSENT

    @property
    def is_there_after(self) -> bool:
        """Whether there is one after it."""
        return self.after is not _ABSENT

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(np.shape(self._known)) if self._is_array else ()

    @property
    def dtype(self) -> str:
        """The name of its dtype; empty where it is no array."""
        return str(self._known.dtype) if self._is_array else ""

    @property
    def _known(self) -> Any:
        return self.before if self.is_there_before else self.after

    @property
    def _is_array(self) -> bool:
        return hasattr(self._known, "dtype")

    @functools.cached_property
    def has_changed(self) -> bool:
        """Whether it is not the same, bit for bit."""
        if not self.is_there_before or not self.is_there_after:
            return True
        before, after = _bits(self.before), _bits(self.after)
        if before is None or after is None:
            return type(before) is not type(after) or bool(self.before != self.after)
        return before != after

    @property
    def has_settled(self) -> bool:
        """Whether it is the same but for rounding."""
        if not self.has_changed:
            return True
        if not self.shows_numbers or not is_real(self.before):
            return False
        before, after = (
            np.asarray(array).astype(np.complex128)
            for array in (self.before, self.after)
        )
        rounding = 64 * float(jnp.finfo(self.before.dtype).eps)
        return float(np.linalg.norm(after - before)) <= rounding * float(
            np.linalg.norm(before)
        )

    @property
    def shows_numbers(self) -> bool:
        """Whether two numbers can be shown: both are arrays of one shape."""
        arrays = [self.before, self.after]
        if not all(hasattr(array, "dtype") or _is_number(array) for array in arrays):
            return False
        shapes = {np.shape(array) for array in arrays}
        return len(shapes) == 1 and all(
            _is_number(a) or not jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended)
            for a in arrays
        )

    def entry(self) -> tuple[tuple[int, ...], complex, complex]:
        """Returns the entry that changes most: its index, after and before."""
        before, after = (
            np.asarray(array).astype(np.complex128)
            for array in (self.before, self.after)
        )
        with np.errstate(invalid="ignore"):
            gap = np.abs(after - before)
        flat = np.where(np.isnan(gap), np.inf, gap)
        index = tuple(map(int, np.unravel_index(int(np.argmax(flat)), flat.shape)))
        return index, _plain(after[index]), _plain(before[index])

    def fits(self, pattern: str) -> bool:
        """Whether a pattern names it, or what it is in."""
        parts = self.path
        heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        if any(fnmatch.fnmatchcase(head, pattern.strip("/")) for head in heads):
            return True
        rest = self.name.removeprefix(pattern)
        return rest != self.name and rest[:1] in ("", "[", ".")


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """One call of a module, and what it leaves.

    Attributes:
      items: Its variables.
      flow: What its results are made of.
      names: The names of the traced call's inputs.
      outputs: The numbers of the results that are the module's output.
      rows: The numbers of the results that are its output before the loss.
      state: The numbers of the inputs that are collections, not parameters.
      sown: Names of what the call adds by `sow`.
      has_collections: Whether there is other state than parameters.
    """

    items: tuple[Item, ...]
    flow: Dataflow
    names: tuple[str, ...]
    outputs: tuple[int, ...]
    rows: tuple[int, ...]
    state: tuple[int, ...]
    sown: tuple[str, ...]
    has_collections: bool

    def sources(self, item: Item) -> list[str]:
        """Names the inputs and parameters that a variable is computed from anew."""
        if item.result is None:
            return []
        if item.source is not None and self.flow.is_handed_through(
            item.result, item.source
        ):
            return []
        held = {*self.state, item.source}
        return [
            self.names[i] for i in sorted(self.flow.of_result(item.result))
            if i not in held
        ]  # fmt: skip

    def is_computed(self, item: Item) -> bool:
        """Whether a variable that was there is written anew, not handed through."""
        if item.result is None or item.source is None:
            return False
        return self.flow.is_computed(item.result)

    def uses_data(self, item: Item) -> bool:
        """Whether a variable is computed from what the module is called with."""
        return item.result is None or bool(
            self.flow.of_result(item.result) & self.flow.data
        )

    def line(self, item: Item) -> Line | None:
        """Returns the line of source that computes a variable."""
        return None if item.result is None else self.flow.line_of_result(item.result)

    def averages(self) -> list[Average]:
        """Returns the updated averages that the output depends on."""
        return self.flow.averages(self.outputs)


def moved(subject: Subject) -> Subject:
    """Returns the module with other values of its parameters."""
    params = jax.tree_util.tree_map(
        lambda leaf: 1.25 * leaf + 0.125 if is_real(leaf) else leaf, subject.params
    )
    return dataclasses.replace(subject, params=params)


def left_by(subject: Subject, held: Held) -> Subject:
    """Returns the module with its variables as a call left them."""
    left = {item.name: item.after for item in held.items if item.is_there_after}

    def replaced(path: Any, value: Any) -> Any:
        first, *rest = path
        return left.get(f"{first.key}{jax.tree_util.keystr(tuple(rest))}", value)

    before = {_PARAMS: subject.params, **subject.collections}
    after = jax.tree_util.tree_map_with_path(replaced, before)
    params = after.pop(_PARAMS)
    return dataclasses.replace(subject, params=params, collections=after)


def called(
    subject: Subject, loss: Callable[[Any], Any] | None, key: Any, trial: int
) -> Held:
    """Calls a module once, and reads its variables before and after."""
    assert subject.after is not None
    args = (0.0, *subject.args)
    names = ["_", *_names(subject)]
    inputs = read_inputs(subject.after, args, argnums=0, names=names)
    point = inputs.draw(key, trial)
    _, params, collections, *_ = inputs.arguments(point.moving, point.held)
    told: dict[str, Any] = {}

    def call(held: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        _, *given = inputs.arguments(point.moving, held)
        assert subject.after is not None
        output, left = subject.after(*given)
        rows = [o for o in jax.tree_util.tree_leaves(output) if is_real(o)]
        if loss is not None:
            output = loss(output)
        told["after"] = _flattened(left)
        arrays = [
            value for _, value in told["after"].values() if hasattr(value, "dtype")
        ]
        made = [o for o in jax.tree_util.tree_leaves(output) if is_real(o)]
        return made, arrays, rows

    with execution.user_code():
        jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(list(point.held))
    count = len(shapes[0])
    values = [_array(value) for value in point.held]
    with execution.working_precision():
        results = jax.jit(lambda at: Evaluator(wide=False)(jaxpr, at))(values)
    before = _flattened({_PARAMS: params, **collections})
    leaves = inputs.of_role(Role.HELD)
    places = {leaf.name: i for i, leaf in enumerate(leaves)}
    last = len(results) - len(shapes[2])
    items, sown = _items(before, told["after"], results[count:last], count, places)
    state = tuple(i for i, leaf in enumerate(leaves) if leaf.argument == 2)
    data = tuple(i for i, leaf in enumerate(leaves) if leaf.argument > 2)
    return Held(
        tuple(items),
        Dataflow(jaxpr, values, data, state),
        tuple(_called(leaf.name) for leaf in leaves),
        tuple(range(count)),
        tuple(range(last, len(results))),
        state,
        tuple(sown),
        bool(collections),
    )


_PARAMS = "params"
_COLLECTIONS = "collections"


def _names(subject: Subject) -> list[str]:
    assert subject.after is not None
    return list(inspect.signature(subject.after).parameters)


def _called(name: str) -> str:
    """Returns the name of a variable as a message has it."""
    if not name.startswith(f"{_COLLECTIONS}['"):
        return name
    collection, _, rest = name.removeprefix(f"{_COLLECTIONS}['").partition("']")
    return collection + rest


def _flattened(tree: PyTree) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Returns each leaf's path and value, by its name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    found = {}
    for path, value in flat:
        first, *rest = path
        parts = tuple(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
        name = f"{first.key}{jax.tree_util.keystr(tuple(rest))}"
        found[name] = (parts, value)
    return found


def _items(
    before: dict[str, Any],
    after: dict[str, Any],
    results: Sequence[Any],
    first: int,
    places: dict[str, int],
) -> tuple[list[Item], list[str]]:
    values: dict[str, tuple[Any, int | None]] = {}
    arrays = iter(enumerate(results))
    for name, (_, value) in after.items():
        if hasattr(value, "dtype"):
            place, value = next(arrays)
            values[name] = value, first + place
        else:
            values[name] = value, None
    items, sown = [], []
    for name in dict.fromkeys([*before, *after]):
        path = (before.get(name) or after[name])[0]
        if name not in before and _is_sown(path, before):
            sown.append(name)
            continue
        value, number = values.get(name, (_ABSENT, None))
        was = before[name][1] if name in before else _ABSENT
        source = places.get(name, places.get(_as_argument(path, name)))
        items.append(Item(name, path, was, value, number, source))
    return items, sown


def _as_argument(path: tuple[str, ...], name: str) -> str:
    return f"{_COLLECTIONS}['{path[0]}']{name.removeprefix(path[0])}"


def _is_sown(path: tuple[str, ...], before: dict[str, Any]) -> bool:
    """Whether a new variable is one more of a tuple, as `sow` makes them."""
    is_numbered = path[-1].isdigit()
    return is_numbered or path[0] in ("intermediates", "Intermediate")


def _array(value: Any) -> Any:
    return value if hasattr(value, "dtype") else jnp.asarray(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex)


def _plain(number: complex) -> complex:
    return number.real if not number.imag else number


def _bits(value: Any) -> tuple[Any, ...] | None:
    """Returns what tells two arrays apart; None for what is no array."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return None
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()
