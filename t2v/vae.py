"""Latents -> uint8 frames, a few at a time, so that memory does not grow with the number of frames; and back."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from t2v import memory
from t2v.autoencoder import Autoencoder

# Pixels decoded at once. At 256x256 eight frames; the largest activation is then some 270 MB in float16. On a CPU so
# few that most activations are below the 32 MB from which on malloc maps new memory for each.
CHUNK_PIXELS = 2**19
CHUNK_PIXELS_CPU = 2**15

# Values held at the decoder's peak for every pixel and channel of its last layers; counted: 6, and a copy that group
# norm makes on a GPU, where it knows no channels-last memory.
PEAK = 7

log = logging.getLogger(__name__)


class VAE:
    """The model's autoencoder; owns the latents' scale.

    Attributes:
        factor: pixels to one latent, per side.
        channels: of a latent.
    """

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder.eval()
        config = autoencoder.config
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.channels: int = config.latent_channels
        self.scale: float = config.scaling_factor

    @property
    def device(self) -> torch.device:
        return self.autoencoder.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The autoencoder's."""
        return self.autoencoder.decoder.conv_out.weight.dtype

    def at_once(self, height: int, width: int, chunk_pixels: int = CHUNK_PIXELS) -> int:
        """Frames of so many pixels that are decoded together."""
        if self.device.type == "cpu":
            chunk_pixels = min(chunk_pixels, CHUNK_PIXELS_CPU)
        return max(1, chunk_pixels // (height * width))

    def workspace(self, frames: int, height: int, width: int) -> int:
        """Bytes that decoding so many frames at once takes at its peak, beside the weights."""
        config = self.autoencoder.config
        return PEAK * config.block_out_channels[0] * frames * height * width * self.dtype.itemsize

    def decode(
        self, latents: Tensor, chunk_pixels: int = CHUNK_PIXELS, release: Callable[[], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Decode chunk by chunk; in chunks half as large, and half again, where memory runs out.

        Args:
            latents: (1, channels, F, h, w), any float dtype.
            chunk_pixels: to decode at once at most, but one frame at least.
            release: gives back what others hold, where memory runs out.

        Yields:
            (n, H, W, 3) uint8 RGB, F frames in all. Values are rounded to the nearest; the original truncated.
        """
        images = latents[0].transpose(0, 1)  # (F, channels, h, w)
        size = self.at_once(images.shape[-2] * self.factor, images.shape[-1] * self.factor, chunk_pixels)
        # On a GPU the next chunk is under way while the caller works on this one.
        ahead = 1 if images.is_cuda else 0
        started: deque[Callable[[], np.ndarray]] = deque()
        rest = images
        while len(rest):
            try:
                started.append(self._decode(rest[:size]))
                rest = rest[size:]
            except (RuntimeError, MemoryError) as error:
                size = min(size, len(rest)) // 2
                if not (size and memory.exhausted(error)):
                    raise
            else:
                if len(started) > ahead:
                    yield started.popleft()()
                continue
            log.warning("Memory ran out in decoding; on with %d frames at once.", size)
            # Here, where the error no longer holds on to tensors.
            release() if release else memory.release(images.device)
        for finish in started:
            yield finish()

    @torch.inference_mode()
    def encode(self, frames: Iterable[np.ndarray], chunk_pixels: int = CHUNK_PIXELS) -> Tensor:
        """(1, channels, F, h, w) float32 latents, the means of what the encoder gives, of (H, W, 3) uint8 RGB frames.

        Frames are taken as they are encoded, `chunk_pixels` at a time at most.
        """
        latents: list[Tensor] = []
        chunk: list[np.ndarray] = []

        def encode() -> None:
            x = torch.from_numpy(np.stack(chunk)).to(self.device).permute(0, 3, 1, 2)  # already channels last
            means = self.autoencoder.encode((x.float() / 127.5 - 1).to(self.dtype))
            latents.append(means.float() * self.scale)
            chunk.clear()

        for frame in frames:
            chunk.append(frame)
            if len(chunk) == self.at_once(frame.shape[0], frame.shape[1], chunk_pixels):
                encode()
        if chunk:
            encode()
        return torch.cat(latents).transpose(0, 1)[None]

    @torch.inference_mode()
    def _decode(self, images: Tensor) -> Callable[[], np.ndarray]:
        """Start decoding; what it returns waits for the end."""
        z = (images / self.scale).to(self.dtype).contiguous(memory_format=torch.channels_last)
        pixels = (self.autoencoder.decode(z).float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).contiguous().to("cpu", non_blocking=True)
        if not images.is_cuda:
            return pixels.numpy
        done = torch.cuda.Event()
        done.record()

        def finish() -> np.ndarray:
            done.synchronize()
            return pixels.numpy()

        return finish
