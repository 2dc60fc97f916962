"""Time this engine against diffusers' stock pipeline: same weights, same noise, same steps, rounds interleaved.

    python scripts/bench.py --model demo
    python scripts/bench.py --model ms-1.7b-random --frames 8 --size 128 --steps 1 --rounds 5
    python scripts/bench.py --model demo --sweep frames=8,16,32,64,128 --plot docs/frames.svg
    python scripts/bench.py --model demo --sweep frames=32,64,128,256 --window 16
    python scripts/bench.py --model ms-1.7b-random --setup
    python scripts/bench.py --model demo --steps 5 --profile

Arms: `stock` is TextToVideoSDPipeline as a user would run it, with DPM-Solver++ 2M, and diffusers' export_to_video;
`ours` is Engine and write_video; on CUDA both also with torch.compile. Each is a process of its own; they take turns.
Beside every time stands the gate: the relative error of the final latents and the PSNR of the frames against stock; in
half precision also the error of each arm against our float32. Prints a table, and one line of JSON last; fails where an
arm does not pass the gate.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t2v import device as devices  # noqa: E402
from t2v.engine import Engine  # noqa: E402
from t2v.job import MAX_FRAMES_AT_ONCE  # noqa: E402
from t2v.media.encode import write_video  # noqa: E402
from t2v.request import Request  # noqa: E402

PROMPT = "a red circle moving right on a black background"
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense half precision
WINDOWS = "ours, windows"
MOST_ERROR, LEAST_PSNR = 1e-3, 50  # against stock, in float32
MOST_HALF = 1.1  # in half precision: error against float32 in stock's
STAGES = ("text", "denoise", "decode", "encode", "total")


@dataclass
class Run:
    """One video: seconds per stage, and what was made. In `ours` encoding overlaps decoding, and counts as decoding.

    `host` is the processor time that the calling thread took to issue the denoising steps; asleep it takes none.
    """

    seconds: dict[str, float]
    latents: np.ndarray = field(repr=False)
    frames: np.ndarray = field(repr=False)


Arm = Callable[[Request], Run]


@dataclass(frozen=True)
class Setting:
    """What the arms have in common.

    Attributes:
        threads: of the CPU; None is torch's choice.
        window: of the arm in windows.
        warm: whether ours warms up first, as the server's setup does.
    """

    folder: Path
    device: str
    dtype: str = "auto"
    threads: int | None = None
    window: int | None = None
    warm: bool = True

    def arm(self, name: str) -> Arm:
        """An arm in this process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is what errors are measured against
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        compiled = name.endswith("compiled")
        if name.startswith("stock"):
            return stock(self.folder, self.device, self.dtype, compiled)
        window = self.window if name == WINDOWS else None
        return ours(self.folder, self.device, self.dtype, compiled, window, self.warm)


class Process:
    """An arm in a process of its own, whose libraries, memory and settings are its own too."""

    def __init__(self, name: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, setting), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, request: Request) -> Run:
        return self._ask(request)

    def peak_memory(self) -> float:
        """GiB that the process has needed so far: on CUDA held by torch, else resident."""
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
            sys.exit(f"An arm ended with {self.process.exitcode}; what it said is above.")


def _serve(pipe: Any, name: str, setting: Setting) -> None:
    warnings.simplefilter("ignore")
    arm = setting.arm(name)
    cuda = setting.device.startswith("cuda")
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request:
            pipe.send(arm(request))
        else:  # what a CUDA graph runs in is not allocated, but reserved
            pipe.send(
                (torch.cuda.max_memory_reserved() if cuda else devices.peak_memory(torch.device("cpu")) or 0) / 2**30
            )


def ours(
    folder: Path, device: str, dtype: str, compiled: bool = False, window: int | None = None, warm: bool = True
) -> Arm:
    engine = Engine.load(folder, device, dtype, compile=compiled)
    if warm:
        engine.warm_up()  # as the server's setup does

    def run(request: Request) -> Run:
        request = dataclasses.replace(request, window=window)
        marks = [_now(device)]
        kept: list[np.ndarray] = []
        began = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal began
            if stage == "text":
                marks.append(_now(device))
                began = time.thread_time()

        latents = engine.denoise(engine.prepare(request).passes[0], on_progress=progress)
        host = time.thread_time() - began
        marks.append(_now(device))

        def chunks():
            for frames in engine.vae.decode(latents):
                kept.append(frames)
                yield frames

        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "a.mp4", chunks(), request.fps, {})
        marks.append(_now(device))
        text, denoise, rest = np.diff(marks)
        seconds = {"text": text, "denoise": denoise, "decode": rest, "encode": 0.0, "total": marks[-1] - marks[0]}
        return Run(seconds | {"host": host}, latents.cpu().numpy(), np.concatenate(kept))

    return run


