"""Everything to be learned on a GPU, in one command made of parts.

    python -m bench.gpu --out outputs/gpu                      # all parts, in the order of their value
    python -m bench.gpu --parts env,weights,default --budget 120
    python -m bench.gpu --rehearse                             # on the CPU, demo model, minimal sizes

A part has a time limit; where it fails or runs out of time, what it had found is kept, the reason is recorded, and the
next part begins. Results are in OUT/results.json, rewritten after every part; a part that is done there is not run
again without --again. OUT/tables.md has the tables for docs/performance.md.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import bench, kernels, levers, random_weights
from bench.lab import Lab, markdown, milliseconds, relative_error, wall_milliseconds
from t2v import fused
from t2v.engine import MARGIN
from t2v.request import Request
from t2v.video import write_video

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_cuda.py",)

# Of one guided step of stock's network, 16 frames of 256x256 by the 1.7B, as torch counts them; counting takes seconds.
GFLOP_DEFAULT = 9774.2

Result = dict[str, Any]


class TimeIsUp(BaseException):
    """A part has run into its limit. Not an Exception, so that no part takes it for a failure of its own."""


@dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        run: (lab, result) puts what it finds into the result, bit by bit.
        limit: seconds.
        table: the result as lines of markdown.
    """

    run: Callable[[Lab, Result], None]
    limit: float
    table: Callable[[Result], list[str]] = lambda result: []
    default: bool = True


def env(lab: Lab, result: Result) -> None:
    result |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": bench._device_name(lab.device),
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
    if lab.rehearsal:
        return
    if not (lab.folder / "model_index.json").exists():
        start = time.perf_counter()
        random_weights.write(lab.folder, device=lab.device)
        result["seconds"] = time.perf_counter() - start
    result["gb"] = sum(path.stat().st_size for path in lab.folder.rglob("*") if path.is_file()) / 1e9


class Tests:
    """pytest in a process of its own; what it says is in a file, also when its time is up.

    Attributes:
        log: the file.
    """

    log = Path("tests.log")

    def __call__(self, lab: Lab, result: Result) -> None:
        command = [sys.executable, "-u", "-m", "pytest", "-v", "-rfE", "--tb=short", "--durations=10", *TESTS]
        with self.log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            try:
                process.wait()
            finally:
                process.kill()
                process.wait()
                result["output"] = self.log.read_text()[-12000:].splitlines()
                print("\n".join(result["output"][-60:]), flush=True)
        result["exit_status"] = process.returncode
        if process.returncode:
            raise RuntimeError(f"pytest ended with {process.returncode}")


TEST_RUN = Tests()


def default(lab: Lab, result: Result) -> None:
    """The default request, ours against stock in one process, the arms in turn, the order turned round every round."""
    request = lab.request()
    before = memory_reset(lab)
    start = time.perf_counter()
    lab.engine.warm_up()
    result["load_and_warm_up_s"] = time.perf_counter() - start
    arms = {"ours": bench.engine_arm(lab.engine)}
    short = lab.request(steps=5)  # warms up and holds as much memory as one of 50
    arms["ours"](short)
    result["peak_gib"] = {"ours": memory_peak(lab) - before}
    before = memory_reset(lab)
    arms["stock"] = bench.pipeline_arm(lab.pipeline, lab.guidance_scale)
    arms["stock"](short)
    result["peak_gib"]["stock"] = memory_peak(lab) - before
    arms = {"stock": arms["stock"], "ours": arms["ours"]}  # stock first: the others are compared with it
    found = bench.compare(arms, request, rounds=1 if lab.rehearsal else 3, warmups=0)
    step = bench.stock_flops(lab.folder, request) if lab.rehearsal else GFLOP_DEFAULT * 1e9
    flops = step * request.num_inference_steps
    for name, row in found.items():
        row["peak_memory_gib"] = result["peak_gib"][name]
        row["stock_tflop_per_s"] = flops / row["denoise"] / 1e12
    result["arms"] = found
    result["stock_gflop_per_step"] = flops / request.num_inference_steps / 1e9


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
    """GiB that are held now; the peak is counted from here."""
    lab.tidy()
    if not lab.cuda:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved() / 2**30


def memory_peak(lab: Lab) -> float:
    """GiB held at most; what a CUDA graph runs in is not allocated, but reserved."""
    return torch.cuda.max_memory_reserved() / 2**30 if lab.cuda else 0.0


