"""Convolutions in fewer products than they are written with; the results are the same to rounding.

A CPU is as fast as it multiplies. There two rows of a convolution with three taps are four products instead of six
(`by_pairs_of_rows`), and maps of few pixels are not worth what its library does to the weights (`by_patches`).

Of twice the size by nearest neighbour, then a 3x3 convolution (`Upsample`), several of the nine taps of each result
meet the same pixel of the small map. Added up beforehand they make a transposed convolution of the small map, with a
4x4 kernel and stride 2: 4 products for 9, and no enlarged map in memory. On a CPU it is 9 for 36 (`by_differences`).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v import fused

# Multiplications per tap from which on fewer of them save more time than the additions that it takes; measured.
WORTH = 2**27

# Values of the input that are transformed at once: so many that they are still in a cache when they are multiplied.
AT_ONCE = 2**22

# Along one side of an enlarged map, which of the three taps add up to each of the four of a transposed kernel, and to
# each of the three that meet a pixel, the difference of the one before to it and that of the one after.
MEET = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
MEET_DIFFERENCES = ((1, 1, 1), (1, 0, 0), (0, 0, 1))


class Conv(nn.Conv2d):
    """3x3 or 1x1 convolution that keeps the size of the map."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int):
        super().__init__(c_in, c_out, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w), channels last."""
        y, bias = self.apart(x)
        return y if bias is None else fused.add_bias(y, bias)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result, and the bias that it still lacks, where a kernel adds that along with something else."""
        if fused.runs("bias", x) and x.shape[1] % 16 == self.out_channels % 16 == 0:
            if self.kernel_size == (1, 1):  # a matrix product adds it by itself
                y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
                return y.permute(0, 3, 1, 2), None
            return convolve(x, self.weight, None), self.bias
        return convolve(x, self.weight, self.bias), None


