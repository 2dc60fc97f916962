"""The scripts, run as people run them."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_demo
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from t2v.engine import Engine
from t2v.media.encode import write_video


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "scripts").glob("*.py") if p.stem != "demo_world"))
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    assert not end.value.code and "usage" in capsys.readouterr().out


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


TRAINING = ["--vae-steps", "2", "--text-steps", "2", "--clips", "16", "--unet-steps", "3", "--batch", "2"]


def train(monkeypatch: pytest.MonkeyPatch, run_folder: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    folders = ["--run", str(run_folder), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *TRAINING, "--save-every", "1", *folders, *more])
    train_demo.main()
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
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
