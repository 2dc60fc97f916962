"""Videos longer than the model was trained on: which frames are denoised together, and how it is put together again.

In every step the denoiser runs on overlapping windows of frames, and where they overlap its predictions are averaged
(MultiDiffusion; Bar-Tal et al., arXiv 2302.08113), heavier in the middle of a window than at its borders. From step to
step the windows move, so that no pair of neighbours is always divided. All of them start from one stretch of noise,
shuffled along the video, by which distant windows show the same things (FreeNoise; Qiu et al., arXiv 2310.15169). A
loop is a timeline bent into a circle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT = 3  # frames that the windows move between two steps; no divisor of a usual window's half


@dataclass(frozen=True)
class Window:
    """Frames that are denoised together.

    Attributes:
        start: the first of them.
        frames: (n,) int64.
        weights: (n, 1, 1) float32, of the prediction for each.
    """

    start: int
    frames: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Timeline:
    """How `frames` frames are denoised, `window` at a time.

    Attributes:
        loop: whether the first frame follows the last.
    """

    frames: int
    window: int
    loop: bool = False

    @property
    def whole(self) -> bool:
        """Whether every step is one run over the frames as they stand."""
        return self.frames <= self.window and not self.loop

    @property
    def size(self) -> int:
        """Frames of one run."""
        return min(self.frames, self.window)

    def starts(self, step: int) -> list[int]:
        """First frames of the windows of a step. In a loop a window may pass the end."""
        stride = max(1, self.size // 2)
        if self.loop:
            count = 1 if self.frames <= self.window else -(-self.frames // stride)
            return [(SHIFT * step + i * stride) % self.frames for i in range(count)]
        last = self.frames - self.size
        return sorted({min(max(0, s), last) for s in range(SHIFT * step % stride - stride, self.frames, stride)})

    def windows(self, step: int, device: torch.device | str = "cpu") -> list[Window]:
        """The windows of a step. A frame's weights over all of them add up to 1."""
        ramp = torch.tensor([min(i + 1, self.size - i) for i in range(self.size)], dtype=torch.float32)
        indices = {start: (start + torch.arange(self.size)) % self.frames for start in self.starts(step)}
        total = torch.zeros(self.frames)
        for index in indices.values():
            total[index] += ramp
        return [
            Window(start, index.to(device), (ramp / total[index])[:, None, None].to(device))
            for start, index in indices.items()
        ]

    def mixture(self, start: int, prompts: int) -> list[float]:
        """Share of each of so many prompts, spread evenly over the timeline, in the window that starts there."""
        at = (start + self.size / 2) / self.frames * prompts - 0.5
        if not self.loop:
            at = min(max(at, 0), prompts - 1)
        shares = [0.0] * prompts
        before = int(at // 1)
        shares[before % prompts] += 1 - (at - before)
        shares[(before + 1) % prompts] += at - before
        return shares

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Unit normal noise of shape (1, c, F, h, w): that of one window, and on from there the same frames in another
        order, half a window shuffled at a time."""
        one = torch.randn((*shape[:2], self.size, *shape[3:]), generator=generator)
        order = list(range(self.size))
        half = max(1, self.size // 2)
        while len(order) < self.frames:
            block = order[len(order) - self.size :][:half]
            order += [block[i] for i in torch.randperm(len(block), generator=generator)]
        return one[:, :, order[: self.frames]]
