"""The parts of a GPU run: what each one measures, and how its result becomes a markdown table.

A part gets the models (`Lab`) and an empty result. It stores every finding as soon as it is known, so that a part that
runs into its time limit keeps what it has found.
"""

import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import compare, kernels, layers, levers, random_weights
from bench.arms import device_name, ours
from bench.lab import Lab, milliseconds, noise, relative_error, wall_milliseconds
from bench.report import markdown
from bench.setup_time import compare_setup
from t2v import budget
from t2v.media.encode import write_video
from t2v.networks import fused
from t2v.networks.unet3d import UNet3DConfig
from t2v.request import Request
from t2v.sampling.denoiser import GuidedNetwork

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_cuda.py",)
LOG_LINES = 60  # of the tests' output that are kept

# Of one guided step of stock's network, 16 frames of 256x256 by the 1.7B model, as torch counts them. Counting them
# takes seconds.
DEFAULT_GFLOP = 9774.2

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        run: measures; called with (lab, result), and fills the result.
        limit: seconds that it may take.
        table: makes lines of markdown of the result.
        default: whether it runs when no parts are named.
    """

    run: Callable[[Lab, Result], None]
    limit: float
    table: Callable[[Result], list[str]] = lambda result: []
    default: bool = True


def env(lab: Lab, result: Result) -> None:
    """Versions, and the rates that the device reaches in a copy and in a matrix product."""
    result |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(lab.device),
    }
    result["processor"] = f"{os.cpu_count()} cores"
    for name in ("triton", "diffusers", "transformers"):
        with contextlib.suppress(ImportError):
            result[name] = __import__(name).__version__
    n = 512 if lab.rehearsal else 8192
    if lab.cuda:
        query = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            result["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        result |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        start = time.perf_counter()
        result["triton_kernels_run"] = fused.available()
        result["first_triton_kernel_s"] = time.perf_counter() - start
    source = torch.randn(n * n * (4 if lab.cuda else 1), device=lab.device)
    ms = milliseconds([partial(torch.empty_like(source).copy_, source)], lab.cuda)
    result["copy_gb_per_s"] = 2 * source.numel() * 4 / ms / 1e6
    a, b = (torch.randn(n, n, device=lab.device, dtype=lab.dtype) for _ in range(2))
    ms = milliseconds([lambda: a @ b], lab.cuda)
    result["matmul_tflop_per_s"] = 2 * n**3 / ms / 1e9


def env_table(result: Result) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in result.items()]


def write_weights(lab: Lab, result: Result) -> None:
    """Write the 1.7B model with random weights, unless the folder exists."""
    if lab.rehearsal:
        return
    if not (lab.folder / "model_index.json").exists():
        start = time.perf_counter()
        random_weights.write(lab.folder, device=lab.device)
        result["seconds"] = time.perf_counter() - start
    result["gb"] = sum(path.stat().st_size for path in lab.folder.rglob("*") if path.is_file()) / 1e9


def run_tests(lab: Lab, result: Result) -> None:
    """pytest in a process of its own. What it has printed is kept, also if its time is up."""
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-rfEs", "--tb=short", "--durations=5", *TESTS]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            result["exit_status"] = process.wait()
        finally:
            process.kill()
            process.wait()
            result["output"] = Path(log.name).read_text().splitlines()[-LOG_LINES:]
            print("\n".join(result["output"]), flush=True)
    if result["exit_status"]:
        raise RuntimeError(f"pytest ended with {result['exit_status']}")


def tests_table(result: Result) -> list[str]:
    return ["```", *result.get("output", [])[-15:], "```"]


def default(lab: Lab, result: Result) -> None:
    """The default request: ours against stock in one process, in turn, in the opposite order every second round."""
    request = lab.request()
    before = memory_reset(lab)
    start = time.perf_counter()
    lab.engine.warm_up()
    result["load_and_warm_up_s"] = time.perf_counter() - start
    short = lab.request(steps=5)  # warms up, and takes as much memory as one of 50
    lab.ours(short)
    result["peak_gib"] = {"ours": memory_peak(lab) - before}
    before = memory_reset(lab)
    lab.stock(short)
    result["peak_gib"]["stock"] = memory_peak(lab) - before
    arms = {"stock": lab.stock, "ours": lab.ours}
    found = compare.compare(arms, request, rounds=1 if lab.rehearsal else 3, warmups=0)
    is_full_size = lab.engine.unet.config == UNet3DConfig() and not lab.rehearsal
    gflop = DEFAULT_GFLOP if is_full_size else compare.stock_flops(lab.folder, request) / 1e9
    flops = gflop * 1e9 * request.num_inference_steps
    for name, row in found.items():
        row.pop("gate")  # of float32; the part `gates` judges half precision
        row["peak_memory_gib"] = result["peak_gib"][name]
        row["stock_tflop_per_s"] = flops / row["denoise"] / 1e12
    result["arms"] = found
    result["stock_gflop_per_step"] = gflop


def default_table(result: Result) -> list[str]:
    columns = {
        "arm": "",
        **dict.fromkeys(("total", "min", "spread", "text", "denoise", "decode", "encode"), ".3f"),
        "host_ms": ".2f",
        "steps_per_second": ".1f",
        "peak_memory_gib": ".2f",
        "times_as_fast": ".2f",
        "stock_tflop_per_s": ".0f",
        "latents_error": ".1e",
        "frames_psnr": ".1f",
    }
    return markdown([{"arm": name} | row for name, row in result.get("arms", {}).items()], columns)


def memory_reset(lab: Lab) -> float:
    """Start to count the peak anew; GiB that are held now."""
    lab.tidy()
    if not lab.cuda:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved() / 2**30


def memory_peak(lab: Lab) -> float:
    """GiB held at most. The memory of a CUDA graph is not allocated while it is played back, but it is reserved."""
    return torch.cuda.max_memory_reserved() / 2**30 if lab.cuda else 0.0


@torch.inference_mode()
def profile(lab: Lab, result: Result) -> None:
    """Kernels of one guided step (ours one by one, ours as a CUDA graph, stock's network), and of decoding."""
    request = lab.request()
    step = lab.step(lab.engine, request)
    engine, pipeline = lab.engine, lab.pipeline
    x = step.latents
    others = torch.zeros((2, *x.shape), device=x.device)
    guidance = torch.tensor(9.0, device=x.device)
    coefficients = torch.tensor([1.0, -0.1, 0.9, 0.1, 0.0, 0.0], dtype=torch.float64, device=x.device)
    inputs = (x, others, step.timestep_terms, step.text_kv, guidance, coefficients)
    guided = GuidedNetwork(engine.model.network)
    pair = torch.cat([x, x]).to(lab.dtype)
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: guided.step(*inputs),
        "ours, recorded": lambda: engine.model.step(*inputs),
        "stock": lambda: pipeline.unet(pair, 500, encoder_hidden_states=step.context),
        "ours, decoding": lambda: list(engine.vae.decode(x)),
    }
    known: list[kernels.Launch] = []
    for name, function in functions.items():
        wall = wall_milliseconds(function, lab.cuda)
        found = kernels.profile(function, lab.cuda, known)
        found |= {"wall_ms": wall, "gaps_ms": wall - found["busy_ms"]}
        result[name] = found
        print("\n".join([f"{name}: {wall:.2f} ms", *kernels.lines(found)]), flush=True)


