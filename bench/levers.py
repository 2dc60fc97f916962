"""Switches and formulations between which only a GPU can decide, tried one by one.

A lever is a context in which the network is patched; the engine itself does not change.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import kernels
from bench.lab import Lab, Step, milliseconds, relative_error, wall_milliseconds
from t2v import unet3d
from t2v.convolution import Upsample
from t2v.engine import Engine
from t2v.unet3d import (
    Attention,
    FeedForward,
    ResBlock,
    TemporalConv,
    TemporalConvs,
    TemporalTransformer,
    TransformerBlock,
    UNet3D,
)

Lever = Callable[[UNet3D], AbstractContextManager[Any]]

SHORT = 64  # frames, at most, of a sequence along the frames
CHUNK = 256  # pixels that one reduction adds up


@contextlib.contextmanager
def attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the time of the context."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


# Group norms of (n, c, h, w) whose memory is channels last.


def group_norm_by_sums(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the statistics in float32, from sums and Euclidean norms over chunks of pixels."""
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
    """Compute mean and variance of chunks of pixels, and combine them."""
    n, c, h, w = x.shape
    length = CHUNK if (h * w) % CHUNK == 0 else h * w
    chunks = x.permute(0, 2, 3, 1).reshape(n, -1, length, groups, c // groups)
    variances, means = torch.var_mean(chunks, dim=(2, 4), correction=0)
    variances, means = variances.float(), means.float()
    variance = variances.mean(1) + means.var(1, correction=0)
    return _apply(x, means.mean(1), variance, weight, bias, eps)


def _apply(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One scale and one shift for every channel of every image, from statistics (n, groups)."""
    n, c = x.shape[:2]
    scale = ((variance + eps).rsqrt()[:, :, None] * weight.view(mean.shape[1], -1)).view(n, c)
    shift = bias - (mean[:, :, None] * scale.view(n, mean.shape[1], -1)).view(n, c)
    return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])


def norms_by(function: Callable[..., Tensor]) -> Lever:
    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return function(x, self.num_groups, self.weight, self.bias, self.eps)

    return lambda unet: patch.object(nn.GroupNorm, "forward", forward)


@contextlib.contextmanager
def fused_norms(unet: UNet3D) -> Iterator[None]:
    """Run every group norm, and the SiLU that follows it, as the Triton kernels of `t2v.groupnorm_triton`."""
    from t2v.groupnorm_triton import group_norm

    activated: set[nn.Module] = {unet.conv_norm_out}
    for module in unet.modules():
        if isinstance(module, ResBlock):
            activated |= {module.norm1, module.norm2}
        if isinstance(module, TemporalConvs):
            activated |= {
                next(iter(stage.values())) for stage in (module.conv1, module.conv2, module.conv3, module.conv4)
            }

    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=self in activated)

    class Functional:
        """torch.nn.functional without SiLU, which the kernels have applied."""

        def __getattr__(self, name: str) -> Any:
            return (lambda x: x) if name == "silu" else getattr(F, name)

    with patch.object(nn.GroupNorm, "forward", forward), patch.object(unet3d, "F", Functional()):
        yield


@contextlib.contextmanager
def fused_norms_and_biases(unet: UNet3D) -> Iterator[None]:
    """Like `fused_norms`; and the norms and residual additions also add the biases of the convolutions before them,
    which cuDNN leaves to a kernel of their own."""
    from bench.fused import add
    from t2v.groupnorm_triton import group_norm

    def norm_silu(norm: nn.Module, x: Tensor, added: Tensor | None = None) -> Tensor:
        norm = cast(nn.GroupNorm, norm)
        return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=True, added=added)

    def residual(self: ResBlock, x: Tensor, signals: dict[nn.Module, Any]) -> Tensor:
        images = unet3d.frames(x)
        h = self.conv1(norm_silu(self.norm1, images))
        h = self.conv2(norm_silu(self.norm2, h, signals[self] + biases[self.conv1]))
        shortcut = images if self.conv_shortcut is None else self.conv_shortcut(images)
        return unet3d.unframes(add(h, shortcut, biases[self.conv2]), x.shape[0])

    def temporal(self: TemporalConvs, x: Tensor) -> Tensor:
        image = h = x.flatten(2, 3).permute(0, 3, 1, 2)
        added = None
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            norm, conv = stage.values()
            h = conv(norm_silu(norm, h, added))
            added = biases[conv][None]
        return add(h, image, biases[conv]).permute(0, 2, 3, 1).view(x.shape)

    biases: dict[nn.Module, Any] = {}
    for module in unet.modules():
        if isinstance(module, ResBlock):
            biases |= {conv: conv.bias for conv in (module.conv1, module.conv2)}
        if isinstance(module, TemporalConv):
            biases[module] = module.bias
    for module in biases:
        setattr(module, "bias", None)  # noqa: B010 - a type checker knows no module without one
    try:
        with (
            fused_norms(unet),
            patch.object(ResBlock, "forward", residual),
            patch.object(TemporalConvs, "forward", temporal),
        ):
            yield
    finally:
        for module, bias in biases.items():
            module.bias = bias


def fused_layer_norms(unet: UNet3D) -> AbstractContextManager[Any]:
    """Run layer norms as the Triton kernel."""
    from bench.fused import layer_norm

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x.contiguous(), self.weight, self.bias, self.eps)

    return patch.object(nn.LayerNorm, "forward", forward)


def fused_feed_forward(unet: UNet3D) -> AbstractContextManager[Any]:
    """Compute a feed-forward's value and gate by one linear layer, and join them in one Triton kernel."""
    from bench.fused import geglu

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        first, out = cast(nn.ModuleDict, self.net["0"]), self.net["2"]
        return out(geglu(first["proj"](x)))

    return patch.object(FeedForward, "forward", forward)


# Temporal attention.


def temporal_attention_memory_efficient(unet: UNet3D) -> AbstractContextManager[Any]:
    """Use torch's memory-efficient kernel where sequences are short, which are those along the frames."""
    attend = Attention.attend

    def forward(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > SHORT or k.shape[2] > SHORT:
            return attend(self, q, k, v)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return attend(self, q, k, v)

    return patch.object(Attention, "attend", forward)


def temporal_attention_in_place(unet: UNet3D) -> AbstractContextManager[Any]:
    """Attend along the frames in a Triton kernel that reads them where they are, without gathering them."""
    from bench.fused import TEMPORAL_LENGTHS, temporal_attention

    original = TemporalTransformer.forward

    def attention(layer: Attention, tokens: Tensor) -> Tensor:
        y = temporal_attention(layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens), layer.heads)
        return layer.to_out[0](y)

    def forward(self: TemporalTransformer, x: Tensor) -> Tensor:
        if x.shape[1] not in TEMPORAL_LENGTHS:
            return original(self, x)
        block = cast(TransformerBlock, self.transformer_blocks[0])
        h = self.proj_in(unet3d.video_norm(self.norm, x)).flatten(2, 3)
        h = h + attention(block.attn1, block.norm1(h))
        h = h + attention(block.attn2, block.norm2(h))
        h = h + block.ff(block.norm3(h))
        return x + self.proj_out(h).view(x.shape)

    return patch.object(TemporalTransformer, "forward", forward)


# Temporal convolutions of (b, c, F, pixels), channels last.


def temporal_by_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve in three dimensions, channels last."""
    b, c, n, pixels = x.shape
    side = math.isqrt(pixels)
    shape = (side, side) if side * side == pixels else (pixels, 1)
    rows = x.permute(0, 2, 3, 1).view(b, n, *shape, c).permute(0, 4, 1, 2, 3)
    y = F.conv3d(rows, weight, bias, padding=(1, 0, 0))
    return y.permute(0, 2, 3, 4, 1).reshape(b, n, pixels, -1).permute(0, 3, 1, 2)


def temporal_by_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Add up three matrix products of shifted frames."""
    rows = x.permute(0, 2, 3, 1)  # (b, F, pixels, c)
    before, here, after = weight[:, :, :, 0, 0].unbind(2)
    y = F.linear(rows, here, bias)
    if rows.shape[1] > 1:
        y[:, 1:] += F.linear(rows[:, :-1], before)
        y[:, :-1] += F.linear(rows[:, 1:], after)
    return y.permute(0, 3, 1, 2)


def temporal_by_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Copy three frames side by side, for one matrix product."""
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1))
    patches = torch.cat([rows[:, :-2], rows[:, 1:-1], rows[:, 2:]], dim=-1)
    flat = weight[:, :, :, 0, 0].permute(0, 2, 1).reshape(weight.shape[0], -1)
    return F.linear(patches, flat, bias).permute(0, 3, 1, 2)


def temporal_by_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as the engine does."""
    return F.conv2d(x, weight[..., 0], bias, padding=(1, 0))


def temporal_by(function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Lever:
    def forward(self: TemporalConv, image: Tensor) -> Tensor:
        return function(image, self.weight, self.bias)

    return lambda unet: patch.object(TemporalConv, "forward", forward)


# Linear layers.


@contextlib.contextmanager
def one_product_for_qkv(unet: UNet3D) -> Iterator[None]:
    """Compute queries, keys and values of a self-attention by one linear layer."""
    joined = {}
    for module in unet.modules():
        if isinstance(module, Attention) and module.to_q.in_features == module.to_k.in_features:
            joined[module] = torch.cat([module.to_q.weight, module.to_k.weight, module.to_v.weight])

    def to_itself(self: Attention, x: Tensor) -> Tensor:
        q, k, v = map(self.split, F.linear(x, joined[self]).chunk(3, dim=-1))
        return self.to_out[0](self.attend(q, k, v))

    with patch.object(Attention, "to_itself", to_itself):
        yield


@contextlib.contextmanager
def one_product_in_feed_forward(unet: UNet3D) -> Iterator[None]:
    """Compute a feed-forward's value and gate by one linear layer."""

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        first, out = cast(nn.ModuleDict, self.net["0"]), self.net["2"]
        value, gate = first["proj"](x).chunk(2, dim=-1)
        return out(value * F.gelu(gate))

    with patch.object(FeedForward, "forward", forward):
        yield


@contextlib.contextmanager
def upsampling_interpolated(unet: UNet3D) -> Iterator[None]:
    """Upsample by nearest neighbour and a 3x3 convolution instead of a transposed convolution."""
    modules = [module for module in unet.modules() if isinstance(module, Upsample)]
    kernels = [module.kernel for module in modules]
    for module in modules:
        module.kernel = None
    try:
        yield
    finally:
        for module, kernel in zip(modules, kernels):
            module.kernel = kernel


matmul = torch.backends.cuda.matmul
LEVERS: dict[str, Lever] = {
    "as it is": lambda unet: contextlib.nullcontext(),
    "cudnn.benchmark": lambda unet: attribute(torch.backends.cudnn, "benchmark", True),
    "group norm by sums": norms_by(group_norm_by_sums),
    "group norm by moments": norms_by(group_norm_by_moments),
    "group norm + SiLU in Triton": fused_norms,
    "group norm + SiLU + biases in Triton": fused_norms_and_biases,
    "layer norm in Triton": fused_layer_norms,
    "feed-forward as one product, GEGLU in Triton": fused_feed_forward,
    "temporal attention as memory-efficient attention": temporal_attention_memory_efficient,
    "temporal attention as a Triton kernel": temporal_attention_in_place,
    "temporal convolution as conv3d": temporal_by(temporal_by_conv3d),
    "temporal convolution as three products": temporal_by(temporal_by_products),
    "temporal convolution as one product": temporal_by(temporal_by_patches),
    "upsampling interpolated": upsampling_interpolated,
    "q, k, v as one product": one_product_for_qkv,
    "feed-forward as one product": one_product_in_feed_forward,
    "attention: flash": lambda unet: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "attention: memory-efficient": lambda unet: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "attention: cuDNN": lambda unet: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "attention: plain": lambda unet: sdpa_kernel(SDPBackend.MATH),
    "attention: flash, else memory-efficient": lambda unet: sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    ),
    "products accumulated in float16": lambda unet: attribute(matmul, "allow_fp16_accumulation", True),
    "products reduced in float32": lambda unet: attribute(matmul, "allow_fp16_reduced_precision_reduction", False),
}
LESS_EXACT = ("products accumulated in float16",)


@torch.inference_mode()
def try_levers(lab: Lab, result: dict[str, Any]) -> None:
    """Time the network, and measure its error against float32, with each lever alone; then with all that helped."""
    request = lab.request()
    unet = lab.engine.unet
    step = lab.step(lab.engine, request)
    exact = exact_prediction(lab, request)
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
        if name != "as it is" and (lab.cuda or "Triton" not in name):
            measured(name, lever)
    # Levers of one family exclude one another: take the fastest.
    best: dict[str, dict[str, Any]] = {}
    for row in rows[1:]:
        family = row["lever"].split(":")[0].split(" as ")[0].split(" by ")[0].split(" + ")[0]
        gained = row.get("ms", 1e9) < 0.995 * base["ms"] and row["lever"] not in LESS_EXACT
        if gained and row["ms"] < best.get(family, {"ms": 1e9})["ms"]:
            best[family] = row
    result["together"] = [row["lever"] for row in best.values()]

    @contextlib.contextmanager
    def together(unet: UNet3D) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for row in best.values():
                stack.enter_context(LEVERS[row["lever"]](unet))
            yield

    measured("all that helped, together", together)
    with together(unet):
        result["profile"] = kernels.profile(lambda: step.network(unet), lab.cuda)
    print("\n".join(kernels.lines(result["profile"])), flush=True)
    measured("as it is, once more", LEVERS["as it is"])

    exactly = lab.step(lab.exact, request)
    for name, allowed in (("float32", False), ("float32 with TF32", True)):
        measured(name, partial(allow_tf32, allowed), lab.exact.unet, exactly)
    lab.drop_exact()
    bfloat16 = Engine.load(lab.folder, lab.device, "bfloat16")
    measured("bfloat16", LEVERS["as it is"], bfloat16.unet, lab.step(bfloat16, request))


@contextlib.contextmanager
def allow_tf32(allowed: bool, unet: UNet3D | None = None) -> Iterator[None]:
    """Allow or forbid products of float32 in TF32."""
    with attribute(matmul, "allow_tf32", allowed), attribute(torch.backends.cudnn, "allow_tf32", allowed):
        yield


def exact_prediction(lab: Lab, request: Any) -> Tensor:
    """The network's predictions for the timed step, in float32 without TF32."""
    with allow_tf32(False):
        return lab.step(lab.exact, request).network(lab.exact.unet)


@torch.inference_mode()
def compile_network(lab: Lab, result: dict[str, Any]) -> None:
    """Time our network with torch.compile: the compilation, then a step as a CUDA graph and without one."""
    step = lab.step(lab.engine, lab.request())
    latents = step.latents.to(lab.dtype)
    exact = exact_prediction(lab, lab.request())
    lab.drop_exact()
    rows = result["rows"] = []
    for mode in ("default",) if lab.rehearsal else ("default", "max-autotune-no-cudagraphs"):
        torch.compiler.reset()
        row: dict[str, Any] = {"mode": mode}
        rows.append(row)
        compiled = torch.compile(lab.engine.unet.run, mode=mode, dynamic=False)
        call = partial(compiled, latents, step.timestep_terms, step.text_kv)
        start = time.perf_counter()
        try:
            row["error_to_float32"] = relative_error(call(), exact)
            row["compile_s"] = time.perf_counter() - start
            row["ms"] = milliseconds([call], lab.cuda)
            row["wall_ms"] = wall_milliseconds(call, lab.cuda)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        print("  ", row, flush=True)
