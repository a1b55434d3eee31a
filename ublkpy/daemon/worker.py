"""A thread of a queue."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

from ublkpy.daemon.forks import taking
from ublkpy.driver.state import QueueState
from ublkpy.system.process import flush_io
from ublkpy.tgt import handlers
from ublkpy.tgt.base import Target
from ublkpy.upcall import pool
from ublkpy.upcall.serve import serve
from ublkpy.uring.map import Map
from ublkpy.uring.mode import Mode
from ublkpy.uring.queue import IoError, Memory, Queue
from ublkpy.uring.shmem import SharedBuffers

log = logging.getLogger(__name__)

_POOL_END = 10.0
"""Seconds for what a pool is doing for a queue that has failed."""


class Worker(threading.Thread):
    """Serves one queue, or as number ``thread`` of several its share, from FETCH to the driver's last abort.

    It stays on the ``nth`` of the queue's ``cpus``, counted around.

    ``ready`` is set when all FETCHes are sent or ``error`` says why not. When the thread has ended,
    ``serving`` turns False and then ``ended`` is called, in this thread, as the last thing; also before it waits for
    a pool, which may take a while. One that was given up calls nobody.
    """

    def __init__(
        self,
        memory: Memory,
        thread: int,
        mode: Mode,
        target: Target,
        target_map: Map,
        cpus: set[int],
        nth: int,
        ended: Callable[[], None],
        shared: SharedBuffers | None = None,
    ) -> None:
        super().__init__(name=f"queue-{memory.q_id}.{thread}", daemon=True)
        self.q_id = memory.q_id
        self.error: BaseException | None = None
        self.ready = threading.Event()
        self.serving = True
        self._queue: Queue | None = None
        self._threads: pool.Executor | None = None
        self._is_starting = True  # it has no queue yet
        self._is_given_up = False
        self._releasing = threading.Lock()
        self._memory = memory
        self._thread = thread
        self._mode = mode
        self._target = target
        self._map = target_map
        self._cpus = cpus
        self._nth = nth
        self._ended = ended
        self._shared = shared

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self.error = e
            self._threads = pool.here()
            if self.is_inside():
                self.ready.set()
                self._tell_end()
            if self._threads:
                self._threads.wait(_POOL_END)
        finally:
            self.serving = False
            self.ready.set()
            self._tell_end()

    def give_up(self) -> None:
        """Have it not begin, if it has not yet: a target that keeps its thread keeps nothing of the device then. Any
        thread.
        """
        with self._releasing:
            self._is_given_up = self._is_starting
            self.serving = self.serving and not self._is_given_up

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; of one that was given up, nobody knows when that is."""
        if not self._is_given_up:
            super().join(timeout)

    def state(self) -> QueueState:
        """This thread as the state file describes it. Any thread, once ``ready`` is set."""
        return QueueState(self.q_id, self.native_id or 0, sorted(self._cpus))

    def release(self) -> None:
        """Let go of the ring, and with it of the device, once the thread has ended without requests."""
        with self._releasing, taking:
            if self._queue:
                self._queue.close()
                self._queue = None

    def cut(self) -> None:
        """Have it end with its requests unanswered; one that is in a method of the target, after that. Any thread."""
        with self._releasing:
            if self._queue and self.serving:
                self._queue.cut()

    def fileno(self) -> int:
        """Its ring, -1 if there is none. Without a lock, for a forked child: there, what others held stays locked."""
        queue = self._queue
        return queue.fileno() if queue else -1

    def is_waiting(self) -> bool:
        """Whether it has requests that are not answered yet. Any thread."""
        with self._releasing:
            return self._queue is not None and self._queue.is_waiting()

    def is_inside(self) -> bool:
        """Whether its threads are in methods of the target when it is given up, or has failed. Any thread."""
        return self._is_starting or (self._threads is not None and not self._threads.wait(0))

    def has_lost_tags(self) -> bool:
        """Whether the driver has taken tags back: it begins to take the device. Any thread."""
        with self._releasing:
            return self._queue is None or self._queue.has_lost_tags()

    def _serve(self) -> None:
        try:
            # Signals are the main thread's.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            flush_io()  # in a daemon, all threads have that already
            self._settle()
            # First: a target that does not return from it keeps nothing of the device.
            handlers.start_thread(self._target)
            try:
                self._answer()
            finally:
                handlers.stop_thread(self._target)
        finally:
            self._is_starting = False
        self.release()

    def _answer(self) -> None:
        with self._releasing, taking:
            if self._is_given_up:
                return
            self._is_starting = False
            queue = self._queue = Queue(self._memory, self._mode, self._map, self._thread, self._shared)
        serve(queue, self._target, self._tell, self.ready.set)

    def _tell_end(self) -> None:
        if not self._is_given_up:
            self._ended()

    def _settle(self) -> None:
        """Stay on one CPU of the queue's, as ublksrv does: a thread that moves costs more to wake up.

        Where that one is offline or excluded by a cpuset, on any of them, or else just anywhere.
        """
        cpus = sorted(self._cpus)
        first = self._nth % max(1, len(cpus))
        for choice in (cpus[first : first + 1], cpus):
            try:
                os.sched_setaffinity(0, choice)
            except OSError as e:
                why = e
            else:
                self._cpus = set(choice)
                return
        log.warning("queue %d runs on any CPU: %s", self.q_id, why)

    def _tell(self, error: IoError) -> None:
        log.error(
            "queue %d: %s at sector %d failed: %s (%d failed so far%s)",
            self.q_id,
            error.op_name,
            error.start_sector,
            os.strerror(error.errno),
            error.count,
            f", {error.injected} of them injected" if error.injected else "",
        )
