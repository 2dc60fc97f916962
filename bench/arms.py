"""The arms of a comparison: this engine, and diffusers' stock pipeline, each of which makes the same video.

`stock` is `TextToVideoSDPipeline` as a user would run it, with DPM-Solver++ 2M, and diffusers' `export_to_video`.
`ours` is `Engine` and `write_video`. On CUDA both also run with torch.compile. An arm can run in a process of its own,
whose libraries, memory and settings are then its own.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2v import device as devices
from t2v.engine import Engine
from t2v.media.encode import write_video
from t2v.request import Request

PROMPT = "a red circle moving right on a black background"
WINDOWS = "ours, windows"  # the arm that denoises in windows, and so makes another video


@dataclass
class Run:
    """One video.

    Attributes:
        seconds: of the stages `text`, `denoise`, `decode`, `encode` and of the `total`. In `ours` encoding overlaps
            decoding, and counts as decoding. `host` is the processor time of the thread that issued the denoising
            steps; while it sleeps it takes none.
        latents: (1, channels, F, h, w) float32, clean.
        frames: (F, H, W, 3) uint8.
    """

    seconds: dict[str, float]
    latents: np.ndarray = field(repr=False)
    frames: np.ndarray = field(repr=False)


Arm = Callable[[Request], Run]


@dataclass(frozen=True)
class Setting:
    """What the arms of one comparison share.

    Attributes:
        folder: of the model.
        dtype: "float32", "float16", "bfloat16" or "auto".
        threads: of the CPU; None leaves the number to torch.
        window: frames in a window, for the arm `ours, windows`.
        warm: whether `ours` warms up first, as the server does in setup.
    """

    folder: Path
    device: str
    dtype: str = "auto"
    threads: int | None = None
    window: int | None = None
    warm: bool = True

    def arm(self, name: str) -> Arm:
        """Load an arm in this process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = False  # errors are measured against float32
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        compiled = name.endswith("compiled")
        if name.startswith("stock"):
            pipeline = load_pipeline(self.folder, self.device, self.dtype)
            if compiled:
                pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True, dynamic=False)
            return stock(pipeline, guidance_scale(self.folder))
        engine = Engine.load(self.folder, self.device, self.dtype, compile=compiled)
        if self.warm:
            engine.warm_up()
        return ours(engine, self.window if name == WINDOWS else None)


class Process:
    """An arm in a process of its own."""

    def __init__(self, name: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer_requests, args=(theirs, name, setting), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, request: Request) -> Run:
        return self._ask(request)

    def peak_memory(self) -> float:
        """GiB that the process has held at most so far: on CUDA reserved by torch, otherwise resident."""
        return self._ask(None)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join()

    def _ask(self, request: Request | None) -> Any:
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            sys.exit(f"An arm ended with {self.process.exitcode}; its own output is above.")


def _answer_requests(pipe: Any, name: str, setting: Setting) -> None:
    warnings.simplefilter("ignore")
    arm = setting.arm(name)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request:
            pipe.send(arm(request))
        else:
            pipe.send((devices.peak_memory(torch.device(setting.device)) or 0) / 2**30)


def ours(engine: Engine, window: int | None = None) -> Arm:
    """The arm of a loaded engine.

    Args:
        window: frames that are denoised together; None leaves the number to the engine.
    """
    device = str(engine.device)

    def run(request: Request) -> Run:
        request = dataclasses.replace(request, window=window)
        marks = [now(device)]
        chunks: list[np.ndarray] = []
        began = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal began
            if stage == "text":
                marks.append(now(device))
                began = time.thread_time()

        latents = engine.denoise(engine.prepare(request).passes[0], on_progress=progress)
        host = time.thread_time() - began
        marks.append(now(device))

        def keep_frames():
            for chunk in engine.vae.decode(latents):
                chunks.append(chunk)
                yield chunk

        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "a.mp4", keep_frames(), request.fps, {})
        marks.append(now(device))
        text, denoise, rest = np.diff(marks)
        seconds = {"text": text, "denoise": denoise, "decode": rest, "encode": 0.0, "total": marks[-1] - marks[0]}
        return Run(seconds | {"host": host}, latents.cpu().numpy(), np.concatenate(chunks))

    return run


def stock(pipeline: Any, guidance: float) -> Arm:
    """The arm of a loaded diffusers pipeline.

    Args:
        guidance: scale of every request.
    """
    from diffusers.utils import export_to_video

    device, precision = str(pipeline.device), pipeline.unet.dtype
    factor, native = pipeline.vae_scale_factor, pipeline.unet.config.sample_size

    def run(request: Request) -> Run:
        encoded = began = host = denoised = 0.0
        final: list[torch.Tensor] = []
        encode, decode = pipeline.encode_prompt, pipeline.decode_latents

        def timed_encode(*args: Any, **kwargs: Any) -> Any:
            nonlocal encoded, began
            context = encode(*args, **kwargs)
            encoded = now(device)
            began = time.thread_time()
            return context

        def timed_decode(latents: torch.Tensor) -> torch.Tensor:
            nonlocal host, denoised
            host = time.thread_time() - began
            denoised = now(device)
            final.append(latents.cpu())
            return decode(latents)

        h, w = (length // factor if length else native for length in (request.height, request.width))
        shape = (1, pipeline.unet.config.in_channels, request.num_frames, h, w)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(int(request.seed or 0)))
        pipeline.encode_prompt, pipeline.decode_latents = timed_encode, timed_decode
        started = now(device)
        try:
            video = pipeline(
                request.prompt,
                height=h * factor,
                width=w * factor,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=guidance,
                latents=noise.to(device, precision),
            ).frames[0]
        finally:
            pipeline.encode_prompt, pipeline.decode_latents = encode, decode
        decoded = now(device)
        with tempfile.TemporaryDirectory() as folder:
            export_to_video(list(video), f"{folder}/a.mp4", fps=request.fps)
        ended = now(device)
        seconds = {
            "text": encoded - started,
            "denoise": denoised - encoded,
            "decode": decoded - denoised,
            "encode": ended - decoded,
            "total": ended - started,
            "host": host,
        }
        return Run(seconds, final[0].float().numpy(), (video * 255).round().astype(np.uint8))

    return run


def load_pipeline(folder: Path, device: str, dtype: str = "auto") -> Any:
    """diffusers' pipeline with DPM-Solver++ 2M, on the device."""
    from diffusers import DPMSolverMultistepScheduler, TextToVideoSDPipeline

    precision = getattr(torch, settled(dtype, device))
    pipeline = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=precision).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guidance_scale(folder: Path) -> float:
    """The model's own, as `Engine.load` reads it."""
    return json.loads((folder / "model_index.json").read_text()).get("_t2v_guidance_scale", 9.0)


def settled(dtype: str, device: str) -> str:
    """The name of the dtype that "auto" stands for."""
    return dtype if dtype != "auto" else "float16" if device.startswith("cuda") else "float32"


def now(device: str) -> float:
    """Seconds, once the device has done all that was issued."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
