"""Switches and formulations that only a GPU can decide between, tried one by one on the network and on single layers.

Nothing here changes the engine: each lever is a context in which the network is patched.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lab import Lab, Step, milliseconds, relative_error, wall_milliseconds
from t2v import fused
from t2v.unet3d import Attention, FeedForward, UNet3D

Lever = Callable[[UNet3D], AbstractContextManager[Any]]

CHUNK = 256  # pixels whose sums one reduction adds up


@contextlib.contextmanager
def attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """A setting of torch, put back afterwards."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


# Group norms of (n, c, h, w) whose memory is channels last.


def group_norm_by_sums(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Statistics from sums and Euclidean norms over chunks of pixels, in float32; then one scale and one shift for
    every channel of every image."""
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    length = CHUNK if (h * w) % CHUNK == 0 else h * w
    chunks = pixels.view(n, -1, length, c)
    sums = chunks.sum(2, dtype=torch.float32).view(n, -1, groups, c // groups).sum((1, 3))
    norms = torch.linalg.vector_norm(chunks, dim=2, dtype=torch.float32).square()
    squares = norms.view(n, -1, groups, c // groups).sum((1, 3))
    mean = sums / (h * w * c // groups)
    variance = squares / (h * w * c // groups) - mean.square()
    return _apply(x, mean, variance, weight, bias, eps)


def group_norm_by_moments(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Mean and variance of chunks of pixels, which are then put together."""
    n, c, h, w = x.shape
    length = CHUNK if (h * w) % CHUNK == 0 else h * w
    chunks = x.permute(0, 2, 3, 1).reshape(n, -1, length, groups, c // groups)
    variances, means = torch.var_mean(chunks, dim=(2, 4), correction=0)
    variances, means = variances.float(), means.float()
    variance = variances.mean(1) + means.var(1, correction=0)
    return _apply(x, means.mean(1), variance, weight, bias, eps)


def _apply(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    n, c = x.shape[:2]
    scale = ((variance + eps).rsqrt()[:, :, None] * weight.view(mean.shape[1], -1)).view(n, c)
    shift = bias - (mean[:, :, None] * scale.view(n, mean.shape[1], -1)).view(n, c)
    return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])


# Temporal convolutions of (b, c, F, pixels), channels last.


def temporal_by_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Three matrix products of shifted frames."""
    rows = x.permute(0, 2, 3, 1)  # (b, F, pixels, c)
    before, here, after = weight[:, :, :, 0, 0].unbind(2)
    y = F.linear(rows, here, bias)
    if rows.shape[1] > 1:
        y[:, 1:] += F.linear(rows[:, :-1], before)
        y[:, :-1] += F.linear(rows[:, 1:], after)
    return y.permute(0, 3, 1, 2)


def temporal_by_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One matrix product of three frames side by side, which are copied."""
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1))
    patches = torch.cat([rows[:, :-2], rows[:, 1:-1], rows[:, 2:]], dim=-1)
    flat = weight[:, :, :, 0, 0].permute(0, 2, 1).reshape(weight.shape[0], -1)
    return F.linear(patches, flat, bias).permute(0, 3, 1, 2)


def temporal_by_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As in the engine."""
    return F.conv2d(x, weight[..., 0], bias, padding=(1, 0))


# Linear layers.


@contextlib.contextmanager
def one_product_for_qkv(unet: UNet3D) -> Iterator[None]:
    """Queries, keys and values of a self-attention by one linear layer."""
    joined = {}
    for module in unet.modules():
        if isinstance(module, Attention) and module.to_q.in_features == module.to_k.in_features:
            joined[module] = torch.cat([module.to_q.weight, module.to_k.weight, module.to_v.weight])

    def to_itself(self: Attention, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, joined[self]).chunk(3, dim=-1)
        y = fused.short_attention(q, k, v, self.heads)
        return self.to_out[0](self.attend(*map(self.split, (q, k, v))) if y is None else y)

    with patch.object(Attention, "to_itself", to_itself):
        yield


@contextlib.contextmanager
def two_products_in_feed_forward(unet: UNet3D) -> Iterator[None]:
    """A feed-forward's value and gate by two linear layers, as on a CPU, and then the kernel."""

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        proj, out = self.net["0"]["proj"], self.net["2"]
        weights, biases = proj.weight.chunk(2), proj.bias.chunk(2)
        return out(fused.geglu(*(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))))

    with patch.object(FeedForward, "forward", forward):
        yield


def in_torch(*kernels: str) -> Lever:
    """Without these Triton kernels."""
    return lambda unet: fused.without(*kernels)


