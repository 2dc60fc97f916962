"""docs/api.md: its table of statuses is what the real server does, and its clients work against it.

T2V_WRITE_DOCS=1 scripts/test tests/test_api.py writes the table.
"""

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from bench.server import PATIENCE, Server, serve
from conftest import ROOT
from documents import check_table

pytestmark = pytest.mark.slow  # starts a server

PAGE = ROOT / "docs" / "api.md"
JSON = {"Content-Type": "application/json"}
QUICK = {"prompt": "a circle", "num_frames": 1, "num_inference_steps": 1, "seed": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("api") / "server", tiny_folder) as started:
        yield started


def rows(*cells: tuple[object, ...]) -> str:
    head, *rest = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in cells]
    return "\n".join([f"| {head} |", "|" + "---|" * len(cells[0]), *(f"| {row} |" for row in rest)]) + "\n"


def shown(body: str) -> str:
    """A body with what differs from run to run, and its long parts, left out."""
    body = re.sub(r"pred_\w+", "pred_...", body)
    body = re.sub(r"base64,[\w+/=]+", "base64,...", body)
    body = re.sub(r'"logs":"(\\.|[^"\\])*"', '"logs":"..."', body)
    body = re.sub(r'"metrics":{[^}]*}', '"metrics":{...}', body)
    return f"`` {body} ``" if "`" in body else f"`{body}`"


def test_the_table_of_statuses(server: Server):
    url = f"{server.url}/predictions"

    def post(body: dict[str, Any] | str, **headers: str) -> requests.Response:
        data = body if isinstance(body, str) else json.dumps(body)
        return server.patiently(lambda: requests.post(url, data, headers=JSON | headers, timeout=PATIENCE))

    seen: list[tuple[str, requests.Response]] = [
        ("success", post({"input": QUICK})),
        ("within the schema, but not possible", post({"input": QUICK | {"prompt": " "}})),
        ("the same", post({"input": QUICK | {"width": 100}})),
        (
            "the same",
            post({"input": QUICK | {"num_frames": 128, "num_inference_steps": 500, "width": 1024, "height": 1024}}),
        ),
        ("the same", post({"input": QUICK | {"preset": "turbo"}})),
        ("the same", post({"input": QUICK | {"guidance_scale": 1, "negative_prompt": "a square"}})),
        ("the same", post({"input": QUICK | {"next_prompts": "a square"}})),
        ("the same", post({"input": QUICK | {"output_format": "gif", "fps": 60}})),
        ("outside a limit", post({"input": QUICK | {"num_frames": 0}})),
        ("wrong type", post({"input": QUICK | {"fps": "8"}})),
        ("not one of the choices", post({"input": QUICK | {"preset": "best"}})),
        ("null", post({"input": QUICK | {"seed": None}})),
        ("the body is not JSON", post('{"input": ')),
        (
            "wrong content type",
            requests.post(url, '{"input": {}}', headers={"Content-Type": "text/plain"}, timeout=PATIENCE),
        ),
        ("more than 100 MiB", post('{"input": {"prompt": "%s"}}' % ("a" * (101 * 2**20)))),
        ("cancelling a prediction that does not run", requests.post(f"{url}/other/cancel", timeout=PATIENCE)),
    ]
    slow = QUICK | {"num_frames": 64, "num_inference_steps": 500}
    background = {"Prefer": "respond-async"}
    ask = {"data": json.dumps({"input": slow}), "headers": JSON | background, "timeout": PATIENCE}
    seen.append(("started in the background", server.patiently(lambda: requests.put(f"{url}/mine", **ask))))
    seen.append(("another prediction is running", requests.post(url, json={"input": QUICK}, timeout=PATIENCE)))
    seen.append(
        ("asking for its state", requests.put(f"{url}/mine", json={"input": {"prompt": " "}}, timeout=PATIENCE))
    )
    seen.append(("cancelling a running prediction", requests.post(f"{url}/mine/cancel", timeout=PATIENCE)))
    assert {answer.status_code for _, answer in seen} == {200, 202, 400, 404, 409, 413, 415, 422}
    order = sorted(seen, key=lambda entry: entry[1].status_code)
    table = [("HTTP", "when", "body"), *((answer.status_code, when, shown(answer.text)) for when, answer in order)]
    check_table(PAGE, "statuses", rows(*table))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_curl_clients_work(server: Server):
    received: list[dict[str, Any]] = []
    arrived = threading.Event()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            arrived.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        one, background, cancel = (block for block in blocks("bash") if "event-stream" not in block)

        def run(command: str) -> str:
            command = command.replace("http://127.0.0.1:5000", server.url)
            command = command.replace("127.0.0.1:8000", f"127.0.0.1:{receiver.server_port}")
            server.until(lambda: server.health()["status"] == "READY", PATIENCE, "ready")
            return subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=PATIENCE
            ).stdout

        assert json.loads(run(one))["status"] == "succeeded"
        assert json.loads(run(background))["status"] in ("starting", "processing")
        assert arrived.wait(PATIENCE)
        assert received[-1]["status"] == "succeeded" and received[-1]["output"].startswith("data:video/mp4;base64,")
        assert json.loads(run(cancel)) == {}
        receiver.shutdown()


def test_the_python_client_works(server: Server, tmp_path: Path):
    (code,) = blocks("python")
    code = code.replace("http://127.0.0.1:5000", server.url).replace("seed=0", "seed=0, num_frames=64")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert not done.returncode, done.stderr
    assert "%|" in done.stdout and "'seed': 0" in done.stdout and (tmp_path / "circle.mp4").stat().st_size > 1000


def test_the_probe_of_the_kubernetes_manifest_tells_well_from_ill(server: Server):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    commands = [container[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness", "liveness")]
    assert commands[0] == commands[1] == commands[2]
    port = server.url.rpartition(":")[2]
    for code, found in (("READY", 0), ("SICK", 1)):
        probe = [part.replace(":5000", f":{port}").replace("'READY'", repr(code)) for part in commands[0]]
        server.until(lambda: server.health()["status"] == "READY", PATIENCE, "ready")
        assert subprocess.run([sys.executable, *probe[1:]], timeout=PATIENCE).returncode == found
