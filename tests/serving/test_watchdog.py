"""The watchdog as a process; tests/test_reliability.py has it beside a server."""

import os
import subprocess
import sys
import time
from pathlib import Path

from t2v.serving import watchdog


def test_without_a_server_there_is_nothing_to_watch(tmp_path: Path):
    assert watchdog.start(tmp_path) is None


def test_it_removes_the_folder_of_a_dead_worker_and_harms_no_stranger(tmp_path: Path):
    """This test is the server's parent process, and no server: it must live on."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "a.mp4").write_text("")
    code = (
        "import subprocess, sys, os, time\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', {watchdog.__file__!r}, str(os.getpid()), "
        f"'{os.getpid()}', {str(folder)!r}], stdout=subprocess.DEVNULL)\n"
        "time.sleep(1)\n"
        "assert os.path.exists(sys.argv[1])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -9
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()
