"""The shipped demo model, its world, and the reader that scores it."""

import numpy as np
import pytest
import torch

import demo_world as world
import score_demo
from conftest import DEMO
from t2v.engine import Engine
from t2v.request import Request

pytestmark = pytest.mark.slow  # the trained model in 20 steps


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load(DEMO, device="cpu")


def drawn(clip: world.Clip, seed: int = 0) -> np.ndarray:
    pixels, _ = world.render([clip], torch.Generator().manual_seed(seed))
    return ((pixels[0].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("motion", range(len(world.MOTIONS)))
@pytest.mark.parametrize("shape", range(len(world.SHAPES)))
def test_the_reader_is_right_about_the_worlds_own_clips(shape: int, motion: int):
    clip = world.Clip((shape + motion) % 6, shape, motion, (shape * 3 + motion) % 4)
    reading = score_demo.read(drawn(clip))
    assert (reading.colour, reading.shape, reading.motion, reading.background) == clip.words()
    if "moving" in world.MOTIONS[motion]:
        assert reading.travel > 1 / 3
    else:
        assert max(reading.growth, 1 / reading.growth) > 2


def test_the_reader_sees_nothing_where_there_is_nothing():
    blank = np.full((16, 64, 64, 3), 128, np.uint8)
    assert score_demo.read(blank) == score_demo.Reading(None, None, None, "gray")
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    assert score_demo.read(noise).motion is None


def test_playing_backwards_is_the_reversed_motion():
    for motion, backwards in world.REVERSED.items():
        clip = world.Clip(0, 0, motion, 0)
        assert score_demo.read(drawn(clip)[::-1]).motion == world.MOTIONS[backwards]


def test_weights_are_small_and_of_the_full_topology(demo: Engine):
    assert sum(f.stat().st_size for f in DEMO.rglob("*.safetensors")) < 30e6
    assert demo.model.info.native_size == (64, 64) and demo.name == "t2v-demo" and demo.model.info.about
    names = {type(m).__name__ for m in demo.unet.modules()}
    assert {"SpatialTransformer", "TemporalTransformer", "TemporalConvs", "ResBlock", "Upsample"} <= names


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "prompt, colour, motion, background",
    [
        ("a red circle moving right on a black background", "red", "moving right", "black"),
        ("a yellow square moving up on a teal background", "yellow", "moving up", "teal"),
    ],
)
def test_it_does_what_the_prompt_says(demo: Engine, prompt: str, colour: str, motion: str, background: str, seed: int):
    video = np.concatenate(list(demo.generate(Request(prompt, seed=seed, num_inference_steps=20))))
    reading = score_demo.read(video)
    assert (reading.colour, reading.motion, reading.background) == (colour, motion, background)


def test_it_draws_the_shape_and_makes_it_grow(demo: Engine):
    """Of six videos, at least four show the shape that was asked for; one or two would by chance."""
    right, growths = 0, []
    for seed, shape in enumerate(("circle", "star", "triangle") * 2):
        colour = ("red", "blue")[seed // 3]
        request = Request(f"a {colour} {shape} growing on a gray background", seed=seed, num_inference_steps=20)
        reading = score_demo.read(np.concatenate(list(demo.generate(request))))
        right += reading.shape == shape
        growths.append(reading.growth)
    assert right >= 4
    assert np.median(growths) > 1.8
