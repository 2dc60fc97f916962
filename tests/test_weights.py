"""A folder is a whole model of this family, or the error says what is wrong with it."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2v import weights
from t2v.engine import Engine
from t2v.errors import WeightsError
from t2v.request import Request

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


def test_tensors_missing_unknown_or_of_another_shape(broken_copy: Path):
    state = load_file(broken_copy / UNET)
    state["stranger"] = state.pop("conv_in.bias")
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state, broken_copy / UNET)
    message = load_error(broken_copy)
    assert "conv_in.bias is missing" in message
    assert "stranger is unknown" in message
    assert "conv_out.bias has shape (5,), not (4,)" in message


def test_truncated_file(broken_copy: Path):
    data = (broken_copy / UNET).read_bytes()
    (broken_copy / UNET).write_bytes(data[: len(data) // 2])
    message = load_error(broken_copy)
    assert UNET in message and "download it again" in message


@pytest.mark.parametrize("network", ["vae", "text_encoder"])
def test_other_networks_are_strict_too(broken_copy: Path, network: str):
    path = next((broken_copy / network).glob("*.safetensors"))
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})
    assert f"broken/{network}" in load_error(broken_copy)


def test_networks_of_different_models(broken_copy: Path):
    config = json.loads((broken_copy / "vae" / "config.json").read_text()) | {"latent_channels": 8}
    (broken_copy / "vae" / "config.json").write_text(json.dumps(config))
    load_error(broken_copy)


@pytest.fixture
def halved(broken_copy: Path) -> Path:
    """The published half-precision set: *.fp16.safetensors in every folder."""
    for path in broken_copy.glob("*/*.safetensors"):
        state = {k: v.half() for k, v in load_file(path).items()}
        save_file(state, path.with_name(f"{path.stem}.fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    return broken_copy


def test_half_precision_files_with_infix(halved: Path):
    engine = Engine.load(halved, device="cpu")
    assert {p.dtype for p in engine.unet.parameters()} == {torch.float32}
    assert engine.text.encode([""]).dtype == engine.vae.dtype == torch.float32


def test_tensors_that_are_kept_as_they_are_stored_compute_the_same(halved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "KEPT", range(0))
    eager = Engine.load(halved, device="cpu")
    monkeypatch.setattr(weights, "KEPT", range(200, 3000))
    kept = Engine.load(halved, device="cpu")
    for network in (kept.unet, kept.text.encoder, kept.vae.autoencoder):
        halves = {p.dtype == torch.float16: p.numel() in weights.KEPT for p in network.parameters()}
        assert halves == {True: True, False: False}
    request = Request("a circle", num_frames=3, num_inference_steps=3, seed=0)
    start = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8).numpy()
    for inputs in ({}, {"init_frames": start}):
        for record in (False, True):
            if record:
                kept.model.step.min_calls = 0
            expected, made = (np.concatenate(list(e.generate(request, **inputs))) for e in (eager, kept))
            assert np.array_equal(made, expected)
    assert kept.model.step.recordings


def test_nothing_is_kept_where_that_would_not_be_exact(halved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "KEPT", range(1, 2**62))
    engine = Engine.load(halved, device="cpu", dtype="bfloat16")
    for network in (engine.unet, engine.text.encoder, engine.vae.autoencoder):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_what_is_kept_can_be_made_writable(halved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "KEPT", range(1, 2**62))
    layer = Engine.load(halved, device="cpu").unet.conv_in
    before, x = layer.weight.clone(), torch.randn(1, 4, 3, 3)
    expected = layer(x)
    weight = weights.writable(layer)
    assert weight is layer.weight is weights.writable(layer) and not weight.requires_grad
    assert torch.equal(weight, before) and torch.equal(layer(x), expected)
    weight.mul_(2)
    assert torch.equal(layer.weight, 2 * before)


def test_text_encoder_keys_with_the_prefix_of_transformers_4(broken_copy: Path, tiny: Engine):
    path = broken_copy / "text_encoder" / "model.safetensors"
    state = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    loaded = Engine.load(broken_copy, device="cpu")
    assert torch.equal(loaded.text.encode(["a circle"]), tiny.text.encode(["a circle"]))


def test_nothing_stays_on_meta_or_learns(tiny: Engine):
    for module in (tiny.unet, tiny.text.encoder, tiny.vae.autoencoder):
        assert not module.training
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device.type == "cpu" and not tensor.requires_grad


def test_unknown_device_and_dtype(tiny_folder: Path):
    assert "no device 'gpu'" in load_error(tiny_folder, device="gpu")
    assert "no dtype 'int8'" in load_error(tiny_folder, dtype="int8")
    if not torch.cuda.is_available():
        assert "no CUDA" in load_error(tiny_folder, device="cuda")


def test_names_of_older_files(broken_copy: Path, tiny: Engine):
    """The autoencoder's attention as diffusers named it before 0.18; CLIP's position ids in the file."""
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    path = broken_copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in older.items():
        assert any(new in key for key in state)
        state = {key.replace(new, old): value for key, value in state.items()}
    save_file(state, path)
    path = broken_copy / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    loaded = Engine.load(broken_copy, device="cpu")
    assert torch.equal(loaded.text.encode(["a circle"]), tiny.text.encode(["a circle"]))
    latents = torch.randn(1, tiny.vae.channels, 1, 4, 4)
    assert (next(loaded.vae.decode(latents)) == next(tiny.vae.decode(latents))).all()


@pytest.mark.parametrize("network", ["vae", "text_encoder", "unet"])
def test_config_that_describes_no_network(broken_copy: Path, network: str):
    path = broken_copy / network / "config.json"
    keys = {"vae": "block_out_channels", "text_encoder": "hidden_size", "unet": "block_out_channels"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {keys[network]: "many"}))
    assert f"{network}/config.json" in load_error(broken_copy)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(broken_copy: Path, value: float):
    state = load_file(broken_copy / UNET)
    state["mid_block.resnets.0.conv1.weight"].view(-1)[7] = value
    save_file(state, broken_copy / UNET)
    assert "mid_block.resnets.0.conv1.weight holds values that are not finite" in load_error(broken_copy)


def test_values_too_large_for_the_dtype(broken_copy: Path):
    state = load_file(broken_copy / UNET)
    state["conv_in.bias"][0] = 1e6
    save_file(state, broken_copy / UNET)
    Engine.load(broken_copy, device="cpu")
    assert "conv_in.bias holds values that are not finite in torch.float16" in load_error(broken_copy, dtype="float16")


def test_networks_that_do_not_fit_are_told_together(broken_copy: Path):
    for path in broken_copy.glob("*/*.safetensors"):
        state = load_file(path)
        state.pop(sorted(state)[0])
        save_file(state, path)
    message = load_error(broken_copy)
    assert all(f"broken/{network}" in message for network in weights.NETWORKS)


def test_a_tensor_under_its_old_and_its_new_name(broken_copy: Path):
    path = broken_copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if ".to_q." in key)
    save_file(state | {key.replace(".to_q.", ".query."): state[key] + 1}, path)
    assert "is there twice" in load_error(broken_copy)


def test_header_of_what_is_written(tmp_path: Path):
    state = {"b": torch.randn(3, 5), "a": torch.arange(4.0), "empty": torch.zeros(0), "scalar": torch.tensor(2.0)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        weights.save(path, shapes, dtype, lambda name, dtype=dtype: state[name].to(dtype))  # type: ignore[misc]
        loaded = load_file(path)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
