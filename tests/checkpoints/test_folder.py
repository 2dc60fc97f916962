"""A folder is a complete model of this family, or the error says what is wrong with it."""

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2v.checkpoints import folder as weights
from t2v.checkpoints.folder import NetworkFiles, write_model
from t2v.engine import Engine
from t2v.errors import WeightsError

UNET = "unet/diffusion_pytorch_model.safetensors"


def load_error(folder: Path, **how: str) -> str:
    with pytest.raises(WeightsError) as caught:
        Engine.load(folder, **({"device": "cpu"} | how))
    return str(caught.value)


def test_no_folder(tmp_path: Path):
    assert "no weights folder" in load_error(tmp_path / "absent")


def test_everything_missing_is_named_at_once(broken_copy: Path):
    (broken_copy / UNET).unlink()
    (broken_copy / "tokenizer" / "merges.txt").unlink()
    (broken_copy / "vae" / "config.json").unlink()
    message = load_error(broken_copy)
    assert all(name in message for name in (UNET, "tokenizer/merges.txt", "vae/config.json"))


def test_what_was_remembered_and_is_not_whole_is_found_out_again(broken_copy: Path):
    weights.write_manifest(broken_copy, "scripts/mend")
    for content in ("", "[1]", "{"):
        (broken_copy / weights.VERIFIED).write_text(content)
        Engine.load(broken_copy, "cpu")
        assert UNET in weights.read_json(broken_copy / weights.VERIFIED)


def test_another_kind_of_model(broken_copy: Path):
    (broken_copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline" in load_error(broken_copy)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\x01"])
def test_config_that_is_no_json_object(broken_copy: Path, content: str):
    (broken_copy / "unet" / "config.json").write_text(content)
    assert "unet/config.json" in load_error(broken_copy)


def test_truncated_file(broken_copy: Path):
    data = (broken_copy / UNET).read_bytes()
    (broken_copy / UNET).write_bytes(data[: len(data) // 2])
    message = load_error(broken_copy)
    assert UNET in message and "download it again" in message


def test_unknown_device_and_dtype(tiny_folder: Path):
    assert "no device 'gpu'" in load_error(tiny_folder, device="gpu")
    assert "no dtype 'int8'" in load_error(tiny_folder, dtype="int8")
    if not torch.cuda.is_available():
        assert "no CUDA" in load_error(tiny_folder, device="cuda")


@pytest.fixture
def manifested(broken_copy: Path) -> Path:
    weights.write_manifest(broken_copy, "make it again")
    weights.check(broken_copy)
    return broken_copy


def flip(path: Path) -> None:
    """Change one bit in the middle, and neither size nor time of change."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_every_damaged_file_is_named_with_the_repair(manifested: Path):
    os.utime(manifested / UNET, ns=(0, 0))
    flip(manifested / UNET)
    (manifested / "vae" / "config.json").write_text("{}")
    (manifested / "tokenizer" / "merges.txt").unlink()
    message = load_error(manifested)
    assert f"{UNET} is damaged" in message and "vae/config.json has 2 bytes" in message
    assert "tokenizer/merges.txt" in message and message.endswith("To repair it: make it again")


def test_a_digest_is_computed_once_unless_asked_for(manifested: Path, monkeypatch: pytest.MonkeyPatch):
    computed: list[Path] = []
    digest = weights.digest
    monkeypatch.setattr(weights, "digest", lambda path: computed.append(path) or digest(path))
    weights.check(manifested)
    assert not computed
    os.utime(manifested / UNET)
    weights.check(manifested)
    assert computed == [manifested / UNET]
    flip(manifested / UNET)
    weights.check(manifested)  # as documented: neither size nor time of change tell
    with pytest.raises(WeightsError, match="is damaged"):
        weights.check(manifested, verify=True)


def test_a_folder_that_cannot_be_written_to(manifested: Path, monkeypatch: pytest.MonkeyPatch):
    (manifested / weights.VERIFIED).unlink()

    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weights.os, "replace", refuse)
    weights.check(manifested)
    assert not (manifested / weights.VERIFIED).exists()


@pytest.mark.parametrize("claimed", [2**62, 2**40, 11 * 2**20])
def test_a_header_bomb_is_refused(broken_copy: Path, claimed: int):
    """Whether the file is as long as its header claims or not."""
    with (broken_copy / UNET).open("r+b") as file:
        file.write(struct.pack("<Q", claimed))
        if claimed < 2**40:
            file.truncate(claimed + 100)
    message = load_error(broken_copy)
    assert UNET in message and ("cut short" in message or "header" in message)


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_a_written_model_loads(tiny_folder: Path, tiny: Engine, tmp_path: Path, infix: str):
    """From tensors in memory, under the networks' own names; diffusers' libraries get the names they need."""
    modules = {"unet": tiny.unet, "vae": tiny.vae.autoencoder, "text_encoder": tiny.text.encoder}
    networks = [
        NetworkFiles.of(name, weights.read_json(tiny_folder / name / "config.json"), module.state_dict())
        for name, module in modules.items()
    ]
    scheduler = weights.read_json(tiny_folder / "scheduler" / "scheduler_config.json")
    index = {"_t2v_name": "written", "_t2v_guidance_scale": 3}
    out = tmp_path / "out"
    write_model(out, networks, scheduler, tiny_folder / "tokenizer", dtype=torch.float32, infix=infix, index=index)
    engine = Engine.load(out, device="cpu")
    assert engine.name == "written" and engine.model.info.guidance_scale == 3
    for name, module in modules.items():
        loaded = {"unet": engine.unet, "vae": engine.vae.autoencoder, "text_encoder": engine.text.encoder}[name]
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())
    path = out / "text_encoder" / f"model{infix}.safetensors"
    assert all(key.startswith("text_model.") for key in load_file(path))
