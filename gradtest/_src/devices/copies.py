"""What every device holds of a result that all of them should hold alike.

Reading an array takes one device's copy and never looks at the others: a gradient that
is wrong on one device alone would pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import execution
from gradtest._src.devices import spanning


@dataclasses.dataclass(frozen=True)
class Copies:
    """The copies of one result.

    Attributes:
      values: Those that differ from each other, bit by bit.
      holders: For each of them, the positions of the devices that hold it. Devices that
        hold a copy together count as one.
    """

    values: list[np.ndarray]
    holders: list[list[int]]

    @property
    def count(self) -> int:
        """How many copies there are, equal ones too."""
        return sum(map(len, self.holders))

    def farthest(self, reference: np.ndarray | None) -> np.ndarray:
        """Returns the copy that lies farthest from a reference, or from the first."""
        truth = self.values[0] if reference is None else reference
        gaps = np.array([float(np.sum(np.abs(value - truth))) for value in self.values])
        return self.values[int(np.argmax(np.where(np.isnan(gaps), np.inf, gaps)))]


def read_copies(array: Any, *, has_device_axis: bool) -> Copies:
    """Returns every device's copy of a result.

    Args:
      array: The result.
      has_device_axis: Whether the copies are its rows, one for each device.
    """
    if has_device_axis:
        return _distinct(execution.to_host(array))
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) < 2:
        return Copies([execution.to_host(array)], [[0]])
    rows = _local_replicas(array)
    if rows is None:
        return Copies([execution.to_host(array)], [[0]])
    if not array.is_fully_addressable:
        rows = [row for part in spanning.from_all_processes(rows) for row in part]
    return _distinct([execution.to_host(row) for row in rows])


def _local_replicas(array: jax.Array) -> list[np.ndarray] | None:
    """Returns the whole copies that this process holds; None where there is none."""
    parts: dict[int, list[Any]] = {}
    for shard in array.addressable_shards:
        parts.setdefault(shard.replica_id, []).append(shard)
    rows = []
    for replica in sorted(parts):
        if sum(shard.data.size for shard in parts[replica]) < array.size:
            return None
        whole = np.empty(array.shape, array.dtype)
        for shard in parts[replica]:
            whole[shard.index] = np.asarray(shard.data)
        rows.append(whole)
    return rows


def _distinct(rows: Sequence[np.ndarray]) -> Copies:
    values: list[np.ndarray] = []
    holders: list[list[int]] = []
    for device, row in enumerate(rows):
        for value, devices in zip(values, holders, strict=True):
            if np.array_equal(row, value, equal_nan=True):
                devices.append(device)
                break
        else:
            values.append(row)
            holders.append([device])
    return Copies(values, holders)