def stock(folder: Path, device: str, dtype: str, compiled: bool = False) -> Arm:
    from diffusers import DPMSolverMultistepScheduler, TextToVideoSDPipeline
    from diffusers.utils import export_to_video

    precision = getattr(torch, settled(dtype, device))
    pipeline = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=precision).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True, dynamic=False)
    guidance = json.loads((folder / "model_index.json").read_text()).get("_t2v_guidance_scale", 9.0)
    factor, native = pipeline.vae_scale_factor, pipeline.unet.config.sample_size

    def run(request: Request) -> Run:
        encoded = began = host = denoised = 0.0
        final: list[torch.Tensor] = []
        encode, decode = pipeline.encode_prompt, pipeline.decode_latents

        def encoding(*args: Any, **kwargs: Any) -> Any:
            nonlocal encoded, began
            context = encode(*args, **kwargs)
            encoded = _now(device)
            began = time.thread_time()
            return context

        def decoding(latents: torch.Tensor) -> torch.Tensor:
            nonlocal host, denoised
            host = time.thread_time() - began
            denoised = _now(device)
            final.append(latents.cpu())
            return decode(latents)

        h, w = (length // factor if length else native for length in (request.height, request.width))
        shape = (1, pipeline.unet.config.in_channels, request.num_frames, h, w)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(int(request.seed or 0)))
        pipeline.encode_prompt, pipeline.decode_latents = encoding, decoding
        started = _now(device)
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
        decoded = _now(device)
        with tempfile.TemporaryDirectory() as folder:
            export_to_video(list(video), f"{folder}/a.mp4", fps=request.fps)
        ended = _now(device)
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


def settled(dtype: str, device: str) -> str:
    """What "auto" stands for."""
    return dtype if dtype != "auto" else "float16" if device.startswith("cuda") else "float32"


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    arms: Mapping[str, Arm], request: Request, rounds: int, warmups: int, exact: np.ndarray | None = None
) -> dict[str, Any]:
    """Interleaved rounds, the order turned round every time; seconds, ratios and the gate.

    Args:
        exact: latents of the request in float32, where the arms run in less.
    """
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for i in range(warmups + rounds):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            run = arms[name](request)
            if i >= warmups:
                runs[name].append(run)
    result: dict[str, Any] = {}
    for name, made in runs.items():
        totals = [run.seconds["total"] for run in made]
        result[name] = {stage: statistics.median(run.seconds[stage] for run in made) for stage in STAGES}
        result[name] |= {"min": min(totals), "spread": max(totals) - min(totals)}
        result[name]["host_ms"] = statistics.median(r.seconds["host"] for r in made) / request.num_inference_steps * 1e3
        result[name]["steps_per_second"] = request.num_inference_steps / result[name]["denoise"]
        if "stock" in runs and name != WINDOWS:  # in windows another video is made
            base = runs["stock"]
            ratios = [a.seconds["total"] / b.seconds["total"] for a, b in zip(base, made)]
            if exact is not None:
                result[name]["error_to_float32"] = _error(made[0].latents, exact)
            mse = np.square(made[0].frames.astype(float) - base[0].frames).mean()
            result[name] |= {
                "times_as_fast": statistics.median(ratios),
                "latents_error": _error(made[0].latents, base[0].latents),
                "frames_psnr": float(10 * np.log10(255**2 / mse)) if mse else float("inf"),
            }
            if not name.startswith("ours") or request.num_frames <= MAX_FRAMES_AT_ONCE:
                result[name]["gate"] = passes(result[name], result["stock"])
    return result


def _error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b.astype(float)))


def passes(made: dict[str, float], stock: dict[str, float]) -> bool:
    """Whether an arm makes what stock makes; in half precision, whether it is as near to float32."""
    if "error_to_float32" in made:
        return made["error_to_float32"] <= MOST_HALF * stock["error_to_float32"]
    return made["latents_error"] <= MOST_ERROR and made["frames_psnr"] >= LEAST_PSNR


