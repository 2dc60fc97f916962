"""The engine on a GPU, against itself on the CPU. Recordings as CUDA graphs are in sampling/test_recording.py."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.test_lora import mcm_folder  # noqa: F401
from conftest import DEMO, clean_latents, first_noise, first_pass
from t2v.budget import DEFAULT, LOW_MEMORY
from t2v.engine import Engine
from t2v.networks import fused
from t2v.request import Request
from t2v.sampling.denoiser import GuidedNetwork
from t2v.sampling.recording import RecordedFunction

CUDA = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

REQUEST = Request("a red circle moving right on a black background", num_frames=8, num_inference_steps=5, seed=0)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def cpu() -> Engine:
    return Engine.load(DEMO, "cpu")


@pytest.fixture(scope="module")
def cuda() -> Engine:
    return Engine.load(DEMO, CUDA)


@torch.inference_mode()
@pytest.mark.parametrize("frames, side", [(16, 8), (5, 12), (1, 4)])
def test_the_denoiser_with_kernels_is_the_denoiser_without(cpu: Engine, cuda: Engine, frames: int, side: int):
    """Each is as far from float32 as the other, and each kernel alone as far as all of them."""
    pytest.importorskip("triton", reason="needs Triton, which a torch for CUDA brings")
    latents, context = torch.randn(1, cpu.vae.channels, frames, side, side), cpu.text.encode(["", "a red circle"])
    expected = cpu.unet(latents, 500, context)
    inputs = latents.to(CUDA, torch.float16), 500, context.to(CUDA, torch.float16)
    with fused.without(*fused.KERNELS):
        plain = error(cuda.unet(*inputs), expected)
    assert fused.runs("bias", inputs[0])
    assert error(cuda.unet(*inputs), expected) < 1.1 * plain + 2e-4
    for kernel in fused.KERNELS:
        with fused.without(kernel):
            assert error(cuda.unet(*inputs), expected) < 1.1 * plain + 2e-4, kernel


@torch.inference_mode()
def test_the_autoencoder_with_kernels_is_the_autoencoder_without(cpu: Engine, cuda: Engine):
    pytest.importorskip("triton", reason="needs Triton, which a torch for CUDA brings")
    latents, pixels = torch.randn(3, cpu.vae.channels, 8, 6), torch.rand(3, 3, 64, 48) * 2 - 1
    for function, x in (("decode", latents), ("encode", pixels)):
        expected = getattr(cpu.vae.autoencoder, function)(x)
        network = getattr(cuda.vae.autoencoder, function)
        half = x.to(CUDA, cuda.vae.dtype, memory_format=torch.channels_last)
        with fused.without(*fused.KERNELS):
            plain = error(network(half), expected)
        assert error(network(half), expected) < 1.1 * plain + 2e-4


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("float16", 2e-2)])
def test_latents_are_those_of_the_cpu(cpu: Engine, dtype: str, bound: float):
    gpu = Engine.load(DEMO, CUDA, dtype)
    assert error(clean_latents(gpu, REQUEST), clean_latents(cpu, REQUEST)) < bound


def test_frames_are_those_of_the_cpu(cpu: Engine, cuda: Engine):
    latents = clean_latents(cpu, REQUEST)
    expected, frames = (np.concatenate(list(engine.vae.decode(latents.to(engine.device)))) for engine in (cpu, cuda))
    assert frames.shape == expected.shape and abs(frames.astype(int) - expected).max() <= 4


@pytest.mark.parametrize(
    "change", [{"window": 4}, {"window": 4, "loop": True}, {"next_prompts": "a blue square", "window": 4}]
)
def test_windows_are_those_of_the_cpu(cpu: Engine, cuda: Engine, change: dict):
    request = dataclasses.replace(REQUEST, **change)
    assert error(clean_latents(cuda, request), clean_latents(cpu, request)) < 2e-2


def test_a_recorded_step_is_the_step(cuda: Engine):
    recorded = clean_latents(cuda, REQUEST)
    assert cuda.model.step.recordings
    with pytest.MonkeyPatch.context() as patch:
        never = RecordedFunction(GuidedNetwork(cuda.model.network).step, min_calls=10**9)
        patch.setattr(cuda.model, "step", never)
        launched = clean_latents(cuda, REQUEST)
    assert not never.recordings and error(recorded, launched) < 1e-3


def test_one_request_gives_the_same_bytes_again(cuda: Engine):
    assert torch.equal(clean_latents(cuda, REQUEST), clean_latents(cuda, REQUEST))


def test_a_cancelled_request_leaves_the_engine_as_it_was(cuda: Engine):
    class Cancelled(BaseException):
        pass

    expected = clean_latents(cuda, REQUEST)

    def cancel_at(stage: str, number: int) -> Callable[[str, int, int], None]:
        def progress(now: str, done: int, total: int) -> None:
            if (now, done) == (stage, number):
                raise Cancelled

        return progress

    # A shape that is recorded, and one whose recording the request had just made.
    for request in (REQUEST, dataclasses.replace(REQUEST, num_frames=5)):
        for stage, number in (("text", 1), ("denoise", 2)):
            with pytest.raises(Cancelled):
                clean_latents(cuda, request, on_progress=cancel_at(stage, number))
    with pytest.raises(Cancelled):
        list(cuda.generate(REQUEST, on_progress=cancel_at("decode", 8)))
    assert torch.equal(clean_latents(cuda, REQUEST), expected)


def test_recordings_read_the_weights_that_a_lora_changed(tiny_folder: Path, mcm_folder: Path):  # noqa: F811
    engine, plain = Engine.load(tiny_folder, CUDA, lora=str(mcm_folder)), Engine.load(tiny_folder, CUDA)
    turbo = Request("a circle", num_frames=2, seed=1)
    quality = dataclasses.replace(turbo, preset="quality", num_inference_steps=3)
    assert first_pass(engine, turbo).sampling.preset == "turbo"
    first, second = clean_latents(engine, turbo), clean_latents(engine, quality)
    assert error(second, clean_latents(plain, quality)) < 1e-3
    assert len(engine.model.step.recordings) == 2
    for _ in range(2):
        assert error(clean_latents(engine, turbo), first) < 1e-3
        assert error(clean_latents(engine, quality), second) < 1e-3
    assert error(first, second) > 0.1


@torch.inference_mode()
def test_the_denoiser_takes_no_more_memory_than_is_planned_for(cuda: Engine):
    request = Request(num_frames=32, width=256, height=256, seed=0)
    latents = first_noise(cuda, request)
    context = cuda.text.encode(["", "a red circle"])
    cuda.unet(latents.half(), 500, context)  # the libraries take their workspaces
    assert peak(lambda: cuda.unet(latents.half(), 500, context)) <= cuda.unet.peak_bytes(2, latents.shape)


@torch.inference_mode()
def test_the_decoder_takes_no_more_memory_than_is_planned_for(cuda: Engine):
    latents = first_noise(cuda, Request(num_frames=8, width=256, height=256, seed=0))
    list(cuda.vae.decode(latents))
    assert peak(lambda: list(cuda.vae.decode(latents))) <= 1.1 * cuda.vae.peak_bytes(8, 256, 256)


def peak(function: Callable[[], object]) -> int:
    """Bytes of tensors that it held at most."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_the_low_memory_plan_makes_the_same(cuda: Engine):
    """One row at a time, without recordings."""
    assert error(clean_latents(cuda, REQUEST, plan=LOW_MEMORY), clean_latents(cuda, REQUEST, plan=DEFAULT)) < 1e-2


def test_recordings_give_way_to_a_request_that_needs_the_memory(cuda: Engine, monkeypatch: pytest.MonkeyPatch):
    clean_latents(cuda, REQUEST)
    step = cuda.model.step
    assert step.recordings
    function, failed = step.function, []

    def out_of_memory_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **kwargs)

    other = dataclasses.replace(REQUEST, num_frames=3)
    monkeypatch.setattr(step, "function", out_of_memory_once)
    made = clean_latents(cuda, other)
    assert failed and made.shape[2] == 3 and bool(made.isfinite().all())
