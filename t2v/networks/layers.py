"""Layers that the denoiser and the autoencoder share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.networks.convolution import conv2d_same, fused_upsample_kernel, upsample2x


class Conv(nn.Conv2d):
    """3x3 or 1x1 convolution that keeps the size of the map."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int):
        super().__init__(c_in, c_out, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w), channels last."""
        return conv2d_same(x, self.weight, self.bias)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution; the parameters of diffusers' `Upsample2D`.

    Attributes:
        conv: the 3x3 convolution.
        kernel: see `fused_upsample_kernel`; None until `fuse_upsample_kernels` makes it.
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
        return upsample2x(x, self.kernel, self.conv.bias)


@torch.no_grad()
def fuse_upsample_kernels(network: nn.Module) -> None:
    """Make the kernel of every `Upsample`. To be called when the weights are final, and after they changed or moved."""
    for module in network.modules():
        if isinstance(module, Upsample):
            kernel = fused_upsample_kernel(module.conv.weight)
            if module.kernel is not None and module.kernel.shape == kernel.shape:
                module.kernel.copy_(kernel)  # recordings read this tensor
            else:
                module.kernel = kernel