def profile_table(result: Result) -> list[str]:
    kinds = sorted({kind for found in result.values() for kind in found["kinds"]})
    rows = [{"step": name} | found | found["kinds"] for name, found in result.items()]
    lines = markdown(
        rows,
        {"step": "", "wall_ms": ".2f", "busy_ms": ".2f", "gaps_ms": ".2f", "kernels": ""} | dict.fromkeys(kinds, ".2f"),
    )
    for name, found in result.items():
        lines += ["", f"{name}, the kernels that take longest:", ""]
        lines += markdown(found["top"][:15], {"ms": ".3f", "calls": "", "kernel": "", "operation": "", "shapes": ""})
    return lines


def levers_table(result: Result) -> list[str]:
    base = next((row["ms"] for row in result.get("rows", []) if "ms" in row), float("nan"))
    rows = [row | {"ms_gained": base - row["ms"]} if "ms" in row else row for row in result.get("rows", [])]
    columns = {"lever": "", "ms": ".3f", "ms_gained": ".3f", "error_to_float32": ".2e", "failed": ""}
    helped = ", ".join(result.get("together", [])) or "none"
    return [*markdown(rows, columns), "", f"Levers that helped: {helped}."]


def layers_table(result: Result) -> list[str]:
    columns = {"layer": "", "way": "", "level": "", "ms": ".4f", "tflop_per_s": ".1f", "gb_per_s": ".0f", "failed": ""}
    return markdown(result.get("rows", []), columns)


