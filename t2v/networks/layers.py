"""Layers that the denoiser and the autoencoder share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.networks import fused
from t2v.networks.convolution import conv2d_same, fused_upsample_kernel, upsample2x


class Conv(nn.Conv2d):
    """3x3 or 1x1 convolution that keeps the size of the map."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int):
        super().__init__(c_in, c_out, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w), channels last."""
        y, bias = self.apart(x)
        return y if bias is None else fused.add_bias(y, bias)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result, and the bias if it has not been added: a later kernel adds it together with other terms."""
        if fused.runs("bias", x) and x.shape[1] % 16 == self.out_channels % 16 == 0:
            if self.kernel_size == (1, 1):  # the matrix product adds the bias
                y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
                return y.permute(0, 3, 1, 2), None
            return conv2d_same(x, self.weight, None), self.bias
        return conv2d_same(x, self.weight, self.bias), None


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
        if self.conv.bias is not None and fused.runs("bias", x):
            return fused.add_bias(upsample2x(x, self.kernel, None), self.conv.bias)
        return upsample2x(x, self.kernel, self.conv.bias)


@torch.no_grad()
def fuse_upsample_kernels(network: nn.Module) -> None:
    """Make the kernel of every `Upsample`. Call it when the weights are final, and after they have changed or moved."""
    for module in network.modules():
        if isinstance(module, Upsample):
            kernel = fused_upsample_kernel(module.conv.weight)
            if module.kernel is not None and module.kernel.shape == kernel.shape:
                module.kernel.copy_(kernel)  # recordings read this tensor
            else:
                module.kernel = kernel
