"""Assertions in jobs of two processes with four devices each, and in one alone."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_DYING = "tests/processes/dying.py"
# Seconds that JAX and a busy machine may take beyond the heartbeat's timeout.
_SLACK = 60


def _environment(**changes):
    environment = dict(os.environ, PYTHONPATH=str(_ROOT), JAX_PLATFORMS="cpu")
    environment.pop("XLA_FLAGS", None)
    environment.pop("GRADTEST_PROCESS_TIMEOUT", None)
    return environment | changes


def _launch(*arguments, timeout=540):
    return subprocess.run(
        [sys.executable, "-m", "gradtest.launch", *arguments],
        cwd=_ROOT, env=_environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("suite", ["agreement", "spanning"])
def test_the_checks_in_a_job_pass_in_both_processes(suite):
    done = _launch(
        "--processes", "2", "--devices-per-process", "4", "--timeout", "500", "--",
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        f"tests/processes/{suite}.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    for rank in range(2):
        own = [
            line for line in done.stdout.splitlines() if line.startswith(f"[{rank}]")
        ]
        # A warning may come between: pytest's, of a plugin that is imported already.
        assert any(re.search(r"\d+ passed(, .*)? in ", line) for line in own)


def test_the_launcher_names_a_process_that_dies_in_a_check_and_ends_the_other():
    done = _launch("--heartbeat-timeout", "60", "--", "python", _DYING, "running")
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL; ending the others" in done.stderr
    assert "[0] the check begins" in done.stdout
    assert "the check has ended" not in done.stdout


def _free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def _job_by_hand(when, heartbeat, **changes):
    """Starts the two processes without the launcher."""
    address = _free_address()
    return [
        subprocess.Popen(
            [sys.executable, _DYING, when, address, str(rank), str(heartbeat)],
            cwd=_ROOT, env=_environment(**changes), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_under_another_launcher_the_survivor_of_a_check_exits_with_an_error():
    heartbeat = 10
    by_jax = _job_by_hand("running", heartbeat)
    # Long before JAX ends it, on a busy machine too.
    by_the_wait = _job_by_hand("tracing", 2 * heartbeat, GRADTEST_PROCESS_TIMEOUT="1")
    told = []
    try:
        for survivor, dead in (by_jax, by_the_wait):
            assert dead.wait(120) == -signal.SIGKILL
            told.append(survivor.communicate(timeout=2 * heartbeat + _SLACK)[0])
            assert survivor.returncode != 0
            assert "the check begins" in told[-1]
            assert "the check has ended" not in told[-1]
    finally:
        for process in by_jax + by_the_wait:
            process.kill()
            process.communicate()
    assert "process 1 of 2 did not come to this call within 1 s" in told[1]


@pytest.mark.core
def test_a_process_by_itself_starts_no_backend_for_the_others():
    code = """
import sys, jax
from gradtest._src.job import agreement
from jax._src import xla_bridge
assert agreement.agreed(len)([1, 2]) == 2
agreement.meet()
assert not xla_bridge.backends_are_initialized()
jax.distributed.initialize(sys.argv[1], 1, 0)
assert agreement.agreed(len)([1, 2]) == 2
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, _free_address()], cwd=_ROOT, env=_environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
