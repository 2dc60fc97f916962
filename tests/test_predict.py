"""The predictor, called as Cog calls it but without a server; test_server.py has the server."""

import inspect
import re
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
from predict import Predictor
from t2v.errors import InvalidRequest, T2VError, WeightsError
from t2v.media.encode import read_metadata, read_video, write_video

# Every input: without a server an omitted one arrives as Cog's FieldInfo.
INPUTS = {
    name: field.default.default
    for name, field in inspect.signature(Predictor.predict).parameters.items()
    if name != "self"
} | {"prompt": "a red circle", "num_frames": 2, "num_inference_steps": 3, "fps": 5, "seed": 0}


@pytest.fixture
def predictor(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setenv("T2V_WEIGHTS", str(tiny_folder))
    monkeypatch.setenv("T2V_DEVICE", "cpu")
    made = Predictor()
    monkeypatch.setattr(tempfile, "tempdir", None)  # which setup changes
    made.setup()
    return made


def run(predictor: Predictor, **inputs) -> Path:
    """Call predict() in another thread than setup(), as the server does."""
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


def test_another_model_upscales_where_it_is_installed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("T2V_WEIGHTS", str(tiny_folder))
    monkeypatch.setenv("T2V_UPSCALER", str(shutil.copytree(tiny_folder, tmp_path / "large")))
    monkeypatch.setenv("T2V_DEVICE", "cpu")
    predictor = Predictor()
    predictor.setup()
    path = run(predictor, upscale=2)
    assert read_video(path)[0].width == 64 and read_metadata(path)["upscaler"] == "large"
    assert '"stage": "start"' in capfd.readouterr().out
    monkeypatch.setenv("T2V_UPSCALER", str(tmp_path / "absent"))
    with pytest.raises(WeightsError, match="There is no weights folder .*absent"):
        Predictor().setup()


def test_a_random_seed_is_reported(predictor: Predictor, capfd: pytest.CaptureFixture[str]):
    seed = read_metadata(run(predictor, seed=None))["seed"]
    assert f"Using seed: {seed}\n" in capfd.readouterr().out


def test_a_file_lives_until_the_next_prediction(predictor: Predictor):
    first = run(predictor)
    assert first.exists()
    second = run(predictor)
    assert second.exists() and not first.exists() and first.name != second.name
    assert list(predictor.outputs.iterdir()) == [second]


def test_what_cog_fetched_is_used_and_goes_with_the_next_prediction(predictor: Predictor):
    """It writes into temporary files, which it keeps, whole or not."""
    (predictor.outputs / "library").mkdir()
    with tempfile.NamedTemporaryFile(suffix="half.mp4", delete=False) as failed:
        pass
    with tempfile.NamedTemporaryFile(suffix=".mp4", delete=False) as fetched:
        write_video(Path(fetched.name), [np.zeros((2, 32, 32, 3), np.uint8)], 5, {})
    made = run(predictor, init_video=Path(fetched.name))
    assert read_metadata(made)["strength"] is None and not Path(failed.name).exists()
    made = run(predictor)
    assert set(predictor.outputs.iterdir()) == {made, predictor.outputs / "library"}


def test_bad_input_is_refused_before_any_work_and_loses_nothing(predictor: Predictor, monkeypatch: pytest.MonkeyPatch):
    kept = run(predictor)
    monkeypatch.setattr(predictor.engine, "run", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InvalidRequest, match="num_frames must be a whole number from 1 to 256, not 0"):
        run(predictor, num_frames=0)
    assert kept.exists()


@pytest.mark.parametrize(
    "error, healthy",
    [
        (RuntimeError("decoder broke at 0x7f0000"), True),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_failure_leaves_no_file_and_a_traceback_in_the_log_alone(
    predictor: Predictor,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    healthy: bool,
):
    def fail(latents: torch.Tensor):
        raise error

    monkeypatch.setattr(predictor.engine.vae, "_decode", fail)
    if not healthy:
        monkeypatch.setattr(torch, "ones", lambda *_, **__: fail(torch.empty(0)))  # nothing can be computed any more
    with pytest.raises(T2VError) as caught:
        run(predictor)
    assert str(caught.value).startswith(
        f"An internal error occurred ({type(error).__name__}); see the container's log."
    )
    assert not list(predictor.outputs.iterdir())
    err = capfd.readouterr().err
    assert "Traceback" in err and str(error) in err
    assert predictor.healthcheck() == healthy


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
