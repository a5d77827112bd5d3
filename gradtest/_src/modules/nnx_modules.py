"""NNX modules as pure functions of their variables; they stay as they are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from gradtest._src.lifting import is_inexact
from gradtest._src.modules.model import Call, Model, Streams, entries_of

PyTree = Any
Path = tuple[Any, ...]

# What parameters are called among all that a call leaves behind.
_PARAMS = "params"
# The collection of arrays that a module holds without a variable around them.
_BARE = "arrays"
# Streams that any `rngs` may have, used or not.
_USUAL_STREAMS = frozenset({"params", "default"})


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """Where one variable's value comes from: a collection, or `params`."""

    path: Path
    variable: Any
    collection: str | None

    @property
    def value(self) -> Any:
        return _value(self.variable)

    def holding(self, value: Any) -> Any:
        """Returns the variable with another value."""
        if isinstance(self.variable, nnx.Variable):
            return self.variable.replace(value)
        return value


def read(module: Any, call: Call, variables: Any, wrt: list[Any]) -> Model:
    """Reads an NNX module with its own variables, or those that are given.

    Raises:
      TypeError, ValueError: `variables` or `rngs` is not what it must be.
    """
    name = type(module).__name__
    graph, state = nnx.split(module)
    leaves = dict(nnx.to_flat_state(state))
    if variables is not None:
        leaves = _replaced(leaves, variables, name)
    takes_rngs = _takes_rngs(module, call.method)
    held = _reseeded(_random(leaves), call, takes_rngs, name)
    slots = tuple(
        _Slot(path, leaf, _collection(leaf, wrt))
        for path, leaf in leaves.items()
        if path not in held
    )

    def apply(
        params: PyTree, collections: PyTree, inputs: Any, kwargs: Any
    ) -> tuple[Any, PyTree]:
        output, left = after(params, collections, inputs, kwargs)
        left.pop(_PARAMS, None)
        return output, left

    def after(
        params: PyTree, collections: PyTree, inputs: Any, kwargs: Any
    ) -> tuple[Any, PyTree]:
        # Made anew: a variable may change in the trace alone that it was made in.
        flat = {path: leaf.replace(_value(leaf)) for path, leaf in held.items()}
        for slot in slots:
            tree = params if slot.collection is None else collections[slot.collection]
            flat[slot.path] = slot.holding(_at(tree, slot.path))
        ordered = [(path, flat[path]) for path in leaves]
        merged = nnx.merge(graph, nnx.from_flat_state(ordered))
        if takes_rngs and call.rngs is not None:
            kwargs = {"rngs": _fresh_rngs(call)} | kwargs
        output = _bound(merged, call.method)(*inputs, **kwargs)
        return _without_variables(output), _collections(merged, slots)

    variable_at = {slot.path: slot.variable for slot in slots}
    params = _nested((slot.path, slot.value) for slot in slots if not slot.collection)
    collections = _grouped(slots)
    entries = entries_of(params, lambda path, leaf: _covering(variable_at, path, leaf))
    notes = _notes(slots)
    return Model(params, collections, apply, entries, notes, after=after)


def _notes(slots: tuple[_Slot, ...]) -> tuple[str, ...]:
    """Says which arrays look like parameters, but are none that NNX would train."""
    bare = [
        _written(slot.path)
        for slot in slots
        if slot.collection == _BARE and is_inexact(getattr(slot.value, "dtype", None))
    ]
    if not bare:
        return ()
    return (
        f"held, because they are arrays without an nnx.Variable around them: "
        f"{', '.join(bare[:4])}{', …' * (len(bare) > 4)}",
    )


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _collection(leaf: Any, wrt: list[Any]) -> str | None:
    """Returns the collection that a variable is held in; None where it is a parameter.

    A variable of any type is a parameter where `wrt` names its type.
    """
    types = tuple(each for each in wrt if isinstance(each, type))
    if isinstance(leaf, (nnx.Param, *types)):
        return None
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) else _BARE


def _grouped(slots: tuple[_Slot, ...]) -> dict[str, PyTree]:
    names = dict.fromkeys(slot.collection for slot in slots if slot.collection)
    return {
        name: _nested((s.path, s.value) for s in slots if s.collection == name)
        for name in names
    }


def _collections(module: Any, slots: tuple[_Slot, ...]) -> dict[str, PyTree]:
    """Returns a module's variables after a call, new ones among them."""
    known = {slot.path: slot for slot in slots}
    now = []
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        if isinstance(leaf, nnx.RngState):
            continue
        slot = known.get(path)
        collection = slot.collection if slot else _collection(leaf, [])
        if slot is None and collection is None:
            collection = nnx.Param.__name__
        now.append(_Slot(path, leaf, collection or _PARAMS))
    return _grouped(tuple(now))


def _nested(flat: Iterator[tuple[Path, Any]] | Any) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in flat:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def _at(tree: PyTree, path: Path) -> Any:
    return functools.reduce(lambda node, part: node[part], path, tree)


def _covering(variable_at: Mapping[Path, Any], path: Path, leaf: Any) -> Any:
    """Returns the variable that a leaf belongs to: its value may be a tree."""
    heads = (path[:count] for count in range(len(path), 0, -1))
    return next((variable_at[head] for head in heads if head in variable_at), leaf)


