"""Where a GPU's time goes: the kernels of a torch.profiler trace, summed by the kind of work they do."""

import json
import re
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

# Copies are told by the kernel's name first, because libraries convert layouts on their own inside an operation.
LAYOUT = re.compile(r"nchwToNhwc|nhwcToNchw|nchw_to_nhwc|CatArray|transpose|Memcpy|Memset|direct_copy", re.IGNORECASE)
# Then the torch operation that launched the kernel decides.
OPERATIONS = (
    ("conv", re.compile(r"conv", re.IGNORECASE)),
    ("attention", re.compile(r"scaled_dot_product|attention|softmax|baddbmm|bmm")),
    ("GEMM", re.compile(r"aten::(addmm|mm|matmul|linear|_addmm_activation)")),
    ("norm", re.compile(r"norm|var_mean")),
    ("copy", re.compile(r"aten::(copy_|cat|clone|contiguous|_to_copy|repeat_interleave|index_select|stack|fill_)")),
)
# A CUDA graph does not say which operation a kernel came from; there the kernel's name decides.
KERNELS = (
    ("attention", re.compile(r"flash|fmha|sdpa|attention|softmax|^attend$", re.IGNORECASE)),
    ("norm", re.compile(r"^(small_norm|norm_rows|add_up|finish|apply)$")),  # of t2v.networks.triton_kernels
    ("conv", re.compile(r"conv|implicit_gemm|fprop|dgrad|wgrad", re.IGNORECASE)),
    ("GEMM", re.compile(r"gemm|gemv|nvjet|cutlass|splitK|cublas", re.IGNORECASE)),
    ("norm", re.compile(r"norm|moments|FusedParams|welford", re.IGNORECASE)),
    ("copy", re.compile(r"copy|index|repeat|fill", re.IGNORECASE)),
)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Launch(NamedTuple):
    """A kernel, the torch operation that launched it, and the shapes of its inputs."""

    kernel: str
    operation: str | None
    shapes: list[list[int]]


def kind(kernel: str, operation: str | None = None) -> str:
    """What a kernel does: conv, GEMM, attention, norm, copy or elementwise."""
    if LAYOUT.search(kernel):
        return "copy"
    for name, pattern in OPERATIONS if operation else ():
        if pattern.search(str(operation)):
            return name
    for name, pattern in KERNELS:
        if pattern.search(kernel):
            return name
    return "elementwise"


def profile(function: Callable[[], Any], cuda: bool, known: list[Launch] | None = None) -> dict[str, Any]:
    """Call the function once under the profiler, after one call that warms it up.

    Args:
        known: launches of earlier profiles; those of this one are added. A CUDA graph does not say which operations its
            kernels came from. They are taken from the earlier launches of the same kernels, in the same order.

    Returns:
        `kernels`: the number of kernels. `busy_ms`: the time in which at least one kernel ran. `kinds`: milliseconds by
        kind. `top`: the 25 entries that take longest, by kernel, operation and shapes. Without a GPU operations
        stand for kernels.
    """
    function()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        function()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarise(events, cuda, known)


def summarise(events: Iterable[dict[str, Any]], cuda: bool = True, known: list[Launch] | None = None) -> dict[str, Any]:
    """The result of `profile`, from the events of a Chrome trace, whose times are microseconds."""
    complete = [event for event in events if event.get("ph") == "X"]
    operations = {
        e["args"]["External id"]: e for e in complete if e.get("cat") == "cpu_op" and "External id" in e["args"]
    }
    if cuda:
        kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    else:
        kernels = _without_children([event for event in complete if event.get("cat") == "cpu_op"])
    kernels.sort(key=lambda event: event["ts"])
    earlier: dict[str, deque[Launch]] = defaultdict(deque)
    for launch in known or []:
        earlier[launch.kernel].append(launch)
    kinds: dict[str, float] = defaultdict(float)
    lines: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in kernels:
        operation = operations.get(event.get("args", {}).get("External id"))
        name = operation["name"] if operation else None
        shapes = [s for s in operation["args"].get("Input Dims", []) if s][:2] if operation else []
        if operation is None and earlier[event["name"]]:
            _, name, shapes = earlier[event["name"]].popleft()
        elif known is not None:
            known.append(Launch(event["name"], name, shapes))
        kinds[kind(event["name"], name)] += event["dur"] / 1e3
        lines[event["name"][:90], name or "", json.dumps(shapes)].append(event["dur"] / 1e3)
    longest = sorted(lines.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "kernels": len(kernels),
        "busy_ms": _union([(e["ts"], e["ts"] + e["dur"]) for e in kernels]) / 1e3,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "top": [
            {"ms": sum(times), "calls": len(times), "kernel": kernel, "operation": operation, "shapes": shapes}
            for (kernel, operation, shapes), times in longest
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A profile for a terminal."""
    kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in found["kinds"].items())
    text = [f"{found['kernels']} kernels, busy for {found['busy_ms']:.2f} ms: {kinds}"]
    for row in found["top"]:
        operation = f"{row['operation'][:36]} {row['shapes'][:60]}"
        text.append(f"{row['ms']:9.3f} ms {row['calls']:5} x {row['kernel'][:60]:60} {operation}")
    return text


def _without_children(operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Operations with the time that they spend in no other operation."""
    own = []
    open_ones: list[dict[str, Any]] = []  # each within the one before
    for event in sorted(operations, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        while open_ones and not (
            open_ones[-1]["tid"] == event["tid"] and event["ts"] < open_ones[-1]["ts"] + open_ones[-1]["total"]
        ):
            open_ones.pop()
        if open_ones:
            open_ones[-1]["dur"] -= event["dur"]
        open_ones.append(event | {"total": event["dur"]})
        own.append(open_ones[-1])
    return own


def _union(spans: list[tuple[float, float]]) -> float:
    """The length that the spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
