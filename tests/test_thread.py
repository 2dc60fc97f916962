"""Calls in the worker's thread."""

import contextvars
import ctypes
import random
import threading
import time

import pytest

from t2v.thread import Worker


class Stop(BaseException):
    pass


@pytest.fixture
def worker() -> Worker:
    return Worker()


def stop(thread: threading.Thread) -> None:
    assert thread.ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stop))


def test_result_exception_and_context_pass(worker: Worker):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    variable.set("mine")
    assert worker.call(lambda x: (x, variable.get()), 3) == (3, "mine")
    with pytest.raises(KeyError, match="wrong"):
        worker.call({}.__getitem__, "wrong")


def test_all_calls_are_made_in_one_thread_whoever_asks(worker: Worker):
    seen: list[int] = []
    for _ in range(3):
        asking = threading.Thread(target=lambda: seen.append(worker.call(threading.get_ident)))
        asking.start()
        asking.join(3)
    assert seen == [worker.thread.ident] * 3


def test_what_stops_the_caller_stops_the_call_and_is_waited_for(worker: Worker):
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
            worker.call(work)
        except Stop:
            seen.append("stopped")

    asking = threading.Thread(target=caller)
    asking.start()
    time.sleep(0.2)
    stop(asking)
    asking.join(3)
    assert seen == ["cleaned up", "stopped"]
    assert worker.call(lambda: "well") == "well"


def test_stopped_at_any_moment_it_goes_on_to_the_next_call(worker: Worker):
    ended: list[str] = []

    def caller() -> None:
        try:
            worker.call(time.sleep, 0.002)
            ended.append("done")
        except Stop:
            ended.append("stopped")

    def guarded() -> None:
        try:
            caller()
        except Stop:  # before or after all of it
            ended.append("outside")

    chance = random.Random(0)
    for _ in range(300):
        asking = threading.Thread(target=guarded)
        asking.start()
        time.sleep(chance.random() * 0.005)
        if asking.is_alive():
            stop(asking)
        asking.join(5)
        assert not asking.is_alive()
    assert worker.call(lambda: "well") == "well" and {"done", "stopped"} <= set(ended)


def test_a_stream_gives_what_is_said_as_it_is_said_and_the_result_last(worker: Worker):
    heard = threading.Event()

    def work(first: int, say) -> str:
        say(first)
        assert heard.wait(3)
        say(2)
        return "result"

    items = worker.stream(work, 1)
    assert next(items) == 1
    heard.set()
    assert list(items) == [2, "result"]
    with pytest.raises(ZeroDivisionError):
        list(worker.stream(lambda say: 1 / 0))


def test_who_takes_no_more_of_a_stream_stops_the_call(worker: Worker):
    seen: list[str] = []

    def work(say) -> None:
        try:
            while True:
                say("more")
                time.sleep(0.01)
        finally:
            seen.append("stopped")

    items = worker.stream(work)
    assert next(items) == "more"
    items.close()
    assert seen == ["stopped"]
    assert worker.call(int) == 0
