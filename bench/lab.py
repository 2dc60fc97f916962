"""Shared by the parts of a GPU run: the loaded models, the inputs of one denoising step, and the clocks."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.arms import PROMPT, Arm, guidance_scale, load_pipeline, ours, stock
from t2v.engine import Engine
from t2v.networks.unet3d import UNet3D
from t2v.request import Request
from t2v.sampling.noise import noise_stream

TIMESTEP = 500  # of the timed step


@dataclass(frozen=True)
class Step:
    """Inputs of one guided denoising step, whose two rows share their latents.

    Attributes:
        latents: (1, channels, F, h, w) float32.
        timestep_terms: (1, d), dtype of the network.
        context: (2, 77, D) text embeddings, dtype of the network.
        text_kv: (2, 77, d) keys and values, dtype of the network.
    """

    latents: Tensor
    timestep_terms: Tensor
    context: Tensor
    text_kv: Tensor

    def network(self, unet: UNet3D) -> Tensor:
        """The network's two predictions, (2, channels, F, h, w)."""
        return unet.forward_projected(self.latents.to(self.timestep_terms.dtype), self.timestep_terms, self.text_kv)


@dataclass
class Lab:
    """The models of a run. Each is loaded when a part first needs it.

    Attributes:
        folder: of the model.
        device: "cuda" or "cpu".
        rehearsal: whether all sizes are minimal, because the run only tries the code.
    """

    folder: Path
    device: str
    rehearsal: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @functools.cached_property
    def engine(self) -> Engine:
        """Ours, in the device's usual precision."""
        return Engine.load(self.folder, self.device)

    @functools.cached_property
    def exact(self) -> Engine:
        """Ours in float32, the reference for errors."""
        return Engine.load(self.folder, self.device, "float32")

    @functools.cached_property
    def pipeline(self) -> Any:
        """diffusers' pipeline, in the same precision as ours."""
        return load_pipeline(self.folder, self.device)

    @property
    def ours(self) -> Arm:
        return ours(self.engine)

    @property
    def stock(self) -> Arm:
        return stock(self.pipeline, guidance_scale(self.folder))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.cuda else torch.float32

    def request(self, frames: int = 16, size: int | None = None, steps: int = 50) -> Request:
        """A request of a part; minimal in a rehearsal."""
        if self.rehearsal:
            frames, size, steps = min(frames, 2), 16, min(steps, 2)
        return Request(PROMPT, num_frames=frames, width=size, height=size, num_inference_steps=steps, seed=0)

    @torch.inference_mode()
    def step(self, engine: Engine, request: Request, timestep: int = TIMESTEP) -> Step:
        """The inputs of one step of the request."""
        context = engine.text.encode(["", PROMPT])
        terms = engine.unet.project_timesteps(torch.tensor([timestep], device=engine.device))
        return Step(noise(engine, request), terms, context, engine.unet.project_text(context))

    def drop_exact(self) -> None:
        """Free the float32 model."""
        self.__dict__.pop("exact", None)
        self.tidy()

    def tidy(self) -> None:
        """Free the memory that nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def noise(engine: Engine, request: Request) -> Tensor:
    """The noise that the first pass of a request starts from, (1, channels, F, h, w) float32."""
    pass_ = engine.prepare(request).passes[0]
    return next(noise_stream(pass_.timeline, pass_.latent_shape, pass_.seed, engine.device))


def milliseconds(functions: Sequence[Callable[[], Any]], cuda: bool, repeats: int = 10, warmups: int = 2) -> float:
    """Median time of a call, without the gaps between launches.

    Args:
        functions: the same work on different tensors. With several, the cache does not hold all inputs.
        cuda: whether the functions run on a GPU. They are then recorded as one CUDA graph, which is played back.
    """
    if not cuda:
        times = []
        repeats, warmups = min(repeats, 2), 1  # a rehearsal
        for _ in range(warmups + repeats):
            start = time.perf_counter()
            for function in functions:
                function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[warmups:]) / len(functions)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function() for function in functions]
    graph.replay()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in marks:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    del kept
    return statistics.median(before.elapsed_time(after) for before, after in marks) / len(functions)


def wall_milliseconds(function: Callable[[], Any], cuda: bool, repeats: int = 5, warmups: int = 2) -> float:
    """Mean wall-clock time of calls in a row, with the gaps between launches."""
    if not cuda:
        repeats, warmups = 1, 0  # a rehearsal
    for _ in range(warmups):
        function()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, computed in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
