"""Time this engine against diffusers' stock pipeline: same weights, same noise, same steps, rounds interleaved.

    python -m bench.bench --model demo
    python -m bench.bench --model ms-1.7b-random --frames 8 --size 128 --steps 1 --rounds 5
    python -m bench.bench --model demo --sweep frames=8,16,32,64,128 --plot docs/frames.svg
    python -m bench.bench --model demo --sweep frames=32,64,128,256 --window 16
    python -m bench.bench --model ms-1.7b-random --setup
    python -m bench.bench --model demo --steps 5 --profile

Every arm runs in a process of its own, and they take turns (`bench.arms`). Beside every time stands the gate: the
relative error of the final latents and the PSNR of the frames against stock; in half precision also the error of each
arm against our float32. Prints a table, and one line of JSON last; fails where an arm does not pass the gate.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import kernels, random_weights, report
from bench.arms import PROMPT, WINDOWS, Process, Setting, device_name, settled
from bench.compare import PEAK_FLOPS, compare, fit, stock_flops
from bench.setup_time import compare_setup
from t2v.request import Request

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("demo", "ms-1.7b-random")


def main() -> None:
    parser = options()
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = ROOT / "weights" / args.model if args.model in MODELS else Path(args.model)
    if args.model == "ms-1.7b-random" and not folder.exists():
        random_weights.write(folder)
    if args.setup:
        result = compare_setup(folder, args.device, args.dtype, args.rounds)
        print(json.dumps({"model": args.model, "rounds": args.rounds, "setup": result}))
        return
    setting = Setting(folder, args.device, args.dtype, args.threads, args.window)
    arms = chosen_arms(parser, args)
    what, _, values = (args.sweep or f"frames={args.frames}").partition("=")
    usual = {"frames": args.frames, "steps": args.steps, "size": args.size}
    requests = {int(value): request(**(usual | {what: int(value)})) for value in values.split(",")}
    if args.profile:
        for name in arms:
            found = profile(setting, name, request(**usual))
            print("\n".join(["", name, *kernels.lines(found)]), flush=True)
        return
    rows = measure(setting, arms, what, requests, args.rounds, args.warmups)
    fits = {name: fit(list(requests), [row[name]["total"] for row in rows]) for name in arms}
    for name, found in fits.items():
        if found:
            print(f"{name}: {found['base']:.3f} s + {found['slope']:.4f} s per {what}, R^2 {found['r2']:.5f}")
    if args.plot:
        report.plot(Path(args.plot), rows, what, arms)
    machine = {"device": device_name(args.device), "torch": torch.__version__, "threads": args.threads}
    asked_for = {"model": args.model, "steps": args.steps, "rounds": args.rounds}
    print(json.dumps(asked_for | machine | {"rows": rows, "fits": fits}))
    failed = [f"{name} at {what} = {row[what]}" for row in rows for name in arms if not row[name].get("gate", True)]
    if failed:
        sys.exit(f"The video differs from stock's: {', '.join(failed)}.")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, ms-1.7b-random, or a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, help="width and height in pixels; default: the model's own")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--sweep", help="frames=8,16,32 or size=128,256 or steps=10,50: one row for each value")
    parser.add_argument("--window", type=int, help="add an arm: ours in windows of this many frames")
    parser.add_argument("--plot", help="with --sweep: write an SVG of time and memory (needs matplotlib)")
    parser.add_argument("--setup", action="store_true", help="time only imports and loading, against from_pretrained")
    parser.add_argument("--profile", action="store_true", help="show only where the time of each arm goes")
    parser.add_argument("--arms", help="run only these, such as: stock,ours")
    return parser


def chosen_arms(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    arms = ["stock", "ours"]
    if args.device.startswith("cuda"):
        arms += ["stock, compiled", "ours, compiled"]
    if args.window:
        arms.append(WINDOWS)
    if not args.arms:
        return arms
    chosen = args.arms.split(",")
    if not set(chosen) <= set(arms):
        parser.error(f"--arms: there are {', '.join(arms)} here, not {args.arms}")
    return chosen


def request(frames: int, steps: int, size: int | None) -> Request:
    return Request(PROMPT, num_frames=frames, num_inference_steps=steps, width=size, height=size, seed=0)


def measure(
    setting: Setting, arms: Sequence[str], what: str, requests: Mapping[int, Request], rounds: int, warmups: int
) -> list[dict[str, Any]]:
    """Compare the arms on every request; one row for each, which is printed when it is known."""
    cold = dataclasses.replace(setting, warm=False)
    peaks = {value: {name: peak_memory(cold, name, asked) for name in arms} for value, asked in requests.items()}
    exact: dict[int, np.ndarray] = {}
    if settled(setting.dtype, setting.device) != "float32":
        with Process("ours", dataclasses.replace(cold, dtype="float32")) as process:
            exact = {value: process(asked).latents for value, asked in requests.items()}
    peak_flops = next((p for gpu, p in PEAK_FLOPS.items() if gpu in device_name(setting.device)), None)
    rows = []
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(Process(name, setting)) for name in arms}
        for value, asked in requests.items():
            result = compare(processes, asked, rounds, warmups, exact.get(value))
            flops = stock_flops(setting.folder, asked) * asked.num_inference_steps
            for name in arms:
                result[name]["peak_memory_gib"] = peaks[value][name]
                result[name]["stock_tflops_per_second"] = flops / result[name]["denoise"] / 1e12
                result[name]["mfu"] = flops / result[name]["denoise"] / peak_flops if peak_flops else None
            print("\n".join(["", f"{what} = {value}", *report.comparison(result)]), flush=True)
            rows.append({what: value} | result)
    return rows


def peak_memory(setting: Setting, name: str, asked: Request) -> float:
    """GiB that a fresh process holds at most, from its start on, loading included."""
    with Process(name, setting) as process:
        process(dataclasses.replace(asked, num_inference_steps=2))
        return process.peak_memory()


def profile(setting: Setting, name: str, asked: Request) -> dict[str, Any]:
    """Where the time of one video goes, by kernel or operation, after one video that warms everything up."""
    arm = setting.arm(name)
    return kernels.profile(lambda: arm(asked), setting.device.startswith("cuda"))


if __name__ == "__main__":
    main()
