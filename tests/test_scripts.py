"""The scripts, run as people run them."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_demo
from conftest import DEMO, ROOT
from t2v.engine import Engine
from t2v.video import VideoInfo, read_metadata, read_video, write_video


def run(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "scripts").glob("*.py") if p.stem != "demo_world"))
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    assert not end.value.code and "usage" in capsys.readouterr().out


def test_generate_writes_where_it_says(tiny_folder: Path, tmp_path: Path):
    options = ["--weights", tiny_folder, "--num-frames", "2", "--num-inference-steps", "2", "--seed", "0", "--fps", "5"]
    result = run("generate.py", "a red circle", *options, "--width", "40", "--out", tmp_path / "a.mp4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "a.mp4")
    assert "Model: tiny" in result.stdout
    assert read_video(tmp_path / "a.mp4")[0] == VideoInfo(2, 40, 32, 5)
    assert read_metadata(tmp_path / "a.mp4")["seed"] == 0


def test_generate_starts_from_a_picture_and_makes_it_larger(tiny_folder: Path, tmp_path: Path):
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    options = ["--weights", tiny_folder, "--num-frames", "2", "--num-inference-steps", "2", "--out", tmp_path / "a.gif"]
    more = ["--init-video", tmp_path / "red.png", "--strength", "0.5", "--upscale", "2", "--output-format", "gif"]
    result = run("generate.py", "a red circle", *options, *more, "--upscaler", tiny_folder)
    assert result.returncode == 0, result.stderr
    assert "2 frames of 64x64" in result.stdout and (tmp_path / "a.gif").read_bytes()[:4] == b"GIF8"


def test_a_filmstrip_has_a_row_for_each_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos = []
    for i, shade in enumerate((50, 200)):
        ramp = np.linspace(0, shade, 7).astype(np.uint8)[:, None, None, None].repeat(16 * (1 + i), axis=2)
        write_video(tmp_path / f"{i}.mp4", [ramp.repeat(16, axis=1).repeat(3, axis=3)], 8, {})
        videos.append(str(tmp_path / f"{i}.mp4"))
    options = ["--frames", "3", "--height", "16", "--out", str(tmp_path / "strip.png")]
    monkeypatch.setattr(sys, "argv", ["filmstrip.py", *videos, *options])
    runpy.run_path(str(ROOT / "scripts" / "filmstrip.py"), run_name="__main__")
    strip = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    assert strip.shape == (36, 96, 3)
    for y, x, shade in ((8, 8, 0), (8, 24, 25), (8, 40, 50), (8, 56, 255), (18, 8, 255), (28, 80, 200)):
        assert abs(strip[y, x] - shade).max() < 8, (y, x)


def test_generate_says_which_model_made_a_foreign_prompt_and_what_it_knows(tmp_path: Path):
    options = ["--weights", DEMO, "--num-frames", "1", "--num-inference-steps", "1"]
    result = run("generate.py", "An astronaut riding a horse", *options, "--out", tmp_path / "a.mp4")
    assert result.returncode == 0, result.stderr
    assert "Model: t2v-demo. It knows one red, orange" in result.stdout


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--num-frames", "0"], "num_frames must be a whole number from 1 to 256, not 0."),
        (["--width", "65"], "width must be a multiple of 8"),
        (["--weights", "absent"], "There is no weights folder absent"),
    ],
)
def test_generate_refuses_in_one_sentence(options: list[str], sentence: str):
    result = run("generate.py", "a red circle", *options)
    assert result.returncode == 1 and sentence in result.stderr and "Traceback" not in result.stderr


TRAINING = ["--vae-steps", "2", "--text-steps", "2", "--clips", "16", "--unet-steps", "3", "--batch", "2"]


def train(monkeypatch: pytest.MonkeyPatch, run_folder: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    folders = ["--run", str(run_folder), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *TRAINING, "--save-every", "1", *folders, *more])
    train_demo.main()
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def test_training_writes_a_model_and_resumes_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An interrupted run ends as an unbroken one does, bit for bit; another seed ends elsewhere."""
    unbroken = train(monkeypatch, tmp_path / "run a", tmp_path / "a")
    assert "unet      3/3" not in capsys.readouterr().err
    assert Engine.load(tmp_path / "a", device="cpu").model.info.native_size == (64, 64)

    class Interrupted(Exception):
        pass

    def save_and_stop(state: dict, path: Path) -> None:
        train_demo_save(state, path)
        if path.name == "unet.pt":
            raise Interrupted

    train_demo_save = train_demo.save
    with monkeypatch.context() as patch:
        patch.setattr(train_demo, "save", save_and_stop)
        with pytest.raises(Interrupted):
            train(monkeypatch, tmp_path / "run b", tmp_path / "b")
    assert torch.load(tmp_path / "run b" / "unet.pt")["step"] == 1
    resumed = train(monkeypatch, tmp_path / "run b", tmp_path / "b")
    assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)

    other = train(monkeypatch, tmp_path / "run c", tmp_path / "c", "--seed", "1")
    assert not all(torch.equal(unbroken[k], other[k]) for k in unbroken)

    more = ("--init", str(tmp_path / "a"), "--unet-steps", "0")
    continued = train(monkeypatch, tmp_path / "run d", tmp_path / "d", *more)
    assert all(torch.equal(unbroken[k], continued[k]) for k in unbroken)
