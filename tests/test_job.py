"""The rules: what a request becomes with a model."""

import dataclasses
import json

import pytest

from t2v.errors import InvalidRequest
from t2v.job import DEFAULT_STRENGTH, FAST_STEPS, Job, ModelInfo, resolve
from t2v.request import Request
from t2v.sampling.distilled import MCM, TURBO

MODEL = ModelInfo("model")
WITH_MCM = dataclasses.replace(MODEL, lora="mcm:1", distilled=MCM)
WITH_TURBO = dataclasses.replace(MODEL, lora="turbo:1", distilled=TURBO)
WITH_STYLE = dataclasses.replace(MODEL, lora="style:0.5")


def job(model: ModelInfo = MODEL, upscaler: ModelInfo | None = None, has_init_video: bool = False, **inputs) -> Job:
    return resolve(Request(**inputs), model, upscaler, has_init_video=has_init_video)


def test_the_default_request():
    (pass_,) = job(seed=5).passes
    assert (pass_.size, pass_.num_frames, pass_.latent_shape) == ((256, 256), 16, (1, 4, 16, 32, 32))
    assert (pass_.seed, pass_.prompts, pass_.negative_prompt) == (5, ("An astronaut riding a horse",), "")
    assert (pass_.sampling.preset, pass_.sampling.solver, pass_.sampling.num_steps) == ("quality", "dpm++", 50)
    assert (pass_.sampling.guidance_scale, pass_.num_guidance_rows) == (9, 2)
    assert (pass_.first_step, pass_.num_steps, pass_.with_lora, pass_.on_upscaler) == (0, 50, False, False)
    assert pass_.timeline.is_single_window
    assert str(pass_) == "16 frames of 256x256"


@pytest.mark.parametrize("scale, rows", [(1, 1), (2, 2)])
def test_guidance_takes_a_second_row(scale: float, rows: int):
    (pass_,) = job(guidance_scale=scale).passes
    assert pass_.num_guidance_rows == rows and (pass_.negative_prompt is None) == (rows == 1)


def test_a_blank_negative_prompt_is_the_empty_prompt():
    assert job(negative_prompt="  ").passes[0].negative_prompt == ""
    assert job(negative_prompt=" text ").passes[0].negative_prompt == "text"


@pytest.mark.parametrize(
    "num_frames, inputs, window",
    [
        (16, {}, 16),
        (128, {}, 128),
        (129, {}, 16),
        (128, {"window": 32}, 32),
        (24, {"next_prompts": "b"}, 16),
        (24, {"next_prompts": "b", "window": 8}, 8),
    ],
)
def test_windows(num_frames: int, inputs: dict, window: int):
    assert job(num_frames=num_frames, **inputs).passes[0].timeline.window_size == window


def test_the_fast_preset_takes_at_most_twenty_steps():
    assert job(preset="fast").passes[0].num_steps == FAST_STEPS == 20
    assert job(preset="fast", num_inference_steps=5).passes[0].num_steps == 5


@pytest.mark.parametrize("asked, steps", [(1, 1), (8, 8), (9, 4), (50, 4)])
def test_steps_of_turbo(asked: int, steps: int):
    assert job(WITH_MCM, num_inference_steps=asked).passes[0].num_steps == steps


def test_turbo_is_the_default_with_a_distilled_model():
    for model, embedded in ((WITH_MCM, None), (WITH_TURBO, 7.5)):
        (pass_,) = job(model).passes
        sampling = pass_.sampling
        assert (sampling.preset, sampling.solver, sampling.distilled) == ("turbo", "lcm", model.distilled)
        assert (sampling.guidance_scale, sampling.embedded_guidance) == (1, embedded)
        assert pass_.with_lora and pass_.num_guidance_rows == 1
    assert not job(WITH_MCM, preset="quality").passes[0].with_lora
    assert job(WITH_STYLE).passes[0].with_lora and job(WITH_STYLE).passes[0].sampling.preset == "quality"


