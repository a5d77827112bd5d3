"""Chex-style assertions that a gradient is right: for JAX, Flax and Optax projects.

The names are those of `gradtest._src.public`. It is imported when one of them is first
used, so that the pytest plugin and the command line start without JAX.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from gradtest import strategies as strategies
    from gradtest._src.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> _typing.Any:
        if name in ("domains", "strategies"):  # one imports what is public, or less
            return _importlib.import_module(f"gradtest.{name}")
        if not name.startswith("_"):
            from gradtest._src import public

            if hasattr(public, name):
                return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        from gradtest._src import public

        names = {name for name in vars(public) if not name.startswith("_")}
        return sorted(globals().keys() | names)
