"""Cog's edge: declare the inputs, build a Request, run the engine, write the video, return its path.

Cog reads the signature of `predict` without running it: defaults, limits and descriptions must be plain literals here.
t2v.request holds the same limits for callers that come past Cog; a test compares the two.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from cog import BasePredictor, Input, Path
from tqdm import tqdm

from t2v import device, watchdog
from t2v.engine import Engine, OnPreview, ignore
from t2v.errors import InvalidRequest, T2VError
from t2v.request import Request
from t2v.source import frames
from t2v.thread import Worker
from t2v.video import write_video

DEMO = FilePath(__file__).resolve().parent / "weights" / "demo"
COG_FOLDER = FilePath("/tmp/coglet/predictions")  # whatever TMPDIR says


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the three networks and warm them up. Environment: T2V_WEIGHTS, T2V_UPSCALER, T2V_DEVICE, T2V_DTYPE,
        T2V_LORA, T2V_COMPILE; and T2V_LOG_PROMPTS at each prediction."""
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        logging.getLogger("t2v").setLevel(logging.INFO)
        self.broken = False
        self.worker = Worker()
        try:
            self.engine = self.worker.call(load)
        except Exception:
            traceback.print_exc()  # Cog's health check keeps only the error's last line
            time.sleep(0.5)  # and ends this process at once: in one case of eight before that was in its log
            raise
        print(f"Loaded on {self.engine.device} with torch {torch.__version__}: {self.engine.describe()}")
        # The server reads an output after predict() has returned, so a file must outlive the call that made it.
        self.outputs = FilePath(tempfile.mkdtemp(prefix="t2v-"))
        atexit.register(shutil.rmtree, self.outputs, ignore_errors=True)
        tempfile.tempdir = str(self.outputs)  # Cog leaves there what it has fetched, and what it failed to fetch
        watchdog.start(self.outputs)
        device.freeze_gc()

    def healthcheck(self) -> bool:
        """False once the device has failed for good: only a new process can use it again."""
        return not self.broken

    def predict(
        self,
        prompt: str = Input(default="An astronaut riding a horse", description="Input prompt, in English"),
        num_frames: int = Input(default=16, ge=1, le=256, description="Number of frames for the output video"),
        num_inference_steps: int = Input(default=50, ge=1, le=500, description="Number of denoising steps"),
        fps: int = Input(default=8, ge=1, le=60, description="Frames per second of the output video"),
        seed: int | None = Input(
            default=None, ge=0, le=4294967295, description="Random seed. Leave blank to randomize the seed"
        ),
        guidance_scale: float | None = Input(
            default=None, ge=1, le=30, description="Weight of the prompt; 1 is none. Left blank, the model's own, 9"
        ),
        width: int | None = Input(
            default=None, ge=16, le=1024, description="Pixels, a multiple of 8. Left blank, the model's own, 256"
        ),
        height: int | None = Input(
            default=None, ge=16, le=1024, description="Pixels, a multiple of 8. Left blank, the model's own, 256"
        ),
        preset: str = Input(
            default="auto",
            choices=["auto", "quality", "fast", "turbo"],
            description="quality takes all steps; fast at most 20; turbo at most 8, with a few-step LoRA installed",
        ),
        negative_prompt: str = Input(default="", description="What to lead the video away from, in English"),
        scheduler: str = Input(
            default="dpm++",
            choices=["dpm++", "ddim", "unipc"],
            description="DPM-Solver++ 2M; UniPC, for few steps; DDIM, as the original, for many; turbo has its own",
        ),
        output_format: str = Input(
            default="mp4", choices=["mp4", "webm", "gif"], description="H.264, VP9, or a GIF that loops"
        ),
        quality: int = Input(
            default=18, ge=1, le=51, description="Constant rate factor of mp4 and webm: 18 looks lossless, 51 is worst"
        ),
        window: int | None = Input(
            default=None,
            ge=4,
            le=128,
            description="Frames denoised together. Left blank, all, or 16 for more than 128 frames or several prompts",
        ),
        loop: bool = Input(default=False, description="Whether the first frame shall follow the last"),
        next_prompts: str = Input(
            default="",
            description="What the video shows later on: up to 15 prompts separated by |, spread evenly along it",
        ),
        init_video: Path | None = Input(
            default=None, description="Video or picture to start from, scaled and cut to the size asked for"
        ),
        strength: float | None = Input(
            default=None,
            ge=0,
            le=1,
            description="How far to leave init_video: 0 keeps it, 1 ignores it. Left blank, 0.6",
        ),
        upscale: int = Input(
            default=1, ge=1, le=2, description="2 makes the video twice as wide and high, in a second pass"
        ),
    ) -> Path:
        """Make a video. Every keyword but init_video is a field of t2v.request.Request."""
        inputs = locals()
        del inputs["self"]
        with self.answering():
            return Path(self.worker.call(self.make, *self.understood(inputs)))

    def understood(self, inputs: dict[str, Any]) -> tuple[Request, FilePath | None]:
        """The request, and the file it starts from.

        Raises:
            InvalidRequest: an input is not as it must be.
        """
        request = Request(**{name: value for name, value in inputs.items() if name != "init_video"})
        init_video = inputs["init_video"]
        if not isinstance(init_video, FilePath | None):  # Cog passes on as text what it does not fetch
            raise InvalidRequest("init_video must be an http, https or data address, or a file sent along.")
        self._tidy(init_video)
        return request, init_video

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """What fails inside is told to the caller in a sentence, to the operator in full."""
        try:
            yield
        except InvalidRequest:
            raise
        except T2VError:
            log_traceback()
            raise
        except Exception as error:
            log_traceback()
            self.broken = self.broken or not self.worker.call(device.is_healthy, self.engine.device)
            # A library's own words may hold paths and addresses; they are for the operator alone.
            sentence = f"An internal error ({type(error).__name__}); the container's log says more. Please try again."
            raise T2VError(sentence) from None
        finally:
            device.trim()

    def make(self, request: Request, init_video: FilePath | None, on_preview: OnPreview = ignore) -> FilePath:
        """The file of the video."""
        print(f"Using seed: {request.seed}")
        print(f"Model: {self.engine.describe()}")
        device.reset_peak(self.engine.device)
        report = Report(request)
        path = self.path(f"t2v-{request.seed}", request.output_format)
        # Inside, not as a decorator: Cog fills in defaults on the outermost function only. And here, not in setup():
        # gradient mode belongs to the thread, and predict() runs in another one.
        with torch.inference_mode():
            job = self.engine.prepare(request, has_init_video=init_video is not None)
            start = None
            if init_video is not None:
                height, width = job.passes[0].size
                start = frames(init_video, request.num_frames, height, width, request.fps)
            made = report.decoding(self.engine.run(job, start, report.progress, on_preview))
            info = write_video(path, made, request.fps, dict(job.metadata), request.quality)
        report.end("encode")
        self._record(
            seed=request.seed,
            model=self.engine.name,
            frames=info.frames,
            **{f"{stage}_seconds": round(seconds, 4) for stage, seconds in report.seconds.items()},
            peak_memory_bytes=device.peak_memory(self.engine.device),
            video_output_count=1,
            video_output_duration_seconds=info.frames / info.fps,
            video_output_total_pixel_count=info.frames * info.width * info.height,
        )
        return path

    def path(self, name: str, suffix: str) -> FilePath:
        """Of a new file for the caller; it stays until the next prediction."""
        return self.outputs / f"{name}-{uuid.uuid4().hex}.{suffix}"

    def _tidy(self, init_video: FilePath | None) -> None:
        """Remove what earlier predictions have left: their files, and the empty directories that Cog makes for each
        and never removes. The newest of those is the one of the prediction that runs now."""
        for old in self.outputs.iterdir():
            with contextlib.suppress(OSError):  # it is a library's directory
                if old != init_video:
                    old.unlink()
        with contextlib.suppress(OSError):  # another server on this machine was faster
            for folder in sorted(COG_FOLDER.iterdir(), key=os.path.getmtime)[:-1]:
                with contextlib.suppress(OSError):  # it is not empty
                    for part in [*folder.iterdir(), folder]:
                        part.rmdir()

    def _record(self, **metrics: int | float | str | None) -> None:
        """Report metrics; outside a server there is nobody to report to, and a prediction must not fail over one."""
        for name, value in metrics.items():
            try:
                if value is not None:
                    self.record_metric(name, value)
            except Exception as error:
                print(f"Metric {name} was not recorded: {error}", file=sys.stderr)


