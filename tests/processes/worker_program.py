"""What the launcher's tests run: `worker_program.py DEED [FILE]`."""

import os
import signal
import subprocess
import sys
import time

import jax

rank = jax.process_index() if "initialize" not in sys.argv else None
deed = sys.argv[1]
if deed == "exit":
    sys.exit(5 - 2 * rank)
if deed == "second raises":
    if rank:
        raise ValueError("of the second")
    time.sleep(100)
if deed == "second is killed":
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
if deed == "initialize":
    jax.distributed.initialize()
    print(f"{jax.process_index()} of {jax.process_count()} by itself")
if deed == "sleep":
    # With a child of its own, and deaf to the polite signal.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with open(f"{sys.argv[2]}.{rank}", "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(100)
