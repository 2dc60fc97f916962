"""Runs a call in a thread of its own, for the sake of the CPU's parallel operations.

OpenMP keeps a team of threads for every thread that has called it, for as long as that one lives. Once the teams
together have more threads than the machine has cores, their members no longer spin while they wait for work but sleep,
and a step of the denoiser takes twice as long. Cog calls setup() in one thread and predict() in several others. A
thread that has ended takes its team with it: so every call gets one, and there is never more than one team.
"""

import contextvars
import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 0.05  # seconds between two looks for a cancellation, which Python cannot deliver to a thread that waits
PATIENCE = 1.0  # seconds that a call has to end after it was stopped, before it is told again


def call(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, its result or its exception.

    What stops this thread meanwhile, a cancellation, is passed on to the call; this returns when that has ended.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:
            errors.append(error)
        done.set()

    def wait(seconds: float) -> bool:
        """Whether the call has ended; by the thread too, for what stops it may come right before `done`. Thread.join is
        not used: stopped in it, Python 3.11 takes the thread that was waited for to have ended."""
        deadline = time.monotonic() + seconds
        while worker.is_alive() and time.monotonic() < deadline:
            if done.wait(INTERVAL):
                return True
        return not worker.is_alive()

    # In this thread's context: it is by that that Cog knows whose output a print is.
    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    worker.start()
    try:
        wait(math.inf)
    except BaseException as stop:
        while worker.is_alive() and not done.is_set():
            identity, kind = ctypes.c_ulong(worker.ident or 0), ctypes.py_object(type(stop))
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, kind)
            wait(PATIENCE)
        raise
    if errors:
        raise errors[0]
    return results[0]
