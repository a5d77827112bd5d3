"""Runs a Python command in several local CPU processes under `jax.distributed`.

    python -m gradtest.launch --processes 2 --devices-per-process 4 -- \
        python -m pytest tests/

Every process finds itself in the job, with its rank, when the command starts: the
script need not call `jax.distributed.initialize`. Their output is shown line by line
behind the rank; when one fails the others are ended; the exit code is the worst one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence

from gradtest._src.job.supervisor import Supervisor
from gradtest._src.job.worker import Settings

_COUNT = "--xla_force_host_platform_device_count"
# Options of Python itself that take the next argument.
_WITH_ARGUMENT = frozenset({"-W", "-X", "--check-hash-based-pycs"})
_USAGE_ERROR = 2


def launch(
    command: Sequence[str],
    *,
    processes: int = 2,
    devices_per_process: int = 1,
    timeout: float | None = None,
    heartbeat_timeout: int = 100,
    initialize: bool = True,
) -> int:
    """Runs a Python command in several local processes under `jax.distributed`.

    Each process runs on the CPU, with simulated devices, in a session of its own. Its
    lines are written to `sys.stdout` and `sys.stderr` behind its rank, `[0] ...`. When
    one ends with another code than 0, or by a signal, the others have five seconds to
    end too; then they are killed, and so is whatever they started. So it is when this
    process is interrupted or dies. For POSIX systems.

    Args:
      command: `python ...` with `-m module`, `-c code` or a script; a script by itself;
        or an installed Python command such as `pytest`. A bare `python` is the one that
        runs this.
      processes: How many processes.
      devices_per_process: How many simulated CPU devices each of them has.
      timeout: After how many seconds all are ended; None waits.
      heartbeat_timeout: After how many seconds without a sign of life JAX's
        coordination service counts a process as dead, and ends the others.
      initialize: Whether `jax.distributed.initialize` is called before the command.
        With False the command does so itself: `jax.distributed.initialize()` finds
        address, number of processes and rank.

    Returns:
      The worst exit code of the processes that ended by themselves, 128 + n for signal
      n; 124 after the timeout.

    Raises:
      ValueError: A number is too small, or the command is no Python command.
      KeyboardInterrupt: After all processes have been ended.

    Example:
      >>> from gradtest.launch import launch
      >>> code = "import jax; assert jax.device_count() == 4"
      >>> launch(["python", "-c", code], processes=2, devices_per_process=2)
      0
    """
    for name, value, least in (
        ("processes", processes, 1),
        ("devices_per_process", devices_per_process, 1),
        ("heartbeat_timeout", heartbeat_timeout, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"`timeout` must be a positive number, got {timeout!r}.")
    python, target = _split(command)
    address = f"127.0.0.1:{_free_port()}"
    with Supervisor() as supervisor:
        for rank in range(processes):
            settings = Settings(
                rank, processes, address, heartbeat_timeout, initialize,
                supervisor.guard, supervisor.new_status(),
            )  # fmt: skip
            supervisor.start(
                [*python, "-m", "gradtest._src.job.worker", settings.text(), *target],
                _environment(settings, devices_per_process),
            )
        return supervisor.wait(timeout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    try:
        return launch(
            command,
            processes=chosen.processes,
            devices_per_process=chosen.devices_per_process,
            timeout=chosen.timeout,
            heartbeat_timeout=chosen.heartbeat_timeout,
            initialize=chosen.initialize,
        )
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradtest.launch",
        usage="%(prog)s [options] -- COMMAND",
        allow_abbrev=False,
        description="Runs a Python command in several local CPU processes under "
        "jax.distributed, and ends all of them when one fails.",
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="how many (default: 2)"
    )
    parser.add_argument(
        "--devices-per-process", type=int, default=1, metavar="N",
        help="simulated CPU devices of each (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="end all processes after so long, with exit code 124",
    )  # fmt: skip
    parser.add_argument(
        "--heartbeat-timeout", type=int, default=100, metavar="SECONDS",
        help="JAX counts a process as dead after so long without a sign of life "
        "(default: 100)",
    )  # fmt: skip
    parser.add_argument(
        "--no-initialize", dest="initialize", action="store_false",
        help="the command calls jax.distributed.initialize() itself",
    )  # fmt: skip
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND",
        help="a Python command: `python -m pytest tests`, `pytest tests`, `train.py`",
    )  # fmt: skip
    return parser


# --- the command ------------------------------------------------------------------


def _split(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns Python with its own options, and what it is to run.

    Raises:
      ValueError: It is no Python command.
    """
    if isinstance(command, str) or not command:
        raise ValueError(
            f"`command` must be a Python command, such as `-- python -m pytest`, got "
            f"{command!r}."
        )
    first, *rest = command
    if not _is_python(first):
        return [sys.executable], [_script(first), *rest]
    python = first if os.path.dirname(first) else sys.executable
    end = 0
    while end < len(rest) and _is_option(rest[end]):
        end += 2 if rest[end] in _WITH_ARGUMENT else 1
    options, target = rest[:end], rest[end:]
    if not target or target in (["-m"], ["-c"]) or target[0] == "-":
        raise ValueError(
            "`command` must say what Python runs: `-m module`, `-c code` or a script, "
            f"got {' '.join(command)!r}."
        )
    for glued in ("-m", "-c"):
        if target[0].startswith(glued) and target[0] != glued:
            target = [glued, target[0].removeprefix(glued), *target[1:]]
    return [python, *options], target


def _is_python(name: str) -> bool:
    return re.fullmatch(r"python[\d.]*", os.path.basename(name)) is not None


def _is_option(argument: str) -> bool:
    starts_command = argument.startswith(("-m", "-c"))
    return len(argument) > 1 and argument[0] == "-" and not starts_command


def _script(name: str) -> str:
    """Returns the path of a Python script, or of an installed Python command."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    for path in (name, beside, shutil.which(name) or ""):
        if os.path.isfile(path) and (os.path.dirname(path) or path.endswith(".py")):
            if path.endswith(".py") or _has_python_shebang(path):
                return path
            break
    raise ValueError(
        "`command` must be a Python command (`python ...`, a script, or an installed "
        f"one such as pytest), got {name!r}."
    )


def _has_python_shebang(path: str) -> bool:
    with open(path, "rb") as file:
        first, second = file.readline(200), file.readline(200)
    # Installers write the second form where the interpreter's path is long.
    return first.startswith(b"#!") and (b"python" in first or b"'''exec'" in second)


# --- the environment --------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _environment(settings: Settings, devices: int) -> dict[str, str]:
    """Returns the environment of one process: CPU, devices, its place in the job."""
    environment = dict(os.environ)
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # the flag says it
    flags = [
        flag
        for flag in environment.get("XLA_FLAGS", "").split()
        if not flag.startswith(_COUNT)
    ]
    if any("_proxy" in name.lower() for name in environment):
        for name in ("no_proxy", "NO_PROXY"):
            known = environment.get(name)
            environment[name] = ",".join(filter(None, [known, "127.0.0.1"]))
    return environment | {
        "GRADTEST_LAUNCHED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_ENABLE_PREEMPTION_SERVICE": "false",  # it would catch SIGTERM
        "JAX_COORDINATOR_ADDRESS": settings.address,
        "JAX_COORDINATOR_BIND_ADDRESS": settings.address,
        "JAX_NUM_PROCESSES": str(settings.size),
        "JAX_PROCESS_ID": str(settings.rank),
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": " ".join([*flags, f"{_COUNT}={devices}"]),
    }


if __name__ == "__main__":
    sys.exit(main())
