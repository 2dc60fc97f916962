"""Prompt to frames with tiny real parts, against diffusers' own pipeline on the same folder."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, TextToVideoSDPipeline, UniPCMultistepScheduler

from conftest import DEMO, clean_latents, first_noise
from t2v import job as job_module
from t2v.engine import Engine, resized
from t2v.request import Request


def frames(engine: Engine, **inputs) -> np.ndarray:
    return np.concatenate(list(engine.generate(Request(**({"num_frames": 3, "num_inference_steps": 3} | inputs)))))


@pytest.mark.parametrize("folder", ["tiny", "demo"])
@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "unipc"])
def test_equals_the_diffusers_pipeline(tiny_folder: Path, folder: str, scheduler: str):
    """The whole way: same folder, same noise, same latents."""
    path = tiny_folder if folder == "tiny" else DEMO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = TextToVideoSDPipeline.from_pretrained(path, torch_dtype=torch.float32)
    kind = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler}[scheduler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine.load(path, device="cpu")
    request = Request("a red circle", 3, 5, seed=3, guidance_scale=9, width=40, height=32, scheduler=scheduler)
    expected = pipeline(
        request.prompt,
        num_frames=3,
        num_inference_steps=5,
        guidance_scale=9.0,
        width=40,
        height=32,
        latents=first_noise(engine, request),
        output_type="latent",
    ).frames
    ours = clean_latents(engine, request)
    assert ours.shape == (1, engine.vae.channels, 3, 4, 5) and ours.dtype == torch.float32
    assert float((ours - expected).norm() / expected.norm()) < 1e-4  # measured 2e-6


def test_same_seed_same_frames(tiny: Engine):
    assert np.array_equal(frames(tiny, seed=0), frames(tiny, seed=0))
    assert not np.array_equal(frames(tiny, seed=0), frames(tiny, seed=1))


def test_prompt_and_guidance_matter(tiny: Engine):
    base = frames(tiny, seed=0).astype(int)
    assert np.abs(frames(tiny, seed=0, prompt="a green square") - base).max() > 0
    assert np.abs(frames(tiny, seed=0, guidance_scale=1) - base).max() > 0
    assert tiny.model.info.guidance_scale == 9 and np.array_equal(frames(tiny, seed=0, guidance_scale=9), base)


@pytest.mark.parametrize("inputs", [{"num_frames": 1}, {"num_frames": 17}, {"width": 40, "height": 24}, {"width": 16}])
def test_any_size_and_count(tiny: Engine, inputs: dict):
    video = frames(tiny, seed=0, **inputs)
    count = inputs.get("num_frames", 3)
    assert video.shape == (count, inputs.get("height", 32), inputs.get("width", 32), 3) and video.dtype == np.uint8


def test_a_preview_shows_every_fourth_frame(tiny: Engine):
    seen: list[tuple[int, int, np.ndarray]] = []
    request = Request(num_frames=6, num_inference_steps=3, seed=0)
    video = tiny.generate(request, on_preview=lambda done, total, preview: seen.append((done, total, preview())))
    last = np.concatenate(list(video))[[0, 0, 0, 0, 4, 4]]
    assert [event[:2] for event in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(preview.shape == (6, 32, 32, 3) and preview.dtype == np.uint8 for *_, preview in seen)
    assert np.abs(seen[2][2].astype(int) - last).max() <= 1
    assert np.abs(seen[0][2].astype(int) - last).mean() > 1


def test_a_cancelled_request_leaves_the_engine_usable(tiny: Engine):
    class Cancelled(BaseException):
        pass

    def cancel(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise Cancelled

    before = frames(tiny, seed=0)
    with pytest.raises(Cancelled):
        tiny.generate(Request(num_frames=2, seed=0), on_progress=cancel)
    assert np.array_equal(frames(tiny, seed=0), before)


def test_bfloat16_runs_and_stays_near(tiny_folder: Path, tiny: Engine):
    half = Engine.load(tiny_folder, device="cpu", dtype="bfloat16")
    assert (
        np.abs(frames(half, seed=0, guidance_scale=2).astype(int) - frames(tiny, seed=0, guidance_scale=2)).mean() < 16
    )


def change(video: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames, 0 to 255."""
    return np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load(DEMO, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("num_frames, steps", [(64, 8), (256, 2)])
def test_no_seam_shows_between_windows(demo: Engine, num_frames: int, steps: int):
    inputs = {"prompt": "a yellow star growing on a teal background", "num_inference_steps": steps, "window": 16}
    steady = change(frames(demo, num_frames=num_frames, seed=1, **inputs))
    borders = np.arange(1, num_frames) % 8 == 0
    assert steady[borders].mean() < 1.2 * steady[~borders].mean()


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [16, 32])
def test_a_loop_ends_where_it_began(demo: Engine, num_frames: int):
    prompt = "a red circle moving right on a black background"
    video = frames(demo, prompt=prompt, seed=1, num_frames=num_frames, window=16, num_inference_steps=10, loop=True)
    closing = np.abs(video[-1].astype(float) - video[0]).mean()
    assert closing <= change(video).max()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "unipc"])