class Upsample(nn.Module):
    """Nearest neighbour to a stated size, then 3x3; has the parameters of diffusers' `Upsample2D` with a convolution.

    Attributes:
        conv: the 3x3 convolution.
        kernel: its taps added up, (3, 3, c_out, c) on a CPU, else (c, c_out, 4, 4); None until `fold` makes it.
    """

    def __init__(self, c: int, c_out: int | None = None):
        super().__init__()
        self.conv = Conv(c, c_out or c, 3)
        self.register_buffer("kernel", None, persistent=False)
        self.kernel: Tensor | None

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(n, c, h, w) -> (n, c_out, *size); `size` is (2 h, 2 w) unless given."""
        doubled = [2 * length for length in x.shape[2:]]
        if self.kernel is None or not (size is None or list(size) == doubled):
            return self.conv(F.interpolate(x, size=tuple(size or doubled), mode="nearest"))
        if multiplies_slowly(x):
            return by_differences(x, self.kernel, self.conv.bias)
        if self.conv.bias is not None and fused.runs("bias", x):
            return fused.add_bias(F.conv_transpose2d(x, self.kernel, stride=2, padding=1), self.conv.bias)
        return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)


def fold(network: nn.Module) -> None:
    """Make the kernels of every `Upsample` in a network whose weights are final; anew after they changed or moved."""
    for module in network.modules():
        if isinstance(module, Upsample):
            weight = module.conv.weight  # (c_out, c, 3, 3)
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
            few = multiplies_slowly(weight)
            meet = torch.tensor(MEET_DIFFERENCES if few else MEET, dtype=exact.dtype, device=exact.device)
            kernel = torch.einsum("pa,qb,oiab->pqoi" if few else "pa,qb,oiab->iopq", meet, meet, exact)
            kernel = kernel.to(weight.dtype)
            kernel = kernel.contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)
            if module.kernel is not None and module.kernel.shape == kernel.shape:
                module.kernel.copy_(kernel)  # recorded graphs read this tensor
            else:
                module.kernel = kernel


def multiplies_slowly(x: Tensor) -> bool:
    """Whether fewer products are worth more additions, and those exact enough: on a CPU, not in half precision."""
    return x.device.type == "cpu" and x.element_size() >= 4


def by_differences(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`Upsample` with 9 products for the 36 of four results.

    Between rows d0 d1 d2 of the small map and taps a, b, c, the two results at d1 are d0 a + d1 (b + c) and
    d1 (a + b) + d2 c, which is d1 (a + b + c) + (d0 - d1) a, and the same with (d2 - d1) c; so it is along the width.

    Args:
        x: (n, c, h, w), channels last.
        kernel: (3, 3, c_out, c); along each side for a pixel, the difference before it and the one after it.

    Returns:
        (n, c_out, 2 h, 2 w), channels last.
    """
    n, c, h, w = x.shape
    c_out = kernel.shape[2]
    halves = (slice(0, 2), slice(0, 1), slice(1, 2))  # of the two results, those that each of the three is added to
    images = x.permute(0, 2, 3, 1)
    y = x.new_empty(n, h, 2, w, 2, c_out)
    some = max(1, AT_ONCE // (h * w * max(c, c_out)))
    for part, result in zip(images.split(some), y.split(some)):
        for i, rows in enumerate(differences(part, 1)):
            for j, pixels in enumerate(differences(rows, 2)):
                product = F.linear(pixels, kernel[i, j], None if i or j else bias)[:, :, None, :, None]
                place = result[:, :, halves[i], :, halves[j]]
                place.add_(product) if i or j else place.copy_(product)
    return y.view(n, 2 * h, 2 * w, c_out).permute(0, 3, 1, 2)


def differences(x: Tensor, dim: int) -> Iterator[Tensor]:
    """The entries along an axis, then what those before are more than they, then those after; zeros beyond the ends."""
    yield x
    length = x.shape[dim] - 1
    for here, there in ((1, 0), (0, 1)):
        difference = x.neg()
        difference.narrow(dim, here, length).add_(x.narrow(dim, there, length))
        yield difference


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
        return by_patches(x, weight, bias)
    worth = n * h * w * c_in * c_out >= WORTH and multiplies_slowly(x) and not torch.is_grad_enabled()
    if worth and height == 3 and h % 2 == 0:
        return by_pairs_of_rows(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=(height // 2, width // 2))


def by_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`convolve` as one matrix product with the patches, which takes the weights as they are.

    For maps of no more pixels than output channels the CPU's library spends more time on rearranging them than on the
    convolution.
    """
    n, _, h, w = x.shape
    c_out, _, height, width = weight.shape
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, width // 2, width // 2, height // 2, height // 2))
    patches = rows.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3).reshape(n * h * w, -1)
    y = F.linear(patches, weight.permute(0, 2, 3, 1).reshape(c_out, -1), bias)
    return y.view(n, h, w, c_out).permute(0, 3, 1, 2)


def by_pairs_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`convolve` for three rows of taps and an even number of rows, by Winograd's F(2, 3) (Lavin and Gray, "Fast
    Algorithms for Convolutional Neural Networks", arXiv 1509.09308) along the height.

    Of rows d0 ... d3 and taps a, b, c, the two results between them are sums of four products: (d0 - d2) a,
    (d1 + d2) (a + b + c) / 2, (d2 - d1) (a - b + c) / 2 and (d1 - d3) c. In float32 the error is less than that of the
    six products; with F(4, 3), still faster, it would be twice as large.
    """
    n, c_in, h, w = x.shape
    c_out, width = weight.shape[0], weight.shape[3]
    a, b, c = (taps[:, :, None] for taps in weight.unbind(2))
    half = (a + b + c) / 2
    kernels = (a, half, half - b, c)
    y = torch.empty((n, c_out, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    even, odd = x[:, :, ::2], x[:, :, 1::2]
    # Every part reads all weights, so none is much smaller than they are.
    some = max(1, max(AT_ONCE, weight.numel() // 4) // (2 * n * w * max(c_in, c_out)))
    for first in range(0, h // 2, some):
        end = min(first + some, h // 2)
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
