"""The demo model's world: what it draws and what its sentences say."""

import pytest
import torch

from demo import world


def clips(n: int, seed: int = 0, held_out: bool | None = None) -> world.Clips:
    return world.random_clips(n, torch.Generator().manual_seed(seed), held_out)


def test_every_shape_stays_inside_the_frame():
    _, masks = world.render(clips(200))
    edges = torch.cat([masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]], dim=-1)
    assert edges.max() == 0
    assert masks.flatten(3).amax(-1).min() == 1


def test_pixels_are_the_background_and_the_colour():
    drawn = clips(20)
    pixels, masks = world.render(drawn)
    for i in range(len(drawn)):
        colour, _, _, background = drawn.words(i)
        for table, name, where in (
            (world.COLOURS, colour, masks[i, :, 0] == 1),
            (world.BACKGROUNDS, background, masks[i, :, 0] == 0),
        ):
            values = pixels[i].permute(0, 2, 3, 1)[where]
            assert torch.allclose(values, torch.tensor(table[name]) / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize("motion", ["circling", "bouncing"])
def test_motions_that_return_can_loop(motion: str):
    """The step from the last frame to the first is no longer than the longest that such a motion takes."""
    drawn = clips(400)
    picked = torch.nonzero(drawn.motion == world.MOTIONS.index(motion))[:, 0]
    x, y, _ = world.path(drawn)
    x, y = x[picked], y[picked]
    steps = torch.hypot(x - x.roll(1, 1), y - y.roll(1, 1))
    assert steps[:, 0].max() <= 1.05 * steps[:, 1:].max()


def test_frames_can_be_drawn_alone():
    drawn = clips(3)
    complete, _ = world.render(drawn)
    some, _ = world.render(drawn, [0, 7])
    assert torch.equal(complete[:, [0, 7]], some)


def test_held_out_pairs_are_drawn_alone_or_not_at_all():
    for held_out in (True, False):
        drawn = clips(300, held_out=held_out)
        pairs = {drawn.words(i)[:2] for i in range(len(drawn))}
        assert all((pair in world.HELD_OUT) == held_out for pair in pairs)
    assert len({clips(1000).words(i)[:2] for i in range(1000)}) == len(world.COLOURS) * len(world.SHAPES)


def test_a_paraphrase_leaves_out_what_is_not_given():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        words = world.paraphrase(generator, "red", None, "circling", None)
        assert "red" in words and "circl" in words.replace("in a circle", "circl")
        assert not any(name in words.split() for name in (*world.BACKGROUNDS, "square", "star", "triangle", "small"))


def test_articles_suit_the_word_that_follows():
    assert world.sentence("orange", "star", "growing", "pink").startswith("an orange star")
    assert world.sentence("red", "star", "growing", "pink") == "a red star growing on a pink background"