def _without_variables(output: Any) -> Any:
    return jax.tree_util.tree_map(
        _value, output, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


# --- calls ---------------------------------------------------------------------------


def _bound(module: Any, method: Any) -> Callable[..., Any]:
    if method is None:
        return module
    if isinstance(method, str):
        return getattr(module, method)
    # One that is bound to the user's module would change that.
    function = method.__func__ if inspect.ismethod(method) else method
    return functools.partial(function, module)


def _takes_rngs(module: Any, method: Any) -> bool:
    if method is None:
        method = type(module).__call__
    try:
        call = getattr(module, method) if isinstance(method, str) else method
        return "rngs" in inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False


# --- variables that are given --------------------------------------------------------


def _replaced(leaves: dict[Path, Any], variables: Any, name: str) -> dict[Path, Any]:
    """Returns the variables with those that the user gave in their places."""
    if isinstance(variables, nnx.State):
        given = {path: _value(v) for path, v in nnx.to_flat_state(variables)}
    elif isinstance(variables, Mapping):
        given = dict(_walk(variables, (), leaves))
    else:
        raise TypeError(
            "`variables` of an NNX module must be an nnx.State or its pure dict, got "
            f"{type(variables).__name__}."
        )
    replaced = dict(leaves)
    for path, value in given.items():
        if path not in leaves:
            raise ValueError(_unknown(path, leaves, name))
        own = _value(leaves[path])
        if _shape(own) != _shape(value):
            raise ValueError(
                f"`variables` do not fit {name}: {_written(path)} has shape "
                f"{_shape(value)}, but the module's {_shape(own)}."
            )
        replaced[path] = _Slot(path, leaves[path], None).holding(value)
    return replaced


def _walk(node: Any, path: Path, leaves: Mapping[Path, Any]) -> Iterator[Any]:
    if path in leaves or not isinstance(node, Mapping):
        yield path, _value(node)
        return
    for key, value in node.items():
        yield from _walk(value, (*path, key), leaves)


def _unknown(path: Path, leaves: Mapping[Path, Any], name: str) -> str:
    wanted = ", ".join(map(_written, list(leaves)[:6]))
    told = (
        f"`variables` has {_written(path)}, which is no variable of {name}: there are "
        f"{wanted}{', …' * (len(leaves) > 6)}."
    )
    if path[0] == "params":
        told += " A dict {'params': ...} is what Linen modules take; of an NNX module "
        told += "hand over nnx.state(module), or its pure dict."
    return told


def _shape(value: Any) -> Any:
    return getattr(value, "shape", ())


def _written(path: Path) -> str:
    return "/".join(map(str, path))


# --- random streams ------------------------------------------------------------------


def _random(leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    return {p: leaf for p, leaf in leaves.items() if isinstance(leaf, nnx.RngState)}


def _reseeded(
    held: dict[Path, Any], call: Call, takes_rngs: bool, name: str
) -> dict[Path, Any]:
    """Returns the random state of a module: its own, or started from `rngs`.

    Raises:
      ValueError: `rngs` names a stream that the module does not have.
    """
    if call.rngs is None:
        return held
    streams = _streams(call)
    tags = {_tag(leaf) for leaf in held.values()}
    unknown = set(streams.given) - tags - _USUAL_STREAMS
    if unknown and not takes_rngs:
        raise ValueError(
            f"`rngs` names the stream {min(unknown)!r}, which {name} does not have: it "
            f"has {sorted(tags) or 'none'}."
        )
    seen: dict[str, int] = {}
    reseeded = {}
    for path, leaf in held.items():
        value = _value(leaf)
        tag = _tag(leaf)
        covered = streams.is_open or tag in streams.given or "default" in streams.given
        if covered and isinstance(leaf, nnx.RngKey):
            number = seen[tag] = seen.get(tag, -1) + 1
            value = _key_like(value, _stream_key(streams, tag), number)
        elif covered:
            value = jax.numpy.zeros_like(value)
        reseeded[path] = leaf.replace(value)
    return reseeded


def _tag(leaf: Any) -> str:
    return str(getattr(leaf, "tag", "default"))


def _streams(call: Call) -> Streams:
    rngs = call.rngs
    if isinstance(rngs, nnx.Rngs):
        rngs = {
            _tag(leaf): _value(leaf)
            for _, leaf in nnx.to_flat_state(nnx.state(rngs))
            if isinstance(leaf, nnx.RngKey)
        }
    return Streams(rngs, call.key)


def _stream_key(streams: Streams, tag: str) -> Any:
    if tag not in streams.given and "default" in streams.given:
        return streams.given["default"]
    return streams.key_of(tag)


def _key_like(own: Any, key: Any, number: int) -> Any:
    """Returns a key for one holder of a stream, as many as it has there."""
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, own.shape) if own.shape else key


def _fresh_rngs(call: Call) -> nnx.Rngs:
    """Returns streams for a method that takes them, as they are before any call."""
    if isinstance(call.rngs, nnx.Rngs):
        return nnx.clone(call.rngs)
    streams = _streams(call)
    if streams.is_open:
        return nnx.Rngs(streams.derived("default"))
    return nnx.Rngs(**streams.given)
