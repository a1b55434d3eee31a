"""Targets of plain methods: called in the queue's thread, one request after the other."""

from __future__ import annotations

import contextlib

from ublkpy.tgt.base import Target
from ublkpy.upcall.failure import Failures
from ublkpy.upcall.steps import returned, serve
from ublkpy.uring.queue import LATER, Queue
from ublkpy.uring.uapi import Op

_READ, _WRITE = int(Op.READ), int(Op.WRITE)
_NONE = memoryview(b"")


class Plain:
    """Answers all calls of a batch. Every line of ``answer`` counts: it is what a request costs."""

    def __init__(self, queue: Queue, target: Target) -> None:
        self._queue = queue
        self._target = target
        self._failures = Failures(target.name)
        self._read, self._write = target.read, target.write

    def answer(self) -> None:
        queue, buffers = self._queue, self._queue.buffers
        read, write = self._read, self._write
        failed, buf, n = None, _NONE, -1
        for offset, length, place, what in queue.short_calls():
            n += 1
            try:
                if what == _READ:
                    buf = buffers[place : place + length]
                    if read(offset, buf) is not None:
                        raise returned("read")
                    buf.release()
                elif what == _WRITE:
                    buf = buffers[place : place + length]
                    if write(offset, buf) is not None:
                        raise returned("write")
                    buf.release()
                elif serve(queue, self._target, queue.call(n)) == LATER:
                    failed = {n: LATER} | (failed or {})
            except BaseException as e:
                failed = {n: self._failures.result(e)} | (failed or {})
                with contextlib.suppress(BufferError):
                    buf.release()
        queue.finish(failed)

    def close(self) -> None:
        """Nothing is left."""
