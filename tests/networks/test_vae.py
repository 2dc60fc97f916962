import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from t2v.engine import Engine
from t2v.media.encode import write_video


def test_decodes_as_diffusers_does(tiny: Engine, tiny_folder: Path):
    reference = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    latents = torch.randn(1, 4, 3, 4, 6)
    frames = np.concatenate(list(tiny.vae.decode(latents)))
    with torch.inference_mode():
        pixels = reference.decode(latents[0].transpose(0, 1) / reference.config.scaling_factor).sample
    expected = (pixels.permute(0, 2, 3, 1).numpy() * 0.5 + 0.5).clip(0, 1) * 255
    assert frames.dtype == np.uint8 and frames.shape == (3, 32, 48, 3)
    assert np.abs(frames - expected).max() <= 0.5 + 1e-3  # nearest value, not truncated


def test_chunks_are_bounded_and_equal_the_whole(tiny: Engine):
    latents = torch.randn(1, 4, 7, 4, 4)
    whole = list(tiny.vae.decode(latents))
    chunks = list(tiny.vae.decode(latents, chunk_pixels=3 * 32 * 32))
    assert [len(c) for c in chunks] == [3, 3, 1] and len(whole) == 1
    difference = np.abs(np.concatenate(chunks).astype(int) - whole[0])
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_one_frame_larger_than_a_chunk(tiny: Engine):
    assert [len(c) for c in tiny.vae.decode(torch.randn(1, 4, 2, 2, 2), chunk_pixels=1)] == [1, 1]


def test_scale_and_factor_come_from_the_config(tiny: Engine):
    assert (tiny.vae.scale_factor, tiny.vae.channels, tiny.vae.scale) == (8, 4, 0.18215)


def test_encoding_equals_the_diffusers_encoder_in_chunks_too(tiny: Engine, tiny_folder: Path):
    reference = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    video = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    with torch.inference_mode():
        x = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = reference.encode(x).latent_dist.mean * reference.config.scaling_factor
    for chunk, counts in ((2**19, [5]), (2 * 32 * 48, [2, 4, 5])):
        encoded: list[int] = []
        latents = tiny.vae.encode(iter(video), chunk, encoded.append)
        assert latents.shape == (1, 4, 5, 4, 6) and torch.allclose(latents[0].transpose(0, 1), expected, atol=1e-5)
        assert encoded == counts


def test_frames_are_not_collected_on_their_way_to_the_file(tiny: Engine, tmp_path: Path):
    """Of 20 chunks at most two exist at a time: the one being encoded and the one being decoded."""
    chunks: list[weakref.ref] = []
    alive: list[int] = []

    def watched() -> Iterator[np.ndarray]:
        for frames in tiny.vae.decode(torch.randn(1, 4, 40, 4, 4), chunk_pixels=2 * 32 * 32):
            chunks.append(weakref.ref(frames))
            alive.append(sum(chunk() is not None for chunk in chunks))
            yield frames

    assert write_video(tmp_path / "a.mp4", watched(), 8, {}).frames == 40
    assert len(chunks) == 20 and max(alive) <= 2
