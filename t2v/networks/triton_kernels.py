"""Triton kernels that do in one pass over memory what torch does on a GPU in several.

They are: group norm, with the bias and the timestep's term before it and SiLU after it; layer norm, with the residual
sum before it; attention within short sequences; the gated linear unit; sums with a residual and a bias.
`t2v.networks.fused` says where each is used, and computes the same in torch.

Matrices are rows of channels, contiguous; a map whose channels are last in memory is such a matrix. All arithmetic is
in float32, whatever the dtype. All shapes share a few compiled kernels: sizes are arguments, and an absent bias or
residual is masked instead of compiled away, because each variant delays a first request by a third of a second. Nothing
is tuned at run time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 32  # number of rows that one program of the norms and sums reads at a time
CHANNELS = 64  # number of channels that it reads
PROGRAMS = 1024  # approximate number of programs for a large map: several for each multiprocessor

# A group norm runs as one kernel if no group of an image is larger than this: pixels, channels of a group.
SMALL = (64, 64)
NARROW = 16  # channels of a group below which reading a group alone wastes most of the memory's bandwidth

ROWS = 64  # number of queries and of keys in one program of the attention; the longest sequence
WIDEST = 8192  # largest number of channels in a row of the layer norm
AT_ONCE = 4096  # number of values in one program of the layer norm
GATED = 2048  # number of values that one program of the gated unit makes


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    added: Tensor | None = None,
    term: Tensor | None = None,
    frames: int = 1,
) -> Tensor:
    """Group norm of maps that are channels last, of x + added + term.

    Args:
        x: (n, c, h, w), channels last, any float dtype.
        groups: divides c.
        weight, bias: (c,).
        silu: whether SiLU is applied to the result.
        added: (c,), the bias of the convolution that made x.
        term: (rows, c), `rows` divides n; each row is added to n / rows images that follow one another.
        frames: number of frames that are stacked along h. With more than one, the result has the frames of each pixel
            together: in memory it is (n, h / frames * w, frames, c).

    Returns:
        (n, c, h, w), channels last, dtype of x.
    """
    n, c, h, w = x.shape
    pixels = h * w
    rows = x.permute(0, 2, 3, 1).contiguous()
    y = torch.empty_like(rows)
    width = c // groups
    repeats, stride = (n // len(term), term.stride(0)) if term is not None else (1, 0)
    if term is not None and term.stride(1) != 1:
        term = term.contiguous()
    # An absent tensor is replaced by a pointer that is never read.
    extra = (
        *(weight if added is None else added, int(added is not None)),
        *(weight if term is None else term, int(term is not None), repeats, stride),
    )
    if pixels <= SMALL[0] and NARROW <= width <= SMALL[1]:
        numbers = (weight, bias, *extra, pixels, c, width, eps, int(silu), frames)
        small_norm[n, groups](rows, y, *numbers, *SMALL)
    else:
        columns = triton.cdiv(c, CHANNELS)
        steps = triton.cdiv(pixels, PIXELS)
        per_chunk = max(1, steps * n * columns // PROGRAMS)
        chunks = triton.cdiv(steps, per_chunk)
        sums = torch.empty((2, n, chunks, c), device=x.device, dtype=torch.float32)
        scales = torch.empty((2, n, c), device=x.device, dtype=torch.float32)
        grid = (n, chunks, columns)
        add_up[grid](rows, sums[0], sums[1], *extra, pixels, c, chunks, per_chunk, PIXELS, CHANNELS)
        tile = (PIXELS, max(CHANNELS, triton.next_power_of_2(width)))
        parameters = (weight, bias, scales[0], scales[1], *extra, c, chunks, width, pixels, eps)
        finish[n, groups](sums[0], sums[1], *parameters, *tile)
        apply[grid](rows, y, scales[0], scales[1], pixels, c, per_chunk, int(silu), frames, PIXELS, CHANNELS)
    return y.permute(0, 3, 1, 2)


EXTRA = ("has_added", "has_term", "repeats", "term_stride")


@triton.jit
def extra_of(added, has_added, term, has_term, repeats, term_stride, image, channel, inside):
    """The sum of the terms that are added to some channels of an image."""
    value = tl.load(added + channel, mask=inside & (has_added != 0), other=0.0).to(tl.float32)
    row = (image // repeats).to(tl.int64) * term_stride
    return value + tl.load(term + row + channel, mask=inside & (has_term != 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=[*EXTRA, "pixels", "width", "silu", "frames"])
def small_norm(
    x,
    y,
    weight,
    bias,
    added,
    has_added,
    term,
    has_term,
    repeats,
    term_stride,
    pixels,
    c,
    width,
    eps,
    silu,
    frames,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One group of one image, all of it in registers."""
    image, group = tl.program_id(0), tl.program_id(1)
    pixel, column = tl.arange(0, PIXELS), tl.arange(0, WIDTH)
    channel = group * width + column
    inside = (pixel < pixels)[:, None] & (column < width)[None, :]
    start = image.to(tl.int64) * pixels
    value = tl.load(x + (start + pixel)[:, None] * c + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    extra = extra_of(added, has_added, term, has_term, repeats, term_stride, image, channel, column < width)
    value = tl.where(inside, value + extra[None, :], 0.0)
    count = (pixels * width).to(tl.float32)
    mean = tl.sum(value) / count
    value = tl.where(inside, value - mean, 0.0)
    deviation = tl.rsqrt(tl.sum(value * value) / count + eps)
    factor = deviation * tl.load(weight + channel, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=column < width, other=0.0).to(tl.float32)
    value = value * factor[None, :] + shift[None, :]
    value = tl.where(silu != 0, value / (1 + tl.exp(-value)), value)
    inner = pixels // frames
    place = start + (pixel % inner) * frames + pixel // inner
    tl.store(y + place[:, None] * c + channel[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*EXTRA, "pixels", "chunks", "steps"])
def add_up(
    x,
    sums,
    squares,
    added,
    has_added,
    term,
    has_term,
    repeats,
    term_stride,
    pixels,
    c,
    chunks,
    steps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums and sums of squares of one chunk of one image, for some channels; (n, chunks, c) each."""
    image, chunk, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)
    extra = extra_of(added, has_added, term, has_term, repeats, term_stride, image, channel, channel < c)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < c)[None, :]
        place = (image.to(tl.int64) * pixels + pixel)[:, None] * c + channel[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value + extra[None, :], 0.0)
        total += value
        square += value * value
    result = (image.to(tl.int64) * chunks + chunk) * c + channel
    tl.store(sums + result, tl.sum(total, 0), mask=channel < c)
    tl.store(squares + result, tl.sum(square, 0), mask=channel < c)


@triton.jit(do_not_specialize=[*EXTRA, "chunks", "width", "pixels"])
def finish(
    sums,
    squares,
    weight,
    bias,
    scale,
    shift,
    added,
    has_added,
    term,
    has_term,
    repeats,
    term_stride,
    c,
    chunks,
    width,
    pixels,
    eps,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scale and shift of the channels of one group of one image; (n, c) each."""
    image, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    channel = group * width + column
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    square = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        place = (image.to(tl.int64) * chunks + chunk)[:, None] * c + channel[None, :]
        total += tl.load(sums + place, mask=inside, other=0.0)
        square += tl.load(squares + place, mask=inside, other=0.0)
    count = pixels.to(tl.float32) * width.to(tl.float32)
    mean = tl.sum(total) / count
    variance = tl.sum(square) / count - mean * mean
    deviation = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    extra = extra_of(added, has_added, term, has_term, repeats, term_stride, image, channel, column < width)
    factor = deviation * tl.load(weight + channel, mask=column < width, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=column < width, other=0.0).to(tl.float32) + (extra - mean) * factor
    tl.store(scale + image * c + channel, factor, mask=column < width)
    tl.store(shift + image * c + channel, offset, mask=column < width)


@triton.jit(do_not_specialize=["pixels", "steps", "silu", "frames"])
def apply(
    x,
    y,
    scale,
    shift,
    pixels,
    c,
    steps,
    silu,
    frames,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x * scale + shift for one chunk of one image and some channels, then SiLU."""
    image, chunk, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)
    factor = tl.load(scale + image * c + channel, mask=channel < c, other=0.0)[None, :]
    offset = tl.load(shift + image * c + channel, mask=channel < c, other=0.0)[None, :]
    start = image.to(tl.int64) * pixels
    inner = pixels // frames
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & (channel < c)[None, :]
        value = tl.load(x + (start + pixel)[:, None] * c + channel[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32) * factor + offset
        value = tl.where(silu != 0, value / (1 + tl.exp(-value)), value)
        place = start + (pixel % inner) * frames + pixel // inner
        tl.store(y + place[:, None] * c + channel[None, :], value.to(y.dtype.element_ty), mask=inside)


def add(x: Tensor, other: Tensor | None, bias: Tensor | None, frames: int = 1) -> Tensor:
    """x + other + bias, as rows of channels.

    Args:
        x: (..., c), contiguous. It is overwritten if frames is 1.
        other: shape of x, contiguous.
        bias: (c,).
        frames: 1, or the size of axis -2 of x, which is (n, pixels, frames, c): `other` and the result are
            (n, frames, pixels, c).

    Returns:
        As x, or as `other`.
    """
    c = x.shape[-1]
    rows = x.numel() // c
    pixels = x.shape[-3] if frames > 1 else rows
    y = x if frames == 1 else torch.empty_like(x if other is None else other)
    extra = (x if other is None else other, int(other is not None), x if bias is None else bias, int(bias is not None))
    grid = (triton.cdiv(rows, PIXELS), triton.cdiv(c, CHANNELS))
    sum_rows[grid](x, y, *extra, rows, c, pixels, frames, PIXELS, CHANNELS)
    return y


@triton.jit(do_not_specialize=["has_other", "has_bias", "rows", "pixels", "frames"])
def sum_rows(
    x,
    y,
    other,
    has_other,
    bias,
    has_bias,
    rows,
    c,
    pixels,
    frames,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some channels of some rows."""
    row = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < c)[None, :]
    video = row // (pixels * frames)
    place = row % (pixels * frames)  # frame by frame, as the result is
    source = (video * frames * pixels + (place % pixels) * frames + place // pixels)[:, None] * c + channel[None, :]
    target = row[:, None] * c + channel[None, :]
    value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=(channel < c) & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
    value += tl.load(other + target, mask=inside & (has_other != 0), other=0.0).to(tl.float32)
    tl.store(y + target, value.to(y.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + added, and the layer norm of the sum along the last axis.

    Args:
        x: (..., c), c <= WIDEST.
        weight, bias: (c,).
        added: shape of x.

    Returns:
        The sum (x itself if nothing is added) and its norm, contiguous.
    """
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    c = x.shape[-1]
    width = max(64, triton.next_power_of_2(c))
    per_program = max(1, AT_ONCE // width)
    total, y = x if added is None else torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // c
    args = (x, x if added is None else added, int(added is not None), total, y, weight, bias, rows, c, eps)
    norm_rows[(triton.cdiv(rows, per_program),)](*args, per_program, width)
    return total, y


@triton.jit(do_not_specialize=["has_added", "rows"])
def norm_rows(
    x,
    added,
    has_added,
    total,
    y,
    weight,
    bias,
    rows,
    c,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some rows, all of them in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < c)[None, :]
    place = row[:, None] * c + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(added + place, mask=inside & (has_added != 0), other=0.0).to(tl.float32)
    stored = value.to(y.dtype.element_ty)
    tl.store(total + place, stored, mask=inside & (has_added != 0))
    value = stored.to(tl.float32)  # the norm of what the next layer reads
    mean = tl.sum(value, 1) / c
    value = tl.where(inside, value - mean[:, None], 0.0)
    deviation = tl.rsqrt(tl.sum(value * value, 1) / c + eps)
    factor = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
    value = value * deviation[:, None] * factor[None, :] + shift[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """value * gelu(gate), exactly by the error function.

    Args:
        value, gate: (..., c), the last axis contiguous, rows equally far apart, as the halves of one tensor are.

    Returns:
        (..., c), contiguous.
    """
    c = value.shape[-1]
    y = torch.empty(value.shape, device=value.device, dtype=value.dtype)
    strides = []
    for x in (value, gate):
        flat = x.flatten(0, -2)
        strides.append(flat.stride(0))
    rows = y.numel() // c
    width = min(512, max(64, triton.next_power_of_2(c)))
    per_program = GATED // width
    grid = (triton.cdiv(rows, per_program), triton.cdiv(c, width))
    gate_rows[grid](value, gate, y, *strides, rows, c, per_program, width)
    return y


@triton.jit(do_not_specialize=["rows"])
def gate_rows(
    value,
    gate,
    y,
    value_stride,
    gate_stride,
    rows,
    c,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some channels of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (channel < c)[None, :]
    a = tl.load(value + row[:, None] * value_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(gate + row[:, None] * gate_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    result = a * b * 0.5 * (1.0 + tl.erf(b * 0.7071067811865476))
    tl.store(y + row[:, None] * c + channel[None, :], result.to(y.dtype.element_ty), mask=inside)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention within sequences that are short.

    Args:
        q, k, v: (n, l, heads * d), l <= ROWS; as parts of one tensor (n, l, 3 * heads * d) they are read in place.

    Returns:
        The same shape, contiguous.
    """
    n, length, c = q.shape
    stride = q.stride(1)
    if any(x.stride() != (length * stride, stride, 1) for x in (q, k, v)):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        stride = c
    y = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    d = c // heads
    sequences = ROWS // length
    args = (q, k, v, y, n, length, sequences, stride, c, d, d**-0.5)
    attend[triton.cdiv(n, sequences), heads](*args, ROWS, max(16, triton.next_power_of_2(d)))
    return y


@triton.jit(do_not_specialize=["n", "length", "sequences"])
def attend(
    q,
    k,
    v,
    y,
    n,
    length,
    sequences,
    stride,
    c,
    d,
    scale,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One head of as many complete sequences as fit into ROWS. Pairs from different sequences are masked."""
    first = tl.program_id(0).to(tl.int64) * sequences
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    count = tl.minimum(n - first, sequences) * length
    inside = (row < count)[:, None] & (column < d)[None, :]
    place = (first * length + row)[:, None] * stride + tl.program_id(1) * d + column[None, :]
    queries = tl.load(q + place, mask=inside, other=0.0)
    keys = tl.load(k + place, mask=inside, other=0.0)
    values = tl.load(v + place, mask=inside, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    sequence = row // length  # rows beyond the last form sequences of their own, which are not stored
    scores = tl.where(sequence[:, None] == sequence[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / total[:, None]
    place = (first * length + row)[:, None] * c + tl.program_id(1) * d + column[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
