"""Convolution algorithms with fewer multiplications: Winograd F(2,3), im2col, fused upsampling.

They equal torch's convolutions to rounding. On a CPU multiplications dominate. Only this module decides which algorithm
is used, by the tensors (`conv2d_same`, `upsample2x`).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications per kernel tap from which Winograd's saves more time than its extra additions take; measured.
MIN_MULTIPLIES = 2**27

# Values of the input that are transformed together, so that they are still in a cache when they are multiplied.
TILE_VALUES = 2**22

# Rows of the matrices that sum 3-tap kernels into the kernels of upsample-then-convolve, along one side:
# UPSAMPLE_TAPS for the 4-tap transposed convolution, DIFFERENCE_TAPS for the form with 3 products.
UPSAMPLE_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
DIFFERENCE_TAPS = ((1, 1, 1), (1, 0, 0), (0, 0, 1))


def prefers_fewer_multiplies(x: Tensor) -> bool:
    """Whether fewer multiplications pay off and are exact enough: on a CPU, except in half precision."""
    return x.device.type == "cpu" and x.element_size() >= 4


def conv2d_same(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that keeps the size of the map.

    Args:
        x: (n, c_in, h, w), channels last.
        weight: (c_out, c_in, height, width), both odd.

    Returns:
        (n, c_out, h, w), channels last.
    """
    n, c_in, h, w = x.shape
    c_out, _, height, width = weight.shape
    if x.device.type == "cpu" and n * h * w <= c_out:
        return im2col(x, weight, bias)
    is_large = n * h * w * c_in * c_out >= MIN_MULTIPLIES
    if is_large and prefers_fewer_multiplies(x) and not torch.is_grad_enabled() and height == 3 and h % 2 == 0:
        return winograd_f23(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=(height // 2, width // 2))


def im2col(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d_same` as one matrix product with the patches of the map.

    For maps with no more pixels than output channels, the CPU's library spends more time on rearranging the weights
    than on the convolution. This algorithm does not rearrange them.
    """
    n, _, h, w = x.shape
    c_out, _, height, width = weight.shape
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, width // 2, width // 2, height // 2, height // 2))
    patches = rows.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3).reshape(n * h * w, -1)
    y = F.linear(patches, weight.permute(0, 2, 3, 1).reshape(c_out, -1), bias)
    return y.view(n, h, w, c_out).permute(0, 3, 1, 2)


def winograd_f23(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d_same` by Winograd's F(2, 3) along the height, for 3 rows of taps and an even number of rows (Lavin and
    Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308).

    For input rows d0 ... d3 and taps a, b, c, the two output rows are sums of four products: (d0 - d2) a,
    (d1 + d2) (a + b + c) / 2, (d2 - d1) (a - b + c) / 2 and (d1 - d3) c. In float32 the error is smaller than that of
    the six direct products. F(4, 3) would be faster still, with twice the error.
    """
    n, c_in, h, w = x.shape
    c_out, width = weight.shape[0], weight.shape[3]
    a, b, c = (taps[:, :, None] for taps in weight.unbind(2))
    half = (a + b + c) / 2
    kernels = (a, half, half - b, c)
    y = torch.empty((n, c_out, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    even, odd = x[:, :, ::2], x[:, :, 1::2]
    # Every tile reads all weights, so none is much smaller than they are.
    pairs_per_tile = max(1, max(TILE_VALUES, weight.numel() // 4) // (2 * n * w * max(c_in, c_out)))
    for first in range(0, h // 2, pairs_per_tile):
        end = min(first + pairs_per_tile, h // 2)
        d1, d2 = even[:, :, first:end], odd[:, :, first:end]
        d0, d3 = odd[:, :, max(first - 1, 0) : end - 1], even[:, :, first + 1 : end + 1]
        before, after = d2.neg(), d1.clone()
        before[:, :, end - first - d0.shape[2] :] += d0
        after[:, :, : d3.shape[2]] -= d3
        p0, p1, p2, p3 = (
            F.conv2d(rows, kernel, added, padding=(0, width // 2))
            for rows, kernel, added in zip((before, d1 + d2, d2 - d1, after), kernels, (None, bias, None, None))
        )
        torch.add(p0, p1, out=y[:, :, 2 * first : 2 * end : 2]).add_(p2)
        torch.sub(p1, p2, out=y[:, :, 2 * first + 1 : 2 * end : 2]).sub_(p3)
    return y


def fused_upsample_kernel(weight: Tensor) -> Tensor:
    """The kernel of `upsample2x` for a 3x3 convolution after upsampling.

    After nearest-neighbour upsampling, several of the nine taps of an output read the same pixel of the small map.
    Their
    sums are computed once, here: a transposed convolution then takes 4 instead of 9 products, the form by differences 9
    instead of 36.

    Args:
        weight: (c_out, c, 3, 3).

    Returns:
        (3, 3, c_out, c) for a CPU, else (c, c_out, 4, 4); in the dtype of the weight.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    by_differences = prefers_fewer_multiplies(weight)
    taps = torch.tensor(DIFFERENCE_TAPS if by_differences else UPSAMPLE_TAPS, dtype=exact.dtype, device=exact.device)
    kernel = torch.einsum("pa,qb,oiab->pqoi" if by_differences else "pa,qb,oiab->iopq", taps, taps, exact)
    memory_format = torch.contiguous_format if by_differences else torch.channels_last
    return kernel.to(weight.dtype).contiguous(memory_format=memory_format)


def upsample2x(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour upsampling to twice the size, then a 3x3 convolution.

    Args:
        x: (n, c, h, w), channels last.
        kernel: see `fused_upsample_kernel`.

    Returns:
        (n, c_out, 2 h, 2 w), channels last.
    """
    if prefers_fewer_multiplies(x):
        return upsample_by_differences(x, kernel, bias)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def upsample_by_differences(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`upsample2x` with 9 products for the 36 of four outputs.

    For rows d0 d1 d2 of the small map and taps a, b, c, the two output rows at d1 are d0 a + d1 (b + c) and
    d1 (a + b) + d2 c. That is d1 (a + b + c) + (d0 - d1) a, and the same with (d2 - d1) c; likewise along the width.

    Args:
        x: (n, c, h, w), channels last.
        kernel: (3, 3, c_out, c); along each side for the pixel, for the difference before it and the one after it.

    Returns:
        (n, c_out, 2 h, 2 w), channels last.
    """
    n, c, h, w = x.shape
    c_out = kernel.shape[2]
    outputs = (
        slice(0, 2),
        slice(0, 1),
        slice(1, 2),
    )  # the outputs, of two, to which each of the three products is added
    images = x.permute(0, 2, 3, 1)
    y = x.new_empty(n, h, 2, w, 2, c_out)
    images_per_tile = max(1, TILE_VALUES // (h * w * max(c, c_out)))
    for part, result in zip(images.split(images_per_tile), y.split(images_per_tile)):
        for i, rows in enumerate(differences(part, 1)):
            for j, pixels in enumerate(differences(rows, 2)):
                product = F.linear(pixels, kernel[i, j], None if i or j else bias)[:, :, None, :, None]
                place = result[:, :, outputs[i], :, outputs[j]]
                place.add_(product) if i or j else place.copy_(product)
    return y.view(n, 2 * h, 2 * w, c_out).permute(0, 3, 1, 2)


def differences(x: Tensor, dim: int) -> Iterator[Tensor]:
    """Yields x, then x[i-1] - x[i], then x[i+1] - x[i] along `dim`, with zero padding."""
    yield x
    length = x.shape[dim] - 1
    for to, source in ((1, 0), (0, 1)):
        difference = x.neg()
        difference.narrow(dim, to, length).add_(x.narrow(dim, source, length))
        yield difference
