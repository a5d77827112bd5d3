"""Where the float64 form of a program runs.

That is the CPU, which has float64 of its own whatever the accelerator has. A program
over several devices needs as many of the CPU's, process by process; where they lack,
an accelerator with float64 of its own keeps the program, and else nothing can be said.

Lifted programs are rebuilt inside of `lifting()`: there `moved` lays their meshes
and shardings over the devices chosen here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
)

# Their float64 is the hardware's; a TPU imitates it with float32's range.
_NATIVE = frozenset({"cpu", "gpu", "cuda", "rocm"})


class NoHomeError(RuntimeError):
    """No device at hand computes a program in float64.

    Attributes:
      says: One clause that says what lacks.
      remedy: One clause that says what to set.
    """

    def __init__(self, says: str, remedy: str):
        super().__init__(f"{says}; {remedy}")
        self.says = says
        self.remedy = remedy


class MustStayError(NotImplementedError):
    """A part of a program runs on its accelerator alone, so the CPU can't take it."""


@dataclasses.dataclass(frozen=True)
class Home:
    """The devices that a program is lifted on.

    Attributes:
      devices: One for each device of the program, in its order.
      why: Why they are the accelerator's own; empty where they are the CPU's.
    """

    devices: tuple[Any, ...]
    why: str = ""


def choose(devices: Sequence[Any], cpus: Sequence[Any], *, stays: str = "") -> Home:
    """Chooses the devices on which a program is lifted.

    Args:
      devices: Those that the program runs on.
      cpus: The CPU's devices; none where JAX was started without that backend.
      stays: Why the program can't leave its devices; empty where it can.

    Raises:
      NoHomeError: The CPU has too few devices, and these have no float64.
    """
    platform = platform_of(devices[0])
    if platform == "cpu":
        return Home(tuple(devices))
    found = None if stays else _beside(devices, cpus)
    if found is not None:
        return Home(tuple(found))
    says, remedy = (stays, _STAY) if stays else _shortage(devices, cpus, platform)
    if platform not in _NATIVE:
        raise NoHomeError(f"{platform} has no float64, and {says}", remedy)
    return Home(tuple(devices), says if stays else f"{says}: {remedy}")


_STAY = "check the program on an accelerator with float64, or its parts alone"


def _beside(devices: Sequence[Any], cpus: Sequence[Any]) -> list[Any] | None:
    """Returns the CPU's device beside each device, of the same process and rank."""
    pairs: dict[Any, Any] = {}
    for process, members in _by_process(devices).items():
        own = _by_process(cpus).get(process, [])
        if len(own) < len(members):
            return None
        pairs.update(zip(members, own, strict=False))
    return [pairs[device] for device in devices]


