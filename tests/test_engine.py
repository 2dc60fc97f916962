"""Prompt to frames with tiny real parts, against diffusers' own pipeline on the same folder."""

import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    TextToVideoSDPipeline,
    UniPCMultistepScheduler,
)

from conftest import DEMO, TINY_UNET
from t2v import memory
from t2v.convolution import fold
from t2v.engine import LEAN, USUAL, Engine, Sampling
from t2v.errors import InvalidRequest, OutOfMemory, WeightsError
from t2v.graph import Function
from t2v.media.encode import write_video
from t2v.request import Request
from t2v.sampler import MCM, update
from t2v.unet3d import UNet3D, UNet3DConfig


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


def test_a_look_at_the_unfinished_video_shows_every_fourth_frame(tiny: Engine):
    seen: list[tuple[int, int, np.ndarray]] = []
    request = Request(num_frames=6, num_inference_steps=3, seed=0)
    video = tiny.generate(request, look=lambda done, total, sketch: seen.append((done, total, sketch())))
    last = np.concatenate(list(video))[[0, 0, 0, 0, 4, 4]]
    assert [event[:2] for event in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(sketch.shape == (6, 32, 32, 3) and sketch.dtype == np.uint8 for *_, sketch in seen)
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


def test_frames_are_not_collected_on_their_way_to_the_file(tiny: Engine, tmp_path: Path):
    """Of 20 chunks at most two exist at a time: the one being encoded and the one being decoded."""
    chunks: list[weakref.ref] = []
    alive: list[int] = []

    def watched() -> Iterator[np.ndarray]:
        for frames in tiny.vae.decode(torch.randn(1, 4, 40, 4, 4), chunk_pixels=2 * 32 * 32):
            chunks.append(weakref.ref(frames))
            alive.append(sum(chunk() is not None for chunk in chunks))
            yield frames

    assert write_video(tmp_path / "a.mp4", watched(), 8, {}).frames == 40
    assert len(chunks) == 20 and max(alive) <= 2


def test_metadata_says_what_was_made_and_by_what(tiny: Engine):
    metadata = tiny.metadata(Request("x", seed=0, num_inference_steps=7))
    assert metadata["model"] == "tiny" and metadata["seed"] == 0 and metadata["num_inference_steps"] == 7
    assert (metadata["width"], metadata["height"], metadata["prompt"]) == (32, 32, "x")


def test_the_lean_plan_gives_the_same_frames(tiny: Engine):
    request = Request("a circle", num_frames=4, num_inference_steps=5, seed=3)
    usual, lean = (tiny.denoised(request, plan=plan) for plan in (USUAL, LEAN))
    assert torch.allclose(usual, lean, atol=1e-4)
    whole, single = (np.concatenate(list(tiny.vae.decode(usual, chunk_pixels=n))) for n in (2**19, 1))
    assert np.abs(whole.astype(int) - single).max() <= 1


def test_memory_is_planned_with_before_the_work(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    request = Request(num_frames=128, width=512, height=512, num_inference_steps=1)
    monkeypatch.setattr(tiny, "unet", UNet3D(UNet3DConfig.from_dict(TINY_UNET | {"attention_head_dim": 1})))
    shape = (1, 4, 128, 64, 64)
    one, two = (tiny.unet.workspace(rows, shape) for rows in (1, 2))
    assert two == 2 * one
    monkeypatch.setattr(tiny, "_denoised", lambda *_: pytest.fail("work was done"))
    for free, plan in ((None, USUAL), (1.2 * two, USUAL), (0.9 * two, LEAN), (1.2 * one, LEAN)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        assert tiny.plan(request) == plan
    monkeypatch.setattr(memory, "free", lambda device: one / 2)
    with pytest.raises(OutOfMemory, match="128 frames of 512x512 need .* ask for at most 58 frames of that size"):
        tiny.generate(request)
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="ask for a smaller size"):
        tiny.generate(request)


def test_a_request_may_not_be_endless_work(tiny: Engine):
    with pytest.raises(InvalidRequest, match="128 frames of 1024x1024 in 500 steps is 3.9 times the work allowed"):
        tiny.generate(Request(num_frames=128, width=1024, height=1024, num_inference_steps=500))


def test_decoding_goes_on_in_smaller_chunks_where_memory_runs_out(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    latents = torch.randn(1, 4, 7, 4, 4)
    expected = np.concatenate(list(tiny.vae.decode(latents)))
    decode, sizes = tiny.vae._decode, []

    def small(images: torch.Tensor):
        sizes.append(len(images))
        if len(images) > 2:
            torch.empty(2**50)
        return decode(images)

    monkeypatch.setattr(tiny.vae, "_decode", small)
    assert np.abs(np.concatenate(list(tiny.vae.decode(latents))).astype(int) - expected).max() <= 1
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_window_as_long_as_the_video_changes_nothing(tiny: Engine):
    request = Request("a circle", num_frames=6, num_inference_steps=4, seed=3)
    windowed = dataclasses.replace(request, window=6)
    assert torch.equal(tiny.denoised(request), tiny.denoised(windowed))
    assert not torch.allclose(tiny.denoised(request), tiny.denoised(dataclasses.replace(request, window=4)), atol=0.01)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"guidance_scale": 1, "scheduler": "unipc"},
        {"num_frames": 24, "window": 8, "loop": True, "next_prompts": "a blue star", "negative_prompt": "text"},
        {"preset": "turbo"},
    ],
)
@pytest.mark.parametrize("plan", [USUAL, LEAN])
def test_denoising_asks_the_device_for_nothing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict, plan):
    """In half precision on a device that has shapes but no values, so that nothing can wait for one; and where what was
    made on the CPU by mistake does not mix with what is on the device."""
    engine = Engine.load(tiny_folder, device="cpu")
    for network in (engine.text.encoder, engine.unet):
        fold(network.to("meta", torch.float16))
    if inputs.get("preset") == "turbo":
        monkeypatch.setattr(engine, "sampling", lambda request: Sampling("turbo", MCM, 4, 1.0))

    def unrecorded(function: Function) -> Function:
        def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert {x.device.type for x in inputs} == {"meta"}  # a CUDA graph would keep values of the CPU for ever
            return function(*inputs)

        return call

    monkeypatch.setattr(engine, "step", unrecorded(engine._step))
    monkeypatch.setattr(engine, "predict", unrecorded(engine._predict))
    request = Request(**({"num_frames": 3, "num_inference_steps": 3} | inputs))
    latents = engine.denoised(request, plan=plan)
    assert latents.device.type == "meta" and latents.dtype == torch.float32
    assert latents.shape == (1, 4, request.num_frames, 4, 4)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tiny_folder: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("t2v.engine.GPU", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match="There is a GPU, but torch .* update its driver"):
        Engine.load(tiny_folder)
    assert Engine.load(tiny_folder, "cpu").device.type == "cpu"


