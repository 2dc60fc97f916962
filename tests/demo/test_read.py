"""Both readers, on clips of which the truth is known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from demo import read, world
from demo.score import READERS, drawn

pytestmark = pytest.mark.slow  # reads a hundred videos

Reader = Callable[[np.ndarray], read.Reading]
readers = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


@readers
def test_readers_are_right_about_the_worlds_own_clips(reader: Reader):
    clips = world.random_clips(32, torch.Generator().manual_seed(7))
    for i in range(len(clips)):
        found = reader(drawn(clips, i))
        assert (found.colour, found.shape, found.motion, found.background) == clips.words(i)


@readers
def test_readers_see_nothing_where_there_is_nothing(reader: Reader):
    blank = np.full((16, 96, 96, 3), 128, np.uint8)
    assert reader(blank) == read.Reading(None, None, None, "gray")
    noise = np.random.default_rng(0).integers(0, 255, (16, 96, 96, 3), np.uint8)
    assert reader(noise).motion is None


@readers
def test_readers_tell_a_motion_from_its_reverse(reader: Reader):
    clips = world.random_clips(16, torch.Generator().manual_seed(1))
    reverse = {"moving left": "moving right", "moving up": "moving down", "growing": "shrinking", "circling": None}
    reverse |= {after: before for before, after in reverse.items() if after}
    for i in range(len(clips)):
        motion = clips.words(i)[2]
        assert reader(drawn(clips, i)[::-1]).motion == reverse.get(motion, motion)


def clip() -> tuple[np.ndarray, str, str]:
    clips = world.random_clips(1, torch.Generator().manual_seed(3))
    return drawn(clips, 0), clips.words(0)[3], clips.words(0)[0]


def test_a_clean_clip_is_crisp_and_steady():
    video, background, colour = clip()
    found = read.crispness(video, background, colour)
    assert found.background == 1 and found.without_specks == 1
    assert found.hue_steps.max() < 0.1 and found.hue_range < 0.1 and found.area_errors.max() < 0.01


def test_each_fault_shows_in_its_own_figure():
    video, background, colour = clip()
    clean = read.crispness(video, background, colour)

    tinted = np.clip(video.astype(int) + 9, 0, 255).astype(np.uint8)
    assert read.crispness(tinted, background, colour).background < 0.01

    speck = video.copy()
    speck[4:8, 2:5, 2:5] = world.COLOURS[colour]
    assert read.crispness(speck, background, colour).without_specks == 0.75

    mask = np.abs(video.astype(int) - world.BACKGROUNDS[background]).max(-1) > 40
    turned = video.copy()
    turned[::2][mask[::2]] = np.roll(world.COLOURS[colour], 1)
    found = read.crispness(turned, background, colour)
    assert np.median(found.hue_steps) > 30 and found.hue_range > 30

    pulsing = video.copy()
    pulsing[8, :40] = world.BACKGROUNDS[background]
    assert read.crispness(pulsing, background, colour).area_errors.max() > 5 * clean.area_errors.max()
