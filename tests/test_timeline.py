"""Windows along time."""

import pytest
import torch

from t2v.timeline import Timeline


@pytest.mark.parametrize("frames", [17, 24, 64, 100, 256])
@pytest.mark.parametrize("window", [4, 5, 16])
@pytest.mark.parametrize("loop", [False, True])
def test_windows_cover_every_frame_and_their_weights_add_up_to_one(frames: int, window: int, loop: bool):
    timeline = Timeline(frames, window, loop)
    for step in range(9):
        total = torch.zeros(frames)
        for part in timeline.windows(step):
            assert len(part.frames.unique()) == window and part.weights.shape == (window, 1, 1)
            if not loop:
                assert torch.equal(part.frames, torch.arange(part.start, part.start + window))
            total[part.frames] += part.weights[:, 0, 0]
        assert torch.allclose(total, torch.ones(frames))


def test_borders_move_from_step_to_step():
    starts = [set(Timeline(64, 16).starts(step)) - {0, 48} for step in range(8)]
    assert len(set.union(*starts)) == 47 and all(len(s) in (5, 6, 7) for s in starts)


def test_a_short_video_is_one_window_and_a_short_loop_one_that_turns():
    assert Timeline(16, 16).whole and not Timeline(16, 16, loop=True).whole and not Timeline(17, 16).whole
    assert [Timeline(16, 16, loop=True).starts(step) for step in range(4)] == [[0], [3], [6], [9]]


def test_prompts_take_turns():
    timeline = Timeline(64, 16)
    shares = [timeline.mixture(start, 2) for start in range(0, 49, 8)]
    assert shares[0] == [1, 0] and shares[-1] == [0, 1] and shares[3] == [0.5, 0.5]
    assert all(abs(sum(s) - 1) < 1e-9 for s in shares)
    assert [s[1] for s in shares] == sorted(s[1] for s in shares)
    assert timeline.mixture(30, 1) == [1]
    around = Timeline(64, 16, loop=True).mixture(56, 2)  # centred on the first frame: half the last, half the first
    assert around == [0.5, 0.5]


def test_noise_of_a_long_video_is_that_of_a_window_in_other_orders():
    shape, generator = (1, 4, 40, 2, 3), lambda: torch.Generator().manual_seed(0)
    noise = Timeline(40, 16).noise(shape, generator())
    assert noise.shape == shape
    frames = [frame.flatten().tolist() for frame in noise[0].transpose(0, 1)]
    assert all(frame in frames[:16] for frame in frames) and frames[16:32] != frames[:16]
    assert all(len({tuple(f) for f in frames[i : i + 8]}) == 8 for i in range(0, 40, 8))
    assert torch.equal(Timeline(40, 40).noise(shape, generator()), torch.randn(shape, generator=generator()))