@pytest.mark.parametrize(
    "model, inputs, sentence",
    [
        (MODEL, {"preset": "turbo"}, "T2V_LORA"),
        (MODEL, {"strength": 0.5}, "strength needs an init_video"),
        (MODEL, {"next_prompts": "b"}, r"next_prompts needs num_frames to be larger than window \(16\)"),
        (MODEL, {"next_prompts": "b", "num_frames": 8, "window": 8}, r"larger than window \(8\)"),
        (MODEL, {"negative_prompt": "b", "guidance_scale": 1}, "negative_prompt has no effect at guidance_scale 1"),
        (WITH_MCM, {"guidance_scale": 7}, "takes no guidance_scale with MCM"),
        (WITH_TURBO, {"guidance_scale": 15}, "guidance_scale must be 2 to 14 with preset turbo"),
        (WITH_TURBO, {"negative_prompt": "b"}, "turbo takes no negative_prompt and has its own scheduler"),
        (WITH_TURBO, {"scheduler": "ddim"}, "turbo takes no negative_prompt and has its own scheduler"),
        (dataclasses.replace(MODEL, scale_factor=16), {"width": 24}, "multiples of 16, not 24x256"),
    ],
)
def test_what_a_model_cannot_do_is_refused(model: ModelInfo, inputs: dict, sentence: str):
    with pytest.raises(InvalidRequest, match=sentence):
        job(model, **inputs)


@pytest.mark.parametrize("strength, steps", [(None, 6), (0, 0), (0.3, 3), (0.31, 4), (1, 10)])
def test_strength_leaves_steps_out(strength: float | None, steps: int):
    (pass_,) = job(has_init_video=True, strength=strength, num_inference_steps=10).passes
    assert pass_.num_steps == steps and pass_.first_step == 10 - steps and pass_.sampling.num_steps == 10


def test_upscaling_is_a_second_pass_of_twice_the_size():
    first, second = job(upscale=2, width=40, height=24, num_inference_steps=10).passes
    assert (first.size, second.size) == ((24, 40), (48, 80))
    assert (first.num_steps, second.num_steps) == (10, 10 * DEFAULT_STRENGTH)
    assert first.seed == second.seed and not second.on_upscaler


def test_an_upscaler_brings_its_own_settings():
    large = ModelInfo("large", native_size=(8, 8), guidance_scale=1.0)
    made = job(dataclasses.replace(MODEL, native_size=(64, 16)), large, upscale=2)
    assert made.passes[1].on_upscaler and made.passes[1].size == (128, 32)
    assert made.passes[1].sampling.guidance_scale == 1
    assert made.metadata["upscaler"] == "large" and (made.metadata["width"], made.metadata["height"]) == (32, 128)
    assert "upscaler" not in job(MODEL, large).metadata


def test_an_upscaler_has_no_distilled_lora():
    first, second = job(WITH_MCM, MODEL, upscale=2).passes
    assert first.sampling.preset == "turbo" and second.sampling.preset == "fast" and second.num_steps == 12
    first, second = job(WITH_MCM, upscale=2).passes
    assert first.num_steps == 4 and second.num_steps == 3 and second.with_lora


def test_a_request_may_not_be_endless_work():
    with pytest.raises(InvalidRequest, match="128 frames of 1024x1024 in 500 steps is 3.9 times the work allowed"):
        job(num_frames=128, width=1024, height=1024, num_inference_steps=500)
    with pytest.raises(InvalidRequest, match="128 frames of 1024x1024 in 200 steps is 1.3 times the work allowed"):
        job(num_frames=128, width=512, height=512, num_inference_steps=200, upscale=2)  # 200 steps and 120 larger ones
    assert job(num_frames=256, num_inference_steps=500, window=128)


def test_metadata_says_what_is_made_and_by_what():
    metadata = job(prompt="x", seed=0, num_inference_steps=7).metadata
    assert metadata["model"] == "model" and metadata["seed"] == 0 and metadata["num_inference_steps"] == 7
    assert (metadata["width"], metadata["height"], metadata["prompt"]) == (256, 256, "x")
    assert metadata.keys() - {field.name for field in dataclasses.fields(Request)} == {"model"}
    assert job(WITH_STYLE).metadata["lora"] == "style:0.5" and job(WITH_TURBO).metadata["guidance_scale"] == 7.5
    assert json.loads(json.dumps(dict(metadata))) == metadata