def test_windows_are_what_they_say(tiny: Engine):
    """One step of DDIM from the averaged predictions, computed here again with the plain network."""
    request = Request("a circle", 12, 1, seed=3, window=8, scheduler="ddim", guidance_scale=1)
    noise = tiny.noise(request)
    (step,) = tiny.schedule.steps("ddim", 1)
    prediction, total = torch.zeros_like(noise), torch.zeros(12, 1, 1)
    ramp = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])[:, None, None]
    with torch.inference_mode():
        for start in (0, 4):
            part = tiny.unet(noise[:, :, start : start + 8], step.t, tiny.text.encode(["a circle"]))
            prediction[:, :, start : start + 8] += ramp * part
            total[start : start + 8] += ramp
    nothing = torch.zeros((2, *noise.shape))
    expected = update(noise, nothing, prediction / total, step.coefficients)[0]
    assert torch.allclose(tiny.denoised(request), expected, atol=1e-4)


def test_next_prompts_and_negative_prompts_do_what_they_say(tiny: Engine):
    long = Request("a circle", num_frames=24, num_inference_steps=3, seed=3, window=8, guidance_scale=2)
    plain, then = (tiny.denoised(dataclasses.replace(long, next_prompts=text)) for text in ("", "a square"))
    same = tiny.denoised(dataclasses.replace(long, next_prompts="a circle"))
    assert torch.allclose(plain, same, atol=1e-4)
    change = (then - plain).abs().mean((0, 1, 3, 4))
    assert 3 * change[:4].max() < change[-4:].min()
    assert not torch.allclose(plain, tiny.denoised(dataclasses.replace(long, negative_prompt="a square")))
    blank = tiny.denoised(dataclasses.replace(long, negative_prompt=" "))
    assert torch.equal(plain, blank)


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"next_prompts": "b"}, "next_prompts need more frames than are denoised together: more than 16"),
        ({"next_prompts": "b", "num_frames": 8, "window": 8}, "more than 8, or a smaller window"),
        ({"negative_prompt": "b", "guidance_scale": 1}, "negative_prompt has no effect at guidance_scale 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny: Engine, inputs: dict, sentence: str):
    with pytest.raises(InvalidRequest, match=sentence):
        tiny.generate(Request("a", **inputs))


def change(video: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames, 0 to 255."""
    return np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load(DEMO, device="cpu")


@pytest.mark.parametrize("num_frames, steps", [(64, 8), (256, 2)])
def test_no_seam_shows_between_windows(demo: Engine, num_frames: int, steps: int):
    inputs = {"prompt": "a yellow star growing on a teal background", "num_inference_steps": steps, "window": 16}
    steady = change(frames(demo, num_frames=num_frames, seed=1, **inputs))
    borders = np.arange(1, num_frames) % 8 == 0
    assert steady[borders].mean() < 1.2 * steady[~borders].mean()


@pytest.mark.parametrize("num_frames", [16, 32])
def test_a_loop_ends_where_it_began(demo: Engine, num_frames: int):
    prompt = "a red circle moving right on a black background"
    video = frames(demo, prompt=prompt, seed=1, num_frames=num_frames, window=16, num_inference_steps=10, loop=True)
    closing = np.abs(video[-1].astype(float) - video[0]).mean()
    assert closing <= change(video).max()


def test_memory_does_not_grow_with_the_windows(tiny: Engine):
    request = Request("a circle", num_frames=16, num_inference_steps=1, seed=0, width=192, height=192)
    peaks = []
    for frames_ in (16, 256):  # the decoder's chunks hold 14 frames of this size, in both
        memory.trim()
        memory.mark(tiny.device)
        for _ in tiny.generate(dataclasses.replace(request, num_frames=frames_, window=16)):
            pass
        peaks.append(memory.peak(tiny.device))
    assert peaks[1] < 1.15 * peaks[0]


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "unipc"])
def test_strength_moves_a_video_away_from_the_one_it_starts_from(demo: Engine, scheduler: str):
    """Measured in latents; strength 0 is what the autoencoder makes of the video."""
    start = frames(demo, prompt="a red circle moving right on a black background", seed=4, num_frames=16)
    prompt = "a red square moving right on a black background"
    request = Request(prompt, seed=1, num_inference_steps=10, scheduler=scheduler)
    x_0 = demo.vae.encode(start)

    def away(strength: float | None) -> float:
        moved = demo.denoised(dataclasses.replace(request, strength=strength), start=start)
        return float((moved - x_0).norm() / x_0.norm())

    distances = [away(strength) for strength in (0, 0.3, 0.6, 1)]
    assert distances[0] == 0 and all(near + 0.05 < far for near, far in zip(distances, distances[1:]))
    assert away(None) == distances[2]
    ignored = demo.denoised(dataclasses.replace(request, strength=1), start=start)
    assert torch.equal(ignored, demo.denoised(request))
    copied = np.concatenate(list(demo.generate(dataclasses.replace(request, strength=0), start=start)))
    assert np.abs(copied.astype(int) - start).mean() < 10  # measured 6


def test_strength_needs_something_to_start_from(tiny: Engine):
    with pytest.raises(InvalidRequest, match="strength needs an init_video"):
        tiny.generate(Request("a", strength=0.5))


def test_running_out_of_memory_with_the_frames_to_start_from(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.vae.autoencoder, "encode", fail)
    with pytest.raises(OutOfMemory, match="3 frames of 32x32: the device's memory ran out; ask for fewer"):
        tiny.denoised(Request(num_frames=3), start=np.zeros((3, 32, 32, 3), np.uint8))


def test_upscaling_is_a_second_pass_from_the_frames_of_the_first(tiny: Engine):
    """By another model with sizes of its own, or by the same."""
    request = Request("a circle", num_frames=3, num_inference_steps=5, seed=3, width=40, height=24)
    first = torch.from_numpy(np.concatenate(list(tiny.generate(request)))).permute(0, 3, 1, 2)
    large = F.interpolate(first.float(), scale_factor=2, mode="bicubic").round().clamp(0, 255).byte()
    again = dataclasses.replace(request, width=80, height=48, strength=0.6)
    expected = np.concatenate(list(tiny.generate(again, start=large.permute(0, 2, 3, 1).numpy())))
    upscaled = dataclasses.replace(request, upscale=2)
    told: list[str] = []
    video = np.concatenate(list(tiny.generate(upscaled, lambda *event: told.append(event[0]))))
    assert video.shape == (3, 48, 80, 3) and np.array_equal(video, expected)
    one = ["text", *["denoise"] * 5, "decode"]
    assert told == [*one, "start", "text", *["denoise"] * 3, "decode"]
    assert (tiny.metadata(upscaled)["width"], tiny.metadata(upscaled)["height"]) == (80, 48)

    parts = {name: getattr(tiny, name) for name in ("text", "unet", "vae", "schedule", "merged")}
    tall = Engine(**parts, native_size=(64, 16), name="tall")
    tall.upscaler = Engine(**parts, native_size=(8, 8), name="large", guidance_scale=1.0)
    native = dataclasses.replace(upscaled, width=None, height=None)
    assert frames(tall, seed=0, upscale=2).shape == (3, 128, 32, 3)
    assert tall.metadata(native)["upscaler"] == "large" and "upscaler" not in tiny.metadata(native)
    (_, second) = tall.passes(native)
    assert second.engine is tall.upscaler and second.size == (128, 32)
    assert second.engine.sampling(second.request).guidance_scale == 1


def test_both_passes_are_looked_at_before_the_work(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny, "_denoised", lambda *_: pytest.fail("work was done"))
    large = Request(num_frames=128, width=512, height=512, num_inference_steps=200, upscale=2)
    with pytest.raises(InvalidRequest, match="128 frames of 1024x1024 in 200 steps is 1.3 times the work allowed"):
        tiny.generate(large)  # 512^2 x 128 x 200 steps and 1024^2 x 128 x 120
    small = dataclasses.replace(large, num_inference_steps=1)
    need = tiny.passes(small)[1].engine.unet.workspace(1, (1, 4, 128, 128, 128))
    monkeypatch.setattr(memory, "free", lambda device: need / 2)
    with pytest.raises(OutOfMemory, match="128 frames of 1024x1024 need .*, or leave upscale out"):
        tiny.generate(small)


def test_encoding_equals_the_diffusers_encoder_in_chunks_too(tiny: Engine, tiny_folder: Path):
    reference = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    video = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    with torch.inference_mode():
        x = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = reference.encode(x).latent_dist.mean * reference.config.scaling_factor
    for chunk in (2**19, 2 * 32 * 48):
        latents = tiny.vae.encode(iter(video), chunk)
        assert latents.shape == (1, 4, 5, 4, 6) and torch.allclose(latents[0].transpose(0, 1), expected, atol=1e-5)
