"""One local process of a job: joins it, runs a Python command, says how that ended.

`gradtest.launch` starts it as `python -m gradtest._src.job.worker SETTINGS COMMAND...`,
the command being what stands after `python`: `-m module`, `-c code` or a script, and
its arguments. It runs in this very process, after `jax.distributed.initialize`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the launcher tells a process.

    Attributes:
      rank: Its number in the job.
      size: How many processes there are.
      address: Where the coordination service is.
      heartbeat_timeout: After how many seconds without a sign it counts as dead.
      initialize: Whether it joins the job, or the command does.
      guard: A pipe that closes when the launcher ends.
      status: A pipe that takes the exit code.
    """

    rank: int
    size: int
    address: str
    heartbeat_timeout: int
    initialize: bool
    guard: int
    status: int

    def text(self) -> str:
        """Returns the settings as one argument of a command."""
        return json.dumps(dataclasses.asdict(self))


# The launcher ends processes that wait in vain, and knows sooner than the service.
_LONG = 24 * 3600


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    settings = Settings(**json.loads(arguments[0]))
    for pipe in (settings.guard, settings.status):
        os.set_inheritable(pipe, False)
    _end_with_launcher(settings.guard)
    if settings.initialize:
        jax.distributed.initialize(
            settings.address,
            settings.size,
            settings.rank,
            cluster_detection_method="deactivate",
            coordinator_bind_address=settings.address,
            heartbeat_timeout_seconds=settings.heartbeat_timeout,
            shutdown_timeout_seconds=_LONG,
        )
    else:
        from gradtest._src.jaxprs import local_cluster as _  # noqa: F401  registers
    code = _exit_code(arguments[1:], settings)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Told before the shutdown, in which every process waits for all others.
    os.write(settings.status, str(code).encode())
    jax.distributed.shutdown()
    return code


def _end_with_launcher(guard: int) -> None:
    """Ends this process, and those that it starts, when the launcher is gone."""

    def watch() -> None:
        os.read(guard, 1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _exit_code(command: Sequence[str], settings: Settings) -> int:
    """Runs a command as Python itself would; returns its exit code."""
    try:
        _run(command)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException as error:
        if settings.initialize and _is_from_initialize(error):
            error.add_note(
                "gradtest.launch: the process is initialised already. Guard the call "
                "by `if not jax.distributed.is_initialized():`, or launch with "
                "--no-initialize."
            )
        traceback.print_exception(type(error), error, _own_frames(error.__traceback__))
        return 1
    return 0


def _run(command: Sequence[str]) -> None:
    option, *rest = command
    if option == "-m":
        module, *arguments = rest
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif option == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, "<string>", "exec"), scope)
    else:
        sys.argv = [option, *rest]
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.abspath(option))
        runpy.run_path(option, run_name="__main__")


def _is_from_initialize(error: BaseException) -> bool:
    """Whether the command called `jax.distributed.initialize` once more."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename == jax.distributed.initialize.__code__.co_filename


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Returns a traceback without the frames that lead to the command."""
    files = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in files:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