def profile(arm: Arm, request: Request, device: str) -> str:
    """Where the time of one video goes, by operation or kernel; after one that warms everything up."""
    from torch.profiler import ProfilerActivity

    arm(request)
    cuda = device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        arm(request)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def stock_flops(folder: Path, request: Request) -> float:
    """Floating-point operations of one guided step of the stock network."""
    from diffusers import UNet3DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config = UNet3DConditionModel.load_config(folder / "unet")
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(config)
        side = [(length or config["sample_size"] * 8) // 8 for length in (request.height, request.width)]
        x = torch.empty(2, 4, request.num_frames, *side)
        context = torch.empty(2, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(x, 1, context)
    return float(counter.get_total_flops())


# What a fresh process imports and does until the model is ready.
SETUP = {
    "stock": (
        "import torch; from diffusers import TextToVideoSDPipeline",
        "TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)",
    ),
    "ours": ("import torch; from t2v.engine import Engine", "Engine.load(folder, device, dtype)"),
}
SETUP_PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
root, imports, load, folder, device, dtype = sys.argv[1:]
sys.path.insert(0, root)
start = time.perf_counter(); exec(imports)
imported = time.perf_counter(); exec(load)
if device.startswith("cuda"): torch.cuda.synchronize()
ready = time.perf_counter()
print(json.dumps({"import": imported - start, "load": ready - imported, "ready": ready - start}))
"""


def compare_setup(folder: Path, device: str, dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of importing, of loading and of both, arms interleaved, files in the page cache, a process for
    each. They are compared by both: ours imports most of what it needs while it loads."""
    dtype = settled(dtype, device)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETUP}
    for i in range(1 + rounds):
        for name in list(SETUP) if i % 2 == 0 else list(reversed(SETUP)):
            program = [sys.executable, "-c", SETUP_PROGRAM, str(ROOT), *SETUP[name], str(folder), device, dtype]
            done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
            if i:  # the first round fills the page cache
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    result = {}
    for name, made in runs.items():
        result[name] = {stage: statistics.median(run[stage] for run in made) for stage in ("import", "load", "ready")}
        result[name]["times_as_fast"] = statistics.median(a["ready"] / b["ready"] for a, b in zip(runs["stock"], made))
        shown = "".join(f"{stage.replace('_', ' '):>15} {value:7.2f}" for stage, value in result[name].items())
        print(f"{name:9}{shown}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, ms-1.7b-random, or a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, help="pixels, width and height; the model's own if omitted")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--sweep", help="frames=8,16,32 or size=128,256 or steps=10,50: a row for each value")
    parser.add_argument("--window", type=int, help="one arm more: ours in windows of so many frames")
    parser.add_argument("--plot", help="with --sweep frames=...: an SVG of time and memory (needs matplotlib)")
    parser.add_argument("--setup", action="store_true", help="time imports and loading only, against from_pretrained")
    parser.add_argument("--profile", action="store_true", help="where the time of each arm goes, by operation, instead")
    parser.add_argument("--arms", help="some of them only, such as: stock,ours")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = ROOT / "weights" / args.model if args.model in ("demo", "ms-1.7b-random") else Path(args.model)
    if args.model == "ms-1.7b-random" and not folder.exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "random_weights.py", folder], check=True)

    if args.setup:
        result = compare_setup(folder, args.device, args.dtype, args.rounds)
        print(json.dumps({"model": args.model, "rounds": args.rounds, "setup": result}))
        return

    setting = Setting(folder, args.device, args.dtype, args.threads, args.window)
    arms = ["stock", "ours"]
    if args.device.startswith("cuda"):
        arms += ["stock, compiled", "ours, compiled"]
    if args.window:
        arms.append(WINDOWS)
    if args.arms:
        chosen = args.arms.split(",")
        if not set(chosen) <= set(arms):
            parser.error(f"--arms: there are {', '.join(arms)} here, not {args.arms}")
        arms = chosen

    def request(**change: int) -> Request:
        values = {"frames": args.frames, "steps": args.steps, "size": args.size} | change
        return Request(
            PROMPT,
            num_frames=values["frames"],
            num_inference_steps=values["steps"],
            width=values["size"],
            height=values["size"],
            seed=0,
        )

    if args.profile:
        for name in arms:
            print(f"\n{name}\n{profile(setting.arm(name), request(), args.device)}", flush=True)
        return

    half = settled(args.dtype, args.device) != "float32"
    what, _, values = (args.sweep or f"frames={args.frames}").partition("=")
    requests = {int(value): request(**{what: int(value)}) for value in values.split(",")}
    # A fresh process for each: what it needs from its start on, loading included.
    cold = dataclasses.replace(setting, warm=False)
    peaks: dict[int, dict[str, float]] = {}
    for value, asked in requests.items():
        peaks[value] = {}
        for name in arms:
            with Process(name, cold) as process:
                process(dataclasses.replace(asked, num_inference_steps=2))
                peaks[value][name] = process.peak_memory()
    rows = []
    with contextlib.ExitStack() as stack:
        exact = {}
        if half:
            with Process("ours", dataclasses.replace(cold, dtype="float32")) as process:
                exact = {value: process(asked).latents for value, asked in requests.items()}
        processes = {name: stack.enter_context(Process(name, setting)) for name in arms}
        for value, asked in requests.items():
            row: dict[str, Any] = {what: value}
            row |= compare(processes, asked, args.rounds, args.warmups, exact.get(value))
            flops = stock_flops(folder, asked) * asked.num_inference_steps
            peak = next((p for gpu, p in PEAK_FLOPS.items() if gpu in _device_name(args.device)), None)
            for name in arms:
                row[name]["peak_memory_gib"] = peaks[value][name]
                row[name]["stock_tflops_per_second"] = flops / row[name]["denoise"] / 1e12
                row[name]["mfu"] = flops / row[name]["denoise"] / peak if peak else None
            rows.append(row)
            _table(row, what)
    fits = {name: fit([row[what] for row in rows], [row[name]["total"] for row in rows]) for name in arms}
    if len(rows) > 2:
        for name, found in fits.items():
            print(f"{name}: {found['base']:.3f} s + {found['slope']:.4f} s per {what}, R^2 {found['r2']:.5f}")
    if args.plot:
        plot(Path(args.plot), rows, what, arms)
    machine = {
        "device": _device_name(args.device),
        "torch": torch.__version__,
        "threads": args.threads or torch.get_num_threads(),
    }
    asked_for = {"model": args.model, "steps": args.steps, "rounds": args.rounds}
    print(json.dumps(asked_for | machine | {"rows": rows, "fits": fits}))
    failed = [f"{name} at {what} = {row[what]}" for row in rows for name in arms if not row[name].get("gate", True)]
    if failed:
        sys.exit(f"Not what stock makes: {', '.join(failed)}.")


