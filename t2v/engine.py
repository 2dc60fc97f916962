"""The story: a request is resolved, its passes are denoised and decoded, and the frames come out."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2v import budget
from t2v.budget import DEFAULT, MemoryPlan
from t2v.job import Job, Pass, resolve
from t2v.model import Model
from t2v.networks.prompt_encoder import PromptEncoder
from t2v.networks.unet3d import UNet3D
from t2v.networks.vae import VAE
from t2v.request import Request

OnProgress = Callable[[str, int, int], None]
OnPreview = Callable[[int, int, Callable[[], np.ndarray]], None]
Frames = Iterable[np.ndarray]

PREVIEW_STRIDE = 4  # frames of a preview that one decoded frame stands for

log = logging.getLogger(__name__)


def ignore(*_: object) -> None:
    """A callback that does nothing."""


class Engine:
    """Text to video. `prepare` says what a request will do, `run` does it, `generate` is both.

    Args:
        upscaler: another model for second passes; None uses the same model.
    """

    def __init__(self, model: Model, upscaler: Model | None = None):
        self.model = model
        self.upscaler = upscaler

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        verify: bool = False,
        lora: str | None = None,
        compile: bool = False,
        upscaler: str | Path | None = None,
    ) -> "Engine":
        """Load a model from a folder in diffusers' layout.

        Args:
            device: "cpu", "cuda", "cuda:1"; "auto" is CUDA if there is a GPU.
            dtype: "float32", "float16", "bfloat16"; "auto" is float16 on CUDA, float32 elsewhere.
            verify: compute the digest of every file and compare it with the manifest, also if it was correct before.
            lora: "path[:scale]" of a LoRA to add to the denoiser; see `t2v.checkpoints.lora` for the formats.
            compile: run the denoiser through torch.compile. The first request of each shape then takes minutes, or
                less if TORCHINDUCTOR_CACHE_DIR holds the results of an earlier start.
            upscaler: folder of another model for second passes, loaded in the same way but without the LoRA.

        Raises:
            WeightsError: a folder is not a complete model of this family, or the device or dtype does not exist.
        """
        model = Model.load(folder, device, dtype, verify, lora, compile)
        return cls(model, Model.load(upscaler, device, dtype, verify, compile=compile) if upscaler else None)

    def generate(
        self,
        request: Request,
        init_frames: Frames | None = None,
        on_progress: OnProgress = ignore,
        on_preview: OnPreview = ignore,
    ) -> Iterator[np.ndarray]:
        """`prepare`, then `run`."""
        job = self.prepare(request, has_init_video=init_frames is not None)
        return self.run(job, init_frames, on_progress, on_preview)

    def prepare(self, request: Request, *, has_init_video: bool = False) -> Job:
        """Decide everything about a request. No tensor is computed and no recording is dropped.

        Raises:
            InvalidRequest: the model cannot do it.
            OutOfMemory: the request does not fit into the device's memory.
        """
        upscaler = self.upscaler.info if self.upscaler else None
        job = resolve(request, self.model.info, upscaler, has_init_video=has_init_video)
        budget.check(job, map(self.model_for, job.passes))
        return job

    def run(
        self,
        job: Job,
        init_frames: Frames | None = None,
        on_progress: OnProgress = ignore,
        on_preview: OnPreview = ignore,
    ) -> Iterator[np.ndarray]:
        """Make the frames of a video.

        All denoising is complete when this returns. Frames are decoded as the caller takes them. An error that a
        callback raises stops the work; the engine stays usable.

        Args:
            init_frames: `num_frames` frames to start from, (H, W, 3) uint8 RGB. Frames that do not have the size of the
                first pass are resized.
            on_progress: called with (stage, done, total). The stages of each pass are "start" (frames encoded, if there
                are any), "text" (once), "denoise" (steps) and "decode" (frames).
            on_preview: called with (done, total, preview) after every denoising step; preview() returns (F, H, W, 3)
                uint8 RGB, the video as the model predicts it at this step. Only every fourth frame is decoded, and
                repeated four times.

        Returns:
            An iterator of (n, H, W, 3) uint8 RGB arrays, with all frames in total.

        Raises:
            OutOfMemory: memory ran out in spite of the plan.
        """
        chunks: Iterator[np.ndarray] = iter(())
        for pass_ in job.passes:
            model = self.model_for(pass_)
            plan = budget.choose_plan(model, pass_)
            log.info("Memory plan: %s", plan)
            latents = self.denoise(pass_, init_frames, on_progress, on_preview, plan)
            chunks = self._decode(model, latents, plan, on_progress)
            init_frames = (frame for chunk in chunks for frame in chunk)
        return chunks

    @torch.inference_mode()
    def denoise(
        self,
        pass_: Pass,
        init_frames: Frames | None = None,
        on_progress: OnProgress = ignore,
        on_preview: OnPreview = ignore,
        plan: MemoryPlan = DEFAULT,
    ) -> Tensor:
        """(1, channels, F, h, w) float32 clean latents of one pass; see `run`.

        If memory runs out, one more attempt is made with the low-memory plan.
        """
        model = self.model_for(pass_)
        advice = f"{pass_}: the device's memory ran out; ask for fewer frames or pixels."
        release = functools.partial(budget.release, *self.models)
        x_0 = None
        if init_frames is not None:
            frames = resized(init_frames, pass_.size)

            def encode(plan: MemoryPlan) -> Tensor:
                total = pass_.num_frames
                return model.vae.encode(frames, plan.chunk_pixels, lambda done: on_progress("start", done, total))

            x_0 = budget.retry(encode, [plan], release, advice)
            if not pass_.num_steps:
                return x_0

        def attempt(plan: MemoryPlan) -> Tensor:
            model.use_lora(pass_.with_lora)
            text_kv = model.text_kv(pass_.prompts, pass_.negative_prompt)
            on_progress("text", 1, 1)

            def on_step(done: int, total: int, x_0: Tensor) -> None:
                on_progress("denoise", done, total)
                on_preview(done, total, lambda: self._preview(model, x_0, plan))

            return model.denoise(pass_, text_kv, x_0, plan.guidance_rows_at_once, on_step)

        return budget.retry(attempt, budget.plans(model, plan), release, advice)

    def _preview(self, model: Model, x_0: Tensor, plan: MemoryPlan) -> np.ndarray:
        chunks = self._decode(model, x_0[:, :, ::PREVIEW_STRIDE], plan)
        return np.concatenate(list(chunks)).repeat(PREVIEW_STRIDE, axis=0)[: x_0.shape[2]]

    def _decode(
        self, model: Model, latents: Tensor, plan: MemoryPlan, on_progress: OnProgress = ignore
    ) -> Iterator[np.ndarray]:
        advice = "The device's memory ran out in decoding; ask for a smaller size."
        release = functools.partial(budget.release, *self.models)
        done = 0
        retry = functools.partial(budget.retry, release=release, advice=advice)
        for frames in model.vae.decode(latents, plan.chunk_pixels, retry):
            done += len(frames)
            on_progress("decode", done, latents.shape[2])
            yield frames

    def warm_up(self) -> None:
        """Do now what the first request would wait for: loading libraries, choosing algorithms, recording the default
        shape.

        A large network on a CPU would take too long. It makes one small frame instead.
        """
        for model in self.models:
            small: dict[str, Any] = {"num_frames": 1, "width": 16, "height": 16} if model.is_slow_to_record else {}
            recorded = (model.step, model.predict)
            for function in recorded:
                function.min_calls = model.profile.min_calls_to_record if small else 0
            for _ in Engine(model).generate(Request(num_inference_steps=1, seed=0, **small)):
                pass
            for function in recorded:
                function.min_calls = model.profile.min_calls_to_record

    def describe(self) -> str:
        """The model's name and what it can show, in one line."""
        return f"{self.name}. {self.model.info.about}" if self.model.info.about else self.name

    def model_for(self, pass_: Pass) -> Model:
        """The model that makes a pass."""
        return self.upscaler if pass_.on_upscaler and self.upscaler else self.model

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.model, self.upscaler) if self.upscaler else (self.model,)

    @property
    def name(self) -> str:
        """Name of the model, for logs and files."""
        return self.model.info.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def text(self) -> PromptEncoder:
        return self.model.text

    @property
    def unet(self) -> UNet3D:
        return self.model.unet

    @property
    def vae(self) -> VAE:
        return self.model.vae


def resized(frames: Frames, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields the frames, (H, W, 3) uint8, in this (height, width). Those of another size are resized (bicubic)."""
    for frame in frames:
        if frame.shape[:2] != size:
            pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
            frame = pixels.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()
        yield frame
