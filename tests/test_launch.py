"""`python -m gradtest.launch`: local processes under `jax.distributed`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gradtest import launch

_ROOT = pathlib.Path(__file__).parent.parent
_PROGRAM = "tests/processes/worker_program.py"


def _environment(**changes):
    environment = dict(os.environ, PYTHONPATH=str(_ROOT))
    environment.pop("XLA_FLAGS", None)
    return environment | changes


def _start(*arguments, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "gradtest.launch", *arguments],
        cwd=_ROOT,
        env=_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _run(*arguments, **changes):
    process = _start(*arguments, **changes)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


_SHOW = """
import os, sys, jax
print(jax.process_index(), jax.process_count(), jax.device_count(),
      jax.local_device_count(), jax.default_backend(), sys.argv[1:])
print("to stderr", file=sys.stderr)
print("flags", os.environ["XLA_FLAGS"])
print("without an end", end="")
"""


@pytest.mark.core
def test_every_process_finds_itself_in_the_job():
    code, out, err = _run(
        "--processes", "3", "--devices-per-process", "2", "--",
        "python", "-c", _SHOW, "--an", "argument",
        XLA_FLAGS="--xla_cpu_enable_fast_math=false "
        "--xla_force_host_platform_device_count=7",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    for rank in range(3):
        assert f"[{rank}] {rank} 3 6 2 cpu ['--an', 'argument']" in lines
        assert f"[{rank}] without an end" in lines
        assert f"[{rank}] to stderr" in err.splitlines()
    assert "gradtest.launch" not in err


def test_flags_of_ones_own_are_kept_but_for_the_number_of_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=7")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    monkeypatch.setenv("HTTPS_PROXY", "proxy:80")
    monkeypatch.setenv("no_proxy", "intranet")
    settings = launch.Settings(1, 2, "127.0.0.1:8", 100, True, 3, 4)
    environment = launch._environment(settings, 4)
    assert environment["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=4"
    assert "JAX_NUM_CPU_DEVICES" not in environment
    assert environment["no_proxy"] == "intranet,127.0.0.1"
    assert environment["JAX_PROCESS_ID"] == "1"


def test_the_worst_exit_code_is_returned():
    code, _, err = _run("--", "python", _PROGRAM, "exit")
    assert code == 5
    assert "process 0 failed with exit code 5" in err
    assert "process 1 failed with exit code 3" in err


@pytest.mark.parametrize(
    ("deed", "code", "told"),
    [
        ("second raises", 1, "process 1 failed with exit code 1; ending the others"),
        ("second is killed", 137, "process 1 was killed by SIGKILL; ending the others"),
    ],
)
def test_when_one_fails_it_is_named_and_the_others_are_ended(deed, code, told):
    found, _, err = _run("--", "python", _PROGRAM, deed)
    assert found == code
    assert told in err
    assert "ended process 0, still running" in err
    if deed == "second raises":
        own = [line for line in err.splitlines() if line.startswith("[1]")]
        assert own[0] == "[1] Traceback (most recent call last):"
        assert _PROGRAM in own[1]  # and no frame of the launcher's
        end = own.index("[1] ValueError: of the second")
        # What XLA logs when the other process is gone may follow, and no traceback.
        assert not any("Traceback" in line or "File " in line for line in own[end:])


def test_an_installed_command_is_run():
    code, out, err = _run("--", "pytest", "--version")
    assert code == 0, err
    assert all(f"[{rank}] pytest " in out + err for rank in range(2))


def test_a_script_that_initialises_by_itself():
    code, out, err = _run("--no-initialize", "--", _PROGRAM, "initialize")
    assert code == 0, err
    assert "[0] 0 of 2 by itself" in out
    assert "[1] 1 of 2 by itself" in out
    code, _, err = _run("--", _PROGRAM, "initialize")
    assert code == 1
    assert "jax.distributed.is_initialized()" in err
    assert "--no-initialize" in err


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "must be a Python command"),
        (["--"], "must be a Python command"),
        (["--", "python"], "must say what Python runs"),
        (["--", "python", "-W", "ignore", "-m"], "must say what Python runs"),
        (["--", "bash", "-c", "true"], "got 'bash'"),
        (["--", "no_such_script.py"], "got 'no_such_script.py'"),
        (["--processes", "0", "--", "x.py"], "`processes` must be an integer >= 1"),
        (["--processes", "two", "--", "x.py"], "invalid int value: 'two'"),
        (["--devices-per-process", "0", "--", "x.py"], "`devices_per_process` must"),
        (["--heartbeat-timeout", "0", "--", "x.py"], "`heartbeat_timeout` must"),
        (["--timeout", "-1", "--", "x.py"], "`timeout` must be a positive number"),
        (["--prozesse", "2", "--", "x.py"], "arguments: --prozesse"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, told, capsys):
    with pytest.raises(SystemExit) as raised:
        launch.main(arguments)
    assert raised.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.core
@pytest.mark.parametrize(
    ("command", "python", "target"),
    [
        ("python -m pytest -q", [], ["-m", "pytest", "-q"]),
        ("python3.12 -u -X dev x.py -m a", ["-u", "-X", "dev"], ["x.py", "-m", "a"]),
        ("python -W ignore -mpytest", ["-W", "ignore"], ["-m", "pytest"]),
        ("python -cpass", [], ["-c", "pass"]),
    ],
)
def test_what_python_runs_is_told_from_its_own_options(command, python, target):
    expected = [sys.executable, *python], target
    assert launch._split(command.split()) == expected


def test_the_function_takes_another_python_and_refuses_a_string():
    own = launch._split([sys.executable, "-m", "pytest"])
    assert own == ([sys.executable], ["-m", "pytest"])
    with pytest.raises(ValueError, match="`command` must be a Python command"):
        launch.launch("python -m pytest")
    with pytest.raises(ValueError, match="`processes` must be an integer"):
        launch.launch(["python", "-m", "pytest"], processes=True)


def _pids(file):
    """Waits for the programs' own process ids, and those of their children."""
    files = [pathlib.Path(f"{file}.{rank}") for rank in range(2)]
    for _ in range(1000):
        texts = [path.read_text() if path.exists() else "" for path in files]
        if all(text.endswith("\n") for text in texts):
            return [int(pid) for text in texts for pid in text.split()]
        time.sleep(0.1)
    raise AssertionError("the programs did not begin")


def _is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return False
    return state[0] != "Z"


def _all_end(pids):
    for _ in range(200):
        if not any(map(_is_alive, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
)
def test_when_the_launcher_is_ended_nothing_is_left(number, code, tmp_path):
    process = _start("--", "python", _PROGRAM, "sleep", str(tmp_path / "pid"))
    pids = _pids(tmp_path / "pid")
    assert all(map(_is_alive, pids))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert _all_end(pids)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_after_the_timeout_all_are_ended_with_what_they_started(tmp_path):
    code, _, err = _run(
        "--timeout", "10", "--", "python", _PROGRAM, "sleep", str(tmp_path / "pid")
    )
    assert code == 124
    assert "after 10 s ended process 0, 1, still running" in err
    assert _all_end(_pids(tmp_path / "pid"))
