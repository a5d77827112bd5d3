"""Where and how programs run: settings, compilation, and the cache of compiled ones.

Every setting of JAX is changed through its context manager, which is local to the
thread, so the caller's flags are as they were afterwards, also after an exception.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import variants
from gradtest._src.devices import homes, spanning

# A check runs each program a few times, so optimising machine code costs more than it
# saves; matrix products call a library and are as fast either way. The second option is
# gone from jax 0.12, hence a list: the first set that the installed JAX takes is used.
_QUICK: list[dict[str, Any]] = [
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
    {"xla_backend_optimization_level": 0},
    {},
]
_KEPT_PROGRAMS = 128


class SlipError(TypeError):
    """A user's slip that is found while a function is traced.

    It leaves `user_code` as a plain TypeError, without JAX's notes about frames.
    """


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Settings for tracing the user's functions: theirs, but with staging allowed.

    Arguments are handed over as they came, which may move them to a device.
    """
    slip = None
    with jax.disable_jit(False), jax.transfer_guard("allow"):
        try:
            yield
        except SlipError as error:
            slip = str(error)
    if slip is not None:
        raise SlipError(slip)


@contextlib.contextmanager
def working_precision() -> Iterator[None]:
    """Settings for running a traced program as the user runs it, NaN or not."""
    with (
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
    ):
        yield


@contextlib.contextmanager
def float64(*, stays: str = "") -> Iterator[None]:
    """Settings for lifted programs: float64, at home, no checks of the user's.

    Args:
      stays: Why the program must stay on the devices that it runs on, if so; see
        `homes.lifting`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(working_precision())
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(homes.lifting(stays))
        yield


@contextlib.contextmanager
def on_mesh(mesh: Any) -> Iterator[None]:
    """Settings for a program that takes its mesh from its surroundings, if any."""
    mesh = homes.moved(mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


@contextlib.contextmanager
def float64_on(mesh: Any, *, stays: str = "") -> Iterator[None]:
    """Settings for lifted programs that need a mesh around them."""
    with float64(stays=stays), on_mesh(mesh):
        yield


# How programs, and why they run where they do, are told where Chex forbids it.
_ITSELF = "the program itself", "the backend that it runs on"
_IN_FLOAT64 = (
    "the float64 form of the program, by which it is judged,",
    "where float64 is native; the program itself runs where it did",
)


class Compiled:
    """A program compiled for one set of shapes; runs under the settings it had.

    Attributes:
      why: Why it runs on an accelerator, where it should run on the CPU.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        settings: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        quickly: bool = True,
    ):
        self._settings = settings
        self._told = _ITSELF if settings is working_precision else _IN_FLOAT64
        # What is jitted or mapped already keeps its own settings.
        lowerable: Any = function if hasattr(function, "lower") else jax.jit(function)
        with settings():
            self._lowered: Any = lowerable.lower(*arguments)
            # An accelerator's compiler is to do as it does for the user's programs.
            self._quickly = quickly and not homes.keeps_accelerator()
        self._lock = threading.Lock()
        self._executable: Any = None
        self.why = ""

    @property
    def devices(self) -> tuple[Any, ...]:
        """The devices that the program is compiled for."""
        self.compile()
        shardings = jax.tree_util.tree_leaves(self._executable.output_shardings)
        found = set().union(*(sharding.device_set for sharding in shardings))
        return tuple(sorted(found, key=lambda device: device.id))

    def out_shapes(self) -> Any:
        """Returns the tree of result shapes and dtypes, before it is compiled."""
        return shapes_of(self._lowered.out_info)

    def compile(self) -> Compiled:
        """Compiles now, if that has not happened yet; other threads may do the same."""
        with self._lock, variants.explaining_refusals(*self._told):
            if self._executable is None:
                compile_it = _compile_quickly if self._quickly else _compile
                self._executable = compile_it(self._lowered)
                self._lowered = None
        return self

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program; results stay on the device."""
        self.compile()
        with self._settings():
            return self._executable(*arguments)


def _compile(lowered: Any) -> Any:
    return lowered.compile()


def _compile_quickly(lowered: Any) -> Any:
    """Compiles with the fewest optimisations that the installed JAX offers."""
    while len(_QUICK) > 1:
        try:
            return lowered.compile(_QUICK[0])
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            del _QUICK[0]
    return lowered.compile()


def jit_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jits a function in such a way that 0 * NaN stays NaN.

    XLA makes of a product with a mask a choice, and so hides a NaN that the function
    has where it runs without `jax.jit`. An accelerator's compiler is left as it is.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_disable_hlo_passes": "algsimp"})


_programs: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
_programs_lock = threading.Lock()


def cached(key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns what `make` made for this key, the last ones used kept."""
    with _programs_lock:
        if key in _programs:
            _programs.move_to_end(key)
            return _programs[key]
    made = make()
    with _programs_lock:
        _programs[key] = made
        while len(_programs) > _KEPT_PROGRAMS:
            _programs.popitem(last=False)
    return made


