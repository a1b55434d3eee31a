"""Threads for a target's own code."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.device.targets import BlockingRam
from ublkpy.upcall import pool
from ublkpy.upcall.pool import Executor, Pool
from ublkpy.uring.queue import Call
from ublkpy.uring.uapi import Op

WRITE: Call = (0, 512, 0, int(Op.WRITE), 3, 0)


class Desk:
    """Of a queue, what a pool needs: the calls of a batch, and a place for the answers."""

    def __init__(self, *calls: Call) -> None:
        self._calls = calls
        self.answers: list[tuple[int, int]] = []

    def calls(self) -> list[Call]:
        return list(self._calls)

    def let_go(self, _piece: int) -> None:
        pass

    def data(self, _place: int, length: int, _what: int) -> memoryview:
        return memoryview(bytearray(length))

    def answer(self, piece: int, result: int) -> None:
        self.answers.append((piece, result))


def pool_of(desk: Any) -> Pool:
    target = BlockingRam()
    target.open()
    return Pool(desk, target)


def test_as_many_at_a_time_as_there_are_threads() -> None:
    executor, barrier = Executor("disk"), threading.Barrier(pool._THREADS, timeout=60)
    found = [executor.submit(barrier.wait) for _ in range(2 * pool._THREADS)]
    assert sorted(future.result(60) for future in found) == sorted([*range(pool._THREADS)] * 2)
    executor.shutdown()
    assert executor.wait(60)


def test_one_after_the_other_needs_one_thread() -> None:
    executor = Executor("disk")
    names = set()
    for _ in range(20):
        names.add(executor.submit(lambda: threading.current_thread().name).result(60))
        assert executor.wait(60)
    executor.shutdown()
    assert names == {"disk_0"}


def test_what_a_job_raises_is_in_its_future() -> None:
    executor = Executor("disk")
    assert isinstance(executor.submit(lambda: 1 // 0).exception(60), ZeroDivisionError)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(print)


def test_to_shut_down_waits_for_nobody() -> None:
    executor, go_on, begun = Executor("disk"), threading.Event(), threading.Event()
    late: list[int] = []

    def wait() -> None:
        begun.set()
        go_on.wait(60)

    executor.run(wait)
    assert begun.wait(60)
    executor._started = pool._THREADS  # no more threads
    executor.run(late.append, 1)
    executor.shutdown(cancel_futures=True)
    assert not executor.wait(0.01)
    go_on.set()
    assert executor.wait(60)
    assert not late


def test_it_serves_asyncio() -> None:
    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(pool.executor("disk"))
        return await asyncio.to_thread(lambda: threading.current_thread().name)

    assert asyncio.run(main()) == "disk_0"
    made = pool.here()
    assert made
    assert made.wait(60)


def test_a_program_ends_with_a_method_that_does_not() -> None:
    script = "from ublkpy.upcall.pool import Executor; import time; Executor('disk').run(time.sleep, 600)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_cpus_that_cannot_be_had_are_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(errno.EPERM, "a filter of system calls")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    desk = Desk(WRITE)
    answering = pool_of(desk)
    answering.answer()
    assert answering._pool.wait(60)
    answering.close()
    assert desk.answers == [(3, 0)]


def test_without_any_thread_requests_fail(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    desk = Desk(WRITE, WRITE)
    answering = pool_of(desk)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        answering.answer()
    assert desk.answers == [(3, -errno.ENOMEM)] * 2
    assert caplog.messages == [
        "requests of target blocking-ram fail: cannot start a thread: the system allows no more (ulimit -u, pids.max)"
    ]
    answering.answer()
    assert answering._pool.wait(60)
    assert desk.answers[2:] == [(3, 0)] * 2
    answering.close()