def load() -> Engine:
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


class Report:
    """What is said about a prediction while it runs: for every stage a line of JSON, and for every denoising step a
    line as tqdm prints it, which Replicate's clients read.

    Attributes:
        seconds: by stage; "start", "text", "denoise", "decode", "encode".
    """

    def __init__(self, request: Request):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.since = time.perf_counter()
        about: dict[str, Any] = {
            "prompt_characters": len(request.prompt),
            "prompt_sha256": hashlib.sha256(request.prompt.encode(errors="surrogatepass")).hexdigest(),
        }
        if os.environ.get("T2V_LOG_PROMPTS") == "1":
            about["prompt"] = request.prompt
        self._say("request", about)

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            print(tqdm.format_meter(done, total, time.perf_counter() - self.since, ncols=80), flush=True)
        if stage != "decode" and done == total:
            self.end(stage)

    def decoding(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same chunks. Decoding and encoding take turns: waiting for a chunk is decoding, the rest encoding."""
        self.since = time.perf_counter()
        for chunk in chunks:
            self._count("decode")
            yield chunk
            self._count("encode")
        self.end("decode")

    def end(self, stage: str) -> None:
        self._count(stage)
        self._say(stage, {"seconds": round(self.seconds[stage], 4)})

    def _count(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.since
        self.since = now

    def _say(self, stage: str, about: dict[str, Any]) -> None:
        print(json.dumps({"stage": stage, **about}), flush=True)


def log_traceback() -> None:
    """To the container's log alone: a prediction's own log, where sys.stderr goes, is sent to the caller."""
    os.write(2, traceback.format_exc().encode(errors="replace"))
