"""Make a video from the command line, without a server."""

import argparse
import dataclasses
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t2v.errors import T2VError  # noqa: E402
from t2v.request import BOUNDS, CHOICES, Request  # noqa: E402


def main() -> None:
    defaults = Request()
    parser = argparse.ArgumentParser(prog="scripts/generate", description=__doc__)
    parser.add_argument("prompt", help="what to show, in English")
    for name, kind, about in (
        ("num_frames", int, "frames"),
        ("num_inference_steps", int, "denoising steps"),
        ("fps", int, "frames per second"),
        ("seed", int, "random if omitted"),
        ("guidance_scale", float, "weight of the prompt; the model's own if omitted"),
        ("quality", int, "constant rate factor of the file, less is better"),
        ("window", int, "frames denoised together; all, or as many as suit the model for long videos, if omitted"),
        ("width", int, "pixels, a multiple of 8; the model's own if omitted"),
        ("height", int, "pixels, a multiple of 8; the model's own if omitted"),
        ("strength", float, "how far to leave --init-video: 0 keeps it, 1 ignores it; 0.6 if omitted"),
        ("upscale", int, "2 makes the video twice as wide and high, in a second pass"),
    ):
        default = None if name == "seed" else getattr(defaults, name)
        low, high = BOUNDS[name]
        shown = "" if default is None else f" (default {default})"
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=f"{about}; {low} to {high}{shown}")
    parser.add_argument("--negative-prompt", default="", help="what to lead the video away from")
    parser.add_argument("--next-prompts", default="", help="what the video shows later on, up to 15 separated by |")
    parser.add_argument("--init-video", type=Path, help="video or picture to start from")
    parser.add_argument("--loop", action="store_true", help="let the first frame follow the last")
    for name, about in (
        ("preset", "auto is turbo where a few-step LoRA is given, else quality"),
        ("scheduler", "the solver"),
        ("output_format", "of the file"),
    ):
        option, default = "--" + name.replace("_", "-"), getattr(defaults, name)
        parser.add_argument(option, choices=CHOICES[name], default=default, help=f"{about} (default {default})")
    parser.add_argument("--out", type=Path, help="the file to write (default outputs/<prompt>-<seed>.<format>)")
    parser.add_argument("--weights", default=os.environ.get("T2V_WEIGHTS") or str(ROOT / "weights" / "demo"))
    parser.add_argument("--upscaler", default=os.environ.get("T2V_UPSCALER"), help="other model for --upscale 2")
    parser.add_argument("--device", default=os.environ.get("T2V_DEVICE") or "auto")
    parser.add_argument("--dtype", default=os.environ.get("T2V_DTYPE") or "auto")
    parser.add_argument("--lora", default=os.environ.get("T2V_LORA"), help="path[:scale]")
    args = parser.parse_args()
    try:
        generate(args)
    except T2VError as error:
        sys.exit(f"scripts/generate: {error}")


def generate(args: argparse.Namespace) -> None:
    names = {field.name for field in dataclasses.fields(Request)}
    # Refused, if it is, before the seconds that the libraries take to load.
    request = Request(**{k: v for k, v in vars(args).items() if k in names})
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60] or "video"
    path = args.out or ROOT / "outputs" / f"{slug}-{request.seed}.{request.output_format}"
    if path.suffix != f".{request.output_format}":
        sys.exit(f"scripts/generate: --out ends in {path.suffix or 'nothing'}, not in .{request.output_format}.")
    if args.init_video and not args.init_video.is_file():
        sys.exit(f"scripts/generate: --init-video {args.init_video} is no file.")

    from tqdm import tqdm

    from t2v.engine import Engine
    from t2v.source import frames
    from t2v.video import write_video

    engine = Engine.load(args.weights, args.device, args.dtype, lora=args.lora, upscaler=args.upscaler)
    print(f"Model: {engine.describe()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    job = engine.prepare(request, has_init_video=args.init_video is not None)
    start = None
    if args.init_video:
        height, width = job.passes[0].size
        start = frames(args.init_video, request.num_frames, height, width, request.fps)
    with tqdm(desc="denoise") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "denoise":
                if done == 1:
                    bar.reset(total)
                bar.update(done - bar.n)

        made = engine.run(job, start, progress)
        info = write_video(path, made, request.fps, dict(job.metadata), request.quality)
    seconds = time.perf_counter() - started
    print(f"{info.frames} frames of {info.width}x{info.height} in {seconds:.1f} s, seed {request.seed}")
    print(path)


if __name__ == "__main__":
    main()
