"""Noise from a seed."""

import torch

from t2v.sampling.noise import initial_noise, noise_stream
from t2v.sampling.timeline import Timeline

CPU = torch.device("cpu")


def test_the_first_noise_is_the_cpu_generators_first_draw():
    expected = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(5))
    assert torch.equal(next(noise_stream(Timeline(2, 128), (1, 4, 2, 4, 4), 5, CPU)), expected)


def test_later_noise_is_new_and_from_the_seed():
    streams = [noise_stream(Timeline(2, 128), (1, 4, 2, 4, 4), 5, CPU) for _ in range(2)]
    first, second = next(streams[0]), next(streams[0])
    assert not torch.equal(first, second)
    assert torch.equal(next(streams[1]), first) and torch.equal(next(streams[1]), second)


def test_noise_of_a_long_video_is_that_of_a_window_in_other_orders():
    shape, generator = (1, 4, 40, 2, 3), lambda: torch.Generator().manual_seed(0)
    noise = initial_noise(Timeline(40, 16), shape, generator())
    assert noise.shape == shape
    frames = [frame.flatten().tolist() for frame in noise[0].transpose(0, 1)]
    assert all(frame in frames[:16] for frame in frames) and frames[16:32] != frames[:16]
    assert all(len({tuple(f) for f in frames[i : i + 8]}) == 8 for i in range(0, 40, 8))
    assert torch.equal(initial_noise(Timeline(40, 40), shape, generator()), torch.randn(shape, generator=generator()))
