"""What the networks compute between matrix products and convolutions; on a GPU in one pass over memory.

Each function is written in torch, which is the reference. On CUDA, in half precision, without gradients and where
Triton works, it calls a Triton kernel of `t2v.networks.triton_kernels` instead. Elsewhere Triton is not imported.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("group norm", "bias", "layer norm", "GEGLU", "attention")
HALF = (torch.float16, torch.bfloat16)
SHORT = 64  # length of the longest sequence that the attention kernel takes
WIDEST = 8192  # largest number of channels that the layer norm kernel takes

log = logging.getLogger(__name__)
disabled: set[str] = set()  # members of KERNELS


def runs(kernel: str, x: Tensor) -> bool:
    """Whether a kernel takes this tensor."""
    return x.is_cuda and kernel not in disabled and x.dtype in HALF and not torch.is_grad_enabled() and available()


@functools.cache
def available() -> bool:
    """Whether Triton compiles and runs a kernel. It needs a C compiler, which some images lack."""
    try:
        from t2v.networks import triton_kernels

        x = torch.ones(2, 64, device="cuda", dtype=torch.float16)
        triton_kernels.geglu(x, x)
        torch.cuda.synchronize()
    except Exception as error:
        log.warning(
            "Triton's kernels do not work here; torch's run instead, slower: %s",
            f"{type(error).__name__}: {error}"[:300],
        )
        return False
    return True


@contextmanager
def without(*kernels: str) -> Iterator[None]:
    """Inside the context, these kernels are replaced by torch's."""
    before = set(disabled)
    disabled.update(kernels)
    try:
        yield
    finally:
        disabled.clear()
        disabled.update(before)


def group_norm(
    norm: Any, x: Tensor, silu: bool = False, bias: Tensor | None = None, term: Tensor | None = None
) -> Tensor:
    """Group norm of x + bias + term, then SiLU if `silu`.

    Args:
        norm: an nn.GroupNorm.
        x: (n, c, h, w), channels last.
        bias: (c,).
        term: (rows, c), `rows` divides n.

    Returns:
        (n, c, h, w), channels last.
    """
    if runs("group norm", x):
        from t2v.networks import triton_kernels

        args = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        return triton_kernels.group_norm(x, *args, silu, bias, term)
    if bias is not None:
        x = x + bias[:, None, None]
    if term is not None:
        rows = term.repeat_interleave(x.shape[0] // len(term), dim=0) if len(term) > 1 else term
        x = x + rows[:, :, None, None]
    return F.silu(norm(x)) if silu else norm(x)


def group_norm_by_pixel(norm: Any, x: Tensor) -> Tensor:
    """Group norm over all frames of (b, F, h, w, c) -> (b*h*w, F, c), with the frames of each pixel together."""
    b, frames, height, width, c = x.shape
    tall = x.flatten(1, 2).permute(0, 3, 1, 2)  # (b, c, F*h, w)
    if runs("group norm", x):
        from t2v.networks import triton_kernels

        args = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        y = triton_kernels.group_norm(tall, *args, frames=frames).permute(0, 2, 3, 1)
        return y.reshape(b * height * width, frames, c)
    y = norm(tall).permute(0, 2, 3, 1).contiguous().view(x.shape)
    return y.flatten(2, 3).transpose(1, 2).contiguous().flatten(0, 1)


def add(x: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias + other, of maps (n, c, h, w), channels last; x may be overwritten."""
    if bias is not None and runs("bias", x):
        from t2v.networks import triton_kernels

        rows, others = x.permute(0, 2, 3, 1).contiguous(), other.permute(0, 2, 3, 1).contiguous()
        return triton_kernels.add(rows, others, bias).permute(0, 3, 1, 2)
    return (x if bias is None else x + bias[:, None, None]) + other


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, of maps (n, c, h, w), channels last; x may be overwritten."""
    if runs("bias", x):
        from t2v.networks import triton_kernels

        return triton_kernels.add(x.permute(0, 2, 3, 1).contiguous(), None, bias).permute(0, 3, 1, 2)
    return x + bias[:, None, None]


def add_by_pixel(x: Tensor, y: Tensor) -> Tensor:
    """x (b, F, h, w, c) + y (b*h*w, F, c) -> (b, F, h, w, c)."""
    b, frames, height, width, c = x.shape
    if frames > 1 and runs("bias", x):
        from t2v.networks import triton_kernels

        other = x.contiguous()
        return triton_kernels.add(y.contiguous().view(b, height * width, frames, c), other, None, frames).view(x.shape)
    return x + y.view(b, height, width, frames, c).permute(0, 3, 1, 2, 4)


def layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Layer norm along the last axis."""
    if runs("layer norm", x) and x.shape[-1] <= WIDEST:
        from t2v.networks import triton_kernels

        return triton_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)[1]
    return norm(x)


def add_and_layer_norm(norm: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, which may broadcast, and the layer norm of the sum."""
    if x.shape == y.shape and runs("layer norm", x) and x.shape[-1] <= WIDEST:
        from t2v.networks import triton_kernels

        return triton_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, y)
    x = x + y
    return x, layer_norm(norm, x)


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """value * gelu(gate), of the same shape."""
    if runs("GEGLU", value):
        from t2v.networks import triton_kernels

        return triton_kernels.geglu(value, gate)
    return value * F.gelu(gate)


def short_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor | None:
    """Self-attention within sequences, (n, l, heads * d) each -> same; None if no kernel takes them."""
    if runs("attention", q) and q.shape[1] <= SHORT:
        from t2v.networks import triton_kernels

        return triton_kernels.attention(q, k, v, heads)
    return None
