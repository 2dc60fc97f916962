"""What the demo model is trained on: frames, clips with sentences about them, and a pool of clips as latents."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from demo import world
from t2v.networks.clip import CLIPText
from t2v.networks.prompt_encoder import BOS, EOS, MAX_TOKENS, PAD, PromptEncoder


def random_frames(n: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """(n, 3, H, W) pixels and (n, 1, H, W) masks: two frames of each of n / 2 clips."""
    clips = world.random_clips(n // 2, generator, held_out=False).to(device)
    picks = torch.randint(world.FRAMES, (2,), generator=generator).tolist()
    pixels, masks = world.render(clips, picks)
    return pixels.flatten(0, 1), masks.flatten(0, 1)


@dataclass(frozen=True)
class Captioned:
    """Clips with a sentence about each.

    Attributes:
        token_ids: (n, 77) int64.
        told: (n, 6) int64, what the sentence says of colour, shape, motion, background, size and place, as indices;
            the number of possible values where it does not say.
    """

    clips: world.Clips
    token_ids: Tensor
    told: Tensor


TOLD = (*(len(values) for values in world.ATTRIBUTES.values()), len(world.SIZES), len(world.PLACES))


class Captions(Dataset):
    """An endless source of batches; batch i depends on the seed and on i alone."""

    def __init__(self, text: PromptEncoder, batch: int, seed: int, first: int = 0):
        self.text, self.batch, self.seed, self.first = text, batch, seed, first

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, i: int) -> Captioned:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.first + i)
        clips = world.random_clips(self.batch, generator, held_out=False)
        sentences, told = zip(*(caption(clips, k, generator) for k in range(self.batch)))
        return Captioned(clips, self.text.tokenize(list(sentences)), torch.tensor(told))


def captions(text: PromptEncoder, batch: int, seed: int, workers: int, first: int = 0) -> Iterator[Captioned]:
    """Endless batches of clips with sentences, from batch `first` on; `workers` processes write them."""
    # The workers only tokenize: they must not touch weights on a GPU.
    source = Captions(PromptEncoder(text.tokenizer, CLIPText(text.encoder.config)), batch, seed, first)
    return iter(DataLoader(source, batch_size=None, num_workers=workers, sampler=range(len(source))))


def caption(clips: world.Clips, i: int, generator: torch.Generator) -> tuple[str, tuple[int, ...]]:
    """A sentence about clip i, and what it says, as in `Captioned.told`."""
    style = float(torch.rand((), generator=generator))
    words: list[str | None] = list(clips.words(i))
    indices = [int(getattr(clips, name)[i]) for name in world.ATTRIBUTES]
    if style < 0.45:
        return world.sentence(*clips.words(i)), (*indices, len(world.SIZES), len(world.PLACES))
    keep = torch.rand(6, generator=generator) >= torch.tensor([0.3 if style > 0.85 else 0.0] * 4 + [0.5] * 2)
    size, place = clips.size_word(i), clips.place_word(i)
    indices += [len(world.SIZES) if size is None else size, len(world.PLACES) if place is None else place]
    words += [None if size is None else world.SIZES[size], None if place is None else world.PLACES[place]]
    told = tuple(index if kept else count for index, kept, count in zip(indices, keep.tolist(), TOLD))
    kept_words = [word if kept else None for word, kept in zip(words, keep.tolist())]
    return world.paraphrase(generator, *kept_words), told


def add_noise_words(ids: Tensor, generator: torch.Generator) -> Tensor:
    """In one sentence of four, up to three random tokens at random places."""
    if int(torch.randint(4, (), generator=generator)):
        return ids
    words = ids[1 : int((ids == EOS).nonzero()[0])].tolist()
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        place = int(torch.randint(len(words) + 1, (), generator=generator))
        words.insert(place, int(torch.randint(1, BOS, (), generator=generator)))
    row = torch.full_like(ids, PAD)
    row[: len(words) + 2] = torch.tensor([BOS, *words, EOS])
    return row


class Pool:
    """Clips as latents, each with a sentence; the oldest are replaced by new ones all the time.

    Attributes:
        latents: (n, channels, F, h, w) of unit variance.
        masks: (n, 1, F, h, w), the share of each latent pixel that the shape covers, its outline included.
        token_ids: (n, 77) int64.
    """

    def __init__(self, args: argparse.Namespace, text: PromptEncoder, vae: AutoencoderKL, first: int):
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        shape = (args.pool, *args.unet_shape)
        self.vae = copy.deepcopy(vae).to(dtype)
        self.latents = torch.empty(shape, dtype=dtype, device=args.device)
        self.masks = torch.empty((args.pool, 1, *shape[2:]), dtype=dtype, device=args.device)
        self.token_ids = torch.empty((args.pool, MAX_TOKENS), dtype=torch.int64, device=args.device)
        self.batch = min(64, args.pool)
        self.place = 0
        filling = captions(text, self.batch, args.seed + 2, args.workers)
        while self.place < args.pool // self.batch * self.batch:
            self.add(next(filling))
        # A resumed run adds what an unbroken one would still hold.
        again = max(0, first - args.pool // args.fresh)
        self.place = again * args.fresh % args.pool
        self.fresh = captions(text, args.fresh, args.seed + 3, args.workers, again)
        for _ in range(again, first):
            self.add(next(self.fresh))

    @torch.no_grad()
    def add(self, batch: Captioned) -> None:
        n = len(batch.clips)
        self.place = self.place if self.place + n <= len(self.latents) else 0
        here = slice(self.place, self.place + n)
        pixels, masks = world.render(batch.clips.to(self.latents.device))
        z = []
        for part in pixels.flatten(0, 1).split(256):
            frames = part.to(self.latents.dtype, memory_format=torch.channels_last)
            z.append(self.vae.encode(frames).latent_dist.mean)
        self.latents[here] = torch.cat(z).unflatten(0, (n, -1)).transpose(1, 2).to(self.latents.dtype)
        # The outline too, on both sides: it is what makes the shape.
        covered = F.max_pool2d(F.avg_pool2d(masks.flatten(0, 1), 8), 3, 1, 1)
        self.masks[here] = covered.unflatten(0, (n, -1)).transpose(1, 2).to(self.masks.dtype)
        self.token_ids[here] = batch.token_ids.to(self.token_ids.device)
        self.place += n

    def draw(self, n: int, stills: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (n, channels, F, h, w), masks and token ids; F is 1 for stills."""
        device = self.latents.device
        picks = torch.randint(len(self.latents), (n,), generator=generator).to(device)
        if stills:
            frames = torch.randint(world.FRAMES, (n,), generator=generator).to(device)
            return self.latents[picks, :, frames, None], self.masks[picks, :, frames, None], self.token_ids[picks]
        return self.latents[picks], self.masks[picks], self.token_ids[picks]