def lifted(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    mesh: Any = None,
    quickly: bool = True,
) -> Compiled:
    """Lowers a lifted program for its home: see `homes`.

    Args:
      function: The program.
      arguments: Its arguments, or their shapes.
      mesh: The mesh that it needs around it, if any.
      quickly: Whether it is compiled with the fewest optimisations, to run rarely.
    """
    own = homes.default_device()
    try:
        settings = functools.partial(float64_on, mesh)
        return Compiled(function, arguments, settings, quickly=quickly)
    except NotImplementedError as error:
        why = str(error).partition(":")[0]
        if not homes.is_for_accelerators(error, own):
            raise
    # The wrapper is new to JAX, which remembers the trace for the CPU.
    return _Staying(lambda *args: function(*args), arguments, mesh, why)


class _Staying(Compiled):
    """A lifted program that stays on the accelerator, with float64 of its own."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        mesh: Any,
        why: str,
    ):
        settings = functools.partial(float64_on, mesh, stays=why)
        super().__init__(function, _loose(arguments), settings)
        self.why = why

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program on arguments that were laid out for the CPU."""
        return super().__call__(*_loose(arguments))


def _loose(tree: Any) -> Any:
    """Returns a tree in which no array is spread over devices of the CPU."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf if spread_of(leaf) is None else spanning.whole(leaf), tree
    )


def working(
    function: Callable[..., Any], arguments: Sequence[Any], *, quickly: bool = True
) -> Compiled:
    """Lowers a program in working precision for the default backend.

    Args:
      function: The program.
      arguments: Its arguments, or their shapes.
      quickly: Whether it is compiled with the fewest optimisations. On an accelerator
        it is compiled as the user's own programs are.
    """
    on_cpu = homes.platform_of(homes.default_device()) == "cpu"
    return Compiled(function, arguments, working_precision, quickly=quickly and on_cpu)


def compile_together(programs: Sequence[Compiled]) -> None:
    """Compiles several programs side by side: XLA works outside of Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(programs))) as pool:
        for done in [pool.submit(program.compile) for program in programs]:
            done.result()


def shapes_of(tree: Any) -> Any:
    """Returns a tree of arrays as their shapes, dtypes and devices alone."""
    return jax.tree_util.tree_map(
        lambda array: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=spread_of(array)
        ),
        tree,
    )


def spread_of(value: Any) -> Any:
    """Returns the sharding of an array over several devices, None for all else."""
    if not isinstance(value, jax.Array) or len(value.sharding.device_set) < 2:
        return None
    return value.sharding


def at_home(value: Any) -> Any:
    """Returns a key array on the device that lifted programs run on."""
    if not isinstance(value, jax.Array) or not jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        return value
    words = spanning.whole(jax.random.key_data(value))
    with float64():
        return jax.random.wrap_key_data(
            jax.numpy.asarray(words), impl=jax.random.key_impl(value)
        )


def spread(array: Any, sharding: Any) -> Any:
    """Lays a lifted array over the devices of a sharding, if there is one."""
    if sharding is None:
        return array
    with float64():
        layout = homes.moved(sharding)
        return array if layout is None else spanning.laid_out(array, layout)


def copied(tree: Any) -> Any:
    """Returns a tree with copies of its arrays, each where the array lies."""
    return jax.tree_util.tree_map(
        lambda leaf: jax.numpy.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def on_device(arrays: Sequence[Any]) -> list[Any]:
    """Puts the arguments of many lifted calls on the device once."""
    with float64():
        return [
            array if spanning.spans(array) else jax.device_put(array)
            for array in arrays
        ]


def to_host(tree: Any) -> Any:
    """Returns a tree of arrays as NumPy arrays, floating ones in float64."""
    return jax.tree_util.tree_map(_to_host, spanning.brought_home(tree))


def _to_host(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind == "c":
        return array.astype(np.complex128, copy=False)
    if array.dtype.kind == "f" or array.dtype.kind == "V":
        return array.astype(np.float64, copy=False)
    return array
