"""Arrays that span processes: brought to each of them whole, and laid out again.

A process can read only the shards on its own devices. What decides a check must be the
same in every process, or one of them would run a program that the others do not: so
where copies of one value differ, all processes take that of the first device.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def spans(value: Any) -> bool:
    """Whether a value is an array on devices of several processes."""
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return False
    return not value.is_fully_addressable


def whole(value: Any) -> np.ndarray:
    """Returns all of an array, wherever it lies, as a NumPy array.

    Every process must ask for the arrays that span processes, in the same order.
    """
    return np.asarray(brought_home(value))


def brought_home(tree: Any) -> Any:
    """Returns a tree with NumPy arrays, or keys, in place of what spans processes."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if spans(leaf)]
    if places:
        arrays = [_words(leaves[i]) for i in places]
        for place, found in zip(places, _gathered(arrays), strict=True):
            leaves[place] = _of_words(found, leaves[place])
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _words(array: jax.Array) -> jax.Array:
    """Returns the numbers that an array consists of: a key's are its words."""
    return jax.random.key_data(array) if _is_key(array) else array


def _of_words(words: np.ndarray, like: jax.Array) -> Any:
    """Returns keys, in place of their words, where `like` is an array of keys."""
    if not _is_key(like):
        return words
    impl = jax.random.key_impl(like)
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl=impl)


def _is_key(array: Any) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))


def own_part(value: Any) -> np.ndarray:
    """Returns what this process has of an array: all entries, or its shards' in a row.

    No other process takes part.
    """
    if not spans(value):
        return np.asarray(value)
    shards = [np.asarray(shard.data).ravel() for shard in value.addressable_shards]
    return np.concatenate(shards) if shards else np.zeros(0)


def own_copy(value: Any) -> np.ndarray:
    """Returns this process's copy of an array that every device has whole."""
    return np.asarray(value.addressable_data(0) if spans(value) else value)


def laid_out(array: Any, sharding: Any) -> Any:
    """Lays an array that every process has over devices, its own or all processes'."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if _is_key(array):
        words = laid_out(np.asarray(jax.random.key_data(array)), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def from_all_processes(array: Any) -> np.ndarray:
    """Returns the arrays that the processes have, of one shape, in order of rank."""
    with _gathering():
        return multihost_utils.process_allgather(np.asarray(array))


@contextlib.contextmanager
def _gathering() -> Iterator[None]:
    """Settings for moving values as they are, NaN or float64."""
    with (
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.enable_x64(True),
        jax.transfer_guard("allow"),
    ):
        yield


def _gathered(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns arrays whole; of copies that differ the first device's."""
    count = max(len(_own_devices(array)) for array in arrays)
    digests = from_all_processes([_digests(array, count) for array in arrays])
    return [
        _whole(array, alike=_copies_are_alike(array, digests[:, i]))
        for i, array in enumerate(arrays)
    ]


def _whole(array: jax.Array, *, alike: bool) -> np.ndarray:
    if alike and array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if alike:
        with _gathering():
            return multihost_utils.process_allgather(array, tiled=True)
    own = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
    none = np.zeros(array.sharding.shard_shape(array.shape), array.dtype)
    parts = from_all_processes([own.get(one, none) for one in _own_devices(array)])
    found = np.empty(array.shape, array.dtype)
    for copies in _holders(array).values():
        process, place, index = copies[0]
        found[index] = parts[process, place]
    return found


def _own_devices(array: jax.Array) -> list[Any]:
    """Returns this process's devices, of the kind that an array lies on."""
    return jax.local_devices(backend=_platform(array))


def _platform(array: jax.Array) -> str:
    device: Any = next(iter(array.sharding.device_set))
    return device.platform


def _digests(array: jax.Array, count: int) -> np.ndarray:
    """Returns two words for each device of this process: a digest of what it holds."""
    found = np.zeros((count, 2), np.uint32)
    places = {device: i for i, device in enumerate(_own_devices(array))}
    for shard in array.addressable_shards:
        data = np.asarray(shard.data).tobytes()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        found[places[shard.device]] = np.frombuffer(digest, np.uint32)
    return found


def _copies_are_alike(array: jax.Array, digests: np.ndarray) -> bool:
    return all(
        np.array_equal(digests[process, place], digests[copies[0][:2]])
        for copies in _holders(array).values()
        for process, place, _ in copies[1:]
    )


def _holders(array: jax.Array) -> dict[str, list[tuple[int, int, Any]]]:
    """Returns, for each part of an array, the devices that hold it and its index.

    A device is named by its process and its place among that process's devices.
    """
    seen: dict[int, int] = {}
    places = {}
    for device in jax.devices(_platform(array)):
        places[device] = seen.setdefault(device.process_index, 0)
        seen[device.process_index] += 1
    found: dict[str, list[tuple[int, int, Any]]] = {}
    indices: dict[Any, Any] = dict(array.sharding.devices_indices_map(array.shape))
    for device in sorted(indices, key=lambda device: device.id):
        index = indices[device]
        holder = (device.process_index, places[device], index)
        found.setdefault(str(index), []).append(holder)
    return found