@torch.inference_mode()
def profile(lab: Lab, result: Result) -> None:
    """One guided step of ours as it is and as a CUDA graph, and the network of stock with the same rows."""
    request = lab.request()
    step = lab.step(lab.engine, request)
    engine, pipeline = lab.engine, lab.pipeline
    x = step.latents
    others = torch.zeros((2, *x.shape), device=x.device)
    guidance = torch.tensor(9.0, device=x.device)
    coefficients = torch.tensor([1.0, -0.1, 0.9, 0.1, 0.0, 0.0], dtype=torch.float64, device=x.device)
    inputs = (x, others, step.timestep_terms, step.text_kv, guidance, coefficients)
    pair = torch.cat([x, x]).to(lab.dtype)
    decoded = torch.zeros_like(x)
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: engine._step(*inputs),
        "ours, recorded": lambda: engine.step(*inputs),
        "stock": lambda: pipeline.unet(pair, 500, encoder_hidden_states=step.context),
        "ours, decoding": lambda: list(engine.vae.decode(decoded)),
    }
    known: list[kernels.Launch] = []
    for name, function in functions.items():
        wall = wall_milliseconds(function, lab.cuda)
        found = kernels.profile(function, lab.cuda, known)
        found |= {"wall_ms": wall, "gaps_ms": wall - found["busy_ms"]}
        result[name] = found
        print(f"  {name}: wall {wall:.2f} ms, busy {found['busy_ms']:.2f} ms, {found['kernels']} kernels")
        print("   ", {kind: round(ms, 2) for kind, ms in found["kinds"].items()})
        for line in found["top"]:
            print(
                f"    {line['ms']:7.3f} ms {line['calls']:4} x {line['kernel'][:60]:60} {line['operation'][:30]}"
                f" {line['shapes'][:60]}"
            )


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
    return [*markdown(rows, columns), "", f"Together: {', '.join(result.get('together', []))}."]


def layers_table(result: Result) -> list[str]:
    columns = {"layer": "", "way": "", "level": "", "ms": ".4f", "tflop_per_s": ".1f", "gb_per_s": ".0f", "failed": ""}
    return markdown(result.get("rows", []), columns)


@torch.inference_mode()
def gates(lab: Lab, result: Result) -> None:
    """Errors against our float32 without TF32, which equals stock's to 1e-6: of single predictions, of the latents
    after some steps, of the frames."""
    request = lab.request(steps=10)
    timesteps = (900, 500, 100)
    with levers.tf32(False):
        steps = {t: lab.step(lab.exact, request, t) for t in timesteps}
        exact = {t: step.network(lab.exact.unet) for t, step in steps.items()}
        made = {"float32": bench.engine_arm(lab.exact)(request)}
    lab.drop("exact")
    rows: dict[str, Result] = {"ours": {}, "stock": {}}
    for t, expected in exact.items():
        step = lab.step(lab.engine, request, t)
        rows["ours"][f"prediction_at_{t}"] = relative_error(step.network(lab.engine.unet), expected)
        pair = step.latents.to(lab.dtype).expand(2, -1, -1, -1, -1)
        predicted = lab.pipeline.unet(pair, t, encoder_hidden_states=step.context).sample
        rows["stock"][f"prediction_at_{t}"] = relative_error(predicted, expected)
    made |= {
        "ours": bench.engine_arm(lab.engine)(request),
        "stock": bench.pipeline_arm(lab.pipeline, lab.guidance_scale)(request),
    }
    for name, row in rows.items():
        row["latents"] = bench.error(made[name].latents, made["float32"].latents)
        row["frames_psnr"] = bench.psnr(made[name].frames, made["float32"].frames)
    found = [{"arm": name} | row for name, row in rows.items()]
    errors = [key for key in rows["ours"] if key != "frames_psnr"]
    most = max(rows["ours"][key] / max(rows["stock"][key], 1e-5) for key in errors)  # in float32 both are exact
    result |= {
        "rows": found,
        "steps": request.num_inference_steps,
        "ours_to_stock": most,
        "passes": most <= bench.MOST_HALF,
    }


def gates_table(result: Result) -> list[str]:
    rows = result.get("rows", [])
    columns = {"arm": ""} | {
        key: ".1f" if key == "frames_psnr" else ".2e" for key in (rows[0] if rows else {}) if key != "arm"
    }
    return [*markdown(rows, columns), "", f"Ours to stock's, at most: {result.get('ours_to_stock')}."]


