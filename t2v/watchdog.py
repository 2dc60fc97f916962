"""Ends a server whose worker has died, so that the platform starts it anew.

Cog's server does not notice that for its purposes it is dead: it stays up and answers 409 for ever. The watchdog is a
small process of its own, started by the worker (`start`). An ordinary shutdown ends the worker and then, within a tenth
of a second, the server; a crash leaves the server behind. It also removes the worker's temporary directory, which a
killed worker cannot do. Only the standard library is used here: the process runs this file without importing t2v.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.2  # seconds between two looks
GRACE = 1.5  # seconds that the server has to answer the running call and, in a shutdown, to exit


def start(folder: Path) -> subprocess.Popen | None:
    """Watch this process from now on, if it is the worker of a Cog server; else nothing is started.

    Args:
        folder: to remove when this process has ended.
    """
    server = os.getppid()
    if b"cog.server.http" not in _command(server):
        return None
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(server), str(folder)]
    # In a session of its own: what a terminal sends to the server must not end the watchdog first.
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def watch(worker: int, server: int, folder: Path) -> None:
    """Wait for the worker's end, whose child this process is, then see to its server and its files."""
    while os.getppid() == worker:
        time.sleep(INTERVAL)
    shutil.rmtree(folder, ignore_errors=True)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if b"cog.server.http" not in _command(server):
            return
        time.sleep(INTERVAL)
    with contextlib.suppress(OSError), open(f"/proc/{server}/fd/2", "a") as log:
        log.write("The worker process died; the server exits so that it is started anew.\n")
    # SIGTERM would be answered with exit code 0. As process 1 of a container, which SIGKILL from inside does not reach,
    # the server is asked in the ordinary way.
    for ask in (signal.SIGKILL, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, ask)
        time.sleep(INTERVAL)


def _command(pid: int) -> bytes:
    """The command line of a process; empty where there is none, or none any more."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