def test_strength_moves_a_video_away_from_the_one_it_starts_from(demo: Engine, scheduler: str):
    """Measured in latents; strength 0 is what the autoencoder makes of the video."""
    start = frames(demo, prompt="a red circle moving right on a black background", seed=4, num_frames=16)
    prompt = "a red square moving right on a black background"
    request = Request(prompt, seed=1, num_inference_steps=10, scheduler=scheduler)
    x_0 = demo.vae.encode(start)

    def away(strength: float | None) -> float:
        moved = clean_latents(demo, dataclasses.replace(request, strength=strength), init_frames=start)
        return float((moved - x_0).norm() / x_0.norm())

    distances = [away(strength) for strength in (0, 0.3, 0.6, 1)]
    assert distances[0] == 0 and all(near + 0.05 < far for near, far in zip(distances, distances[1:]))
    assert away(None) == distances[2]
    ignored = clean_latents(demo, dataclasses.replace(request, strength=1), init_frames=start)
    assert torch.equal(ignored, clean_latents(demo, request))
    copied = np.concatenate(list(demo.generate(dataclasses.replace(request, strength=0), init_frames=start)))
    assert np.abs(copied.astype(int) - start).mean() < 10  # measured 6


def test_progress_reports_every_stage_in_order(tiny: Engine):
    events: list[tuple[str, int, int]] = []
    request = Request(num_frames=2, num_inference_steps=3, seed=0)
    list(tiny.generate(request, on_progress=lambda *event: events.append(event)))
    assert events == [("text", 1, 1), ("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3), ("decode", 2, 2)]


@pytest.mark.parametrize("stage", ["start", "text", "denoise", "decode"])
def test_an_error_from_on_progress_stops_the_work_there(tiny: Engine, stage: str):
    """In either of two passes; the engine stays usable."""
    request = Request(num_frames=2, num_inference_steps=2, seed=0, upscale=2)
    events: list[str] = []

    def cancel_at(count: int) -> None:
        events.clear()

        def on_progress(at: str, done: int, total: int) -> None:
            events.append(at)
            if events.count(stage) == count and at == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(tiny.generate(request, np.zeros((2, 32, 32, 3), np.uint8), on_progress))
        assert events[-1] == stage and events.count(stage) == count

    before = frames(tiny, seed=0)
    cancel_at(1)
    cancel_at(2)
    assert np.array_equal(frames(tiny, seed=0), before)


@pytest.mark.parametrize("inputs, passes", [({}, 1), ({"strength": 0.5}, 1), ({"upscale": 2}, 2)])
def test_a_request_is_resolved_once(tiny: Engine, monkeypatch: pytest.MonkeyPatch, inputs: dict, passes: int):
    """Every rule is evaluated once for each pass, while the job is prepared; the work evaluates none of them again."""
    counts: dict[str, int] = {}
    for name in ("_sampling", "_timeline", "_latent_shape"):

        def counted(*args, name=name, rule=getattr(job_module, name)):
            counts[name] = counts.get(name, 0) + 1
            return rule(*args)

        monkeypatch.setattr(job_module, name, counted)
    start = np.zeros((2, 32, 32, 3), np.uint8) if "strength" in inputs else None
    list(tiny.generate(Request(num_frames=2, num_inference_steps=2, **inputs), start))
    assert counts == {"_sampling": passes, "_timeline": passes, "_latent_shape": passes}


def test_preparing_drops_no_recordings(tiny_folder: Path):
    engine = Engine.load(tiny_folder, "cpu")
    engine.warm_up()
    recordings = dict(engine.model.step.recordings)
    engine.prepare(Request(num_frames=256, width=1024, height=256, num_inference_steps=1))
    assert recordings and engine.model.step.recordings == recordings


def test_a_job_can_be_run_again(tiny: Engine):
    job = tiny.prepare(Request(num_frames=2, num_inference_steps=2))
    once, twice = (np.concatenate(list(tiny.run(job))) for _ in range(2))
    assert np.array_equal(once, twice)


def doubled(video: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    large = F.interpolate(pixels, scale_factor=2, mode="bicubic").round().clamp(0, 255).byte()
    return large.permute(0, 2, 3, 1).numpy()


def test_upscaling_is_a_second_pass_from_the_frames_of_the_first(tiny: Engine):
    request = Request("a circle", num_frames=3, num_inference_steps=5, seed=3, width=40, height=24)
    large = doubled(np.concatenate(list(tiny.generate(request))))
    again = dataclasses.replace(request, width=80, height=48, strength=0.6)
    expected = np.concatenate(list(tiny.generate(again, large)))
    events: list[str] = []
    upscaled = tiny.generate(
        dataclasses.replace(request, upscale=2), on_progress=lambda *event: events.append(event[0])
    )
    assert np.array_equal(np.concatenate(list(upscaled)), expected) and expected.shape == (3, 48, 80, 3)
    one = ["text", *["denoise"] * 5, "decode"]
    assert events == [*one, "start", "text", *["denoise"] * 3, "decode"]


def test_an_upscaler_makes_the_second_pass(tiny: Engine, tiny_folder: Path):
    engine = Engine.load(tiny_folder, "cpu", upscaler=DEMO)
    request = Request("a circle", num_frames=2, num_inference_steps=3, seed=3)
    large = doubled(np.concatenate(list(tiny.generate(request))))
    again = Request("a circle", num_frames=2, num_inference_steps=3, seed=3, width=64, height=64, strength=0.6)
    expected = np.concatenate(list(Engine(engine.models[1]).generate(again, large)))
    assert np.array_equal(frames(engine, prompt="a circle", num_frames=2, seed=3, upscale=2), expected)


def test_frames_of_another_size_are_resized():
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), np.uint8)
    assert np.array_equal(np.stack(list(resized(video, (8, 12)))), video)
    assert np.array_equal(np.stack(list(resized(video, (16, 24)))), doubled(video))


def test_gradients_are_never_recorded(tiny: Engine):
    assert torch.is_grad_enabled()
    latents = clean_latents(tiny, Request(num_frames=1, num_inference_steps=1, seed=0))
    assert not latents.requires_grad
    iterator = tiny.generate(Request(num_frames=1, num_inference_steps=1, seed=0))
    next(iterator)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # not leaked between chunks