def sweep(lab: Lab, result: Result) -> None:
    """Frames and sizes: seconds for a step, and the memory planned and measured. Ours, then stock."""
    cases = [(32, 256), (16, 512)]
    rows = result["rows"] = []
    ours, stock = bench.engine_arm(lab.engine), bench.pipeline_arm(lab.pipeline, lab.guidance_scale)
    for frames, size in cases[:1] if lab.rehearsal else cases:
        request = lab.request(frames, size, steps=6)
        lab.engine.release()
        row: Result = {
            "frames": frames,
            "size": f"{request.width}x{request.height}",
            "planned_gib": planned(lab, request),
        }
        rows.append(row)
        for name, arm in (("ours", ours), ("stock", stock)):
            memory_reset(lab)
            before = torch.cuda.memory_allocated() / 2**30 if lab.cuda else 0.0
            start = time.perf_counter()
            arm(request)
            row[f"{name}_first_s"] = time.perf_counter() - start
            made = arm(request)
            row[f"{name}_peak_gib"] = memory_peak(lab) - before
            row[f"{name}_ms_per_step"] = made.seconds["denoise"] / request.num_inference_steps * 1e3
            row[f"{name}_decode_s"] = made.seconds["decode"] + made.seconds["encode"]
            lab.engine.release()
        row["times_as_fast"] = row["stock_ms_per_step"] / row["ours_ms_per_step"]
        print(
            "  ",
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()},
            flush=True,
        )


def planned(lab: Lab, request: Request) -> float:
    """GiB beside the weights that the engine's memory plan counts with."""
    engine = lab.engine
    plan = engine.plan(request)
    height, width = engine.size(request)
    shape = (
        1,
        engine.vae.channels,
        engine.timeline(request).size,
        height // engine.vae.factor,
        width // engine.vae.factor,
    )
    chunk = min(request.num_frames, engine.vae.at_once(height, width, plan.chunk_pixels))
    return MARGIN * (engine.unet.workspace(2, shape) + engine.vae.workspace(chunk, height, width)) / 2**30


def sweep_table(result: Result) -> list[str]:
    columns = {"frames": "", "size": ""} | dict.fromkeys(
        ("ours_ms_per_step", "stock_ms_per_step", "times_as_fast"), ".2f"
    )
    columns |= dict.fromkeys(
        ("planned_gib", "ours_peak_gib", "stock_peak_gib", "ours_decode_s", "stock_decode_s"), ".2f"
    )
    return markdown(result.get("rows", []), columns | {"ours_first_s": ".2f"})


def overlap(lab: Lab, result: Result) -> None:
    """Seconds of decoding, of encoding with verification, and of both while one waits for the other."""
    rows = result["rows"] = []
    for frames in (2,) if lab.rehearsal else (16, 64):
        latents = lab.engine.noise(lab.request(frames))
        row: Result = {"frames": frames}
        made: list[np.ndarray] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"
            for _ in range(2):  # the first warms up
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
    """Fresh processes: imports, loading, the first video and the second."""
    steps, frames, rounds = (1, 1, 1) if lab.rehearsal else (10, 16, 2)
    result |= bench.compare_setup(lab.folder, lab.device, "auto", rounds, frames, steps)


def setup_table(result: Result) -> list[str]:
    columns = {"arm": ""} | dict.fromkeys(("import", "load", "ready", "first", "second", "times_as_fast"), ".2f")
    return markdown([{"arm": name} | row for name, row in result.items()], columns)


def compiled_table(result: Result) -> list[str]:
    columns = {"mode": "", "compile_s": ".1f", "ms": ".3f", "wall_ms": ".3f", "error_to_float32": ".2e", "failed": ""}
    return markdown(result.get("rows", []), columns)


def compiled_stock(lab: Lab, result: Result) -> None:
    """The default request by stock whose network is compiled, as diffusers' documentation advises."""
    pipeline = lab.pipeline
    eager = pipeline.unet
    mode = "default" if lab.rehearsal else "max-autotune"
    try:
        pipeline.unet = torch.compile(eager, mode=mode, fullgraph=True, dynamic=False)
        arm = bench.pipeline_arm(pipeline, lab.guidance_scale)
        request = dataclasses.replace(lab.request(), width=None, height=None)
        start = time.perf_counter()
        arm(dataclasses.replace(request, num_inference_steps=2))
        result["compile_s"] = time.perf_counter() - start
        result["runs"] = [arm(request).seconds for _ in range(1 if lab.rehearsal else 4)]
    finally:
        pipeline.unet = eager


def compiled_stock_table(result: Result) -> list[str]:
    runs = [{"run": str(i)} | run for i, run in enumerate(result.get("runs", []), 1)]
    columns = {"run": ""} | dict.fromkeys(("total", "text", "denoise", "decode", "encode"), ".3f")
    return [f"Compiled in {result.get('compile_s')} s.", "", *markdown(runs, columns)]


