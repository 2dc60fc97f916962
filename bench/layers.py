"""Single layers of the denoiser, timed at the 1.7B model's shapes: as they are, and in other ways that torch has."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lab import Lab, milliseconds
from bench.levers import attribute, temporal_by_conv3d
from t2v.networks import fused

LEVELS = ((320, 32), (640, 16), (1280, 8), (1280, 4))  # channels and side of the map, for 256x256 pixels
SETS = 4  # of input tensors, on which a layer is timed in turn
HEAD_DIM = 64


@torch.inference_mode()
def time_layers(lab: Lab, result: dict[str, Any]) -> None:
    """Time single layers at the shapes of the 1.7B model, two rows of 16 frames."""
    frames, rows = (2, 2) if lab.rehearsal else (16, 2)
    found = result["rows"] = []

    def add(
        layer: str, way: str, functions: Sequence[Callable[[], Any]], gflop: float = 0, gigabytes: float = 0
    ) -> None:
        row: dict[str, Any] = {"layer": layer, "way": way, "level": level}
        found.append(row)
        try:
            ms = milliseconds(functions, lab.cuda)
            row |= {"ms": ms, "tflop_per_s": gflop / ms, "gb_per_s": gigabytes / ms * 1e3}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=lab.device, dtype=lab.dtype)

    for c, side in ((32, 4), (64, 2)) if lab.rehearsal else LEVELS:
        level = f"{c} at {side}x{side}"
        pixels = side * side
        images = [
            random(rows * frames, c, side, side).contiguous(memory_format=torch.channels_last) for _ in range(SETS)
        ]
        videos = [x.permute(0, 2, 3, 1).view(rows, frames, pixels, c).permute(0, 3, 1, 2) for x in images]
        tokens = [x.permute(0, 2, 3, 1) for x in images]
        size = images[0].numel() * images[0].element_size() / 1e9
        flops = 2e-9 * images[0].numel() * c

        spatial = (random(c, c, 3, 3) * (9 * c) ** -0.5).contiguous(memory_format=torch.channels_last)
        temporal = (random(c, c, 3, 1) * (3 * c) ** -0.5).contiguous(memory_format=torch.channels_last)
        for tuned in (False, True):
            way = "cudnn.benchmark" if tuned else "as it is"
            with attribute(torch.backends.cudnn, "benchmark", tuned):
                add("conv 3x3", way, [partial(F.conv2d, x, spatial, padding=1) for x in images], 9 * flops, 2 * size)
                calls = [partial(F.conv2d, x, temporal, padding=(1, 0)) for x in videos]
                add("temporal conv", way, calls, 3 * flops, 2 * size)
        calls = [partial(temporal_by_conv3d, x, temporal, None) for x in videos]
        add("temporal conv", "conv3d", calls, 3 * flops, 2 * size)

        group_norm = torch.nn.GroupNorm(32, c, device=lab.device, dtype=lab.dtype)
        layer_norm = torch.nn.LayerNorm(c, device=lab.device, dtype=lab.dtype)
        bias, wide, square = random(c), random(8 * c, c) * c**-0.5, random(c, c) * c**-0.5
        for way, kernels in (("as it is", contextlib.nullcontext()), ("torch", fused.without(*fused.KERNELS))):
            with kernels:
                for layer, maps in (("frame norm + SiLU", images), ("video norm + SiLU", videos)):
                    calls = [partial(fused.group_norm, group_norm, x, True, bias) for x in maps]
                    add(layer, way, calls, gigabytes=2 * size)
                pairs = list(zip(tokens, tokens[1:]))
                sums = [partial(fused.add_and_layer_norm, layer_norm, x, y) for x, y in pairs]
                add("sum + layer norm", way, sums, gigabytes=4 * size)
                add("GEGLU", way, [partial(fused.geglu, x, y) for x, y in pairs], gigabytes=3 * size)
        add(
            "linear to 8 times the width", "as it is", [partial(F.linear, x, wide) for x in tokens], 8 * flops, 9 * size
        )
        add("linear", "as it is", [partial(F.linear, x, square) for x in tokens], flops, 2 * size)

        heads = max(1, c // HEAD_DIM)
        for layer, n, length in (
            ("spatial attention", rows * frames, pixels),
            ("temporal attention", rows * pixels, frames),
        ):
            q = random(n, length, c)
            work = (4e-9 * q.numel() * length, 4 * size)
            if length <= fused.SHORT and fused.runs("attention", q):
                add(layer, "kernel", [partial(fused.short_attention, q, q, q, heads)] * 2, *work)
            split = q.unflatten(-1, (heads, -1)).transpose(1, 2)
            for backend in (None, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
                with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
                    calls = [partial(F.scaled_dot_product_attention, split, split, split)] * 2
                    add(layer, backend or "torch's choice", calls, *work)
    for row in found:
        print(
            f"  {row['layer']:28} {row['way']:20} {row['level']:16} {row.get('ms', float('nan')):8.4f} ms"
            f" {row.get('tflop_per_s', 0):7.1f} TF/s {row.get('gb_per_s', 0):7.0f} GB/s {row.get('failed', '')}"
        )
