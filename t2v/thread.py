"""One thread for all work, for the sake of the CPU's parallel operations.

OpenMP keeps a team of threads for every thread that has called it. Once the teams together have more threads than the
machine has cores, their members no longer spin while they wait for work but sleep, and a step of the denoiser takes
twice as long. Cog calls setup() in one thread and predict() in several others; here their work is done in one.
"""

import contextvars
import ctypes
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

INTERVAL = 0.05  # seconds between two looks for a cancellation, which Python cannot deliver to a thread that waits
PATIENCE = 1.0  # seconds that a call has to end after it was stopped, before it is told again


class Call:
    """One call, its outcome, and how far it is.

    Attributes:
        said: what it has said and nobody has taken yet.
        running: whether it may be stopped now.
        stopped: whether it shall not begin any more.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]):
        self.function, self.args = function, args
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.context = contextvars.copy_context()  # it is by that that Cog knows whose output a print is
        self.result: Any = None
        self.error: BaseException | None = None
        self.running = self.stopped = False
        self.done = threading.Event()


class Worker:
    """A thread that makes calls, one after the other. It lives as long as the process.

    A thread for each call would do for OpenMP, but not for cancellations: in CPython 3.11 an exception sent to a thread
    that is just starting another one may hit that one, which then never begins, while the first waits for it for ever.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` in the worker's thread, its result or its exception.

        What stops the caller meanwhile, a cancellation, is passed on to the call; this returns when that has ended.
        """
        (result,) = self._follow(Call(function, args))
        return result

    def stream(self, function: Callable[..., Any], *args: Any) -> Generator[Any, None, None]:
        """What `function(*args, say)` says in the worker's thread, `say(what)`, while it runs; its result last.

        A caller that takes no more, or is stopped, stops the call; it has ended when the iterator has.
        """
        call = Call(function, args)
        call.args += (call.said.put,)
        yield from self._follow(call)

    def _follow(self, call: Call) -> Generator[Any, None, None]:
        try:
            self.calls.put(call)
            while not call.done.wait(INTERVAL):
                while not call.said.empty():
                    yield call.said.get()
        except BaseException as stop:
            call.stopped = True
            self.calls.put(call)  # it may not have got there; a second time does no harm
            while not call.done.is_set():
                with self.lock:
                    if call.running:
                        # A generator that is closed would be no reason to stop for those who clean up after all others.
                        reason = KeyboardInterrupt if isinstance(stop, GeneratorExit) else type(stop)
                        identity, kind = ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(reason)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, kind)
                call.done.wait(PATIENCE)
            raise
        if call.error:
            raise call.error
        while not call.said.empty():
            yield call.said.get()
        yield call.result

    def _work(self) -> None:
        while True:
            call = self.calls.get()
            try:
                with self.lock:
                    call.running = not (call.stopped or call.done.is_set())
                if call.running:
                    call.result = call.context.run(call.function, *call.args)
                with self.lock:
                    call.running = False
            except BaseException as error:  # also what stops a call that has just returned
                call.running = False
                call.error = error
            call.done.set()
