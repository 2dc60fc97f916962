"""What the parts of a GPU run share: the loaded models, the inputs of one denoising step, and how time is taken."""

import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.engine import Engine
from t2v.request import Request
from t2v.unet3d import UNet3D

PROMPT = "a red circle moving right on a black background"
TIMESTEP = 500  # of the step that is timed


@dataclass(frozen=True)
class Step:
    """Inputs of one guided denoising step: two rows share their latents.

    Attributes:
        latents: (1, 4, F, h, w) float32.
        timestep_terms: (1, d), dtype of the network.
        context: (2, 77, D) text embeddings, dtype of the network.
        text_kv: (2, 77, d) keys and values, dtype of the network.
    """

    latents: Tensor
    timestep_terms: Tensor
    context: Tensor
    text_kv: Tensor

    def network(self, unet: UNet3D) -> Tensor:
        """The network's two predictions, (2, 4, F, h, w)."""
        return unet.run(self.latents.to(self.timestep_terms.dtype), self.timestep_terms, self.text_kv)


@dataclass
class Lab:
    """Models are loaded when a part first needs them.

    Attributes:
        folder: of the model; the `weights` part may have written it.
        device: "cuda" or "cpu".
        rehearsal: whether sizes are minimal, because only the code is to be tried.
    """

    folder: Path
    device: str
    rehearsal: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @functools.cached_property
    def engine(self) -> Engine:
        """Ours, in the precision that the device usually runs in."""
        return Engine.load(self.folder, self.device)

    @functools.cached_property
    def exact(self) -> Engine:
        """Ours in float32, without TF32: what errors are measured against."""
        return Engine.load(self.folder, self.device, "float32")

    @functools.cached_property
    def pipeline(self) -> Any:
        """diffusers' pipeline in the same precision, with DPM-Solver++ 2M."""
        from diffusers import DPMSolverMultistepScheduler, TextToVideoSDPipeline

        pipeline = TextToVideoSDPipeline.from_pretrained(self.folder, torch_dtype=self.dtype).to(self.device)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.cuda else torch.float32

    @property
    def guidance_scale(self) -> float:
        """The model's own."""
        return json.loads((self.folder / "model_index.json").read_text()).get("_t2v_guidance_scale", 9.0)

    def request(self, frames: int = 16, size: int | None = None, steps: int = 50, seed: int = 0) -> Request:
        """The request of a part; smaller in a rehearsal."""
        if self.rehearsal:
            frames, size, steps = min(frames, 2), 16, min(steps, 2)
        return Request(PROMPT, num_frames=frames, width=size, height=size, num_inference_steps=steps, seed=seed)

    @torch.inference_mode()
    def step(self, engine: Engine, request: Request, timestep: int = TIMESTEP) -> Step:
        context = engine.text.encode(["", PROMPT])
        terms = engine.unet.moments(torch.tensor([timestep], device=engine.device))
        return Step(engine.noise(request), terms, context, engine.unet.condition(context))

    def drop(self, *names: str) -> None:
        """Forget models, and give their memory back."""
        for name in names:
            self.__dict__.pop(name, None)
        self.tidy()

    def tidy(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def milliseconds(functions: Sequence[Callable[[], Any]], cuda: bool, repeats: int = 10, warmups: int = 2) -> float:
    """Median time of a call, launch gaps excluded.

    Args:
        functions: the same work on different tensors, so that a cache does not hold all of them.
        cuda: whether they run on a GPU; all of them are then one CUDA graph, which is played back.
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
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept
    return statistics.median(start.elapsed_time(end) for start, end in marks) / len(functions)


def wall_milliseconds(function: Callable[[], Any], cuda: bool, repeats: int = 5, warmups: int = 2) -> float:
    """Mean wall-clock time of calls issued one after the other, launch gaps included."""
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


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """A table: `columns` maps keys of the rows to format specifications."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for key, spec in columns.items():
            value = row.get(key)
            cells.append("" if value is None else value if isinstance(value, str) else format(value, spec))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
