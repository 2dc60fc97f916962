"""Ends a server whose worker process has died, so that the platform restarts it.

A workaround for Cog 0.23 (https://github.com/replicate/cog), whose server survives the crash of its worker and then
answers 409 for ever. It can go when Cog exits in that case, as it once did
(https://github.com/replicate/cog/issues/722). The watchdog is a small process, started by the worker (`start`). In an
ordinary shutdown the server ends within 0.1 s of the worker; after a crash it stays. The watchdog also removes the
temporary directory of a killed worker. It runs this file alone, with the standard library.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.2  # seconds between two checks
GRACE = 1.5  # seconds that the server has to answer the running request and, in a shutdown, to exit


def start(folder: Path) -> subprocess.Popen | None:
    """Start to watch this process if it is the worker of a Cog server; otherwise do nothing and return None.

    Args:
        folder: removed once this process has ended.
    """
    server = os.getppid()
    if b"cog.server.http" not in _command(server):
        return None
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(server), str(folder)]
    # A session of its own, so that a terminal's Ctrl-C does not end the watchdog before the server.
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def watch(worker: int, server: int, folder: Path) -> None:
    """Wait until the worker, this process's parent, has ended; then remove its files and end a stuck server."""
    while os.getppid() == worker:
        time.sleep(INTERVAL)
    shutil.rmtree(folder, ignore_errors=True)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if b"cog.server.http" not in _command(server):
            return
        time.sleep(INTERVAL)
    with contextlib.suppress(OSError), open(f"/proc/{server}/fd/2", "a") as log:
        log.write("The worker process died; the server exits so that it can be restarted.\n")
    # SIGKILL first, because SIGTERM would end in exit code 0; but process 1 of a container ignores SIGKILL from inside.
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal_number)
        time.sleep(INTERVAL)


def _command(pid: int) -> bytes:
    """The command line of a process; empty if the process does not exist."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
