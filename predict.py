"""Cog's edge: declare the inputs, build a Request, run the engine, write the video, return its path.

Cog reads the signature of `predict` without running it: defaults, limits and descriptions must be plain literals here.
t2v.request holds the same limits for callers that come past Cog; a test compares the two.
"""

import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path as FilePath

import torch
from cog import BasePredictor, Input, Path
from tqdm import tqdm

from t2v.engine import Engine
from t2v.errors import InvalidRequest, OutOfMemory
from t2v.request import Request
from t2v.video import write_video

DEMO = FilePath(__file__).resolve().parent / "weights" / "demo"


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the three networks and warm them up. Environment: T2V_WEIGHTS, T2V_DEVICE, T2V_DTYPE,
        T2V_LORA, T2V_COMPILE."""
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        try:
            self.engine = Engine.load(
                os.environ.get("T2V_WEIGHTS") or DEMO,
                device=os.environ.get("T2V_DEVICE") or "auto",
                dtype=os.environ.get("T2V_DTYPE") or "auto",
                lora=os.environ.get("T2V_LORA"),
                compile=os.environ.get("T2V_COMPILE") == "1",
            )
            self.engine.warm_up()
        except Exception:
            traceback.print_exc()  # Cog's health check keeps only the error's last line
            raise
        print(f"Loaded {self.engine.describe()}")
        # The server reads an output after predict() has returned, so a file must outlive the call that made it.
        self.outputs = FilePath(tempfile.mkdtemp(prefix="t2v-"))
        atexit.register(shutil.rmtree, self.outputs, ignore_errors=True)

    def predict(
        self,
        prompt: str = Input(default="An astronaut riding a horse", description="Input prompt, in English"),
        num_frames: int = Input(default=16, ge=1, le=128, description="Number of frames for the output video"),
        num_inference_steps: int = Input(default=50, ge=1, le=500, description="Number of denoising steps"),
        fps: int = Input(default=8, ge=1, le=60, description="Frames per second of the output video"),
        seed: int | None = Input(
            default=None, ge=0, le=4294967295, description="Random seed. Leave blank to randomize the seed"
        ),
    ) -> Path:
        """Make a video. Every keyword is a field of t2v.request.Request."""
        try:
            request = Request(
                prompt=prompt, num_frames=num_frames, num_inference_steps=num_inference_steps, fps=fps, seed=seed
            )
            for old in self.outputs.iterdir():
                old.unlink()
            return Path(self._make(request))
        except InvalidRequest:
            raise
        except torch.OutOfMemoryError as error:
            traceback.print_exc()
            torch.cuda.empty_cache()
            raise OutOfMemory(f"{num_frames} frames do not fit the GPU's memory; ask for fewer.") from error
        except Exception:
            traceback.print_exc()  # Cog drops the traceback
            raise

    def _make(self, request: Request) -> FilePath:
        started = time.perf_counter()
        print(f"Using seed: {request.seed}")
        print(f"Model: {self.engine.describe()}")
        path = self.outputs / f"t2v-{request.seed}-{uuid.uuid4().hex}.mp4"
        # Inside, not as a decorator: Cog fills in defaults on the outermost function only. And here, not in setup():
        # gradient mode belongs to the thread, and predict() runs in another one.
        with torch.inference_mode():
            frames = self.engine.generate(request, Progress())
            info = write_video(path, frames, request.fps, self.engine.metadata(request))
        seconds = time.perf_counter() - started
        print(f"Wrote {info.frames} frames of {info.width}x{info.height} at {request.fps} fps in {seconds:.1f} s")
        self._record(seed=request.seed, model=self.engine.name)
        return path

    def _record(self, **metrics: int | float | str | None) -> None:
        """Report metrics; outside a server there is nobody to report to, and a prediction must not fail over one."""
        for name, value in metrics.items():
            try:
                self.record_metric(name, value)
            except Exception as error:
                print(f"Metric {name} was not recorded: {error}", file=sys.stderr)


class Progress:
    """Prints one tqdm-shaped line per denoising step, which Replicate's clients read."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            print(tqdm.format_meter(done, total, time.perf_counter() - self.started, ncols=80), flush=True)
