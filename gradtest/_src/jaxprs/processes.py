"""The key-value store that JAX's processes share: it has no public name.

Checked on jax 0.10.2 and 0.12.0: `jax._src.distributed.global_state` has the client of
the coordination service, whose errors are told apart by their text alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax._src import distributed


class StoreError(RuntimeError):
    """The coordination service does not answer."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The processes that `jax.distributed.initialize` brought together.

    Attributes:
      rank: This process's number.
      size: How many there are.
    """

    rank: int
    size: int
    _client: Any

    def put(self, key: str, value: bytes) -> bool:
        """Stores a value for good; returns False where the key had one already."""
        try:
            self._client.key_value_set_bytes(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise _store_error(error) from None
        return True

    def get(self, key: str, seconds: float) -> bytes | None:
        """Returns a value; None where there is none within so many seconds."""
        wait = max(1, round(1000 * seconds))
        try:
            return self._client.blocking_key_value_get_bytes(key, wait)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise _store_error(error) from None

    def delete(self, key: str) -> None:
        """Removes a value."""
        try:
            self._client.key_value_delete(key)
        except jax.errors.JaxRuntimeError as error:
            raise _store_error(error) from None


def current_job() -> Job | None:
    """Returns the job of this process; None where it is alone. Starts no backend."""
    state = distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None
    return Job(state.process_id, state.num_processes, state.client)


def _store_error(error: Exception) -> StoreError:
    return StoreError((str(error).strip().splitlines() or [""])[0])
