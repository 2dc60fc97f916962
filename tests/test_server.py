"""The real server, on 127.0.0.1, with tiny weights: what a caller sends and gets."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from bench.server import PATIENCE, Server, saved, serve
from conftest import ROOT
from t2v.media.encode import VideoInfo, read_metadata, write_video
from t2v.serving.schema import document

pytestmark = pytest.mark.slow  # starts servers

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_frames": 3, "num_inference_steps": 2, "fps": 7, "seed": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("with") / "schema", tiny_folder) as started:
        yield started


@pytest.fixture(scope="module")
def bare_server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("without") / "schema", tiny_folder, schema=False) as started:
        yield started


def video(answer: dict[str, Any], path: Path) -> tuple[VideoInfo, np.ndarray]:
    return saved(answer["output"], path)


def test_it_is_ready_and_serves_its_schema(server: Server):
    assert server.health()["status"] == "READY"
    served = requests.get(f"{server.url}/openapi.json", timeout=PATIENCE).json()
    expected = document((ROOT / "predict.py").read_text(), "Predictor", served["info"]["version"])
    assert served["components"]["schemas"]["Input"] == expected["components"]["schemas"]["Input"]


def test_a_prediction_is_a_video_of_the_asked_length_and_rate(server: Server, tmp_path: Path):
    answer = server.predict(input=QUICK).json()
    assert answer["status"] == "succeeded", answer
    info, _ = video(answer, tmp_path / "a.mp4")
    assert info == VideoInfo(3, 32, 32, 7)
    assert read_metadata(tmp_path / "a.mp4")["seed"] == 0
    assert answer["metrics"]["seed"] == 0 and answer["metrics"]["model"] == "tiny"
    assert "Using seed: 0" in answer["logs"] and "100%|" in answer["logs"]


def test_same_seed_same_frames_and_seed_zero_is_a_seed(server: Server, tmp_path: Path):
    first, second, other = (
        video(server.predict(input=QUICK | {"seed": seed}).json(), tmp_path / "a.mp4")[1] for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_without_a_seed_every_prediction_differs(server: Server):
    quick = {k: v for k, v in QUICK.items() if k != "seed"}
    seeds = {server.predict(input=quick).json()["metrics"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_only_the_latest_output_stays_on_disk(server: Server):
    server.predict(input=QUICK)
    server.predict(input=QUICK)
    assert len(list(server.tmp.rglob("*.mp4"))) == 1


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"num_inference_steps": 0}, "0 is less than the minimum of 1"),
        ({"num_inference_steps": 501}, "501 is greater than the maximum of 500"),
        ({"num_frames": "16"}, 'is not of type "integer"'),
        ({"num_frames": 257}, "maximum of 256"),
        ({"fps": 1.5}, 'is not of type "integer"'),
        ({"seed": -1}, "minimum of 0"),
        ({"prompt": 3}, 'is not of type "string"'),
    ],
)
def test_the_schema_refuses_bad_inputs(server: Server, inputs: dict[str, Any], words: str):
    response = server.predict(input=QUICK | inputs)
    assert response.status_code == 422 and words in response.json()["detail"][0]["msg"]


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 500, not 0."),
        ({"num_inference_steps": 501}, "num_inference_steps must be a whole number from 1 to 500, not 501."),
        ({"num_frames": "16"}, "num_frames must be a whole number from 1 to 256, not '16'."),
        ({"fps": None}, "fps must be a whole number from 1 to 60, not None."),
        ({"seed": 2**64}, "seed must be a whole number from 0 to 4294967295"),
        ({"prompt": " "}, "prompt is blank"),
    ],
)
def test_python_refuses_them_when_there_is_no_schema(bare_server: Server, inputs: dict[str, Any], sentence: str):
    answer = bare_server.predict(input=QUICK | inputs).json()
    assert answer["status"] == "failed" and "InvalidRequest" in answer["error"] and sentence in answer["error"]


def test_omitted_inputs_take_their_defaults_without_a_schema_too(bare_server: Server, tmp_path: Path):
    answer = bare_server.predict(input={"num_frames": 1.0, "num_inference_steps": 1}).json()
    assert answer["status"] == "succeeded", answer
    assert video(answer, tmp_path / "a.mp4")[0] == VideoInfo(1, 32, 32, 8)
    assert read_metadata(tmp_path / "a.mp4")["prompt"] == "An astronaut riding a horse"


def test_long_and_strange_prompts_make_videos(server: Server, tmp_path: Path):
    for prompt in ("word " * 200 + "last", 'a "b" $(c) ; \\ \n é 日本 😀 \u202e', "-y /tmp/x"):
        answer = server.predict(input=QUICK | {"prompt": prompt}).json()
        assert answer["status"] == "succeeded", answer
        assert ("tokens; only the first 75 are used" in answer["logs"]) == prompt.startswith("word")
        assert video(answer, tmp_path / "a.mp4")[0].frames == 3


@pytest.mark.parametrize("kind", ["webm", "gif"])
def test_other_formats_come_under_their_own_type(server: Server, kind: str):
    answer = server.predict(input=QUICK | {"output_format": kind}).json()
    assert answer["status"] == "succeeded", answer
    media = {"webm": "video/webm", "gif": "image/gif"}[kind]
    assert answer["output"].startswith(f"data:{media};base64,")


def test_every_control_reaches_the_engine(server: Server, tmp_path: Path):
    """Each input changes the frames, apart from those that only change the file."""
    base = QUICK | {"num_frames": 12, "num_inference_steps": 3}
    plain = video(server.predict(input=base).json(), tmp_path / "a.mp4")[1]
    for change in (
        {"guidance_scale": 3},
        {"negative_prompt": "a square"},
        {"scheduler": "ddim"},
        {"scheduler": "unipc"},
        {"window": 4},
        {"loop": True},
        {"window": 8, "next_prompts": "a square | a star"},
    ):
        answer = server.predict(input=base | change).json()
        frames = video(answer, tmp_path / "b.mp4")[1]
        assert frames.shape == plain.shape and not np.array_equal(frames, plain), change
        told = read_metadata(tmp_path / "b.mp4")
        assert all(told[name] == value for name, value in change.items())
    sized = video(server.predict(input=base | {"width": 48, "height": 16}).json(), tmp_path / "c.mp4")[0]
    assert (sized.width, sized.height) == (48, 16)
    large = video(server.predict(input=base | {"upscale": 2}).json(), tmp_path / "c.mp4")[0]
    assert (large.width, large.height) == (64, 64) and read_metadata(tmp_path / "c.mp4")["upscale"] == 2
    small = server.predict(input=base | {"quality": 51}).json()["output"]
    assert len(small) < len(server.predict(input=base | {"quality": 5}).json()["output"])


def test_cancelling_frees_the_server_and_leaves_no_file(server: Server):
    slow = QUICK | {"num_inference_steps": 500, "num_frames": 32}
    server.start("slow", input=slow)
    server.until(lambda: "/500 [" in server.log.read_text(), PATIENCE, "a step")
    server.cancel("slow")
    assert server.predict(input=QUICK).json()["status"] == "succeeded"
    assert len(list(server.tmp.rglob("*.mp4"))) == 1


def test_missing_weights_fail_setup_in_one_sentence(tmp_path: Path):
    with serve(tmp_path / "server", tmp_path / "ms-1.7b") as broken:
        health = broken.health()
        assert health["status"] == "SETUP_FAILED"
        assert "There is no weights folder" in health["setup"]["logs"] and "ms-1.7b" in health["setup"]["logs"]
        broken.until(lambda: "Traceback" in broken.log.read_text(), PATIENCE, "the traceback in the log")


def test_a_video_can_start_from_another_one(server: Server, tmp_path: Path):
    first = server.predict(input=QUICK | {"num_frames": 4}).json()["output"]
    request = QUICK | {"num_frames": 4, "seed": 1, "num_inference_steps": 4, "init_video": first}
    frames = {}
    for strength in (0, 0.5, 1):
        answer = server.predict(input=request | {"strength": strength}).json()
        assert answer["status"] == "succeeded", answer
        frames[strength] = video(answer, tmp_path / "a.mp4")[1]
        assert read_metadata(tmp_path / "a.mp4")["strength"] == strength
    assert all(not np.array_equal(frames[a], frames[b]) for a, b in ((0, 0.5), (0.5, 1), (0, 1)))
    free = {k: v for k, v in request.items() if k != "init_video"}
    assert np.array_equal(frames[1], video(server.predict(input=free).json(), tmp_path / "a.mp4")[1])


def test_cancelling_stops_the_reading_of_init_video(server: Server, tmp_path: Path):
    """Each frame takes a while in the autoencoder, so there is time to cancel before the first step."""
    write_video(tmp_path / "a.mp4", [np.zeros((64, 256, 256, 3), np.uint8)], 8, {})
    sent = "data:video/mp4;base64," + base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    seen = len(server.log.read_bytes())

    def log() -> str:
        return server.log.read_bytes()[seen:].decode()

    inputs = QUICK | {"num_frames": 64, "width": 256, "height": 256, "init_video": sent}
    server.start("reading", input=inputs)
    server.until(lambda: "prompt_sha256" in log(), 30, "the request")
    server.cancel("reading")
    server.until(lambda: server.health()["status"] == "READY", 5, "ready again")
    assert '\\"stage\\": \\"start\\"' not in log()
    answer = server.predict(input=QUICK).json()
    assert answer["status"] == "succeeded" and [path.suffix for path in server.files()] == [".mp4"]


@pytest.mark.parametrize(
    "sent, sentence",
    [
        ("/etc/hostname", "init_video must be an http, https or data URL, or an uploaded file"),
        ("file:///etc/hostname", "init_video must be an http, https or data URL, or an uploaded file"),
        ("data:video/mp4;base64,bm8gdmlkZW8=", "init_video has an unknown format; send an MP4"),
    ],
)
def test_files_of_the_server_and_what_is_no_video_are_refused(server: Server, sent: str, sentence: str):
    answer = server.predict(input=QUICK | {"init_video": sent}).json()
    assert answer["status"] == "failed" and f"InvalidRequest: {sentence}" in answer["error"], answer


def test_strength_without_a_video_is_refused(server: Server):
    answer = server.predict(input=QUICK | {"strength": 0.5}).json()
    assert "InvalidRequest: strength needs an init_video" in answer["error"]
