"""Windows along time."""

import pytest

from t2v.sampling.timeline import Timeline


@pytest.mark.parametrize("frames", [17, 24, 64, 100, 256])
@pytest.mark.parametrize("window", [4, 5, 16])
@pytest.mark.parametrize("loop", [False, True])
def test_windows_cover_every_frame_and_their_weights_add_up_to_one(frames: int, window: int, loop: bool):
    timeline = Timeline(frames, window, loop)
    for step in range(9):
        total = [0.0] * frames
        for part in timeline.windows(step):
            assert len(set(part.frames)) == len(part.weights) == window and part.frames[0] == part.start
            if not loop:
                assert part.frames == list(range(part.start, part.start + window))
            for frame, weight in zip(part.frames, part.weights):
                total[frame] += weight
        assert total == pytest.approx([1] * frames)


def test_borders_move_from_step_to_step():
    starts = [set(Timeline(64, 16).starts(step)) - {0, 48} for step in range(8)]
    assert len(set.union(*starts)) == 47 and all(len(s) in (5, 6, 7) for s in starts)


def test_a_short_video_is_one_window_and_a_short_loop_one_that_turns():
    assert (
        Timeline(16, 16).is_single_window
        and not Timeline(16, 16, loop=True).is_single_window
        and not Timeline(17, 16).is_single_window
    )
    assert [Timeline(16, 16, loop=True).starts(step) for step in range(4)] == [[0], [3], [6], [9]]


def test_prompts_take_turns():
    timeline = Timeline(64, 16)
    shares = [timeline.prompt_shares(start, 2) for start in range(0, 49, 8)]
    assert shares[0] == [1, 0] and shares[-1] == [0, 1] and shares[3] == [0.5, 0.5]
    assert all(abs(sum(s) - 1) < 1e-9 for s in shares)
    assert [s[1] for s in shares] == sorted(s[1] for s in shares)
    assert timeline.prompt_shares(30, 1) == [1]
    around = Timeline(64, 16, loop=True).prompt_shares(56, 2)  # centred on the first frame
    assert around == [0.5, 0.5]
