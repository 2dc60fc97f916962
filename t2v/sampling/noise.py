"""Noise from a seed. It is drawn on the CPU: one seed gives the same noise on every device."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from t2v.sampling.timeline import Timeline


def noise_stream(
    timeline: Timeline, shape: Sequence[int], seed: int, device: torch.device, pin_memory: bool = False
) -> Iterator[Tensor]:
    """Yields unit normal noise without end, (1, c, F, h, w) float32 on `device`. The first is x_T.

    Args:
        pin_memory: copy through pinned memory, so that the host does not wait until a GPU has caught up.
    """
    generator = torch.Generator().manual_seed(seed)
    yield initial_noise(timeline, shape, generator).to(device)
    while True:
        noise = torch.randn(tuple(shape), generator=generator, pin_memory=pin_memory)
        yield noise.to(device, non_blocking=True)


def initial_noise(timeline: Timeline, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Unit normal noise (1, c, F, h, w) float32: that of one window, repeated with its frames in shuffled order.

    Half a window is shuffled at a time. Distant windows then show the same content (FreeNoise; Qiu et al., arXiv
    2310.15169).
    """
    size = timeline.window_size
    one = torch.randn((*shape[:2], size, *shape[3:]), generator=generator)
    order = list(range(size))
    half = max(1, size // 2)
    while len(order) < timeline.num_frames:
        block = order[len(order) - size :][:half]
        order += [block[i] for i in torch.randperm(len(block), generator=generator)]
    return one[:, :, order[: timeline.num_frames]]
