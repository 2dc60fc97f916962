"""Single layers of the denoiser, timed at the 1.7B model's shapes in several equivalent ways."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lab import Lab, milliseconds
from bench.levers import (
    attribute,
    group_norm_by_moments,
    group_norm_by_sums,
    temporal_by_conv2d,
    temporal_by_patches,
    temporal_by_products,
)

LEVELS = ((320, 32), (640, 16), (1280, 8), (1280, 4))  # channels and side of the map, for 256x256 pixels
SETS = 4  # of input tensors, on which a layer is timed in turn


@torch.inference_mode()
def time_layers(lab: Lab, result: dict[str, Any]) -> None:
    """Time single layers at the shapes of the 1.7B model, two rows of 16 frames, in several equivalent ways."""
    frames, rows = (2, 2) if lab.rehearsal else (16, 2)
    levels = ((32, 4), (64, 2)) if lab.rehearsal else LEVELS
    found = result["rows"] = []

    def add(
        layer: str, way: str, level: str, functions: Sequence[Callable[[], Any]], gflop: float, gigabytes: float
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

    for c, side in levels:
        level = f"{c} at {side}x{side}"
        pixels = side * side
        images = [
            random(rows * frames, c, side, side).contiguous(memory_format=torch.channels_last) for _ in range(SETS)
        ]
        videos = [x.permute(0, 2, 3, 1).view(rows, frames, pixels, c).permute(0, 3, 1, 2) for x in images]
        size = images[0].numel() * images[0].element_size() / 1e9
        weight, bias = random(c, c, 3, 3) * (9 * c) ** -0.5, random(c)
        packed = weight.contiguous(memory_format=torch.channels_last)
        flops = 2e-9 * images[0].numel() * c
        for way, w in (("weight as in the file", weight), ("as it is", packed)):
            for tuned in (False, True):
                with attribute(torch.backends.cudnn, "benchmark", tuned):
                    functions = [partial(F.conv2d, x, w, bias, padding=1) for x in images]
                    add("conv 3x3", way + (", benchmark" if tuned else ""), level, functions, 9 * flops, 2 * size)
        temporal = random(c, c, 3, 1, 1) * (3 * c) ** -0.5
        frames_last = temporal.contiguous(memory_format=torch.channels_last_3d)  # as the engine holds it
        for way, function, kernel in (
            ("as it is", temporal_by_conv2d, frames_last),
            ("weight as in the file", temporal_by_conv2d, temporal),
            ("three products", temporal_by_products, temporal),
            ("one product", temporal_by_patches, temporal),
        ):
            for tuned in (False, True) if function is temporal_by_conv2d else (False,):
                with attribute(torch.backends.cudnn, "benchmark", tuned):
                    calls = [partial(function, x, kernel, bias) for x in videos]
                    add("temporal conv", way + (", benchmark" if tuned else ""), level, calls, 3 * flops, 2 * size)
        for way, layout in (("conv3d", torch.contiguous_format), ("conv3d channels last", torch.channels_last_3d)):
            cubes = [x.view(rows, c, frames, side, side).contiguous(memory_format=layout) for x in videos]
            kernel = temporal.contiguous(memory_format=layout)
            calls = [partial(F.conv3d, x, kernel, bias, padding=(1, 0, 0)) for x in cubes]
            add("temporal conv", way, level, calls, 3 * flops, 2 * size)
        norm_weight, norm_bias = random(c), random(c)
        for layer, maps in (("frame norm + SiLU", images), ("video norm + SiLU", videos)):
            for way, norm in norms(lab).items():
                calls = [partial(norm, x, 32, norm_weight, norm_bias, 1e-5) for x in maps]
                add(layer, way, level, calls, 0, 2 * size)
        inner = random(8 * c, c) * c**-0.5
        tokens = [x.permute(0, 2, 3, 1) for x in images]
        calls = [partial(F.linear, x, inner) for x in tokens]
        add("linear to 8 times the width", "as it is", level, calls, 8 * flops, 9 * size)
        square = random(c, c) * c**-0.5
        calls = [partial(F.linear, x, square) for x in tokens]
        add("linear", "as it is", level, calls, flops, 2 * size)
        heads = max(1, c // 64)
        spatial = random(rows * frames, heads, pixels, c // heads)
        along = random(rows * pixels, heads, frames, c // heads)
        for layer, q in (("spatial attention", spatial), ("temporal attention", along)):
            length = q.shape[2]
            for backend in (None, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
                context = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
                with context:
                    calls = [partial(F.scaled_dot_product_attention, q, q, q)] * 2
                    add(layer, backend or "as it is", level, calls, 4e-9 * q.numel() * length, 4 * size)
    for row in found:
        print(
            f"  {row['layer']:28} {row['way']:32} {row['level']:16} {row.get('ms', float('nan')):8.4f} ms"
            f" {row.get('tflop_per_s', 0):7.1f} TF/s {row.get('gb_per_s', 0):7.0f} GB/s {row.get('failed', '')}"
        )


def norms(lab: Lab) -> dict[str, Callable[..., Tensor]]:
    """Ways to compute a group norm and the SiLU after it."""

    def native(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def then_silu(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: F.silu(norm(*args))

    ways: dict[str, Callable[..., Tensor]] = {
        "native": native,
        "by sums": then_silu(group_norm_by_sums),
        "by moments": then_silu(group_norm_by_moments),
    }
    if lab.cuda:
        with contextlib.suppress(ImportError):
            from t2v.groupnorm_triton import group_norm

            ways["Triton"] = partial(group_norm, silu=True)
    return ways