@contextlib.contextmanager
def in_torch_with(backend: SDPBackend) -> Iterator[None]:
    """Short sequences by one of torch's attentions; the others as they are."""
    attend = Attention.attend

    def forward(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if q.shape[2] <= fused.SHORT else contextlib.nullcontext():
            return attend(self, q, k, v)

    with fused.without("attention"), patch.object(Attention, "attend", forward):
        yield


matmul = torch.backends.cuda.matmul
LEVERS: dict[str, Lever] = {
    "as it is": lambda unet: contextlib.nullcontext(),
    **{f"{kernel} in torch": in_torch(kernel) for kernel in fused.KERNELS},
    "all in torch": in_torch(*fused.KERNELS),
    "short attention: memory-efficient": lambda unet: in_torch_with(SDPBackend.EFFICIENT_ATTENTION),
    "q, k, v as one product": one_product_for_qkv,
    "feed-forward as two products": two_products_in_feed_forward,
}
ONLY_ON_CUDA = {name for name in LEVERS if name.endswith("in torch") or name.startswith("short attention")}


@torch.inference_mode()
def try_levers(lab: Lab, result: dict[str, Any]) -> None:
    """Milliseconds of the network and its error against float32, with each lever alone, then with all that gained."""
    request = lab.request()
    unet = lab.engine.unet
    step = lab.step(lab.engine, request)
    exact = exact_prediction(lab, request)  # the part after this one measures against float32 too
    rows = result["rows"] = []

    def measured(name: str, lever: Lever, unet: UNet3D = unet, step: Step = step) -> dict[str, Any]:
        row: dict[str, Any] = {"lever": name}
        rows.append(row)
        start = time.perf_counter()
        try:
            with lever(unet):
                row["error_to_float32"] = relative_error(step.network(unet), exact)
                row["ms"] = milliseconds([lambda: step.network(unet)], lab.cuda, warmups=1)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        row["seconds"] = time.perf_counter() - start
        print(
            f"  {name:45} {row.get('ms', float('nan')):8.3f} ms  error {row.get('error_to_float32', float('nan')):.2e}"
            f"  {row.get('failed', '')}",
            flush=True,
        )
        return row

    measured("warm-up", LEVERS["as it is"])
    rows.clear()
    base = measured("as it is", LEVERS["as it is"])
    for name, lever in LEVERS.items():
        if name != "as it is" and (lab.cuda or name not in ONLY_ON_CUDA):
            measured(name, lever)
    if not lab.cuda:
        print("  The Triton kernels run on CUDA alone; what they would bring is not tried here.")
    best = [row["lever"] for row in rows[1:] if row.get("ms", 1e9) < 0.995 * base["ms"]]
    result["together"] = best

    @contextlib.contextmanager
    def together(unet: UNet3D) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in best:
                stack.enter_context(LEVERS[name](unet))
            yield

    if len(best) > 1:
        measured("all that gained, together", together)
    measured("as it is, once more", LEVERS["as it is"])


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 may be multiplied in TF32."""
    with attribute(matmul, "allow_tf32", allowed), attribute(torch.backends.cudnn, "allow_tf32", allowed):
        yield


def exact_prediction(lab: Lab, request: Any) -> Tensor:
    """The network's predictions in float32 without TF32."""
    with tf32(False):
        return lab.step(lab.exact, request).network(lab.exact.unet)


# Single layers.

LEVELS = ((320, 32), (640, 16), (1280, 8), (1280, 4))  # channels, and the side of the map, at 256x256
SETS = 4  # of tensors that a layer is timed on


@torch.inference_mode()
def time_layers(lab: Lab, result: dict[str, Any]) -> None:
    """Single layers at the 1.7B's shapes, two rows of 16 frames, in ways that give the same."""
    frames, rows = (2, 2) if lab.rehearsal else (16, 2)
    levels = ((32, 4), (64, 2)) if lab.rehearsal else LEVELS
    found = result["rows"] = []

    def add(
        layer: str, way: str, level: str, functions: list[Callable[[], Any]], gflop: float, gigabytes: float
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
    """Ways to a group norm and the SiLU after it."""

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
            from t2v.triton_kernels import group_norm

            ways["Triton"] = lambda *args: group_norm(*args, silu=True)
    return ways


@torch.inference_mode()
def compile_network(lab: Lab, result: dict[str, Any]) -> None:
    """Our network through torch.compile: seconds to compile, then milliseconds as a CUDA graph and without one."""
    step = lab.step(lab.engine, lab.request())
    latents = step.latents.to(lab.dtype)
    exact = exact_prediction(lab, lab.request())
    lab.drop("exact")
    rows = result["rows"] = []
    for mode in ("default",) if lab.rehearsal else ("default", "max-autotune-no-cudagraphs"):
        torch.compiler.reset()
        row: dict[str, Any] = {"mode": mode}
        rows.append(row)
        compiled = torch.compile(lab.engine.unet.run, mode=mode, dynamic=False)

        def call(compiled: Callable[..., Tensor] = compiled) -> Tensor:
            with fused.without(*fused.KERNELS):  # the compiler makes its own
                return compiled(latents, step.timestep_terms, step.text_kv)

        start = time.perf_counter()
        try:
            row["error_to_float32"] = relative_error(call(), exact)
            row["compile_s"] = time.perf_counter() - start
            row["ms"] = milliseconds([call], lab.cuda)
            row["wall_ms"] = wall_milliseconds(call, lab.cuda)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        print("  ", row, flush=True)
