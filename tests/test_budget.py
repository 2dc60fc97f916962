"""Memory is estimated before the work, and met with a second attempt where it runs out all the same."""

import numpy as np
import pytest
import torch

from conftest import TINY_UNET, clean_latents, first_pass
from t2v import budget, device
from t2v.budget import DEFAULT, LOW_MEMORY, choose_plan, retry
from t2v.engine import Engine
from t2v.errors import OutOfMemory
from t2v.networks.unet3d import UNet3D, UNet3DConfig
from t2v.request import Request


def set_free(monkeypatch: pytest.MonkeyPatch, free: float | None) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: free)


def refuse(*_: object) -> None:
    pytest.fail("work was done")


def test_the_low_memory_plan_gives_the_same_frames(tiny: Engine):
    request = Request("a circle", num_frames=4, num_inference_steps=5, seed=3)
    default, low = (clean_latents(tiny, request, plan=plan) for plan in (DEFAULT, LOW_MEMORY))
    assert torch.allclose(default, low, atol=1e-4)
    whole, single = (np.concatenate(list(tiny.vae.decode(default, chunk_pixels=n))) for n in (2**19, 1))
    assert np.abs(whole.astype(int) - single).max() <= 1


def test_the_plan_is_the_first_that_fits(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    # As in the 1.7B model, most of the memory is taken where the guided pair is two rows.
    monkeypatch.setattr(tiny.model, "unet", UNet3D(UNet3DConfig.from_dict(TINY_UNET | {"attention_head_dim": 1})))
    pass_ = first_pass(tiny, Request(num_frames=128, width=512, height=512, num_inference_steps=1))
    two, one = (
        max(f(tiny.model, pass_, p) for f in (budget.denoising_bytes, budget.decoding_bytes))
        for p in (DEFAULT, LOW_MEMORY)
    )
    assert two == 2 * one
    for free, plan in ((None, DEFAULT), (1.01 * two, DEFAULT), (0.99 * two, LOW_MEMORY), (1.01 * one, LOW_MEMORY)):
        set_free(monkeypatch, free)
        assert choose_plan(tiny.model, pass_) == plan


def test_what_cannot_fit_is_refused_before_the_work(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    request = Request(num_frames=128, width=512, height=512, num_inference_steps=1)
    pass_ = first_pass(tiny, request)
    monkeypatch.setattr(tiny, "run", refuse)
    need = budget.denoising_bytes(tiny.model, pass_, LOW_MEMORY)
    set_free(monkeypatch, need / 2)
    with pytest.raises(OutOfMemory, match="128 frames of 512x512 need .* ask for at most 64 frames of that size"):
        tiny.generate(request)
    set_free(monkeypatch, 1000)
    with pytest.raises(OutOfMemory, match="ask for a smaller size"):
        tiny.generate(request)


def test_a_second_pass_that_cannot_fit_is_refused_before_the_first(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    request = Request(num_frames=128, width=512, height=512, num_inference_steps=1, upscale=2)
    second = tiny.prepare(request).passes[1]
    monkeypatch.setattr(tiny, "run", refuse)
    set_free(monkeypatch, budget.denoising_bytes(tiny.model, second, LOW_MEMORY) / 2)
    with pytest.raises(OutOfMemory, match="128 frames of 1024x1024 need .*, or leave upscale out"):
        tiny.generate(request)


def test_the_retry_takes_the_settings_in_turn():
    attempts: list[int] = []
    released: list[int] = []

    def attempt(size: int) -> str:
        attempts.append(size)
        if size > 2:
            torch.empty(2**50)  # more than any address space has
        return f"done with {size}"

    assert retry(attempt, [8, 4, 2, 1], lambda: released.append(attempts[-1]), "") == "done with 2"
    assert attempts == [8, 4, 2] and released == [8, 4]
    with pytest.raises(OutOfMemory, match="ask for less"):
        retry(attempt, [4, 3], lambda: None, "ask for less")


def test_the_retry_leaves_other_errors_alone():
    def attempt(size: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        retry(attempt, [2, 1], refuse, "")


def test_denoising_that_runs_out_of_memory_goes_on_with_the_low_memory_plan(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
):
    request = Request(num_frames=2, num_inference_steps=3, seed=1)
    expected = clean_latents(tiny, request)
    forward = tiny.model.network

    def one_row_at_a_time(latents: torch.Tensor, terms: torch.Tensor, text_kv: torch.Tensor) -> torch.Tensor:
        if len(text_kv) > 1:
            torch.empty(2**50)
        return forward(latents, terms, text_kv)

    engine = Engine(type(tiny.model)(*(getattr(tiny.model, n) for n in ("text", "unet", "vae", "schedule", "info"))))
    monkeypatch.setattr(engine.model, "network", one_row_at_a_time)
    monkeypatch.setattr(engine.model.step.function.__self__, "network", one_row_at_a_time)
    assert torch.allclose(clean_latents(engine, request), expected, atol=1e-4)


def test_decoding_that_runs_out_of_memory_goes_on_in_smaller_chunks(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    expected = np.concatenate(list(tiny.generate(Request(num_frames=7, num_inference_steps=1, seed=1))))
    decode, sizes = tiny.vae._decode, []

    def small(images: torch.Tensor):
        sizes.append(len(images))
        if len(images) > 2:
            torch.empty(2**50)
        return decode(images)

    monkeypatch.setattr(tiny.vae, "_decode", small)
    made = np.concatenate(list(tiny.generate(Request(num_frames=7, num_inference_steps=1, seed=1))))
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_memory_that_runs_out_with_the_init_frames_is_reported(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.vae.autoencoder, "encode", fail)
    with pytest.raises(OutOfMemory, match="3 frames of 32x32: the device's memory ran out; ask for fewer"):
        clean_latents(tiny, Request(num_frames=3), np.zeros((3, 32, 32, 3), np.uint8))


def test_memory_does_not_grow_with_the_windows(tiny: Engine):
    request = {"num_inference_steps": 1, "seed": 0, "width": 96, "height": 96, "window": 8}
    peaks = []
    for num_frames in (8, 48):
        device.trim()
        device.reset_peak(tiny.device)
        for _ in tiny.generate(Request("a circle", num_frames, **request)):
            pass
        peaks.append(device.peak_memory(tiny.device))
    assert peaks[1] < 1.15 * peaks[0]
