"""Cog's real server on 127.0.0.1, for the soak run and for the tests that talk to a server."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from t2v.media.encode import VideoInfo, read_video
from t2v.serving.schema import write_schema

ROOT = Path(__file__).resolve().parent.parent

PATIENCE = 180  # seconds a test waits for what comes in any case, on a machine that may be busy with other work


class Server:
    """A running server.

    Attributes:
        folder: its working directory, with `tmp` for temporary files.
        log: file of its standard output and error.
    """

    def __init__(self, port: int, process: subprocess.Popen, folder: Path):
        self.url, self.process, self.folder = f"http://127.0.0.1:{port}", process, folder
        self.log = folder / "server.log"
        self.tmp = folder / "tmp"

    def health(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/health-check", timeout=PATIENCE).json()

    def predict(self, **request: Any) -> requests.Response:
        """POST, again while the slot of the request before is not yet free (409), which the server allows itself."""
        return self.patiently(lambda: requests.post(f"{self.url}/predictions", json=request, timeout=PATIENCE))

    def start(self, name: str, **request: Any) -> None:
        """Start a prediction of that id in the background."""
        headers = {"Prefer": "respond-async"}
        url = f"{self.url}/predictions/{name}"
        answer = self.patiently(lambda: requests.put(url, json=request, headers=headers, timeout=PATIENCE))
        assert answer.status_code == 202, answer.text

    def poll(self, name: str, **request: Any) -> dict[str, Any]:
        """What the running prediction of that id has got to; the server has no other way to ask."""
        return requests.put(f"{self.url}/predictions/{name}", json=request, timeout=PATIENCE).json()

    def cancel(self, name: str) -> None:
        assert requests.post(f"{self.url}/predictions/{name}/cancel", timeout=PATIENCE).status_code == 200

    def patiently(self, ask: Callable[[], requests.Response]) -> requests.Response:
        deadline = time.monotonic() + PATIENCE
        while (response := ask()).status_code == 409 and time.monotonic() < deadline:
            time.sleep(0.05)
        return response

    def until(self, true: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait for something, and say how many seconds it took."""
        started = time.monotonic()
        while not true():
            assert time.monotonic() < started + seconds, f"{what}: not within {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - started

    def worker(self) -> psutil.Process:
        """The process that holds the model."""
        return _running(psutil.Process(self.process.pid).children(), "_run_worker")[0]

    def encoders(self) -> list[psutil.Process]:
        return _running(self.worker().children(recursive=True), "ffmpeg")

    def files(self) -> list[Path]:
        """What lies in the server's temporary directory."""
        return [path for path in self.tmp.rglob("*") if path.is_file()]


def saved(url: str, path: Path) -> tuple[VideoInfo, np.ndarray]:
    """What an MP4 holds that came as a data URL; it then lies at the path."""
    kind, _, data = url.partition(",")
    assert kind == "data:video/mp4;base64"
    path.write_bytes(base64.b64decode(data, validate=True))
    return read_video(path)


def _running(processes: list[psutil.Process], words: str) -> list[psutil.Process]:
    """Those with these words in their command line."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has just ended, or is a zombie
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def serve(
    folder: Path,
    weights: Path | None,
    schema: bool = True,
    predictor: str | None = None,
    stub: str = "predict.py:Predictor",
    before: Callable[[], None] | None = None,
    inside: Sequence[str] = (),
    **environment: str,
) -> Iterator[Server]:
    """Cog's server on a copy of the project by links.

    Args:
        schema: whether the generated schema is there.
        predictor: source of a predict.py to take instead.
        stub: file and class of the predictor.
        before: called in the server's process before it starts.
        inside: a command that runs the server's, which follows it.
        environment: variables to add.
    """
    folder.mkdir()
    (folder / "t2v").symlink_to(ROOT / "t2v")
    if predictor is None:
        (folder / "predict.py").symlink_to(ROOT / "predict.py")
    else:
        (folder / "predict.py").write_text(predictor)
    if schema:
        write_schema(ROOT / "predict.py", stub.partition(":")[2], folder / ".cog" / "openapi_schema.json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "tmp").mkdir()
    environment = os.environ | {
        "COG_PREDICT_TYPE_STUB": stub,
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "T2V_DEVICE": "cpu",
        "TMPDIR": str(folder / "tmp"),
        **environment,
    }
    environment.pop("T2V_WEIGHTS", None)
    if weights:
        environment["T2V_WEIGHTS"] = str(weights)
    with (folder / "server.log").open("w") as stream:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=folder,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=before,
        )
        server = Server(port, process, folder)
        try:
            server.until(lambda: _settled(server), PATIENCE, "setup")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


def _settled(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        return server.health()["status"] != "STARTING"
    except requests.ConnectionError:
        return False
