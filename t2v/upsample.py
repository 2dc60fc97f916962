"""Twice the size, then a 3x3 convolution: the upsampling of the denoiser and of the autoencoder's decoder.

Four neighbouring pixels of the enlarged map are one pixel of the small one, so of the nine taps of each result several
meet the same value. Added up beforehand they make a transposed convolution of the small map, with a 4x4 kernel and
stride 2: 4 products for 9, and no enlarged map in memory. The result is the same to rounding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Along one side: which of the three taps add up to each of the four of the transposed kernel.
MEET = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class Upsample(nn.Module):
    """Nearest neighbour to a stated size, then 3x3; has the parameters of diffusers' `Upsample2D` with a convolution.

    Attributes:
        conv: the 3x3 convolution.
        kernel: (c, c_out, 4, 4), its taps added up; None until `fold` makes it.
    """

    def __init__(self, c: int, c_out: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(c, c_out or c, 3, padding=1)
        self.register_buffer("kernel", None, persistent=False)
        self.kernel: Tensor | None

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(n, c, h, w) -> (n, c_out, *size); `size` is (2 h, 2 w) unless given."""
        doubled = [2 * length for length in x.shape[2:]]
        if self.kernel is not None and (size is None or list(size) == doubled):
            return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, size=tuple(size or doubled), mode="nearest"))


def fold(network: nn.Module) -> None:
    """Make the kernels of every `Upsample` in a network whose weights are final; anew after they have changed."""
    for module in network.modules():
        if isinstance(module, Upsample):
            weight = module.conv.weight  # (c_out, c, 3, 3)
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
            meet = torch.tensor(MEET, dtype=exact.dtype, device=exact.device)
            kernel = torch.einsum("pa,qb,oiab->iopq", meet, meet, exact)
            kernel = kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            if module.kernel is None:
                module.kernel = kernel
            else:
                module.kernel.copy_(kernel)  # recorded graphs read this tensor
