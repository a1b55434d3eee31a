"""Targets whose plain methods wait for something: threads of a pool call them, many requests at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from ublkpy.tgt.base import Target
from ublkpy.upcall.failure import Failures
from ublkpy.upcall.steps import serve
from ublkpy.uring.queue import LATER, Call, Queue

_log = logging.getLogger(__name__)

_THREADS = 32
"""As many requests of a queue are on their way at once; others wait for their turn."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Job = tuple[Callable[..., object], tuple[Any, ...]]


class Executor(ThreadPoolExecutor):
    """Threads for a target's own code: not bound to one CPU, as that of the queue is, which starts them.

    They end with the program, whatever they wait for, where those of the parent class would hold it up; and to shut it
    down waits for nobody. It is one of that class because asyncio takes no other.
    """

    def __init__(self, name: str) -> None:
        super().__init__(_THREADS, name)
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._left = 0  # jobs that have not ended
        self._started = 0
        self._is_over = False

    def run(self, what: Callable[..., object], *args: Any) -> None:
        """Have a thread call it, sooner or later; what it raises is lost. RuntimeError when there can be no thread."""
        with self._changed:
            if self._is_over:
                raise RuntimeError("the pool is shut down")
            if self._started <= self._left and self._started < _THREADS:
                self._start()
            self._left += 1
            self._jobs.put((what, args))

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """The same, with its result in a future."""
        future: Future[_T] = Future()
        self.run(_into, future, lambda: fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; with ``cancel_futures``, forget those that have not begun. Does not ``wait``: see there."""
        with self._changed:
            if cancel_futures:
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._jobs.get_nowait()
                        self._left -= 1
            if not self._is_over:
                self._is_over = True
                for _ in range(self._started):
                    self._jobs.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Until all that it was given has ended; False if it has not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, timeout)

    def _start(self) -> None:
        """One more thread; with fewer than are wanted the others do."""
        try:
            threading.Thread(target=self._work, name=f"{self._name}_{self._started}", daemon=True).start()
        except RuntimeError as e:
            if not self._started:
                raise RuntimeError("cannot start a thread: the system allows no more (ulimit -u, pids.max)") from e
        else:
            self._started += 1

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # then it stays where the queue is
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        while job := self._jobs.get():
            what, args = job
            try:
                what(*args)
            except BaseException:
                _log.exception("a bug in ublkpy")
            del job, what, args  # what they hold must not live until the next
            with self._changed:
                self._left -= 1
                if not self._left:
                    self._changed.notify_all()


def _into(future: Future[_T], call: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as e:
        future.set_exception(e)
    else:
        future.set_result(result)


_of_thread = threading.local()


def executor(name: str) -> Executor:
    """The executor of a queue's thread, which calls this once."""
    made: Executor = Executor(name)
    _of_thread.executor = made
    return made


def here() -> Executor | None:
    """What ``executor`` has made in this thread."""
    return getattr(_of_thread, "executor", None)


class Pool:
    """Hands each request to a thread, which answers it."""

    def __init__(self, queue: Queue, target: Target) -> None:
        self._queue = queue
        self._target = target
        self._failures = Failures(target.name)
        self._pool = executor(target.name)
        self._has_told = False

    def answer(self) -> None:
        for call in self._queue.calls():
            try:
                self._pool.run(self._answer, call)
            except RuntimeError as e:
                self._queue.answer(call[4], -errno.ENOMEM)
                if not self._has_told:
                    self._has_told = True
                    _log.error("requests of target %s fail: %s", self._target.name, e)

    def _answer(self, call: Call) -> None:
        try:
            result = serve(self._queue, self._target, call)
        except BaseException as e:
            result = self._failures.result(e)
        if result != LATER:
            self._queue.answer(call[4], result)

    def close(self) -> None:
        """Let the threads go: nobody waits for what has not begun."""
        self._pool.shutdown(cancel_futures=True)
