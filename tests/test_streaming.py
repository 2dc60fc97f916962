"""The predictor that sends previews, over server-sent events from the real server."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from bench.server import PATIENCE, Server, saved, serve
from conftest import ROOT
from t2v.media.encode import VideoInfo, read_metadata

pytestmark = pytest.mark.slow  # starts a server

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_frames": 10, "num_inference_steps": 8, "seed": 0}


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("streaming") / "server"
    with serve(folder, tiny_folder, stub="predict.py:StreamingPredictor") as running:
        yield running


def events(server: Server, **inputs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, data) of each event of a prediction."""

    def ask() -> requests.Response:
        url, headers = f"{server.url}/predictions", {"Accept": "text/event-stream"}
        return requests.post(url, json={"input": QUICK | inputs}, headers=headers, stream=True, timeout=PATIENCE)

    with server.patiently(ask) as answer:
        assert answer.status_code == 200, answer.text
        kind = ""
        for line in answer.iter_lines():
            name, _, value = line.decode().partition(":")
            if name == "event":
                kind = value.strip()
            elif name == "data":
                yield kind, json.loads(value)


def test_previews_precede_the_video(server: Server, tmp_path: Path):
    seen = list(events(server, previews=3))
    chunks = [data["chunk"] for kind, data in seen if kind == "output"]
    assert seen[-1][0] == "completed" and seen[-1][1]["status"] == "succeeded"
    assert len(chunks) == 4
    videos = [saved(chunk, tmp_path / f"{i}.mp4") for i, chunk in enumerate(chunks)]
    assert all(info == VideoInfo(10, 32, 32, 8) for info, _ in videos)
    assert read_metadata(tmp_path / "3.mp4")["seed"] == 0
    away = [np.abs(frames.astype(float) - videos[-1][1]).mean() for _, frames in videos[:-1]]
    assert away[2] < away[0]


def test_a_preview_arrives_before_the_last_step(server: Server):
    seen = []
    for kind, data in events(server, previews=1, num_inference_steps=100, num_frames=16):
        seen.append("preview" if kind == "output" else data.get("data", kind))
    assert seen.index("preview") < next(i for i, text in enumerate(seen) if "100/100" in text)


@pytest.mark.parametrize("previews", [0, 20])
def test_number_of_previews_is_limited_by_the_steps(server: Server, previews: int):
    answer = server.predict(input=QUICK | {"previews": previews}).json()
    assert answer["status"] == "succeeded", answer
    assert len(answer["output"]) == min(previews, 7) + 1  # without events it is a list
    assert answer["metrics"]["frames"] == 10


def test_an_invalid_input_is_refused_in_a_sentence(server: Server):
    seen = list(events(server, width=100))
    assert "width must be a multiple of 8" in seen[-1][1]["error"]


def test_closing_the_stream_between_previews_frees_the_server(server: Server):
    reader = events(server, previews=20, num_inference_steps=500, num_frames=64)
    while next(reader)[0] != "output":
        pass
    reader.close()
    answer = server.predict(input=QUICK | {"previews": 0}).json()
    assert answer["status"] == "succeeded", answer
    assert len(server.files()) == 1


def test_cancelling_between_previews_frees_the_server(server: Server):
    server.start("slow", input=QUICK | {"previews": 20, "num_inference_steps": 500, "num_frames": 64})
    server.until(lambda: server.poll("slow").get("output"), PATIENCE, "a preview")
    server.cancel("slow")
    assert server.predict(input=QUICK | {"previews": 0}).json()["status"] == "succeeded"
    assert len(server.files()) == 1


def test_the_client_of_the_api_page_works(server: Server):
    page = (ROOT / "docs" / "api.md").read_text()
    (command,) = (block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "event-stream" in block)
    server.until(lambda: server.health()["status"] == "READY", PATIENCE, "ready")
    command = command.replace("http://127.0.0.1:5000", server.url)
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert shown.count("event: output") == 3 and "event: completed" in shown
