"""The predictor for clients that want to look on: previews of the unfinished video, and then the video.

Built with `cog build -f cog-stream.yaml`, it answers a request that accepts text/event-stream with events as they come.
The inputs are those of predict.py, spelled out again because Cog reads them without running anything; a test compares.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

import numpy as np
from cog import Input, Path, streaming

from predict import Predictor
from t2v.request import Request
from t2v.video import write_video

PREVIEW_QUALITY = 30  # constant rate factor


class StreamingPredictor(Predictor):
    @streaming
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
        previews: int = Input(default=4, ge=0, le=20, description="Number of previews, spread evenly over the steps"),
    ) -> Iterator[Path]:
        """Make a video: its previews first, MP4 files of the same size and length, and last the video itself."""
        inputs = locals()
        del inputs["self"], inputs["previews"]
        with self.answering():
            request, init_video = self.understood(inputs)
            # Written here, while the denoising goes on in the worker's thread.
            with contextlib.closing(self.worker.stream(self._watched, request, init_video, previews)) as items:
                for item in items:
                    if isinstance(item, FilePath):
                        yield Path(item)
                    else:
                        path = self.path("preview", "mp4")
                        write_video(path, [item], request.fps, {}, PREVIEW_QUALITY)
                        yield Path(path)

    def _watched(
        self, request: Request, init_video: FilePath | None, previews: int, say: Callable[[np.ndarray], None]
    ) -> FilePath:
        def look(done: int, total: int, sketch: Callable[[], np.ndarray]) -> None:
            if done < total and (done - 1) * (previews + 1) // total < done * (previews + 1) // total:
                say(sketch())

        return self.make(request, init_video, look)
