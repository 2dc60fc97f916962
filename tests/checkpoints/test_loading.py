"""Networks are filled completely from their files, or the error says what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2v.checkpoints import folder as weights
from t2v.checkpoints import loading
from t2v.engine import Engine
from t2v.errors import WeightsError
from t2v.request import Request

UNET = "unet/diffusion_pytorch_model.safetensors"


def load_error(folder: Path, **how: str) -> str:
    with pytest.raises(WeightsError) as caught:
        Engine.load(folder, **({"device": "cpu"} | how))
    return str(caught.value)


def test_tensors_missing_unknown_or_of_another_shape(broken_copy: Path):
    state = load_file(broken_copy / UNET)
    state["stranger"] = state.pop("conv_in.bias")
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state, broken_copy / UNET)
    message = load_error(broken_copy)
    assert "conv_in.bias is missing" in message
    assert "stranger is unknown" in message
    assert "conv_out.bias has shape (5,), not (4,)" in message


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
    monkeypatch.setattr(loading, "KEEP_HALF_SIZES", range(0))
    eager = Engine.load(halved, device="cpu")
    monkeypatch.setattr(loading, "KEEP_HALF_SIZES", range(200, 3000))
    kept = Engine.load(halved, device="cpu")
    for network in (kept.unet, kept.text.encoder, kept.vae.autoencoder):
        halves = {p.dtype == torch.float16: p.numel() in loading.KEEP_HALF_SIZES for p in network.parameters()}
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
    monkeypatch.setattr(loading, "KEEP_HALF_SIZES", range(1, 2**62))
    engine = Engine.load(halved, device="cpu", dtype="bfloat16")
    for network in (engine.unet, engine.text.encoder, engine.vae.autoencoder):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_what_is_kept_can_be_made_writable(halved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "KEEP_HALF_SIZES", range(1, 2**62))
    layer = Engine.load(halved, device="cpu").unet.conv_in
    before, x = layer.weight.clone(), torch.randn(1, 4, 3, 3)
    expected = layer(x)
    weight = loading.materialised(layer)
    assert weight is layer.weight is loading.materialised(layer) and not weight.requires_grad
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
    assert "occurs twice" in load_error(broken_copy)
