"""CUDA recorded need CUDA; everything else about recordings is the same on the CPU, where they are traces."""

import gc
import weakref

import numpy as np
import pytest
import torch

from conftest import clean_latents
from t2v.engine import Engine
from t2v.request import Request
from t2v.sampling import recording
from t2v.sampling.recording import RecordedFunction

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_gives_what_the_function_gives(device: str):
    recorded = RecordedFunction(lambda x, y: (x @ y, x + 1))
    for shape in ((2, 3), (4, 3), (2, 3)):
        x, y = torch.randn(shape, device=device), torch.randn(3, 5, device=device)
        product, successor = recorded(x, y)
        assert torch.allclose(product, x @ y) and torch.equal(successor, x + 1)
    assert len(recorded.recordings) == 2


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_what_it_returned_stays_as_it_was(device: str):
    """Results are fed back as inputs, and kept beyond the next call."""
    recorded = RecordedFunction(lambda x: (2 * x,))
    (first,) = recorded(torch.ones(2, device=device))
    (second,) = recorded(first)
    recorded(torch.zeros(3, device=device))
    assert first.tolist() == [2, 2] and second.tolist() == [4, 4]


def test_recordings_are_bounded_and_the_one_unused_for_longest_goes_first():
    recorded = RecordedFunction(lambda x: (x,), max_recordings=2)
    recorded(torch.zeros(1)), recorded(torch.zeros(2))
    oldest = weakref.ref(next(iter(recorded.recordings.values())))
    newest = list(recorded.recordings.values())[1]
    recorded(torch.zeros(1))
    recorded(torch.zeros(3))
    assert [key[0][0][0] for key in recorded.recordings] == [1, 3] and newest not in recorded.recordings.values()
    recorded(torch.zeros(4)), recorded(torch.zeros(5))
    gc.collect()
    assert oldest() is None


def test_shapes_and_dtypes_tell_recordings_apart():
    recorded = RecordedFunction(lambda x: (x,))
    recorded(torch.zeros(2)), recorded(torch.zeros(2).half()), recorded(torch.zeros(1, 2)), recorded(torch.zeros(2))
    assert len(recorded.recordings) == 3


@torch.inference_mode()
def test_nothing_is_recorded_before_it_pays():
    recorded = RecordedFunction(lambda x: (x + 1,), min_calls=2)
    for calls in (1, 2, 3, 4):
        assert recorded(torch.zeros(2))[0].tolist() == [1, 1]
        assert len(recorded.recordings) == (calls > 2)
    recorded(torch.zeros(3))
    assert len(recorded.recordings) == 1


@torch.inference_mode()
def test_calls_that_are_known_to_come_count():
    recorded = RecordedFunction(lambda x: (x + 1,), min_calls=3)
    recorded.upcoming_calls = 3
    recorded(torch.zeros(2))
    assert not recorded.recordings
    recorded.upcoming_calls = 3  # and one was made
    recorded(torch.zeros(2))
    assert len(recorded.recordings) == 1


@torch.inference_mode()
def test_changed_weights_are_taken_up():
    weight = torch.ones(2, 2)
    recorded = RecordedFunction(lambda x: (x @ weight.t().contiguous(),))
    assert recorded(torch.ones(1, 2))[0].tolist() == [[2, 2]]
    weight.fill_(2)
    recorded.invalidate()
    assert recorded(torch.ones(1, 2))[0].tolist() == [[4, 4]]


def test_what_cannot_be_recorded_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "Trace", refuse)
    recorded = RecordedFunction(lambda x: (x + 1,))
    assert [recorded(torch.zeros(1))[0].item() for _ in range(2)] == [1, 1]
    assert caplog.text.count("without recordings") == 1


@pytest.mark.parametrize("large", [False, True])
def test_warming_up_records_the_default_shape_unless_that_takes_too_long(tiny_folder, monkeypatch, large: bool):
    engine = Engine.load(tiny_folder, "cpu")
    monkeypatch.setattr("t2v.model.LARGE_UNET_PARAMETERS", 0 if large else 10**9)
    engine.warm_up()
    step = engine.model.step
    assert len(step.recordings) == (not large)
    recorded = dict(step.recordings)
    clean_latents(engine, Request("a red circle", num_inference_steps=1))
    clean_latents(engine, Request("a red circle", num_frames=3, num_inference_steps=1))
    assert step.recordings == recorded  # which the default request replays, and others are not worth it


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")])
@torch.inference_mode()
def test_running_out_of_memory_while_recording_is_the_callers_to_handle(error: Exception):
    """And the next call may record."""
    fits = False

    def double(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not fits:
            raise error
        return (2 * x,)

    recorded = RecordedFunction(double)
    with pytest.raises(type(error)):
        recorded(torch.ones(2))
    fits = True
    assert recorded(torch.ones(2))[0].tolist() == [2, 2] and len(recorded.recordings) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_complete_request_is_the_same_through_recordings(tiny_folder, device: str):
    """The step is a function of tensors alone: everything that differs between steps and requests is copied in, or the
    second request would repeat the first."""
    engine = Engine.load(tiny_folder, device, dtype="float32")
    step = engine.model.step
    requests = [
        Request("a red circle", 3, num_inference_steps=4, seed=1),
        Request("a blue square", 3, num_inference_steps=3, seed=2, guidance_scale=3),
        Request("a blue square", 2, num_inference_steps=3, seed=2, guidance_scale=1),
    ]
    step.can_record = False
    plain = [clean_latents(engine, request).cpu() for request in requests]
    step.can_record, step.min_calls = True, 0
    for request, expected in zip(requests, plain):
        recorded = clean_latents(engine, request).cpu()
        np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-5)
    assert len(step.recordings) == 2
