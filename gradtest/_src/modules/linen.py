"""Linen modules as pure functions of their variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import core, errors, nnx

from gradtest._src.modules.model import Call, Model, Streams, entries_of

PyTree = Any

_NEEDS_STREAM = re.compile(r'needs PRNG for "([^"]+)"')
# What a call could change, if nobody said what it may.
_CHANGEABLE = core.DenyList(("intermediates",))
_STATE = core.DenyList(("params", "intermediates"))
# What says that variables are not those of the module.
_MISFITS = (
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
    errors.ModifyScopeVariableError,
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
)


def read(module: nn.Module, call: Call, variables: Any, wrt: list[Any]) -> Model:
    """Reads a Linen module, initialised unless it has or is given variables.

    Raises:
      TypeError, ValueError: `variables` or `rngs` is not what it must be.
    """
    del wrt
    streams = _LinenStreams(call, type(module).__name__)
    if module.scope is not None:
        module, bound = module.unbind()
        variables = bound if variables is None else variables
    is_own = variables is None
    if is_own:
        variables = streams.initialised(module, call)
    variables = _plain(variables, is_own)
    params = variables.pop("params", {})

    def apply(
        params: PyTree, collections: PyTree, inputs: Any, kwargs: Any
    ) -> tuple[Any, PyTree]:
        options = {"mutable": list(collections)} | kwargs
        returned = called(params, collections, inputs, options)
        if options["mutable"] is False:
            return returned, collections
        output, updated = returned
        kept = {**collections, **core.unfreeze(updated)}
        return (returned if "mutable" in kwargs else output), kept

    def after(
        params: PyTree, collections: PyTree, inputs: Any, kwargs: Any
    ) -> tuple[Any, PyTree]:
        # Some layers (SpectralNorm) write mapped parameters back where they may, though
        # they do without: only what can't do without writes its parameters.
        try:
            output, updated = called(
                params, collections, inputs, kwargs | {"mutable": _STATE}
            )
        except errors.ModifyScopeVariableError:
            output, updated = called(
                params, collections, inputs, kwargs | {"mutable": _CHANGEABLE}
            )
        kept = {"params": params, **collections, **core.unfreeze(updated)}
        has_pair = kwargs.get("mutable", False) is not False
        return ((output, updated) if has_pair else output), kept

    def called(params: PyTree, collections: PyTree, inputs: Any, options: Any) -> Any:
        given = {"params": params, **collections}
        return streams.run(
            lambda rngs: module.apply(
                given, *inputs, rngs=rngs, method=call.method, **options
            )
        )

    entries = entries_of(params, lambda path, leaf: leaf)
    return Model(params, variables, apply, entries, after=after)


def _plain(variables: Any, is_own: bool) -> dict[str, PyTree]:
    """Returns variables as nested dicts of arrays, sharding metadata left out."""
    if isinstance(variables, nnx.State):
        raise TypeError(
            "`variables` of a Linen module must be the dict that `init` returns, got "
            "an nnx.State: that is an NNX module's."
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`variables` must be a dict of collections such as {'params': ...}, got "
            f"{type(variables).__name__}."
        )
    plain = dict(core.unfreeze(nn.meta.unbox(variables)))
    if "params" not in plain and not is_own:
        raise ValueError(
            "`variables` must hold the collection 'params', got "
            f"{sorted(map(str, plain))}: hand over all that `init` returns, or "
            "{'params': params}."
        )
    return plain


def explained(error: Exception, name: str) -> Exception | None:
    """Returns a clear error for one of Flax's about a module's variables."""
    if isinstance(error, _MISFITS):
        return ValueError(
            f"`variables` do not fit {name}: {_first_line(error)} What `init` returns "
            "does, all of its collections."
        )
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition(" (https://")[0].splitlines()[0]


class _LinenStreams(Streams):
    """Streams that are added as a module asks for them."""

    def __init__(self, call: Call, name: str):
        if isinstance(call.rngs, nnx.Rngs):
            raise TypeError(
                "`rngs` of a Linen module must be a key or a dict of keys by stream, "
                "got nnx.Rngs: that is an NNX module's."
            )
        super().__init__(call.rngs, call.key)
        self._name = name
        self._used = dict(self.given)

    def run(self, function: Any) -> Any:
        """Calls a function of the streams; open ones are added one by one."""
        return self._supplied(function, self._used, self.is_open)

    def initialised(self, module: nn.Module, call: Call) -> PyTree:
        """Returns fresh variables of a module."""
        streams = {"params": self.derived("params"), **self.given}
        options = {
            name: value for name, value in call.kwargs.items() if name not in _APPLY
        }
        return self._supplied(
            lambda rngs: module.init(rngs, *call.inputs, method=call.method, **options),
            streams,
            is_open=True,
        )

    def _supplied(self, function: Any, streams: dict[str, Any], is_open: bool) -> Any:
        while True:
            try:
                return function(dict(streams))
            except errors.InvalidRngError as error:
                found = _NEEDS_STREAM.search(str(error))
                missing = found.group(1) if found else ""
                if is_open and missing and missing not in streams:
                    streams[missing] = self.derived(missing)
                    continue
                raise ValueError(
                    f"`rngs` lacks the stream {missing!r} that {self._name} asks for: "
                    f"it has {sorted(streams)}. Add it, or hand over one key for all "
                    "streams."
                ) from error


# Options of `apply` that `init` does not take in the same sense.
_APPLY = frozenset({"mutable", "capture_intermediates"})
