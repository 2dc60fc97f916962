"""Cog's edge: declare the inputs, resolve a request, run it, write the video and return its path.

Cog reads this file without running it, so that defaults, limits and descriptions of the inputs are literals here. They
repeat those of `t2v.request.Request`, which also holds for callers who get past Cog's checks; a test compares the two.
"""

import atexit
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from cog import BasePredictor, Input, Path, streaming

from t2v import __version__, device
from t2v.engine import Engine, OnPreview, ignore
from t2v.errors import InvalidRequest, OutOfMemory, T2VError
from t2v.media.decode import read_frames
from t2v.media.encode import write_video
from t2v.request import Request
from t2v.resources import DEMO
from t2v.serving import watchdog
from t2v.serving.report import Report
from t2v.serving.worker import Worker

COG_FOLDER = FilePath("/tmp/coglet/predictions")  # Cog ignores TMPDIR for it
PREVIEW_QUALITY = 30  # constant rate factor


class Inputs:
    """Each input once, for both predictors. All but `init_video` and `previews` are fields of `Request`."""

    prompt = Input(
        default="An astronaut riding a horse",
        description="What the video shows, in English. Example: a red circle moving right on a black background",
    )
    num_frames = Input(
        default=16, ge=1, le=256, description="Number of frames. 16 frames at 8 fps are a video of 2 seconds"
    )
    num_inference_steps = Input(
        default=50,
        ge=1,
        le=500,
        description="Number of denoising steps. More steps take longer; 20 to 25 are often enough",
    )
    fps = Input(default=8, ge=1, le=60, description="Frames per second of the video file")
    seed = Input(
        default=None,
        ge=0,
        le=4294967295,
        description="Random seed. The same seed and inputs give the same frames. Default: random",
    )
    guidance_scale = Input(
        default=None,
        ge=1,
        le=30,
        description="Classifier-free guidance scale. 1 turns guidance off. Default: the model's own",
    )
    width = Input(
        default=None, ge=16, le=1024, description="Width in pixels, a multiple of 8. Default: the model's own"
    )
    height = Input(
        default=None, ge=16, le=1024, description="Height in pixels, a multiple of 8. Default: the model's own"
    )
    preset = Input(
        default="auto",
        choices=["auto", "quality", "fast", "turbo"],
        description="auto: turbo with an installed few-step LoRA, else quality. fast: up to 20 steps. turbo: up to 8",
    )
    negative_prompt = Input(
        default="", description="What to avoid in the video. Requires guidance. Example: blurry, text"
    )
    scheduler = Input(
        default="dpm++",
        choices=["dpm++", "ddim", "unipc"],
        description="Solver: DPM-Solver++ 2M, DDIM as in the original, or UniPC for few steps. turbo uses its own",
    )
    output_format = Input(
        default="mp4",
        choices=["mp4", "webm", "gif"],
        description="File format: mp4 (H.264), webm (VP9) or a looping gif",
    )
    quality = Input(
        default=18,
        ge=1,
        le=51,
        description="Constant rate factor of mp4 and webm. 1 is nearly lossless, 18 looks lossless, 51 is the worst",
    )
    window = Input(
        default=None,
        ge=4,
        le=128,
        description="Number of frames denoised together. Default: all; 16 for over 128 frames or several prompts",
    )
    loop = Input(default=False, description="Make the video loop seamlessly")
    next_prompts = Input(
        default="",
        description="Prompts for later parts of the video, up to 15, separated by |. Example: a red star | a square",
    )
    init_video = Input(
        default=None, description="Video or picture to start from, scaled and cropped to the requested size"
    )
    strength = Input(
        default=None, ge=0, le=1, description="How much to change init_video: 0 returns it, 1 ignores it. Default: 0.6"
    )
    upscale = Input(default=1, ge=1, le=2, description="2 doubles the width and height in a second pass")
    previews = Input(default=4, ge=0, le=20, description="Number of previews, spread evenly over the denoising steps")


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the model and warm it up. Reads T2V_WEIGHTS, T2V_UPSCALER, T2V_DEVICE, T2V_DTYPE, T2V_LORA and
        T2V_COMPILE; every prediction reads T2V_LOG_PROMPTS."""
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        logging.getLogger("t2v").setLevel(logging.INFO)
        self.device_failed = False
        self.worker = Worker()
        try:
            self.engine = self.worker.call(load_engine)
        except Exception:
            traceback.print_exc()  # Cog's health check reports only the last line of the error
            time.sleep(0.5)  # Cog ends this process at once; without the pause the log lost it in one case of eight
            raise
        print(f"Loaded on {self.engine.device} with torch {torch.__version__}: {self.engine.describe()}")
        # The server reads a video after predict() has returned, so it must outlive the call that made it.
        self.outputs = FilePath(tempfile.mkdtemp(prefix="t2v-"))
        atexit.register(shutil.rmtree, self.outputs, ignore_errors=True)
        tempfile.tempdir = str(self.outputs)  # where Cog puts the files that it downloads, and leaves failed ones
        watchdog.start(self.outputs)
        device.freeze_gc()

    def healthcheck(self) -> bool:
        """False once the device has failed for good: then only a new process can use it."""
        return not self.device_failed

    def predict(
        self,
        prompt: str = Inputs.prompt,
        num_frames: int = Inputs.num_frames,
        num_inference_steps: int = Inputs.num_inference_steps,
        fps: int = Inputs.fps,
        seed: int | None = Inputs.seed,
        guidance_scale: float | None = Inputs.guidance_scale,
        width: int | None = Inputs.width,
        height: int | None = Inputs.height,
        preset: str = Inputs.preset,
        negative_prompt: str = Inputs.negative_prompt,
        scheduler: str = Inputs.scheduler,
        output_format: str = Inputs.output_format,
        quality: int = Inputs.quality,
        window: int | None = Inputs.window,
        loop: bool = Inputs.loop,
        next_prompts: str = Inputs.next_prompts,
        init_video: Path | None = Inputs.init_video,
        strength: float | None = Inputs.strength,
        upscale: int = Inputs.upscale,
    ) -> Path:
        """Make a video."""
        inputs = locals()  # Cog passes all of them by name
        del inputs["self"]
        with self.reporting_errors():
            request, init_video = self.parse_inputs(inputs)
            return Path(self.worker.call(self.generate_file, request, init_video))

    def parse_inputs(self, inputs: dict[str, Any]) -> tuple[Request, FilePath | None]:
        """The request, and the file to start from if there is one. Removes the files of earlier predictions.

        Raises:
            InvalidRequest: an input is invalid.
        """
        init_video = inputs.pop("init_video")
        request = Request(**inputs)
        if not isinstance(init_video, FilePath | None):  # Cog passes a text if it cannot download the file
            raise InvalidRequest("init_video must be an http, https or data URL, or an uploaded file.")
        self.remove_old_files(init_video)
        return request, init_video

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Errors reach the caller as one sentence, and the container's log with their traceback."""
        try:
            yield
        except InvalidRequest:
            raise
        except T2VError as error:
            log_traceback()
            if isinstance(error, OutOfMemory) and self.engine.device.type == "cpu":
                # If there was no memory for a kernel's code, oneDNN creates no further kernel in that thread.
                self.worker.restart()
            raise
        except Exception as error:
            log_traceback()
            if not self.worker.call(device.is_healthy, self.engine.device):
                self.device_failed = True
            # The message of a library may contain paths and addresses, which are for the operator alone.
            raise T2VError(
                f"An internal error occurred ({type(error).__name__}); see the container's log. Please try again."
            ) from None
        finally:
            device.trim()

    def generate_file(self, request: Request, init_video: FilePath | None, on_preview: OnPreview = ignore) -> FilePath:
        """Make the video and write it; returns its path. Runs in the worker's thread; can be stopped at each step."""
        print(f"Using seed: {request.seed}")
        print(f"Model: {self.engine.describe()}")
        device.reset_peak(self.engine.device)
        report = Report(request.prompt, log_prompt=os.environ.get("T2V_LOG_PROMPTS") == "1")

        def on_progress(stage: str, done: int, total: int) -> None:
            self.worker.check()
            report.on_progress(stage, done, total)

        path = self.new_path(f"t2v-{request.seed}", request.output_format)
        # A context, not a decorator of predict(): Cog replaces defaults only on the outermost function. And not in
        # setup(), because gradient mode belongs to the thread.
        with torch.inference_mode():
            job = self.engine.prepare(request, has_init_video=init_video is not None)
            init_frames = None
            if init_video is not None:
                first = job.passes[0]
                init_frames = self.stoppable(read_frames(init_video, first.num_frames, first.size, request.fps))
            frames = self.engine.run(job, init_frames, on_progress, on_preview)
            chunks = self.stoppable(report.timed(frames))
            info = write_video(path, chunks, request.fps, {**job.metadata, "t2v": __version__}, request.quality)
        report.end("encode")
        self.record_metrics(
            seed=request.seed,
            model=self.engine.name,
            t2v_version=__version__,
            frames=info.frames,
            **{f"{stage}_seconds": round(seconds, 4) for stage, seconds in report.seconds.items()},
            peak_memory_bytes=device.peak_memory(self.engine.device),
            video_output_count=1,
            video_output_duration_seconds=info.frames / info.fps,
            video_output_total_pixel_count=info.frames * info.width * info.height,
        )
        return path

    def stoppable(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same frames; a stopped caller ends the work before the next one."""
        for item in frames:
            self.worker.check()
            yield item

    def new_path(self, name: str, suffix: str) -> FilePath:
        """The path of a new file, which stays until the next prediction."""
        return self.outputs / f"{name}-{uuid.uuid4().hex}.{suffix}"

    def remove_old_files(self, init_video: FilePath | None) -> None:
        """Remove the files of earlier predictions but for `init_video`, and the empty folders that Cog leaves for each
        prediction. The newest folder belongs to the prediction that is running."""
        for old in self.outputs.iterdir():
            with contextlib.suppress(OSError):  # a library's folder
                if old != init_video:
                    old.unlink()
        with contextlib.suppress(OSError):  # another server on this machine was faster
            for folder in sorted(COG_FOLDER.iterdir(), key=os.path.getmtime)[:-1]:
                with contextlib.suppress(OSError):  # it is not empty
                    for part in [*folder.iterdir(), folder]:
                        part.rmdir()

    def record_metrics(self, **metrics: int | float | str | None) -> None:
        """Report metrics to Cog. A prediction does not fail because of one, nor outside a server."""
        for name, value in metrics.items():
            try:
                if value is not None:
                    self.record_metric(name, value)
            except Exception as error:
                print(f"Metric {name} was not recorded: {error}", file=sys.stderr)


class StreamingPredictor(Predictor):
    """Sends previews of the unfinished video to clients that accept text/event-stream, and then the video. Built with
    `cog build -f cog-stream.yaml`."""

    @streaming
    def predict(
        self,
        prompt: str = Inputs.prompt,
        num_frames: int = Inputs.num_frames,
        num_inference_steps: int = Inputs.num_inference_steps,
        fps: int = Inputs.fps,
        seed: int | None = Inputs.seed,
        guidance_scale: float | None = Inputs.guidance_scale,
        width: int | None = Inputs.width,
        height: int | None = Inputs.height,
        preset: str = Inputs.preset,
        negative_prompt: str = Inputs.negative_prompt,
        scheduler: str = Inputs.scheduler,
        output_format: str = Inputs.output_format,
        quality: int = Inputs.quality,
        window: int | None = Inputs.window,
        loop: bool = Inputs.loop,
        next_prompts: str = Inputs.next_prompts,
        init_video: Path | None = Inputs.init_video,
        strength: float | None = Inputs.strength,
        upscale: int = Inputs.upscale,
        previews: int = Inputs.previews,
    ) -> Iterator[Path]:
        """Make a video: first its previews, MP4 files of the same size and length, and last the video."""
        inputs = locals()  # Cog passes all of them by name
        del inputs["self"], inputs["previews"]

        def generate_file(
            request: Request, init_video: FilePath | None, send: Callable[[np.ndarray], None]
        ) -> FilePath:
            def on_preview(done: int, total: int, preview: Callable[[], np.ndarray]) -> None:
                if done < total and (done - 1) * (previews + 1) // total < done * (previews + 1) // total:
                    send(preview())

            return self.generate_file(request, init_video, on_preview)

        with self.reporting_errors():
            request, init_video = self.parse_inputs(inputs)
            # Previews are encoded in this thread while the worker's goes on denoising.
            with contextlib.closing(self.worker.stream(generate_file, request, init_video)) as items:
                for item in items:
                    if isinstance(item, FilePath):
                        yield Path(item)
                    else:
                        path = self.new_path("preview", "mp4")
                        write_video(path, [item], request.fps, {}, PREVIEW_QUALITY)
                        yield Path(path)


def load_engine() -> Engine:
    """The engine that the environment variables describe, warmed up."""
    engine = Engine.load(
        os.environ.get("T2V_WEIGHTS") or DEMO,
        device=os.environ.get("T2V_DEVICE") or "auto",
        dtype=os.environ.get("T2V_DTYPE") or "auto",
        lora=os.environ.get("T2V_LORA"),
        compile=os.environ.get("T2V_COMPILE") == "1",
        upscaler=os.environ.get("T2V_UPSCALER"),
    )
    engine.warm_up()
    return engine


def log_traceback() -> None:
    """Write it to the container's log alone. sys.stderr is the log of the prediction, which the caller receives."""
    os.write(2, traceback.format_exc().encode(errors="replace"))