@torch.inference_mode()
def gates(lab: Lab, result: Result) -> None:
    """Errors of both arms against our float32 without TF32, which equals stock's to 1e-6: of single predictions, of the
    latents after some steps, of the frames."""
    request = lab.request(steps=10)
    timesteps = (900, 500, 100)
    with levers.allow_tf32(False):
        steps = {t: lab.step(lab.exact, request, t) for t in timesteps}
        exact = {t: step.network(lab.exact.unet) for t, step in steps.items()}
        made = {"float32": ours(lab.exact)(request)}
    lab.drop_exact()
    rows: dict[str, Result] = {"ours": {}, "stock": {}}
    for t, expected in exact.items():
        step = lab.step(lab.engine, request, t)
        rows["ours"][f"prediction_at_{t}"] = relative_error(step.network(lab.engine.unet), expected)
        pair = step.latents.to(lab.dtype).expand(2, -1, -1, -1, -1)
        predicted = lab.pipeline.unet(pair, t, encoder_hidden_states=step.context).sample
        rows["stock"][f"prediction_at_{t}"] = relative_error(predicted, expected)
    made |= {
        "ours": lab.ours(request),
        "stock": lab.stock(request),
    }
    for name, row in rows.items():
        row["latents"] = compare.error(made[name].latents, made["float32"].latents)
        row["frames_psnr"] = compare.psnr(made[name].frames, made["float32"].frames)
    errors = [key for key in rows["ours"] if key != "frames_psnr"]
    most = max(rows["ours"][key] / max(rows["stock"][key], 1e-5) for key in errors)  # a rehearsal is exact
    result |= {
        "rows": [{"arm": name} | row for name, row in rows.items()],
        "steps": request.num_inference_steps,
        "ours_to_stock": most,
        "passes": most <= compare.MAX_RATIO,
    }


def gates_table(result: Result) -> list[str]:
    rows = result.get("rows", [])
    columns = {"arm": ""} | {
        key: ".1f" if key == "frames_psnr" else ".2e" for key in (rows[0] if rows else {}) if key != "arm"
    }
    return [*markdown(rows, columns), "", f"Our error divided by stock's, at most: {result.get('ours_to_stock')}."]


def sweep(lab: Lab, result: Result) -> None:
    """Numbers of frames and sizes: milliseconds of a step, and the peak of memory against the plan."""
    cases = [(8, 256), (32, 256), (64, 256), (16, 512)]
    rows = result["rows"] = []
    arms = {"ours": lab.ours, "stock": lab.stock}
    for frames, size in cases[:1] if lab.rehearsal else cases:
        request = lab.request(frames, size, steps=6)
        budget.release(lab.engine.model)
        row: Result = {
            "frames": frames,
            "size": f"{request.width}x{request.height}",
            "planned_gib": planned(lab, request),
        }
        rows.append(row)
        for name, arm in arms.items():
            memory_reset(lab)
            before = torch.cuda.memory_allocated() / 2**30 if lab.cuda else 0.0
            start = time.perf_counter()
            arm(request)
            row[f"{name}_first_s"] = time.perf_counter() - start
            made = arm(request)
            row[f"{name}_peak_gib"] = memory_peak(lab) - before
            row[f"{name}_ms_per_step"] = made.seconds["denoise"] / request.num_inference_steps * 1e3
            row[f"{name}_decode_s"] = made.seconds["decode"] + made.seconds["encode"]
            budget.release(lab.engine.model)
        row["times_as_fast"] = row["stock_ms_per_step"] / row["ours_ms_per_step"]
        print(
            "  ",
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()},
            flush=True,
        )


def planned(lab: Lab, request: Request) -> float:
    """GiB that the memory plan expects beside the weights."""
    model, pass_ = lab.engine.model, lab.engine.prepare(request).passes[0]
    plan = budget.choose_plan(model, pass_)
    return (budget.denoising_bytes(model, pass_, plan) + budget.decoding_bytes(model, pass_, plan)) / 2**30


