"""One thread for all work, and cooperative stopping.

OpenMP keeps a team of threads for every thread that has called it. Once the teams together have more threads than the
machine has cores, waiting members sleep instead of spinning, and a denoising step takes twice as long. Cog calls
setup() in one thread and predict() in several others; their work runs in this one.
"""

import contextvars
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

POLL = 0.05  # seconds; Python delivers a cancellation to a waiting thread only between two waits
END = object()  # follows the last item of a call


class Stopped(BaseException):
    """Ends work whose caller was stopped. Not an `Exception`, so that no handler takes it for a failure."""


class Worker:
    """A thread that runs one call after the other, and lives as long as the process or until `restart`."""

    def __init__(self) -> None:
        self._pool = _start_thread()
        self._stop = threading.Event()

    def restart(self) -> None:
        """Go on in a new thread. The old one starts it and ends, and OpenMP's team of threads with it.

        A cancellation cannot leave the worker without a thread: it lands in the caller, before or after the assignment.
        """
        old = self._pool
        self._pool = old.submit(_start_thread).result()
        old.shutdown(wait=False)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` in the worker's thread; returns its result or raises its exception.

        If this caller is stopped meanwhile (Cog raises a cancellation in its thread), the function's next `check`
        raises `Stopped`, and the caller's exception goes on once the function has ended.
        """
        (result,) = self.stream(lambda send: function(*args))
        return result

    def stream(self, function: Callable[..., Any], *args: Any) -> Generator[Any, None, None]:
        """Run `function(*args, send)` in the worker's thread; yields what it sends, at once, and last its result.

        Closing the iterator stops the function as a cancellation does, and returns once it has ended.
        """
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        context = contextvars.copy_context()  # by which Cog attributes what is printed to a prediction

        def run() -> Any:
            try:
                self._stop = stop
                self.check()  # the caller may have been stopped before its turn came
                return context.run(function, *args, items.put)
            finally:
                items.put(END)

        try:
            future = self._pool.submit(run)
            while (item := _next(items)) is not END:
                yield item
        except BaseException:
            stop.set()
            # One thread runs all calls in order: when this one has run, so has `run`. The future is no help here, for
            # a cancellation may arrive after the submission and before the assignment.
            self._pool.submit(int).result()
            raise
        yield future.result()

    def check(self) -> None:
        """Raise `Stopped` if the running call's caller was stopped. Work calls this at every step, in this thread."""
        if self._stop.is_set():
            raise Stopped


def _start_thread() -> ThreadPoolExecutor:
    """A pool of one thread, which runs already.

    In CPython 3.11 a cancellation that arrives while a thread is being started can hit the new thread, and its starter
    then waits for ever.
    """
    pool = ThreadPoolExecutor(1, "t2v-worker")
    pool.submit(int).result()
    return pool


def _next(items: "queue.SimpleQueue[Any]") -> Any:
    while True:
        try:
            return items.get(timeout=POLL)
        except queue.Empty:
            continue
