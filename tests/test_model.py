"""A loaded model: what is cached and recorded changes together with the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import clean_latents
from t2v.engine import Engine
from t2v.request import Request


@pytest.fixture
def style_folder(tmp_path: Path) -> Path:
    """A PEFT LoRA of a layer that reads the text."""
    layer = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    return tmp_path


def test_text_keys_and_values_have_a_row_for_each_text(tiny: Engine):
    model = tiny.model
    one, two = model.text_kv(["a", "b"], None), model.text_kv(["a", "b"], "c")
    assert one.shape[:3] == (2, 1, 77) and two.shape[:3] == (2, 2, 77)
    assert torch.equal(two[:, 1:], one) and torch.equal(two[0, 0], two[1, 0])
    assert torch.equal(model.text_kv(["a"], "")[0, 0], model.text_kv([""], None)[0, 0])


def test_use_lora_changes_weights_recordings_and_the_cached_text_together(tiny_folder: Path, style_folder: Path):
    engine = Engine.load(tiny_folder, "cpu", lora=str(style_folder))
    model = engine.model
    model.step.min_calls = 0
    request = Request("x", num_frames=1, num_inference_steps=2, seed=0)
    with_lora = clean_latents(engine, request)
    kv = model.text_kv(["a"], "")
    assert model.lora and model.lora.active and model.has_recordings
    model.use_lora(False)
    assert not model.lora.active and not model.has_recordings
    assert not torch.equal(model.text_kv(["a"], ""), kv)  # the LoRA changes the projection of the text
    plain = model.unet.state_dict()
    assert all(
        torch.equal(value, plain[key]) for key, value in Engine.load(tiny_folder, "cpu").unet.state_dict().items()
    )
    model.use_lora(True)
    assert torch.equal(model.text_kv(["a"], ""), kv)
    torch.testing.assert_close(clean_latents(engine, request), with_lora, rtol=1e-4, atol=1e-5)


def test_use_lora_without_a_lora_does_nothing(tiny: Engine):
    tiny.model.use_lora(True)
    tiny.model.use_lora(False)


@pytest.mark.parametrize("guidance_rows_at_once, recorded", [(2, True), (1, False)])
def test_only_the_default_plan_is_recorded(tiny_folder: Path, guidance_rows_at_once: int, recorded: bool):
    engine = Engine.load(tiny_folder, "cpu")
    model = engine.model
    model.step.min_calls = 0
    (pass_,) = engine.prepare(Request(num_frames=1, num_inference_steps=1)).passes
    kv = model.text_kv(pass_.prompts, pass_.negative_prompt)
    latents = model.denoise(pass_, kv, None, guidance_rows_at_once, lambda done, total, x_0: None)
    assert latents.shape == pass_.latent_shape and model.has_recordings == recorded