def sweep_table(result: Result) -> list[str]:
    columns = {"frames": "", "size": ""} | dict.fromkeys(
        ("ours_ms_per_step", "stock_ms_per_step", "times_as_fast"), ".2f"
    )
    columns |= dict.fromkeys(
        ("planned_gib", "ours_peak_gib", "stock_peak_gib", "ours_decode_s", "stock_decode_s"), ".2f"
    )
    return markdown(result.get("rows", []), columns | {"ours_first_s": ".2f"})


def overlap(lab: Lab, result: Result) -> None:
    """Seconds of decoding, of encoding and verifying, and of both at the same time."""
    rows = result["rows"] = []
    for frames in (2,) if lab.rehearsal else (16, 64):
        latents = noise(lab.engine, lab.request(frames))
        row: Result = {"frames": frames}
        made: list[np.ndarray] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"
            for _ in range(2):  # the first round warms up
                start = time.perf_counter()
                made = list(lab.engine.vae.decode(latents))
                decoded = time.perf_counter()
                write_video(path, made, 8, {})
                encoded = time.perf_counter()
                write_video(path, lab.engine.vae.decode(latents), 8, {})
                both = time.perf_counter()
            row |= {"decode_s": decoded - start, "encode_s": encoded - decoded, "together_s": both - encoded}
        rows.append(row)


def overlap_table(result: Result) -> list[str]:
    return markdown(result.get("rows", []), {"frames": "", "decode_s": ".3f", "encode_s": ".3f", "together_s": ".3f"})


def setup(lab: Lab, result: Result) -> None:
    """Seconds of fresh processes: imports, loading, the first video and the second."""
    steps, frames, rounds = (1, 1, 1) if lab.rehearsal else (10, 16, 2)
    result |= compare_setup(lab.folder, lab.device, "auto", rounds, frames, steps)


def setup_table(result: Result) -> list[str]:
    columns = {"arm": ""} | dict.fromkeys(("import", "load", "ready", "first", "second", "times_as_fast"), ".2f")
    return markdown([{"arm": name} | row for name, row in result.items()], columns)


def compiled_table(result: Result) -> list[str]:
    columns = {"mode": "", "compile_s": ".1f", "ms": ".3f", "wall_ms": ".3f", "error_to_float32": ".2e", "failed": ""}
    return markdown(result.get("rows", []), columns)


def compiled_stock(lab: Lab, result: Result) -> None:
    """The default request by stock with its network compiled, as diffusers' documentation advises."""
    pipeline = lab.pipeline
    eager = pipeline.unet
    mode = "default" if lab.rehearsal else "max-autotune"
    try:
        pipeline.unet = torch.compile(eager, mode=mode, fullgraph=True, dynamic=False)
        arm = lab.stock
        request = dataclasses.replace(lab.request(), width=None, height=None)
        start = time.perf_counter()
        arm(dataclasses.replace(request, num_inference_steps=2))
        result["compile_s"] = time.perf_counter() - start
        result["runs"] = [arm(request).seconds for _ in range(1 if lab.rehearsal else 3)]
    finally:
        pipeline.unet = eager


def compiled_stock_table(result: Result) -> list[str]:
    runs = [{"run": str(i)} | run for i, run in enumerate(result.get("runs", []), 1)]
    columns = {"run": ""} | dict.fromkeys(("total", "text", "denoise", "decode", "encode"), ".3f")
    return [f"Compiled in {result.get('compile_s')} s.", "", *markdown(runs, columns)]


# In the order of their value, should time run out.
PARTS = {
    "env": Part(env, 30, env_table),
    "weights": Part(write_weights, 60),
    "default": Part(default, 90, default_table),
    "profile": Part(profile, 40, profile_table),
    "levers": Part(levers.try_levers, 90, levers_table),
    "gates": Part(gates, 40, gates_table),
    "tests": Part(run_tests, 120, tests_table),
    "sweep": Part(sweep, 60, sweep_table),
    "overlap": Part(overlap, 20, overlap_table),
    "micro": Part(layers.time_layers, 40, layers_table),
    "setup": Part(setup, 120, setup_table),
    "compile": Part(levers.compile_network, 240, compiled_table, default=False),
    "compiled-stock": Part(compiled_stock, 420, compiled_stock_table, default=False),
}
