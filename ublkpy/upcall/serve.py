"""The loop of a queue's thread, in the way that suits the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ublkpy.tgt import handlers
from ublkpy.tgt.base import Target
from ublkpy.tgt.handlers import Way
from ublkpy.upcall import aio, pool
from ublkpy.upcall.plain import Plain
from ublkpy.upcall.pool import Pool
from ublkpy.upcall.raw import Raw
from ublkpy.uring.queue import Event, IoError, Queue


class Answers(Protocol):
    """Who answers the calls of a queue."""

    def __init__(self, queue: Queue, target: Target) -> None: ...

    def answer(self) -> None:
        """All of those of a batch, now or later."""

    def close(self) -> None:
        """When there are no more."""


_WAYS: dict[Way, type[Answers]] = {Way.RAW: Raw, Way.PLAIN: Plain, Way.BLOCKING: Pool}


def serve(queue: Queue, target: Target, tell: Callable[[IoError], None], ready: Callable[[], None]) -> None:
    """Until the driver has taken all tags back. ``ready`` is called before the first request, ``tell`` for those that
    failed. OSError as from ``Queue.run``, and what an ``async def start`` of the target raises; threads of its pool may
    still be in methods of the target then (``pool.here``).
    """
    way = handlers.way(target)
    if way is Way.ASYNC:
        aio.serve(queue, target, tell, ready)
    else:
        answers = _WAYS[way](queue, target)
        ready()
        try:
            while (event := queue.run()) is not Event.STOPPED:
                if event is Event.UPCALLS:
                    answers.answer()
                elif event is Event.IO_ERROR:
                    tell(queue.error)
        finally:
            answers.close()
    if threads := pool.here():
        threads.wait()
