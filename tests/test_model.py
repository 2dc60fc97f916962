"""A loaded model: what is cached and recorded changes together with the weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import clean_latents
from t2v.checkpoints import lora
from t2v.engine import Engine
from t2v.errors import InvalidRequest, WeightsError
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


@pytest.fixture
def with_turbo(broken_copy: Path, style_folder: Path) -> Path:
    """A model folder that brings a few-step LoRA."""
    recipe = {"name": "quick", "solver": "ddim", "default_steps": 4, "max_steps": 8}
    config = {"r": 2, "lora_alpha": 2, "_t2v_distilled": recipe}
    shutil.copytree(style_folder, broken_copy / "turbo", ignore=shutil.ignore_patterns("broken"))
    (broken_copy / "turbo" / "adapter_config.json").write_text(json.dumps(config))
    return broken_copy


def test_a_models_own_turbo_serves_preset_turbo_and_no_other(tiny: Engine, with_turbo: Path):
    engine = Engine.load(with_turbo, "cpu")
    request = Request("x", num_frames=2, num_inference_steps=3, seed=0)
    assert torch.equal(clean_latents(engine, request), clean_latents(tiny, request))
    turbo = replace(request, preset="turbo", num_inference_steps=50)
    sampling = engine.prepare(turbo).passes[0].sampling
    assert (sampling.solver, sampling.num_steps, sampling.guidance_scale) == ("ddim", 4, 1)
    assert engine.prepare(turbo).metadata["lora"] == "turbo:1"
    quality = replace(request, preset="quality", guidance_scale=1, scheduler="ddim")
    assert not torch.allclose(clean_latents(engine, turbo), clean_latents(engine, quality), atol=1e-2)
    assert torch.equal(clean_latents(engine, request), clean_latents(tiny, request))


def test_an_installed_lora_takes_the_place_of_the_models_own(with_turbo: Path, style_folder: Path):
    engine = Engine.load(with_turbo, "cpu", lora=str(style_folder))
    with pytest.raises(InvalidRequest, match="preset turbo needs a few-step LoRA, and .* is not one"):
        engine.prepare(Request("x", preset="turbo"))


def test_a_removal_that_failed_is_completed_before_the_next_request(with_turbo: Path, monkeypatch: pytest.MonkeyPatch):
    engine = Engine.load(with_turbo, "cpu")
    quality = Request("x", num_frames=1, num_inference_steps=2, seed=0)
    turbo = replace(quality, preset="turbo")
    expected = {request.preset: clean_latents(engine, request) for request in (quality, turbo)}

    def no_memory(network: object) -> None:
        raise MemoryError

    for request in (turbo, quality):
        clean_latents(engine, turbo)  # the LoRA is in the weights
        with monkeypatch.context() as patch:
            patch.setattr(lora, "fuse_upsample_kernels", no_memory)
            with pytest.raises(MemoryError):
                engine.model.use_lora(False)
        assert torch.equal(clean_latents(engine, request), expected[request.preset])


@pytest.mark.parametrize(
    "recipe, reason",
    [
        (None, "is not a few-step LoRA: its adapter_config.json lacks _t2v_distilled"),
        ({"name": "quick", "pace": 3}, "unexpected keyword argument 'pace'"),
        ({"name": "quick", "solver": "euler"}, "its solver must be lcm or ddim, not 'euler'"),
    ],
)
def test_a_turbo_folder_that_cannot_be_used_is_refused(with_turbo: Path, recipe: dict | None, reason: str):
    (with_turbo / "turbo" / "adapter_config.json").write_text(json.dumps({"r": 2, "_t2v_distilled": recipe}))
    with pytest.raises(WeightsError, match=reason):
        Engine.load(with_turbo, "cpu")


def test_a_recipe_may_give_a_range_of_guidance_scales(with_turbo: Path):
    scales = {"minimum": 2, "default": 7.5, "maximum": 14}
    recipe = {"name": "quick", "solver": "lcm", "embedded_guidance": scales}
    (with_turbo / "turbo" / "adapter_config.json").write_text(json.dumps({"r": 2, "_t2v_distilled": recipe}))
    sampling = Engine.load(with_turbo, "cpu").prepare(Request("x", preset="turbo")).passes[0].sampling
    assert sampling.embedded_guidance == 7.5


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
