"""The trainer, at its smallest: all stages, an interruption, the folder it writes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo import data, distill, train, world
from t2v.engine import Engine

pytestmark = pytest.mark.slow  # takes some ten seconds

SMALLEST = {
    "vae-steps": 2, "vae-noise-steps": 1, "vae-batch": 4, "text-steps": 2, "text-batch": 4, "pool": 4, "fresh": 2,
    "still-steps": 1, "still-batch": 2, "unet-steps": 3, "batch": 1, "turbo-clips": 1, "turbo-steps": 4,
    "turbo-batch": 1, "save-every": 1,
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    options = [part for name, value in SMALLEST.items() for part in (f"--{name}", str(value))]
    folders = ["--run", str(folder / "run"), "--out", str(folder / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options, *folders, *more])
    monkeypatch.setattr(distill, "TEACHER_STEPS", 4)
    train.main()
    return load_file(folder / "out" / "unet" / "diffusion_pytorch_model.safetensors")


WITHOUT_TURBO = ("--stages", "vae,text,unet,export")


def test_training_writes_a_model_with_its_few_step_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, tmp_path)
    assert Engine.load(tmp_path / "out", device="cpu").model.info.native_size == (world.SIZE, world.SIZE)
    turbo = load_file(tmp_path / "out" / "turbo" / "adapter_model.safetensors")
    assert turbo and all(value.isfinite().all() for value in turbo.values())
    assert any(value.any() for name, value in turbo.items() if "lora_B" in name)


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit; another seed ends elsewhere."""
    unbroken = run(monkeypatch, tmp_path / "a", *WITHOUT_TURBO)

    class Interrupted(Exception):
        pass

    save = train.save

    def save_and_stop(state: dict, path: Path) -> None:
        save(state, path)
        if path.name == "unet.pt":
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run(monkeypatch, tmp_path / "b", *WITHOUT_TURBO)
    assert torch.load(tmp_path / "b" / "run" / "unet.pt")["step"] == 1
    resumed = run(monkeypatch, tmp_path / "b", *WITHOUT_TURBO)
    assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)

    other = run(monkeypatch, tmp_path / "c", *WITHOUT_TURBO, "--seed", "1")
    assert not all(torch.equal(unbroken[k], other[k]) for k in unbroken)

    more = ("--init", str(tmp_path / "a" / "out"), "--unet-steps", "0")
    continued = run(monkeypatch, tmp_path / "d", *WITHOUT_TURBO, *more)
    assert all(torch.equal(unbroken[k], continued[k]) for k in unbroken)


def test_captions_say_what_is_recorded_about_them():
    generator = torch.Generator().manual_seed(0)
    clips = world.random_clips(200, generator)
    names = (*world.ATTRIBUTES.values(), world.SIZES, world.PLACES)
    for i in range(len(clips)):
        words, told = data.caption(clips, i, generator)
        words = words.replace("grey", "gray")
        for values, index in zip(names[3:], told[3:]):
            assert [v for v in values if v in words] == ([values[index]] if index < len(values) else [])


@pytest.mark.parametrize("module", ["train", "score", "filmstrip"])
def test_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"demo.{module}").main()
    assert not end.value.code and "usage" in capsys.readouterr().out
