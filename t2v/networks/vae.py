"""Latents to uint8 frames and back, a few frames at a time, so that memory does not grow with their number."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from t2v.networks.autoencoder import Autoencoder

R = TypeVar("R")

# Number of values that the decoder holds at its peak for each pixel and each channel of its last layers, counted: 6,
# and a copy that torch's group norm makes on a GPU, where it does not support channels-last memory.
PEAK_VALUES = 7


class Retry(Protocol):
    """Calls `attempt` with the first setting; may try the next one if memory runs out."""

    def __call__(self, attempt: Callable[[int], R], settings: Iterable[int]) -> R: ...


def no_retry(attempt: Callable[[int], R], settings: Iterable[int]) -> R:
    """`attempt` with the first setting."""
    return attempt(next(iter(settings)))


class VAE:
    """The model's autoencoder for videos; applies the scale of the latents.

    Args:
        max_chunk_pixels: maximum number of pixels that are computed together, but at least one frame.
        is_asynchronous: whether the host enqueues work. The device then computes the next chunk while the caller
            handles the current one.

    Attributes:
        scale_factor: pixels per latent, along each side.
        channels: number of channels of a latent.
        scale: factor from the autoencoder's latents to those that the denoiser sees.
    """

    def __init__(self, autoencoder: Autoencoder, max_chunk_pixels: int, is_asynchronous: bool = False):
        self.autoencoder = autoencoder.eval()
        self.max_chunk_pixels = max_chunk_pixels
        self.is_asynchronous = is_asynchronous
        config = autoencoder.config
        self.scale_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.channels: int = config.latent_channels
        self.scale: float = config.scaling_factor

    @property
    def device(self) -> torch.device:
        return self.autoencoder.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The autoencoder's dtype."""
        return self.autoencoder.decoder.conv_out.weight.dtype

    def frames_per_chunk(self, height: int, width: int, chunk_pixels: int | None = None) -> int:
        """Number of frames of this size that are computed together."""
        pixels = min(chunk_pixels or self.max_chunk_pixels, self.max_chunk_pixels)
        return max(1, pixels // (height * width))

    def peak_bytes(self, frames: int, height: int, width: int) -> int:
        """Bytes that decoding this number of frames together takes at its peak, beside the weights."""
        config = self.autoencoder.config
        return PEAK_VALUES * config.block_out_channels[0] * frames * height * width * self.dtype.itemsize

    def decode(self, latents: Tensor, chunk_pixels: int | None = None, retry: Retry = no_retry) -> Iterator[np.ndarray]:
        """Decode chunk by chunk.

        Args:
            latents: (1, channels, F, h, w), any float dtype.
            chunk_pixels: maximum number of pixels decoded together; None is `max_chunk_pixels`.
            retry: called with the function that starts a chunk and the numbers of frames to try, each half of the one
                before. Later chunks keep the number that succeeded.

        Yields:
            (n, H, W, 3) uint8 RGB, F frames in all. Values are rounded to the nearest; the original truncated.
        """
        images = latents[0].transpose(0, 1)  # (F, channels, h, w)
        height, width = (self.scale_factor * side for side in images.shape[-2:])
        size = self.frames_per_chunk(height, width, chunk_pixels)
        started: deque[Callable[[], np.ndarray]] = deque()
        while len(images):

            def start(size: int, images: Tensor = images) -> tuple[int, Callable[[], np.ndarray]]:
                return size, self._decode(images[:size])

            size, finish = retry(start, halvings(min(size, len(images))))
            started.append(finish)
            images = images[size:]
            if len(started) > self.is_asynchronous:
                yield started.popleft()()
        for finish in started:
            yield finish()

    @torch.inference_mode()
    def encode(
        self,
        frames: Iterable[np.ndarray],
        chunk_pixels: int | None = None,
        on_chunk: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Encode frames chunk by chunk, as they arrive.

        Args:
            frames: (H, W, 3) uint8 RGB.
            chunk_pixels: maximum number of pixels encoded together; None is `max_chunk_pixels`.
            on_chunk: called with the number of frames encoded so far.

        Returns:
            (1, channels, F, h, w) float32 latents, the means of the encoder's distributions.
        """
        latents: list[Tensor] = []
        chunk: list[np.ndarray] = []
        done = 0

        def encode() -> None:
            nonlocal done
            x = torch.from_numpy(np.stack(chunk)).to(self.device).permute(0, 3, 1, 2)  # already channels last
            means = self.autoencoder.encode((x.float() / 127.5 - 1).to(self.dtype))
            latents.append(means.float() * self.scale)
            done += len(chunk)
            chunk.clear()
            on_chunk(done)

        for frame in frames:
            chunk.append(frame)
            if len(chunk) == self.frames_per_chunk(frame.shape[0], frame.shape[1], chunk_pixels):
                encode()
        if chunk:
            encode()
        return torch.cat(latents).transpose(0, 1)[None]

    @torch.inference_mode()
    def _decode(self, images: Tensor) -> Callable[[], np.ndarray]:
        """Start decoding; the returned function waits for the result."""
        z = (images / self.scale).to(self.dtype).contiguous(memory_format=torch.channels_last)
        pixels = (self.autoencoder.decode(z).float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).contiguous().to("cpu", non_blocking=True)
        if not images.is_cuda:
            return pixels.numpy
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(images.device))

        def finish() -> np.ndarray:
            done.synchronize()
            return pixels.numpy()

        return finish


def halvings(n: int) -> Iterator[int]:
    """n, half of it, and so on down to 1."""
    while n:
        yield n
        n //= 2
