"""Videos longer than the model was trained on: which frames are denoised together. Plain data, no torch.

In every step the denoiser runs on overlapping windows of frames. Where windows overlap, its predictions are averaged
(MultiDiffusion; Bar-Tal et al., arXiv 2302.08113), with more weight in the middle of a window than at its borders. The
windows move from step to step, so that no pair of neighbouring frames is separated in every step. A loop is a timeline
bent into a circle.
"""

from dataclasses import dataclass

SHIFT = 3  # number of frames that the windows move between two steps; no divisor of a common half window


@dataclass(frozen=True)
class Window:
    """Frames that are denoised together.

    Attributes:
        start: index of the first frame.
        frames: indices of all frames, in order. In a loop they may pass the end and continue at 0.
        weights: weight of the prediction for each frame, 0 to 1.
    """

    start: int
    frames: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Timeline:
    """How `num_frames` frames are denoised, `window` frames at a time.

    Attributes:
        loop: whether the last frame leads to the first.
    """

    num_frames: int
    window: int
    loop: bool = False

    @property
    def is_single_window(self) -> bool:
        """Whether every step is one call of the network with all frames in order."""
        return self.num_frames <= self.window and not self.loop

    @property
    def window_size(self) -> int:
        """Number of frames in one call of the network."""
        return min(self.num_frames, self.window)

    def starts(self, step: int) -> list[int]:
        """First frames of the windows of a step. In a loop a window may pass the end."""
        stride = max(1, self.window_size // 2)
        if self.loop:
            count = 1 if self.num_frames <= self.window else -(-self.num_frames // stride)
            return [(SHIFT * step + i * stride) % self.num_frames for i in range(count)]
        last = self.num_frames - self.window_size
        return sorted({min(max(0, s), last) for s in range(SHIFT * step % stride - stride, self.num_frames, stride)})

    def windows(self, step: int) -> list[Window]:
        """The windows of a step. The weights of a frame over all windows add up to 1."""
        size = self.window_size
        ramp = [min(i + 1, size - i) for i in range(size)]
        frames = {start: [(start + i) % self.num_frames for i in range(size)] for start in self.starts(step)}
        total = [0] * self.num_frames
        for indices in frames.values():
            for index, weight in zip(indices, ramp):
                total[index] += weight
        return [
            Window(start, indices, [weight / total[index] for index, weight in zip(indices, ramp)])
            for start, indices in frames.items()
        ]

    def prompt_shares(self, start: int, num_prompts: int) -> list[float]:
        """Share of each prompt, spread evenly over the timeline, in the window that begins at `start`."""
        at = (start + self.window_size / 2) / self.num_frames * num_prompts - 0.5
        if not self.loop:
            at = min(max(at, 0), num_prompts - 1)
        shares = [0.0] * num_prompts
        before = int(at // 1)
        shares[before % num_prompts] += 1 - (at - before)
        shares[(before + 1) % num_prompts] += at - before
        return shares
