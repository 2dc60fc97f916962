"""Calls in the worker's thread, and callers that are stopped meanwhile."""

import contextvars
import ctypes
import random
import threading
import time

import pytest

from t2v.serving.worker import Stopped, Worker


class Cancelled(BaseException):
    pass


@pytest.fixture
def worker() -> Worker:
    return Worker()


def cancel(thread: threading.Thread) -> None:
    """Raise `Cancelled` in the thread, as Cog does to the one that it called."""
    assert thread.ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))


def test_result_exception_and_context_are_passed_on(worker: Worker):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    variable.set("mine")
    assert worker.call(lambda x: (x, variable.get()), 3) == (3, "mine")
    with pytest.raises(KeyError, match="wrong"):
        worker.call({}.__getitem__, "wrong")


def test_all_callers_share_one_thread(worker: Worker):
    seen: list[int] = []
    for _ in range(3):
        caller = threading.Thread(target=lambda: seen.append(worker.call(threading.get_ident)))
        caller.start()
        caller.join(3)
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0] != threading.get_ident()


def test_a_stopped_caller_ends_the_call_at_its_next_check_and_waits_for_it(worker: Worker):
    seen: list[str] = []

    def work() -> None:
        try:
            while True:
                time.sleep(0.01)
                worker.check()
        finally:
            time.sleep(0.2)
            seen.append("cleaned up")

    def call() -> None:
        try:
            worker.call(work)
        except Cancelled:
            seen.append("cancelled")

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.2)
    cancel(caller)
    caller.join(3)
    assert seen == ["cleaned up", "cancelled"]
    assert worker.call(lambda: "well") == "well"


def test_a_call_stopped_before_its_turn_never_starts_and_no_other_call_is_stopped(worker: Worker):
    release = threading.Event()
    seen: list[str] = []

    def first() -> None:
        release.wait(5)
        worker.check()
        seen.append("first ran")

    def call_second() -> None:
        try:
            worker.call(seen.append, "second ran")
        except Cancelled:
            seen.append("cancelled")

    callers = [threading.Thread(target=worker.call, args=(first,)), threading.Thread(target=call_second)]
    for caller in callers:
        caller.start()
        time.sleep(0.1)
    cancel(callers[1])
    time.sleep(0.2)
    release.set()
    for caller in callers:
        caller.join(3)
    assert seen == ["first ran", "cancelled"]
    worker.call(worker.check)


def test_a_cancellation_at_any_moment_leaves_nothing_running(worker: Worker):
    """Also one that arrives between the submission of the work and the wait for it."""
    ended: list[str] = []
    running = threading.Event()

    def work() -> None:
        running.set()
        try:
            for _ in range(4):
                time.sleep(0.0005)
                worker.check()
        finally:
            running.clear()

    def call() -> None:
        try:
            try:
                worker.call(work)
                ended.append("done")
            except Cancelled:
                ended.append("running" if running.is_set() else "stopped")
        except Cancelled:  # before or after the call
            ended.append("outside")

    chance = random.Random(0)
    for _ in range(300):
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        time.sleep(chance.random() * 0.005)
        if caller.is_alive():
            cancel(caller)
        caller.join(5)
        assert not caller.is_alive()
    assert worker.call(lambda: "well") == "well"
    assert {"done", "stopped"} <= set(ended) and "running" not in ended


def test_a_stream_yields_items_as_they_are_sent_and_the_result_last(worker: Worker):
    received = threading.Event()

    def work(first: int, send) -> str:
        send(first)
        assert received.wait(3)
        send(2)
        return "result"

    items = worker.stream(work, 1)
    assert next(items) == 1
    received.set()
    assert list(items) == [2, "result"]
    with pytest.raises(ZeroDivisionError):
        list(worker.stream(lambda send: 1 / 0))


def test_closing_a_stream_stops_the_call_whatever_handles_exceptions(worker: Worker):
    seen: list[str] = []

    def work(send) -> None:
        while True:
            try:
                send("more")
                time.sleep(0.01)
                worker.check()
            except Exception:
                seen.append("swallowed")
            except Stopped:
                seen.append("stopped")
                raise

    items = worker.stream(work)
    assert next(items) == "more"
    items.close()
    assert seen == ["stopped"]
    assert worker.call(int) == 0


def test_a_restarted_worker_runs_calls_in_another_thread():
    worker = Worker()
    before = worker.call(threading.get_ident)
    worker.restart()
    after = worker.call(threading.get_ident)
    assert before != after and worker.call(threading.get_ident) == after
