"""`t2v weights download` against a server on 127.0.0.1 that speaks the Hub's protocol, and has faults on demand."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import ROOT
from t2v.cli import MALLOC
from t2v.engine import Engine

pytestmark = pytest.mark.slow  # runs a script in every test

REVISION = "8227dddca75a8561bf858d604cc5dae52b954d01"
FIRST, SECOND = "first/model", "second/model"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves a folder as a repository.

    Attributes:
        repository: the one it has.
        cut: files whose first transfer ends in the middle.
        absent: files it does not have.
        spoilt: files of which it sends a wrong byte.
        ranges: files that were asked for from the middle.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.repository = FIRST
        self.cut: set[str] = set()
        self.absent: set[str] = set()
        self.spoilt: set[str] = set()
        self.ranges: set[str] = set()
        self.served: list[str] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.server
        prefix = f"/{hub.repository}/resolve/{REVISION}/"
        name = self.path.split("?")[0].removeprefix(prefix)
        path = hub.folder / name
        if not self.path.startswith(prefix) or name in hub.absent or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if name in hub.spoilt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if body and (wanted := self.headers.get("Range")) and not wanted.startswith("bytes=0-"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            hub.ranges.add(name)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        hub.served.append(name)
        if name in hub.cut:
            hub.cut.remove(name)
            self.wfile.write(data[start : start + len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[Hub]:
    server = Hub(tiny_folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def manifest(tiny_folder: Path, tmp_path: Path) -> Path:
    files = {}
    for path in sorted(p for p in tiny_folder.rglob("*") if p.is_file() and p.name != ".verified.json"):
        entry = {"bytes": path.stat().st_size}
        if path.suffix == ".safetensors":
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.relative_to(tiny_folder).as_posix()] = entry
    content = {"repositories": [FIRST, SECOND], "revision": REVISION, "files": files}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(content))
    return path


def run(hub: Hub, manifest: Path, folder: Path, *options: str | Path, code: str = "") -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", f"{code}from t2v.cli import main; main()"]
    arguments = ["weights", "download", folder, "--model", manifest, *options]
    home = {"HF_HOME": str(manifest.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | MALLOC | home | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    return subprocess.run(
        [*program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_downloaded_folder_loads(hub: Hub, manifest: Path, tmp_path: Path):
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 0 and "T2V_WEIGHTS=" in done.stdout and "CC-BY-NC" in done.stdout, done.stderr
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / ".cache").exists()
    Engine.load(tmp_path / "out", device="cpu", verify=True)
    hub.served.clear()
    assert run(hub, manifest, tmp_path / "out").returncode == 0
    assert not hub.served, "nothing is fetched twice"


def test_the_second_repository_serves_if_the_first_is_gone(hub: Hub, manifest: Path, tmp_path: Path):
    hub.repository = SECOND
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / UNET).is_file(), done.stderr


def test_an_interrupted_transfer_continues_where_it_stopped(
    hub: Hub, manifest: Path, tmp_path: Path, tiny_folder: Path
):
    """A file of more than the 10 MB in which the Hub's client writes."""
    hub.folder = Path(shutil.copytree(tiny_folder, tmp_path / "served"))
    large = hub.folder / "large.safetensors"
    large.write_bytes(os.urandom(25_000_000))
    content = json.loads(manifest.read_text())
    content["files"][large.name] = {"bytes": 25_000_000, "sha256": hashlib.sha256(large.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(content))
    hub.cut = {large.name}
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert hub.ranges == {large.name} and (tmp_path / "out" / large.name).read_bytes() == large.read_bytes()


def test_a_wrong_byte_is_noticed_and_good_files_are_kept(hub: Hub, manifest: Path, tmp_path: Path):
    hub.spoilt = {UNET}
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 1 and f"{UNET} is damaged" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    hub.spoilt.clear()
    hub.served.clear()
    assert run(hub, manifest, tmp_path / "out").returncode == 0
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.served, "what was good is kept"


def test_a_missing_file_is_named(hub: Hub, manifest: Path, tmp_path: Path):
    hub.absent = {"tokenizer/merges.txt"}
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 1 and "tokenizer/merges.txt could not be fetched" in done.stderr
    assert "run this again" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_an_unreachable_server_is_reported(hub: Hub, manifest: Path, tmp_path: Path):
    hub.shutdown()
    hub.server_close()
    code = (  # without the Hub client's half a minute of pauses
        "import time; time.sleep = lambda seconds: None;"
    )
    done = run(hub, manifest, tmp_path / "out", code=code)
    assert done.returncode == 1 and "could not be fetched" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_is_reported(hub: Hub, manifest: Path, tmp_path: Path):
    """With a limit on the size of a file."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20));"
    )
    done = run(hub, manifest, tmp_path / "out", code=code)
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_noticed_before_the_download(hub: Hub, manifest: Path, tmp_path: Path):
    content = json.loads(manifest.read_text())
    content["files"][UNET]["bytes"] = 10**18
    manifest.write_text(json.dumps(content))
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 1 and "GB free" in done.stderr and not hub.served


def test_a_damaged_folder_is_repaired(hub: Hub, manifest: Path, tmp_path: Path):
    assert run(hub, manifest, tmp_path / "out").returncode == 0
    path = tmp_path / "out" / UNET
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "out" / "vae" / "config.json").unlink()
    hub.served.clear()
    assert run(hub, manifest, tmp_path / "out").returncode == 0
    assert sorted(hub.served) == [UNET, "vae/config.json"]
    Engine.load(tmp_path / "out", device="cpu", verify=True)


def test_files_can_be_copied_from_a_folder(hub: Hub, manifest: Path, tmp_path: Path, tiny_folder: Path):
    done = run(hub, manifest, tmp_path / "out", "--from", tiny_folder)
    assert done.returncode == 0 and not hub.served, done.stderr
    done = run(hub, manifest, tmp_path / "other", "--from", tmp_path)
    assert done.returncode == 1 and "has no" in done.stderr and not (tmp_path / "other").exists()


def test_files_without_a_known_digest_are_checked_against_the_servers(hub: Hub, manifest: Path, tmp_path: Path):
    """As ModelScope's own, whose manifest has names only."""
    content = json.loads(manifest.read_text())
    content["files"] = {name: {} for name in content["files"]}
    manifest.write_text(json.dumps(content))
    hub.spoilt = {UNET}
    done = run(hub, manifest, tmp_path / "out")
    assert done.returncode == 1 and f"{UNET} is damaged" in done.stderr
    hub.spoilt.clear()
    assert run(hub, manifest, tmp_path / "out").returncode == 0


@pytest.mark.parametrize("name", ["ms-1.7b", "original"])
def test_the_shipped_manifests_are_complete(name: str):
    content = json.loads((ROOT / "weights" / "manifests" / f"{name}.json").read_text())
    assert [repository.split("/")[0] for repository in content["repositories"]] == ["damo-vilab", "ali-vilab"]
    if name == "ms-1.7b":
        assert sum(entry["bytes"] for entry in content["files"].values() if "sha256" in entry) == 3_670_806_678
