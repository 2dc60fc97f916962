"""CUDA graphs need CUDA; everything else about recordings is the same on the CPU, where they are traces."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from t2v import graph
from t2v.engine import Engine
from t2v.graph import Graphs, Pace, Trace
from t2v.request import Request

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_gives_what_the_function_gives(device: str):
    graphs = Graphs(lambda x, y: (x @ y, x + 1))
    for shape in ((2, 3), (4, 3), (2, 3)):
        x, y = torch.randn(shape, device=device), torch.randn(3, 5, device=device)
        product, successor = graphs(x, y)
        assert torch.allclose(product, x @ y) and torch.equal(successor, x + 1)
    assert len(graphs.recordings) == 2


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_what_it_returned_stays_as_it_was(device: str):
    """Results are fed back as inputs, and kept beyond the next call."""
    graphs = Graphs(lambda x: (2 * x,))
    (first,) = graphs(torch.ones(2, device=device))
    (second,) = graphs(first)
    graphs(torch.zeros(3, device=device))
    assert first.tolist() == [2, 2] and second.tolist() == [4, 4]


def test_the_host_is_never_far_ahead_of_a_gpu_and_never_waits_for_its_last_step(monkeypatch: pytest.MonkeyPatch):
    recorded: list[Any] = []

    class Event:
        def __init__(self, blocking: bool):
            self.done = False
            recorded.append(self)

        def record(self, stream: object) -> None:
            pass

        def synchronize(self) -> None:
            self.done = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pace = Pace(torch.device("cuda"))
    for step in range(1, 6):
        pace.keep()
        assert [event.done for event in recorded] == [i < step - 2 for i in range(step)]


def test_recordings_are_bounded_and_the_one_unused_for_longest_goes_first():
    graphs = Graphs(lambda x: (x,), keep=2)
    graphs(torch.zeros(1)), graphs(torch.zeros(2))
    oldest = weakref.ref(next(iter(graphs.recordings.values())))
    newest = list(graphs.recordings.values())[1]
    graphs(torch.zeros(1))
    graphs(torch.zeros(3))
    assert [key[0][0][0] for key in graphs.recordings] == [1, 3] and newest not in graphs.recordings.values()
    graphs(torch.zeros(4)), graphs(torch.zeros(5))
    gc.collect()
    assert oldest() is None


def test_shapes_and_dtypes_tell_recordings_apart():
    graphs = Graphs(lambda x: (x,))
    graphs(torch.zeros(2)), graphs(torch.zeros(2).half()), graphs(torch.zeros(1, 2)), graphs(torch.zeros(2))
    assert len(graphs.recordings) == 3


@torch.inference_mode()
def test_nothing_is_recorded_before_it_pays():
    graphs = Graphs(lambda x: (x + 1,), after=2)
    for calls in (1, 2, 3, 4):
        assert graphs(torch.zeros(2))[0].tolist() == [1, 1]
        assert len(graphs.recordings) == (calls > 2)
    graphs(torch.zeros(3))
    assert len(graphs.recordings) == 1


@torch.inference_mode()
def test_calls_that_are_known_to_come_count():
    graphs = Graphs(lambda x: (x + 1,), after=3)
    graphs.expected = 3
    graphs(torch.zeros(2))
    assert not graphs.recordings
    graphs.expected = 3  # and one was made
    graphs(torch.zeros(2))
    assert len(graphs.recordings) == 1


@torch.inference_mode()
def test_what_was_computed_while_it_was_traced_is_not_computed_again():
    calls = []
    graphs = Graphs(lambda x: (calls.append(x) or x * x,))
    assert [graphs(torch.tensor([value]))[0].item() for value in (2.0, 3.0, 4.0)] == [4, 9, 16]
    assert len(calls) == 1


@torch.inference_mode()
def test_changed_weights_are_taken_up():
    weight = torch.ones(2, 2)
    graphs = Graphs(lambda x: (x @ weight.t().contiguous(),))
    assert graphs(torch.ones(1, 2))[0].tolist() == [[2, 2]]
    weight.fill_(2)
    graphs.forget()
    assert graphs(torch.ones(1, 2))[0].tolist() == [[4, 4]]


def test_what_cannot_be_recorded_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "Trace", refuse)
    graphs = Graphs(lambda x: (x + 1,))
    assert [graphs(torch.zeros(1))[0].item() for _ in range(2)] == [1, 1]
    assert caplog.text.count("without recordings") == 1


@pytest.mark.parametrize("large", [False, True])
def test_warming_up_records_the_default_shape_unless_that_takes_too_long(tiny_folder, monkeypatch, large: bool):
    engine = Engine.load(tiny_folder, "cpu")
    monkeypatch.setattr("t2v.engine.LARGE", 0 if large else 10**9)
    engine.warm_up()
    assert isinstance(engine.step, Graphs) and len(engine.step.recordings) == (not large)
    recorded = dict(engine.step.recordings)
    engine.denoised(Request("a red circle", num_inference_steps=1))
    engine.denoised(Request("a red circle", num_frames=3, num_inference_steps=1))
    assert engine.step.recordings == recorded  # which the default request plays back, and others are not worth it


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")])
def test_a_lack_of_memory_is_told_and_frees_the_recordings(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def refuse(*_):
        raise error

    graphs = Graphs(lambda x: (x,))
    graphs(torch.zeros(1))
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(graph, "Trace", refuse)
        graphs(torch.zeros(2))
    assert not graphs.recordings
    graphs(torch.zeros(2))  # the next one may fit
    assert len(graphs.recordings) == 1

    def refuse_a_second(*args):
        return refuse() if graphs.recordings else Trace(*args)

    monkeypatch.setattr(graph, "Trace", refuse_a_second)
    assert graphs(torch.ones(3))[0].tolist() == [1, 1, 1]  # in the place of the other
    assert [key[0][0][0] for key in graphs.recordings] == [3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_request_is_the_same_through_recordings(tiny_folder, device: str):
    """The engine's step is a function of tensors alone: everything that differs between steps and requests is copied
    in, or the second request would repeat the first."""
    engine = Engine.load(tiny_folder, device, dtype="float32")
    requests = [
        Request("a red circle", 3, num_inference_steps=4, seed=1),
        Request("a blue square", 3, num_inference_steps=3, seed=2, guidance_scale=3),
        Request("a blue square", 2, num_inference_steps=3, seed=2, guidance_scale=1),
    ]
    engine.step = engine._step
    plain = [engine.denoised(request).cpu() for request in requests]
    engine.step = Graphs(engine._step)
    for request, expected in zip(requests, plain):
        recorded = engine.denoised(request).cpu()
        np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-5)
    assert len(engine.step.recordings) == 2
