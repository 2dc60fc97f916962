"""Small Triton kernels that join what the network does between its products; candidates for the engine on a GPU.

Each one reads its inputs once and computes in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 1024  # that one program computes
TEMPORAL_LENGTHS = range(1, 65)  # frames for which `temporal_attention` holds a sequence at once


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias, all channels last.

    Args:
        x, y: (n, c, h, w), channels last.
        bias: (c,).
    """
    z = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), VALUES),)](x, y, bias, z, x.numel(), x.shape[1], VALUES)
    return z


@triton.jit
def add_kernel(x, y, bias, z, size, c, VALUES: tl.constexpr):
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = place < size
    total = tl.load(x + place, mask=inside).to(tl.float32) + tl.load(y + place, mask=inside).to(tl.float32)
    total += tl.load(bias + place % c, mask=inside).to(tl.float32)
    tl.store(z + place, total.to(z.dtype.element_ty), mask=inside)


def geglu(x: Tensor) -> Tensor:
    """The first half of the last axis times GELU of the second half: (..., 2 c) -> (..., c)."""
    c = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], c), dtype=x.dtype, device=x.device)
    geglu_kernel[(triton.cdiv(y.numel(), VALUES),)](x, y, y.numel(), c, VALUES)
    return y


@triton.jit
def geglu_kernel(x, y, size, c, VALUES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = place < size
    source = (place // c) * 2 * c + place % c
    value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + source + c, mask=inside, other=0.0).to(tl.float32)
    result = value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the last axis of a contiguous tensor."""
    c = x.shape[-1]
    rows = x.numel() // c
    y = torch.empty_like(x)
    width = triton.next_power_of_2(c)
    at_once = max(1, 2048 // width)
    layer_norm_kernel[(triton.cdiv(rows, at_once),)](x, weight, bias, y, rows, c, eps, at_once, width)
    return y


@triton.jit
def layer_norm_kernel(x, weight, bias, y, rows, c, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < c)[None, :]
    place = row[:, None] * c + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - (tl.sum(value, 1) / c)[:, None], 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, 1) / c + eps)[:, None]
    factor = tl.load(weight + column, mask=column < c, other=0.0).to(tl.float32)[None, :]
    term = tl.load(bias + column, mask=column < c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, (centred * deviation * factor + term).to(y.dtype.element_ty), mask=inside)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention along the frames at each pixel, which reads the frames where they are.

    Args:
        q, k, v: (b, F, pixels, heads * d), contiguous; F is one of `TEMPORAL_LENGTHS`, d a power of two.

    Returns:
        The same shape.
    """
    b, length, pixels, c = q.shape
    y = torch.empty_like(q)
    d = c // heads
    block = max(16, triton.next_power_of_2(length))
    warps = 1 if block == 16 else 4
    temporal_attention_kernel[(heads, b * pixels)](
        q, k, v, y, length, pixels, c, d**-0.5, block, d, q.dtype == torch.float32, num_warps=warps
    )
    return y


@triton.jit
def temporal_attention_kernel(
    q,
    k,
    v,
    y,
    length,
    pixels,
    c,
    scale,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,
):
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = ((sequence // pixels) * length * pixels + sequence % pixels) * c + head * D
    frame = tl.arange(0, LENGTH)
    place = start + frame[:, None].to(tl.int64) * pixels * c + tl.arange(0, D)[None, :]
    inside = (frame < length)[:, None]
    queries = tl.load(q + place, mask=inside, other=0.0)
    keys = tl.load(k + place, mask=inside, other=0.0)
    values = tl.load(v + place, mask=inside, other=0.0)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
    scores = tl.where((frame < length)[None, :], scores, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    result = tl.dot(shares.to(values.dtype), values, input_precision=precision)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
