"""Guidance and windows around a network."""

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import clean_latents, first_noise
from t2v.budget import DEFAULT, LOW_MEMORY
from t2v.engine import Engine
from t2v.networks.layers import fuse_upsample_kernels
from t2v.request import Request
from t2v.sampling.denoiser import GuidedNetwork
from t2v.sampling.distilled import MCM
from t2v.sampling.solvers import solver_step, solver_steps


def network(latents: torch.Tensor, terms: torch.Tensor, text_kv: torch.Tensor) -> torch.Tensor:
    """Another prediction for every row."""
    return latents * text_kv.mean((1, 2))[:, None, None, None, None] + terms.mean()


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_guidance_goes_from_the_unconditional_row_to_the_conditional_and_beyond(rows_at_once: int):
    x, terms = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 5)
    text_kv, scale = torch.stack([torch.full((7, 5), 2.0), torch.full((7, 5), 3.0)]), torch.tensor(4.0)
    guided = GuidedNetwork(network, rows_at_once)
    torch.testing.assert_close(guided.predict(x, terms, text_kv, scale)[0], (2 + 4 * (3 - 2)) * x + terms.mean())
    torch.testing.assert_close(guided.predict(x, terms, text_kv[1:], scale)[0], 3 * x + terms.mean())


def test_a_window_as_long_as_the_video_changes_nothing(tiny: Engine):
    request = Request("a circle", num_frames=6, num_inference_steps=4, seed=3)
    whole, six, four = (clean_latents(tiny, dataclasses.replace(request, window=n)) for n in (None, 6, 4))
    assert torch.equal(whole, six) and not torch.allclose(whole, four, atol=0.01)


def test_windows_are_averaged_by_their_weights(tiny: Engine):
    """One step of DDIM from the averaged predictions, computed here again with the plain network."""
    request = Request("a circle", 12, 1, seed=3, window=8, scheduler="ddim", guidance_scale=1)
    noise = first_noise(tiny, request)
    (step,) = solver_steps(tiny.model.schedule, "ddim", 1)
    prediction, total = torch.zeros_like(noise), torch.zeros(12, 1, 1)
    ramp = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])[:, None, None]
    with torch.inference_mode():
        for start in (0, 4):
            part = tiny.unet(noise[:, :, start : start + 8], step.t, tiny.text.encode(["a circle"]))
            prediction[:, :, start : start + 8] += ramp * part
            total[start : start + 8] += ramp
    nothing = torch.zeros((2, *noise.shape))
    expected = solver_step(noise, nothing, prediction / total, step.coefficients)[0]
    assert torch.allclose(clean_latents(tiny, request), expected, atol=1e-4)


def test_next_prompts_change_the_end_and_negative_prompts_everything(tiny: Engine):
    long = Request("a circle", num_frames=24, num_inference_steps=3, seed=3, window=8, guidance_scale=2)
    plain, then = (clean_latents(tiny, dataclasses.replace(long, next_prompts=text)) for text in ("", "a square"))
    same = clean_latents(tiny, dataclasses.replace(long, next_prompts="a circle"))
    assert torch.allclose(plain, same, atol=1e-4)
    change = (then - plain).abs().mean((0, 1, 3, 4))
    assert 3 * change[:4].max() < change[-4:].min()
    assert not torch.allclose(plain, clean_latents(tiny, dataclasses.replace(long, negative_prompt="a square")))
    assert torch.equal(plain, clean_latents(tiny, dataclasses.replace(long, negative_prompt=" ")))


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"guidance_scale": 1, "scheduler": "unipc"},
        {"num_frames": 8, "window": 4, "loop": True, "next_prompts": "a blue star", "negative_prompt": "text"},
        {"preset": "turbo"},
    ],
)
@pytest.mark.parametrize("plan", [DEFAULT, LOW_MEMORY], ids=["default", "low memory"])
def test_denoising_never_waits_for_the_device(tiny_folder: Path, inputs: dict, plan):
    """In half precision on a device that has shapes but no values, so that nothing can wait for one; and where tensors
    made on the CPU by mistake do not mix with those on the device."""
    engine = Engine.load(tiny_folder, device="cpu")
    model = engine.model
    for module in (model.text.encoder, model.unet):
        fuse_upsample_kernels(module.to("meta", torch.float16))
    model.info = dataclasses.replace(model.info, distilled=MCM, lora="mcm:1")
    for function in (model.step, model.predict):
        function.can_record = False

        def on_the_device(*tensors: torch.Tensor, call=function.function) -> tuple[torch.Tensor, ...]:
            assert {x.device.type for x in tensors} == {"meta"}  # a CUDA graph would keep the CPU's values for ever
            return call(*tensors)

        function.function = on_the_device
    request = Request(**({"num_frames": 3, "num_inference_steps": 3, "preset": "quality"} | inputs))
    latents = clean_latents(engine, request, plan=plan)
    assert latents.device.type == "meta" and latents.dtype == torch.float32
    assert latents.shape == (1, 4, request.num_frames, 4, 4)
