"""Prompt to frames with tiny real parts, against diffusers' own pipeline on the same folder."""

import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, TextToVideoSDPipeline

from conftest import DEMO
from t2v import vae
from t2v.engine import Engine
from t2v.errors import InvalidRequest
from t2v.request import Request
from t2v.video import write_video


def frames(engine: Engine, **inputs) -> np.ndarray:
    return np.concatenate(list(engine.generate(Request(**({"num_frames": 3, "num_inference_steps": 3} | inputs)))))


@pytest.mark.parametrize("folder", ["tiny", "demo"])
@pytest.mark.parametrize("scheduler", ["dpm++", "ddim"])
def test_equals_the_diffusers_pipeline(tiny_folder: Path, folder: str, scheduler: str):
    """The whole way: same folder, same noise, same latents."""
    path = tiny_folder if folder == "tiny" else DEMO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = TextToVideoSDPipeline.from_pretrained(path, torch_dtype=torch.float32)
    if scheduler == "dpm++":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine.load(path, device="cpu")
    engine.solver = scheduler
    request = Request("a red circle", 3, num_inference_steps=5, seed=3, guidance_scale=9, width=40, height=32)
    expected = pipeline(
        request.prompt,
        num_frames=3,
        num_inference_steps=5,
        guidance_scale=9.0,
        width=40,
        height=32,
        latents=engine.noise(request),
        output_type="latent",
    ).frames
    ours = engine.denoised(request)
    assert ours.shape == (1, 4, 3, 4, 5) and ours.dtype == torch.float32
    assert float((ours - expected).norm() / expected.norm()) < 1e-4  # measured 2e-6


def test_same_seed_same_frames(tiny: Engine):
    assert np.array_equal(frames(tiny, seed=0), frames(tiny, seed=0))
    assert not np.array_equal(frames(tiny, seed=0), frames(tiny, seed=1))


def test_prompt_and_guidance_matter(tiny: Engine):
    base = frames(tiny, seed=0).astype(int)
    assert np.abs(frames(tiny, seed=0, prompt="a green square") - base).max() > 0
    assert np.abs(frames(tiny, seed=0, guidance_scale=1) - base).max() > 0
    assert tiny.guidance_scale == 9 and np.array_equal(frames(tiny, seed=0, guidance_scale=9), base)


@pytest.mark.parametrize("inputs", [{"num_frames": 1}, {"num_frames": 17}, {"width": 40, "height": 24}, {"width": 16}])
def test_any_size_and_count(tiny: Engine, inputs: dict):
    video = frames(tiny, seed=0, **inputs)
    count = inputs.get("num_frames", 3)
    assert video.shape == (count, inputs.get("height", 32), inputs.get("width", 32), 3) and video.dtype == np.uint8


def test_noise_is_the_cpu_generators_first_draw(tiny: Engine):
    expected = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(5))
    assert torch.equal(tiny.noise(Request(seed=5, num_frames=2)), expected)


def test_progress_tells_every_stage_in_order(tiny: Engine):
    told: list[tuple[str, int, int]] = []
    request = Request(num_frames=2, num_inference_steps=3, seed=0)
    list(tiny.generate(request, lambda *event: told.append(event)))
    assert told == [("text", 1, 1), ("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3), ("decode", 2, 2)]


def test_a_cancelled_request_leaves_the_engine_usable(tiny: Engine):
    class Cancelled(BaseException):
        pass

    def cancel(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise Cancelled

    before = frames(tiny, seed=0)
    with pytest.raises(Cancelled):
        tiny.generate(Request(num_frames=2, seed=0), cancel)
    assert np.array_equal(frames(tiny, seed=0), before)


def test_gradients_are_never_recorded(tiny: Engine):
    assert torch.is_grad_enabled()
    latents = tiny.denoised(Request(num_frames=1, num_inference_steps=1, seed=0))
    assert not latents.requires_grad
    iterator = tiny.generate(Request(num_frames=1, num_inference_steps=1, seed=0))
    next(iterator)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # not leaked between chunks


def test_a_size_that_the_autoencoder_cannot_make_is_refused(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny.vae, "factor", 16)
    with pytest.raises(InvalidRequest, match="multiples of 16"):
        tiny.size(Request(width=24))


def test_bfloat16_runs_and_stays_near(tiny_folder: Path, tiny: Engine):
    half = Engine.load(tiny_folder, device="cpu", dtype="bfloat16")
    assert (
        np.abs(frames(half, seed=0, guidance_scale=2).astype(int) - frames(tiny, seed=0, guidance_scale=2)).mean() < 16
    )


def test_frames_are_not_collected_on_their_way_to_the_file(
    tiny: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 20 chunks at most two exist at a time: the one being encoded and the one being decoded."""
    monkeypatch.setattr(vae, "CHUNK_PIXELS", 2 * 32 * 32)
    chunks: list[weakref.ref] = []
    alive: list[int] = []

    def watched() -> Iterator[np.ndarray]:
        for frames in tiny.vae.decode(torch.randn(1, 4, 40, 4, 4)):
            chunks.append(weakref.ref(frames))
            alive.append(sum(chunk() is not None for chunk in chunks))
            yield frames

    assert write_video(tmp_path / "a.mp4", watched(), 8, {}).frames == 40
    assert len(chunks) == 20 and max(alive) <= 2


def test_metadata_says_what_was_made_and_by_what(tiny: Engine):
    metadata = tiny.metadata(Request("x", seed=0, num_inference_steps=7))
    assert metadata["model"] == "tiny" and metadata["seed"] == 0 and metadata["num_inference_steps"] == 7
    assert (metadata["width"], metadata["height"], metadata["prompt"]) == (32, 32, "x")