def fit(x: list[int], y: list[float]) -> dict[str, float]:
    """The straight line nearest to the points, and the share of their variance it explains."""
    if len(x) < 3:
        return {}
    slope, base = np.polyfit(x, y, 1)
    rest = np.square(np.array(y) - (base + slope * np.array(x))).sum() / np.square(np.array(y) - np.mean(y)).sum()
    return {"base": float(base), "slope": float(slope), "r2": float(1 - rest)}


def plot(path: Path, rows: list[dict[str, Any]], what: str, arms: list[str]) -> None:
    """Seconds and peak memory over what was swept, a line for each arm."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "t2v"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, key, label in zip(panels, ("total", "peak_memory_gib"), ("seconds for a video", "peak memory, GiB")):
        for name in arms:
            panel.plot([row[what] for row in rows], [row[name][key] for row in rows], marker="o", label=name)
        panel.set(xlabel=what, ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, metadata={"Date": None})


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


COLUMNS = {
    "total": "8.3f",
    "min": "8.3f",
    "spread": "8.3f",
    "text": "8.3f",
    "denoise": "8.3f",
    "decode": "8.3f",
    "encode": "8.3f",
    "host_ms": "8.2f",
    "steps_per_second": "8.2f",
    "peak_memory_gib": "8.2f",
    "times_as_fast": "8.2f",
    "latents_error": "8.1e",
    "error_to_float32": "8.1e",
    "frames_psnr": "8.1f",
}


def _table(row: dict[str, Any], what: str) -> None:
    print(f"\n{what} = {row[what]}")
    print(" " * 16 + "".join(f"{name.replace('_', ' ')[:9]:>10}" for name in COLUMNS))
    for name, result in row.items():
        if name != what:
            cells = (format(result[k], form) if k in result else "-" for k, form in COLUMNS.items())
            print(f"{name:16}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
