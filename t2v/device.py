"""Device and dtype, the differences between a CPU and a GPU, memory and health."""

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from t2v.errors import WeightsError, is_out_of_memory

NVIDIA_DEVICE = Path("/dev/nvidia0")  # exists wherever a container was given a GPU
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Memory limits of a container (cgroups, version 2 and 1): the file of the limit, the file of the use, and the file and
# key of the part of the use that the kernel can reclaim.
CGROUPS_ROOT = Path("/sys/fs/cgroup")
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# Freed bytes that malloc may keep: MALLOC_TRIM_THRESHOLD_ in cog.yaml.
MALLOC_RESERVE = 2**28


@dataclass(frozen=True)
class DeviceProfile:
    """The differences between a CPU and a GPU. Only kernels decide for themselves, by the device of their tensors.

    Attributes:
        is_asynchronous: whether the host enqueues work and runs ahead of the device.
        chunk_pixels: maximum number of pixels that the autoencoder decodes together. 2^19 are eight frames of 256x256;
            the largest activation then takes 270 MB in float16. A CPU is fastest if most activations stay below 32 MB.
        min_calls_to_record: number of calls with one shape from which a recording pays off. A trace takes half a
            second.
        recordings_hold_memory: whether a recording keeps the memory that it ran in.
    """

    is_asynchronous: bool
    chunk_pixels: int
    min_calls_to_record: int
    recordings_hold_memory: bool

    @classmethod
    def of(cls, device: torch.device) -> "DeviceProfile":
        return GPU if device.type == "cuda" else CPU


CPU = DeviceProfile(False, chunk_pixels=2**15, min_calls_to_record=35, recordings_hold_memory=False)
GPU = DeviceProfile(True, chunk_pixels=2**19, min_calls_to_record=0, recordings_hold_memory=True)


def select_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1"; "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        WeightsError: the device does not exist, or there is a GPU that torch cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and NVIDIA_DEVICE.exists():
            raise WeightsError(
                f"There is a GPU, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it; "
                "update its driver, or choose the device cpu."
            )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WeightsError(f"There is no device {name!r}; use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WeightsError(f"The device is set to {name!r}, but torch finds no CUDA here; use auto or cpu.")
    return device


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name: "float32", "float16", "bfloat16"; "auto" is float16 on CUDA, float32 elsewhere.

    Raises:
        WeightsError: there is no such dtype.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise WeightsError(f"There is no dtype {name!r}; use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def is_healthy(device: torch.device) -> bool:
    """Whether the device still computes. After some errors a GPU computes nothing until a new process uses it."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except Exception as error:
        return is_out_of_memory(error)


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take; None if the number is unknown.

    On a GPU it includes memory that torch's allocator has reserved and does not use. On a CPU it is the available
    memory of the machine or of the container, whichever is less, minus `MALLOC_RESERVE`. A limit of the address space
    (`ulimit -v`) is not considered: malloc can reuse most of the memory that it keeps mapped, but how much is unknown.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = min(_limits(), default=None)
    return None if available is None else max(0, available - MALLOC_RESERVE)


def release_memory(device: torch.device) -> None:
    """Return unused memory to the system."""
    trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trim() -> None:
    """Return the memory that malloc keeps to the system. An idle server would hold the peak of its largest request."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def freeze_gc() -> None:
    """Exclude all objects that exist now from garbage collection.

    Scanning the libraries' 400,000 objects costs 0.25 s per collection.
    """
    gc.collect()
    gc.freeze()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement for `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak; if this fails, the peak is that of the process's lifetime


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes held since `reset_peak`: by torch on a GPU, or resident in the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # the memory of a CUDA graph is reserved, not allocated
    return _kilobytes("/proc/self/status", "VmHWM")


def _limits() -> Iterator[int]:
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if available is not None:
        yield available
    for limit, use, stat, reclaimable in CGROUPS:
        maximum, used = _read(CGROUPS_ROOT / limit), _read(CGROUPS_ROOT / use)
        if maximum.strip().isdigit() and used:
            cached = re.search(rf"^{reclaimable} (\d+)$", _read(CGROUPS_ROOT / stat), re.MULTILINE)
            yield int(maximum) - int(used) + (int(cached[1]) if cached else 0)


def _kilobytes(path: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _read(Path(path)), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
