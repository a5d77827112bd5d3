"""Local processes that stand or fall together: started, listened to, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any, TextIO

_TIMED_OUT = 124
# How long the others have to end by themselves when one has failed: they are often
# about to fail in the same way, and their last lines say why.
_GRACE = 5.0
# How long a process has between being told to end and being killed.
_FAREWELL = 2.0
# After so many seconds it is told that a process has ended and others have not.
_PATIENCE = 10.0
_POLL = 0.02
# After one has failed, how long it may take until another one is seen to be dead.
_SETTLING = 0.5


class Supervisor:
    """Starts processes, shows their lines, and ends all of them together.

    Attributes:
      guard: A pipe that processes inherit, and that closes when this one ends.
    """

    def __init__(self) -> None:
        self.guard, self._guarding = os.pipe()
        self._processes: list[_Process] = []
        self._told: set[int] = set()
        self._statuses: list[tuple[int, int]] = []
        self._writing = threading.Lock()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self._processes)
        for process in self._processes:
            process.close()
        for pipe in (self.guard, self._guarding):
            os.close(pipe)

    def new_status(self) -> int:
        """Returns a pipe on which the next process tells its exit code."""
        self._statuses.append(os.pipe())
        return self._statuses[-1][1]

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the next process."""
        told, tells = self._statuses[len(self._processes)]
        process = _Process(
            len(self._processes), command, environment, (self.guard, tells), told
        )
        self._processes.append(process)
        process.show_lines(self._writing)

    def wait(self, timeout: float | None) -> int:
        """Waits for all processes, or for one to fail; returns the worst exit code."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with _ended_by_signals():
            failed = self._first_to_fail(deadline)
            if failed is not None:
                failed = self._culprit(failed)
                self._say(f"{failed.how_it_ended()}; ending the others")
                self._wait_all(time.monotonic() + _GRACE)
        codes = [process.code() for process in self._processes]
        running = [p for p, code in zip(self._processes, codes, strict=True)
                   if code is None]  # fmt: skip
        # One that told its code may still wait for the others in JAX's shutdown.
        self._end(self._processes)
        self._tell(failed, running, timeout)
        known = [code for code in codes if code is not None]
        return _TIMED_OUT if failed is None and running else max(known, default=1)

    def _first_to_fail(self, deadline: float | None) -> _Process | None:
        """Waits until a process fails, all have ended, or the time is over."""
        done: dict[int, float] = {}
        while True:
            for process in self._processes:
                if process.code():
                    return process
                if process.code() == 0:
                    done.setdefault(process.rank, time.monotonic())
            self._tell_of_early(done)
            if all(process.has_ended() for process in self._processes):
                return None
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(_POLL)

    def _tell_of_early(self, done: dict[int, float]) -> None:
        """Says which processes have ended, where others go on: they may wait."""
        if len(done) == len(self._processes) or not done:
            return
        if time.monotonic() - max(done.values()) < _PATIENCE:
            return
        for rank in done.keys() - self._told:
            self._say(f"process {rank} has ended with exit code 0; others still run")
            self._told.add(rank)

    def _culprit(self, failed: _Process) -> _Process:
        """Returns the process that was killed, where another's failure shows sooner.

        The others lose their connections before it is quite gone.
        """
        deadline = time.monotonic() + _SETTLING
        while time.monotonic() < deadline:
            for process in self._processes:
                if process.was_killed():
                    return process
            time.sleep(_POLL)
        return failed

    def _wait_all(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if all(process.code() is not None for process in self._processes):
                return
            time.sleep(_POLL)

    def _tell(
        self,
        failed: _Process | None,
        running: Sequence[_Process],
        timeout: float | None,
    ) -> None:
        names = ", ".join(str(process.rank) for process in running)
        if failed is None and running:
            self._say(f"after {timeout:g} s ended process {names}, still running")
        elif running:
            self._say(f"ended process {names}, still running")
        for process in self._processes:
            if process is not failed and process not in running and process.code():
                self._say(process.how_it_ended())

    def _end(self, processes: Sequence[_Process]) -> None:
        """Ends processes and what they started: asks first, then kills."""
        asked = [process for process in processes if not process.has_ended()]
        for process in asked:
            # One that has told its code only waits for others that will not come.
            process.signal(signal.SIGKILL if process.told_code else signal.SIGTERM)
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline:
            if all(process.has_ended() for process in asked):
                break
            time.sleep(_POLL)
        for process in processes:
            process.signal(signal.SIGKILL)
            process.finish()

    def _say(self, text: str) -> None:
        with self._writing:
            _write(sys.stderr, f"gradtest.launch: {text}\n")


class _Process:
    """One process, in a session of its own.

    Attributes:
      rank: Its number.
      told_code: The exit code that it told before it ended.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        inherited: tuple[int, int],
        status: int,
    ):
        self.rank = rank
        self.told_code: int | None = None
        self._status = status
        self._readers: list[threading.Thread] = []
        os.set_blocking(status, False)
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=inherited,
        )
        os.close(inherited[1])

    def show_lines(self, writing: threading.Lock) -> None:
        """Writes each line of the process behind its rank, as it comes."""
        for source, target in (
            (self._popen.stdout, sys.stdout),
            (self._popen.stderr, sys.stderr),
        ):
            reader = threading.Thread(
                target=_copy_lines,
                args=(source, target, f"[{self.rank}] ", writing),
                daemon=True,
            )
            reader.start()
            self._readers.append(reader)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._popen.poll() is not None

    def code(self) -> int | None:
        """Returns the exit code, 128 + n for signal n; None where there is none yet.

        What the process told counts more than how it ended then: in JAX's shutdown one
        that fails drags the others along.
        """
        if self.told_code is None:
            ended = self._popen.poll()  # before the pipe is read for the last time
            with contextlib.suppress(BlockingIOError):
                told = os.read(self._status, 16)
                self.told_code = int(told) if told else None
            if self.told_code is None and ended is not None:
                return 128 - ended if ended < 0 else ended
        return self.told_code

    def was_killed(self) -> bool:
        """Whether a signal ended it: not SIGABRT, by which JAX ends survivors."""
        self.code()
        ended = self._popen.poll()
        by_signal = self.told_code is None and ended is not None and ended < 0
        return by_signal and ended != -signal.SIGABRT

    def how_it_ended(self) -> str:
        """Says which process it is, and how it ended."""
        ended = self._popen.poll()
        if self.told_code is None and ended is not None and ended < 0:
            return f"process {self.rank} was killed by {_signal_name(-ended)}"
        return f"process {self.rank} failed with exit code {self.code()}"

    def signal(self, number: int) -> None:
        """Sends a signal to the process and to those that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def finish(self) -> None:
        """Waits for the end of the process and of its output."""
        self._popen.wait()
        for reader in self._readers:
            reader.join(_FAREWELL)

    def close(self) -> None:
        """Closes the pipe of the exit code."""
        os.close(self._status)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _copy_lines(
    source: IO[bytes], target: TextIO, prefix: str, writing: threading.Lock
) -> None:
    with source:
        for line in source:
            text = prefix + line.decode(errors="replace")
            with writing:
                _write(target, text if text.endswith("\n") else text + "\n")


def _write(target: TextIO, text: str) -> None:
    """Writes what the stream's encoding has; a reader that is gone ends nothing."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    with contextlib.suppress(BrokenPipeError, ValueError):
        target.write(text.encode(encoding, "replace").decode(encoding))
        target.flush()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end this process in good order: see `SystemExit`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Any] = {
        number: signal.signal(number, leave)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