def _by_process(devices: Sequence[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for device in sorted(set(devices), key=lambda d: (d.process_index, d.id)):
        found.setdefault(device.process_index, []).append(device)
    return found


def _shortage(
    devices: Sequence[Any], cpus: Sequence[Any], platform: str
) -> tuple[str, str]:
    """Says what of the CPU lacks, and how it is had."""
    if not cpus:
        says = "JAX was started without the CPU backend"
        return says, f"set JAX_PLATFORMS={platform},cpu"
    needed = max(map(len, _by_process(devices).values()))
    own = _by_process(cpus)
    count = min(len(own.get(process, [])) for process in _by_process(devices))
    return (
        f"the CPU has {count} device{'s' * (count != 1)} where the program is over "
        f"{needed}",
        f"set jax_num_cpu_devices={needed} (or JAX_NUM_CPU_DEVICES={needed}) before "
        "JAX starts",
    )


# --- what this process has --------------------------------------------------------


def platform_of(device: Any) -> str:
    """Returns the name of a device's backend: "cpu", "gpu", "tpu"."""
    return device.platform


def cpu_devices() -> list[Any]:
    """Returns the CPU's devices, of all processes; none without that backend."""
    try:
        return jax.devices("cpu")
    except RuntimeError:
        return []


def default_device() -> Any:
    """Returns the device on which uncommitted values are computed with."""
    chosen: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is None:
        return jax.local_devices()[0]
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def claim_devices(values: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the devices on which a program of these values runs by itself."""
    for value in values:
        if isinstance(value, jax.Array) and value.committed:
            return tuple(sorted(value.sharding.device_set, key=lambda d: d.id))
    return (default_device(),)


def describe(truth: Sequence[Any], claim: Sequence[Any], why: str = "") -> str:
    """Says where truth and claim ran; empty where all of it was on the CPU.

    Args:
      truth: The devices of what ran in float64.
      claim: Those of the claim in its own precision.
      why: Why the truth is not on the CPU, where that is known.
    """
    if {platform_of(device) for device in (*truth, *claim)} <= {"cpu"}:
        return ""
    ran = f"claim on {_named(claim)}"
    if platform_of(truth[0]) == "cpu":
        return f"devices: truth on {_named(truth)}, {ran}"
    why = why or choose(truth, cpu_devices()).why
    return f"devices: truth on {_named(truth)}, in float64 of its own ({why}); {ran}"


def _named(devices: Sequence[Any]) -> str:
    platform = platform_of(devices[0])
    name = "the CPU" if platform == "cpu" else platform
    kind = "" if platform == "cpu" else f" ({devices[0].device_kind})"
    count = f"{len(devices)} devices of " if len(devices) > 1 else ""
    return f"{count}{name}{kind}"


# --- lifted programs, laid over the devices of their home -------------------------


@dataclasses.dataclass
class _Lifting:
    """A lifted program that is being built.

    Attributes:
      stays: Why it can't leave its devices; empty where it can.
      leaves: Whether it leaves an accelerator for the CPU.
      keeps: Whether a part of it was left on an accelerator.
    """

    stays: str
    leaves: bool
    keeps: bool = False


_current: contextvars.ContextVar[_Lifting | None] = contextvars.ContextVar(
    "lifting", default=None
)


@contextlib.contextmanager
def lifting(stays: str = "") -> Iterator[None]:
    """Within, meshes and shardings are laid over home devices.

    Args:
      stays: Why the program can't leave the devices that it runs on, if so.

    Raises:
      NoHomeError: Nothing here computes in float64.
    """
    around = _current.get()
    own = default_device()
    (home,) = choose([own], cpu_devices(), stays=stays).devices
    leaves = home != own or (around is not None and around.leaves)
    keeps = platform_of(home) != "cpu"
    token = _current.set(_Lifting(stays, leaves, keeps))
    try:
        with contextlib.ExitStack() as stack:
            if home != own:
                stack.enter_context(jax.default_device(home))
            mesh = _context_mesh()
            if mesh is not None and moved(mesh) is not mesh:
                stack.enter_context(jax.set_mesh(moved(mesh)))
            yield
    finally:
        _current.reset(token)


def require_accelerator(what: str) -> None:
    """Says of a part of a lifted program that only its accelerator runs it.

    Raises:
      MustStayError: The program has left its accelerator for the CPU.
    """
    lifted = _current.get()
    if lifted is not None and lifted.leaves:
        raise MustStayError(f"{what} runs on its accelerator alone")


def keeps_accelerator() -> bool:
    """Whether a part of the lifted program was left on an accelerator."""
    lifted = _current.get()
    return lifted is not None and lifted.keeps


def is_for_accelerators(error: NotImplementedError, own: Any) -> bool:
    """Whether an error says that a CPU can't run a program of the device `own`."""
    if platform_of(own) == "cpu":
        return False
    is_missing = "not found for platform cpu" in str(error)
    return is_missing or isinstance(error, MustStayError)


def is_on_cpu() -> bool:
    """Whether the program that is built now, lifted or not, runs on the CPU."""
    return platform_of(default_device()) == "cpu"


def _context_mesh() -> Mesh | None:
    """Returns the mesh that `jax.set_mesh` set, if any."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # while a function is traced: it was moved already
        return None
    return None if mesh.empty else mesh


def moved(layout: Any) -> Any:
    """Returns a mesh or sharding laid over home devices, anything else as it is.

    Outside of `lifting()` everything is left as it is. A sharding that has no mesh to
    lay anew becomes None.
    """
    lifted = _current.get()
    if lifted is None or not isinstance(layout, _LAYOUTS):
        return layout
    if isinstance(layout, Mesh):
        return _moved_mesh(layout, lifted)
    if isinstance(layout, AbstractMesh):
        return _moved_abstract_mesh(layout, lifted)
    if isinstance(layout, NamedSharding):
        mesh = moved(layout.mesh)
        return layout if mesh is layout.mesh else NamedSharding(mesh, layout.spec)
    return _moved_sharding(layout, lifted)


_LAYOUTS = (Mesh, AbstractMesh, Sharding)


def _home(devices: Sequence[Any], lifted: _Lifting) -> list[Any]:
    home = list(choose(devices, cpu_devices(), stays=lifted.stays).devices)
    lifted.keeps = lifted.keeps or platform_of(home[0]) != "cpu"
    return home


def _moved_sharding(sharding: Sharding, lifted: _Lifting) -> Sharding | None:
    devices = list(sharding.device_set)
    home = _home(devices, lifted)
    if home == devices:
        return sharding
    return SingleDeviceSharding(home[0]) if len(home) == 1 else None


def _moved_mesh(mesh: Mesh, lifted: _Lifting) -> Mesh:
    if mesh.empty:
        return mesh
    devices = list(mesh.devices.flat)
    home = _home(devices, lifted)
    if home == devices:
        return mesh
    laid = np.empty(len(home), dtype=object)
    laid[:] = home
    return Mesh(
        laid.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types
    )


def _moved_abstract_mesh(mesh: AbstractMesh, lifted: _Lifting) -> AbstractMesh:
    """Gives a mesh without devices the kind of device that it has at home."""
    kind, cpus = mesh.abstract_device, cpu_devices()
    if kind is None or kind.platform == "cpu" or lifted.stays or len(cpus) < mesh.size:
        return mesh
    beside = Mesh(np.array(cpus[:1]), ("any",)).abstract_mesh
    return mesh.update(abstract_device=beside.abstract_device)
