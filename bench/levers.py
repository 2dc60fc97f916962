"""Formulations between which only a GPU can decide, tried one by one on a step of the network.

The base is the network as it is, with its Triton kernels (`t2v.networks.fused`). A lever is a context that turns a
kernel off, or patches the network to compute something in another way; the engine itself does not change. A lever that
takes less time than the base is a proposal: what it does belongs into the network. A kernel whose row "in torch" takes
no more time than the base is not worth its code.
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

from bench.lab import Lab, Step, milliseconds, relative_error, wall_milliseconds
from t2v.engine import Engine
from t2v.networks import fused, unet3d
from t2v.networks.layers import Upsample
from t2v.networks.transformer import Attention, FeedForward
from t2v.networks.unet3d import UNet3D
from t2v.request import Request

Lever = Callable[[UNet3D], AbstractContextManager[Any]]


@contextlib.contextmanager
def attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the time of the context."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def in_torch(*kernels: str) -> Lever:
    """Without these Triton kernels."""
    return lambda unet: fused.without(*kernels)


@contextlib.contextmanager
def short_attention_by(backend: SDPBackend) -> Iterator[None]:
    """Attend within short sequences, which are those along the frames, by one of torch's kernels."""
    attend = Attention.attend

    def forward(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if q.shape[2] <= fused.SHORT else contextlib.nullcontext():
            return attend(self, q, k, v)

    with fused.without("attention"), patch.object(Attention, "attend", forward):
        yield


def temporal_by_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve in three dimensions, channels last.

    Args:
        x: (b, c, F, pixels), channels last.
        weight: (c, c, 3, 1).
    """
    b, c, n, pixels = x.shape
    side = math.isqrt(pixels)
    shape = (side, side) if side * side == pixels else (pixels, 1)
    rows = x.permute(0, 2, 3, 1).reshape(b, n, *shape, c).permute(0, 4, 1, 2, 3)
    y = F.conv3d(rows, weight[..., None], bias, padding=(1, 0, 0))
    return y.permute(0, 2, 3, 4, 1).reshape(b, n, pixels, -1).permute(0, 3, 1, 2)


def temporal_convolutions_in_3d(unet: UNet3D) -> AbstractContextManager[Any]:
    return patch.object(unet3d, "conv2d_same", temporal_by_conv3d)


@contextlib.contextmanager
def one_product_for_qkv(unet: UNet3D) -> Iterator[None]:
    """Compute queries, keys and values of a self-attention by one linear layer."""
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


def two_products_in_feed_forward(unet: UNet3D) -> AbstractContextManager[Any]:
    """Compute a feed-forward's value and gate by two linear layers, as on a CPU, and join them in the kernel."""

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        proj, out = cast(nn.Linear, cast(nn.ModuleDict, self.net["0"])["proj"]), self.net["2"]
        weights, biases = proj.weight.chunk(2), proj.bias.chunk(2)
        return out(fused.geglu(*(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))))

    return patch.object(FeedForward, "forward", forward)


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
    **{f"{kernel} in torch": in_torch(kernel) for kernel in fused.KERNELS},
    "all kernels in torch": in_torch(*fused.KERNELS),
    "short attention: memory-efficient": lambda unet: short_attention_by(SDPBackend.EFFICIENT_ATTENTION),
    "other attention: flash": lambda unet: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "temporal convolution as conv3d": temporal_convolutions_in_3d,
    "q, k, v as one product": one_product_for_qkv,
    "feed-forward as two products": two_products_in_feed_forward,
    "upsampling interpolated": upsampling_interpolated,
    "cudnn.benchmark": lambda unet: attribute(torch.backends.cudnn, "benchmark", True),
    "products accumulated in float16": lambda unet: attribute(matmul, "allow_fp16_accumulation", True),
}
LESS_EXACT = ("products accumulated in float16",)
# Levers that a rehearsal leaves out: kernels that no CPU runs, backends that it does not have.
ONLY_ON_CUDA = {name for name in LEVERS if name.endswith("in torch") or "attention: " in name}


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
        if name != "as it is" and (lab.cuda or name not in ONLY_ON_CUDA):
            measured(name, lever)
    # Only what gains on its own, and is as exact.
    helped = [row["lever"] for row in rows[1:] if row.get("ms", 1e9) < 0.995 * base["ms"]]
    helped = [name for name in helped if name not in LESS_EXACT and not name.startswith("all kernels")]
    result["together"] = helped

    @contextlib.contextmanager
    def together(unet: UNet3D) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in helped:
                stack.enter_context(LEVERS[name](unet))
            yield

    if len(helped) > 1:
        measured("all that helped, together", together)
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


def exact_prediction(lab: Lab, request: Request) -> Tensor:
    """The network's predictions for the timed step, in float32 without TF32."""
    with allow_tf32(False):
        return lab.step(lab.exact, request).network(lab.exact.unet)


@torch.inference_mode()
def compile_network(lab: Lab, result: dict[str, Any]) -> None:
    """Time our network with torch.compile, without the kernels: the compilation, then a step as a CUDA graph and
    without one."""
    step = lab.step(lab.engine, lab.request())
    latents = step.latents.to(lab.dtype)
    exact = exact_prediction(lab, lab.request())
    lab.drop_exact()
    rows = result["rows"] = []
    for mode in ("default",) if lab.rehearsal else ("default", "max-autotune-no-cudagraphs"):
        torch.compiler.reset()
        row: dict[str, Any] = {"mode": mode}
        rows.append(row)
        compiled = torch.compile(lab.engine.unet.forward_projected, mode=mode, dynamic=False)

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