PARTS = {
    "env": Part(env, 30, env_table),
    "weights": Part(write_weights, 60),
    "default": Part(default, 60, default_table),
    "profile": Part(profile, 20, profile_table),
    "levers": Part(levers.try_levers, 30, levers_table),
    "gates": Part(gates, 25, gates_table),
    "tests": Part(TEST_RUN, 25, lambda result: ["```", *result.get("output", [])[-30:], "```"]),
    "sweep": Part(sweep, 30, sweep_table),
    "overlap": Part(overlap, 15, overlap_table),
    "micro": Part(levers.time_layers, 40, layers_table, default=False),
    "setup": Part(setup, 120, setup_table, default=False),
    "compile": Part(levers.compile_network, 240, compiled_table, default=False),
    "compiled-stock": Part(compiled_stock, 420, compiled_stock_table, default=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    standard = [name for name, part in PARTS.items() if part.default]
    parser.add_argument("--parts", default=",".join(standard), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no part is started")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "outputs" / "gpu")))
    parser.add_argument("--model", type=Path, help="folder; random weights are written there if it does not exist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--again", action="store_true", help="run parts again that are done")
    parser.add_argument("--rehearse", action="store_true", help="the demo model on the CPU, minimal sizes")
    args = parser.parse_args()
    names = args.parts.split(",")
    if not set(names) <= set(PARTS):
        parser.error(f"--parts: there are {', '.join(PARTS)}, not {args.parts}")
    if args.rehearse:
        args.device, args.model = "cpu", args.model or ROOT / "weights" / "demo"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no CUDA here; --rehearse runs all parts on the CPU.")
    warnings.simplefilter("ignore")
    lab = Lab(args.model or Path("/tmp/ms-1.7b-random"), args.device, args.rehearse)
    failed = run(lab, names, args.out, args.budget, args.again)
    if failed:
        sys.exit(f"Not done: {', '.join(failed)}.")


def run(lab: Lab, names: list[str], out: Path, budget: float, again: bool = False) -> list[str]:
    """Run parts one after the other; return those that are not done."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    began = time.perf_counter()
    todo = [name for name in names if again or results.get(name, {}).get("status") != "done"]
    TEST_RUN.log = out.resolve() / "tests.log"
    for name in todo:
        spent = time.perf_counter() - began
        if spent > budget:
            results[name] = {"status": "no time left"}
        else:
            print(f"\n== {name} (at {spent:.0f} s)", flush=True)
            results[name] = run_part(lab, PARTS[name])
            print(f"== {name}: {results[name]['status']}, {results[name]['seconds']:.1f} s", flush=True)
        path.write_text(json.dumps(results, indent=1))
        (out / "tables.md").write_text("\n".join(tables(results)) + "\n")
    print("\n".join(["", *tables(results, short=True)]))
    for name in names:
        print(
            f"{name:10} {results[name]['status']:14} {results[name].get('seconds', 0):6.1f} s"
            f"  {results[name].get('reason', '')}"
        )
    return [name for name in names if results[name]["status"] != "done"]


def run_part(lab: Lab, part: Part) -> Result:
    found: Result = {}
    start = time.perf_counter()
    report: Result = {"status": "done"}
    try:
        with time_limit(part.limit * (10 if lab.rehearsal else 1)):
            part.run(lab, found)
    except TimeIsUp:
        report = {"status": "timed out", "reason": f"more than {part.limit:.0f} s"}
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        report = {"status": "failed", "reason": reason, "traceback": traceback.format_exc().splitlines()}
        traceback.print_exc()
    with contextlib.suppress(Exception):
        lab.tidy()
    return report | {"seconds": time.perf_counter() - start, "result": found}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp in this thread when the time is up."""

    def up(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tables(results: dict[str, Result], short: bool = False) -> list[str]:
    """All tables, in the order of the parts; the short ones are for a terminal."""
    lines = []
    for name in PARTS:
        if name not in results or (short and name not in SHORT):
            continue
        lines += [f"## {name}: {results[name]['status']}", ""]
        try:
            lines += PARTS[name].table(results[name].get("result", {}))
        except Exception as error:  # of a part that did not get far
            lines.append(f"No table: {error!r}")
        lines.append("")
    return lines


SHORT = ("env", "default", "levers", "gates", "sweep", "overlap", "setup")

if __name__ == "__main__":
    main()
