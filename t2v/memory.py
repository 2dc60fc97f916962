"""How much memory a device has left, how much was used, and whether an error means that there was not enough."""

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import torch

# Of the limits a container may set (kernel cgroups, version 2 and 1): limit, use, and what of it can be given back.
CGROUPS_ROOT = Path("/sys/fs/cgroup")
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# How the libraries say that memory is used up where there is no class for it: torch, oneDNN and the C++ library of the
# CPU's; CUDA, cuBLAS and cuDNN of what they allocate themselves.
SIGNS = (
    "can't allocate memory",
    "bad_alloc",
    "not enough memory",
    "could not create a",
    "could not execute a",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)


def free(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where that cannot be told.

    On the CPU the lesser of what the machine has available and what the container may use. A limit of address space
    (`ulimit -v`) is not counted: of what malloc keeps mapped, most can be used again, and nobody knows how much.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min(_limits(), default=None)


def exhausted(error: BaseException) -> bool:
    """Whether the error means that a device's memory was used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def works(device: torch.device) -> bool:
    """Whether the device still computes; after some errors a GPU does not until a new process uses it."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except Exception as error:
        return exhausted(error)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trim() -> None:
    """Give back the CPU's memory that malloc keeps: an idle server would hold what its largest request took."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """What exists now is there to stay: to look through the libraries' 400,000 objects for garbage takes a quarter of a
    second each time."""
    gc.collect()
    gc.freeze()


def mark(device: torch.device) -> None:
    """Where `peak` is to start from."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the kernel then counts the peak anew; else it is that of the whole process


def peak(device: torch.device) -> int | None:
    """Bytes held at most since `mark`: by torch on the GPU, or resident in the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # what a CUDA graph uses is not allocated when it is played back
    return _kilobytes("/proc/self/status", "VmHWM")


def _limits() -> Iterator[int]:
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if available is not None:
        yield available
    for limit, use, stat, reclaimable in CGROUPS:
        most, used = _read(CGROUPS_ROOT / limit), _read(CGROUPS_ROOT / use)
        if most.strip().isdigit() and used:
            cached = re.search(rf"^{reclaimable} (\d+)$", _read(CGROUPS_ROOT / stat), re.MULTILINE)
            yield int(most) - int(used) + (int(cached[1]) if cached else 0)


def _kilobytes(path: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _read(Path(path)), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
