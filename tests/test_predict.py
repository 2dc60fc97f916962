"""The predictor, called as Cog calls it but without a server; test_server.py has the server."""

import re
import threading
from pathlib import Path

import pytest
import torch

import predict
from predict import Predictor
from t2v.errors import InvalidRequest, WeightsError
from t2v.video import read_metadata, read_video

INPUTS = {"prompt": "a red circle", "num_frames": 2, "num_inference_steps": 3, "fps": 5, "seed": 0}


@pytest.fixture
def predictor(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setenv("T2V_WEIGHTS", str(tiny_folder))
    monkeypatch.setenv("T2V_DEVICE", "cpu")
    made = Predictor()
    made.setup()
    return made


def run(predictor: Predictor, **inputs) -> Path:
    """Call predict() with every argument: without a server an omitted one would arrive as Cog's FieldInfo. In another
    thread than setup(), as the server does."""
    result: list[Path | Exception] = []

    def call() -> None:
        try:
            result.append(Path(predictor.predict(**(INPUTS | inputs))))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(120)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def test_makes_the_video_that_was_asked_for(predictor: Predictor, capfd: pytest.CaptureFixture[str]):
    path = run(predictor)
    info, _ = read_video(path)
    assert (info.frames, info.width, info.height, info.fps) == (2, 32, 32, 5)
    metadata = read_metadata(path)
    assert metadata["seed"] == 0 and metadata["prompt"] == "a red circle" and metadata["model"] == "tiny"
    assert metadata["num_inference_steps"] == 3
    out = capfd.readouterr().out
    assert "Using seed: 0" in out and "Model: tiny" in out
    # What Replicate's clients look for: percent, bar, done/total. One line per step.
    assert re.findall(r"^ *(\d+)%\|.*\| (\d/\d) \[.*\]$", out, re.MULTILINE) == [
        ("33", "1/3"),
        ("67", "2/3"),
        ("100", "3/3"),
    ]


def test_a_random_seed_is_reported(predictor: Predictor, capfd: pytest.CaptureFixture[str]):
    seed = read_metadata(run(predictor, seed=None))["seed"]
    assert f"Using seed: {seed}\n" in capfd.readouterr().out


def test_a_file_lives_until_the_next_prediction(predictor: Predictor):
    first = run(predictor)
    assert first.exists()
    second = run(predictor)
    assert second.exists() and not first.exists() and first.name != second.name
    assert list(predictor.outputs.iterdir()) == [second]


def test_bad_input_is_refused_before_any_work_and_loses_nothing(predictor: Predictor, monkeypatch: pytest.MonkeyPatch):
    kept = run(predictor)
    monkeypatch.setattr(predictor.engine, "generate", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InvalidRequest, match="num_frames must be a whole number from 1 to 128, not 0"):
        run(predictor, num_frames=0)
    assert kept.exists()


def test_a_failure_leaves_no_file_and_a_traceback_in_the_log(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(latents: torch.Tensor):
        raise RuntimeError("decoder broke")

    monkeypatch.setattr(predictor.engine.vae, "_decode", fail)
    with pytest.raises(RuntimeError, match="decoder broke"):
        run(predictor)
    assert not list(predictor.outputs.iterdir())
    assert "Traceback" in capfd.readouterr().err


def test_metrics_without_a_server_do_not_fail_a_prediction(predictor: Predictor, monkeypatch: pytest.MonkeyPatch):
    def broken(name: str, value: object) -> None:
        raise RuntimeError("no scope")

    monkeypatch.setattr(predictor, "record_metric", broken)
    assert run(predictor).exists()


def test_named_weights_that_are_missing_fail_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Never a silent fall-back to the demo model."""
    monkeypatch.setenv("T2V_WEIGHTS", str(tmp_path / "ms-1.7b"))
    with pytest.raises(WeightsError, match=r"no weights folder .*ms-1\.7b"):
        Predictor().setup()


def test_unset_weights_are_the_demo_model(monkeypatch: pytest.MonkeyPatch):
    class Loaded(Exception):
        pass

    def load(folder: Path, **_: str) -> None:
        raise Loaded(folder)

    monkeypatch.delenv("T2V_WEIGHTS", raising=False)
    monkeypatch.setattr(predict.Engine, "load", load)
    with pytest.raises(Loaded, match=r"weights/demo$"):
        Predictor().setup()
