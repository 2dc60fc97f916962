"""The shipped demo model: its size, its topology, and that it does what prompts say."""

import numpy as np
import pytest

from conftest import DEMO
from demo import read, world
from t2v.engine import Engine
from t2v.request import Request


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load(DEMO, device="cpu")


def video(engine: Engine, prompt: str, seed: int, steps: int = 12) -> np.ndarray:
    return np.concatenate(list(engine.generate(Request(prompt, seed=seed, num_inference_steps=steps))))


def test_weights_are_small_and_of_the_full_topology(demo: Engine):
    assert sum(f.stat().st_size for f in DEMO.rglob("*.safetensors")) < 30e6
    assert demo.model.info.native_size == (world.SIZE, world.SIZE) and demo.name == "t2v-demo"
    names = {type(m).__name__ for m in demo.unet.modules()}
    assert {"SpatialTransformer", "TemporalTransformer", "TemporalConvs", "ResBlock", "Upsample"} <= names


def test_the_sentence_about_the_model_names_all_it_knows(demo: Engine):
    known = (*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, *(m.split()[-1] for m in world.MOTIONS))
    assert all(word in demo.model.info.about for word in known)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_does_what_the_prompt_says(demo: Engine, seed: int):
    """Of eight readings of four videos at least seven are right in everything."""
    clips = ("red circle moving right", "blue star bouncing", "green square circling", "yellow triangle growing")
    right = 0
    for text, background in zip(clips, world.BACKGROUNDS):
        colour, shape, motion = text.split(maxsplit=2)
        frames = video(demo, world.sentence(colour, shape, motion, background), seed)
        for reader in (read.by_outline, read.by_ratios):
            found = reader(frames)
            right += (found.colour, found.shape, found.motion, found.background) == (colour, shape, motion, background)
    assert right >= 7
