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
# Bytes that malloc may hold on to while the tensors of a request come and go.
HELD = 2**28
# Parameters of glibc's malloc, as malloc.h numbers them. So much of what is freed at the heap's end stays; blocks below
# 32 MB come from the heap, as they would after the first of that size; and all threads share one heap, since those of
# others cannot grow beyond 64 MB.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
POLICY = {M_TRIM_THRESHOLD: HELD, M_MMAP_THRESHOLD: 2**25, M_ARENA_MAX: 1}


def free(device: torch.device) -> int | None:
    """Bytes that tensors can still take; None where that cannot be told.

    On the CPU the lesser of what the machine has available and what the container may use, but for `HELD`. A limit of
    address space (`ulimit -v`) is not counted: of what malloc keeps mapped, most can be used again, and nobody knows
    how much.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    left = min(_limits(), default=None)
    return None if left is None else max(0, left - HELD)


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


def keep() -> None:
    """Have malloc keep `HELD` bytes of what is freed for the tensors to come, until `trim`; else they are new memory
    time and again, which the kernel clears page by page. It holds for the process; threads that were there before may
    keep heaps of their own."""
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        library = ctypes.CDLL(None)
        for parameter, value in POLICY.items():
            library.mallopt(parameter, value)


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
