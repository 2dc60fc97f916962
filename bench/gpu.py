"""Measure on a GPU. One command answers everything that only a GPU can answer, in parts:

    python -m bench.gpu --out outputs/gpu

Run it on one H100 or H200 that nobody else uses. Nothing has to be downloaded: the part `weights` writes the 1.7B model
with random weights (3.7 GB in /tmp), which is as fast as the trained one. Each part has a time limit; those of the
standard parts add up to 12 minutes. After `--budget SECONDS` no part begins. If a part fails or runs out of time, its
findings so far are kept, the reason is recorded, and the next part begins.

OUT/results.json is rewritten after every part. A part that is done there does not run again, unless --again is given;
the same command therefore continues a run that was cut off. OUT/tables.md holds the tables for docs/performance.md. The
command ends with 1 if a part is not done.

What the parts decide:

    default  how many times as fast as stock a request is, in seconds from the prompt to the verified MP4, and the peak
             of memory. Before the kernels of `t2v.networks.fused`: 2.69 s against 3.28 s on an H200.
    profile  what a step spends its time on: products, convolutions, norms, copies, attention, gaps between launches.
    levers   which kernel earns its code, and which other formulation would be faster than the one in the network.
    gates    whether our error in half precision is at most 1.1 times stock's.
    tests    whether tests/test_cuda.py passes: CUDA graphs, windows, LoRA, cancelling, the plan of memory.
    sweep    the time of a step at other sizes, and whether the plan of memory (`t2v.budget`) holds.
    overlap  what it saves to encode while the next frames are decoded.
    micro    single layers, in several ways.
    setup    seconds of fresh processes until they are ready, and of their first and second video.

Two parts take many minutes and run only if they are named: `compile` (our network through torch.compile) and
`compiled-stock` (the default request by stock with its network compiled). Before a GPU is at hand, rehearse. With
little time, begin with the parts that tell most:

    python -m bench.gpu --rehearse          # the same code on the CPU: demo model, minimal sizes
    python -m bench.gpu --parts env,weights,default,profile,levers --budget 120
    python -m bench.gpu --parts compiled-stock
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.lab import Lab
from bench.parts import PARTS, Part, Result

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("env", "default", "levers", "gates", "sweep", "overlap", "setup")  # parts whose tables a terminal shows


class TimeIsUp(BaseException):
    """A part has run into its time limit. It is no Exception, so that no part handles it as a failure of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    standard = [name for name, part in PARTS.items() if part.default]
    parser.add_argument("--parts", default=",".join(standard), help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no part begins")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "outputs" / "gpu")))
    parser.add_argument("--model", type=Path, help="folder; the part weights writes it if it does not exist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--again", action="store_true", help="also run the parts that are done")
    parser.add_argument("--rehearse", action="store_true", help="try the code: demo model, CPU, minimal sizes")
    args = parser.parse_args()
    asked = args.parts.split(",")
    if not set(asked) <= set(PARTS):
        parser.error(f"--parts: there are {', '.join(PARTS)}, not {args.parts}")
    names = [name for name in PARTS if name in asked]
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
    """Run the parts one after the other.

    Returns:
        The names of those that are not done.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    began = time.perf_counter()
    todo = [name for name in names if again or results.get(name, {}).get("status") != "done"]
    for name in todo:
        spent = time.perf_counter() - began
        if spent > budget:
            results[name] = {"status": "not begun"}
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
    """The part's result, with its status, the seconds that it took, and the reason where it is not done."""
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
    """Raise TimeIsUp in the main thread after so many seconds."""

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
    """The tables of all parts; the short ones for a terminal."""
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


if __name__ == "__main__":
    main()
