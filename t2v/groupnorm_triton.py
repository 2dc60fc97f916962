"""Group norm, and the SiLU after it, for maps whose channels are last in memory, as three Triton kernels.

torch's own kernel on a GPU takes one block of threads for each group of each image, and knows no channels-last memory.
Here every image is cut into chunks of pixels. `add_up` adds up the values and the squares of a chunk, for each channel.
`finish` adds up the chunks and the channels of a group, and makes of them one scale and one shift for each channel.
`apply` reads the map once more, scales, shifts and applies SiLU. All arithmetic is in float32. Off unless it is asked
for; `torch.nn.functional.group_norm` is the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 32  # that one program reads at a time
CHANNELS = 64  # that one program reads
PROGRAMS = 1024  # about so many, where the map is large enough: several for each multiprocessor


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    added: Tensor | None = None,
) -> Tensor:
    """Group norm of maps that are channels last.

    Args:
        x: (n, c, h, w), channels last, any float dtype.
        groups: divides c.
        weight, bias: (c,).
        silu: whether SiLU is applied to the result.
        added: (k, c), where k divides n: a term of every n / k images that is added to x first.

    Returns:
        (n, c, h, w), channels last, dtype of x.
    """
    n, c, h, w = x.shape
    pixels = h * w
    rows = x.permute(0, 2, 3, 1).reshape(n, pixels, c)  # a view, where x is channels last
    columns = triton.cdiv(c, CHANNELS)
    steps = triton.cdiv(pixels, PIXELS)
    # Of each chunk. A power of two: there are few, and each is compiled.
    per_chunk = 2 ** max(0, (steps * n * columns // PROGRAMS).bit_length() - 1)
    chunks = triton.cdiv(steps, per_chunk)
    sums = torch.empty((2, n, chunks, c), device=x.device, dtype=torch.float32)
    scales = torch.empty((2, n, c), device=x.device, dtype=torch.float32)
    y = torch.empty_like(rows)
    grid = (n, chunks, columns)
    term = weight if added is None else added.contiguous()  # not read where there is none
    share = 0 if added is None else n // len(added)
    add_up[grid](rows, term, sums[0], sums[1], pixels, c, chunks, share, per_chunk, PIXELS, CHANNELS)
    width = c // groups
    count = float(pixels * width)
    tile = (triton.next_power_of_2(chunks), triton.next_power_of_2(width))
    finish[n, groups](
        sums[0], sums[1], term, weight, bias, scales[0], scales[1], c, chunks, width, count, eps, share, *tile
    )
    apply[grid](rows, y, scales[0], scales[1], pixels, c, per_chunk, silu, PIXELS, CHANNELS)
    return y.view(n, h, w, c).permute(0, 3, 1, 2)


@triton.jit
def add_up(
    x,
    added,
    sums,
    squares,
    pixels,
    c,
    chunks,
    SHARE: tl.constexpr,
    STEPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums and sums of squares of one chunk of one image, for some channels; (n, chunks, c) each."""
    image, chunk, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    if SHARE > 0:
        term = tl.load(added + (image // SHARE) * c + channel, mask=channel < c, other=0.0).to(tl.float32)
    for step in range(STEPS):
        pixel = (chunk * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < c)[None, :]
        place = (image.to(tl.int64) * pixels + pixel)[:, None] * c + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if SHARE > 0:
            value = tl.where(inside, value + term[None, :], 0.0)
        total += value
        square += value * value
    result = (image * chunks + chunk) * c + channel
    tl.store(sums + result, tl.sum(total, 0), mask=channel < c)
    tl.store(squares + result, tl.sum(square, 0), mask=channel < c)


@triton.jit
def finish(
    sums,
    squares,
    added,
    weight,
    bias,
    scale,
    shift,
    c,
    chunks,
    width,
    count,
    eps,
    SHARE: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scale and shift of the channels of one group of one image; (n, c) each."""
    image, group = tl.program_id(0), tl.program_id(1)
    chunk, column = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    channel = group * width + column
    inside = (chunk < chunks)[:, None] & (column < width)[None, :]
    place = (image * chunks + chunk)[:, None] * c + channel[None, :]
    mean = tl.sum(tl.load(sums + place, mask=inside, other=0.0)) / count
    variance = tl.sum(tl.load(squares + place, mask=inside, other=0.0)) / count - mean * mean
    deviation = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    factor = deviation * tl.load(weight + channel, mask=column < width, other=0.0).to(tl.float32)
    term = tl.load(bias + channel, mask=column < width, other=0.0).to(tl.float32) - mean * factor
    if SHARE > 0:
        offset = tl.load(added + (image // SHARE) * c + channel, mask=column < width, other=0.0).to(tl.float32)
        term += offset * factor
    tl.store(scale + image * c + channel, factor, mask=column < width)
    tl.store(shift + image * c + channel, term, mask=column < width)


@triton.jit
def apply(
    x,
    y,
    scale,
    shift,
    pixels,
    c,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x * scale + shift for one chunk of one image and some channels, then SiLU."""
    image, chunk, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)
    factor = tl.load(scale + image * c + channel, mask=channel < c, other=0.0)[None, :]
    term = tl.load(shift + image * c + channel, mask=channel < c, other=0.0)[None, :]
    for step in range(STEPS):
        pixel = (chunk * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < c)[None, :]
        place = (image.to(tl.int64) * pixels + pixel)[:, None] * c + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor + term
        if SILU:
            value = value / (1 + tl.exp(-value))
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)
