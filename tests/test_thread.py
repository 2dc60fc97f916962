"""Calls in a thread of their own."""

import contextvars
import ctypes
import threading
import time

import pytest

from t2v import thread


class Stop(BaseException):
    pass


def test_result_exception_and_context_pass():
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    variable.set("mine")
    caller = threading.get_ident()
    assert thread.call(lambda x: (x, variable.get(), threading.get_ident() != caller), 3) == (3, "mine", True)
    with pytest.raises(KeyError, match="wrong"):
        thread.call({}.__getitem__, "wrong")


def test_every_call_ends_its_thread():
    before = threading.active_count()
    for _ in range(5):
        thread.call(time.sleep, 0)
    time.sleep(0.1)
    assert threading.active_count() == before


def test_what_stops_the_caller_stops_the_call_and_is_waited_for():
    seen: list[str] = []

    def work() -> None:
        try:
            while True:
                time.sleep(0.01)
        finally:
            time.sleep(0.2)
            seen.append("cleaned up")

    def caller() -> None:
        try:
            thread.call(work)
        except Stop:
            seen.append("stopped")

    running = threading.Thread(target=caller)
    running.start()
    time.sleep(0.2)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running.ident), ctypes.py_object(Stop))
    running.join(3)
    assert seen == ["cleaned up", "stopped"]
