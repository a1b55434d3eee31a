"""Operations on files, on the ring of the queue whose asyncio loop asks for them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ublkpy.uring.queue import FileOp, Queue

_current: ContextVar[Files] = ContextVar("files")
_lost: list[Any] = []  # memory that the kernel may write to for as long as we live


class Files:
    """Those of one loop; all of it runs in its thread."""

    def __init__(self, queue: Queue, look_soon: Callable[[], None]) -> None:
        """``look_soon`` is called when there is something for ``Queue.poll`` to send."""
        self.loop = asyncio.get_running_loop()
        self._queue = queue
        self._look_soon = look_soon
        self._numbers = list(range(queue.max_file_ops))
        self._slots = asyncio.Semaphore(len(self._numbers))
        self._running: dict[int, tuple[asyncio.Future[int], Any]] = {}
        self._is_over = False
        _current.set(self)

    async def run(self, op: FileOp, memory: Any = None) -> int:
        """One of them: the result of the system call, or a negative errno. ``memory`` is what it reads or writes.

        It ends when the kernel is done with that: after a cancellation, too.
        """
        async with self._slots:
            if self._is_over:
                return -errno.EIO
            number = self._numbers.pop()
            try:
                self._queue.file_op(number, op)
            except BaseException:
                self._numbers.append(number)
                raise
            self._look_soon()
            cancelled = None
            while True:
                future: asyncio.Future[int] = self.loop.create_future()
                self._running[number] = future, memory
                try:
                    result = await future
                    break
                except asyncio.CancelledError as e:
                    cancelled = e
                    if not self._is_running(number, future):
                        break
            if cancelled:
                raise cancelled
            return result

    def _is_running(self, number: int, future: asyncio.Future[int]) -> bool:
        found = self._running.get(number)
        return found is not None and found[0] is future

    def end(self) -> None:
        """After FILE_OPS."""
        for number, result in self._queue.ended():
            future, _ = self._running.pop(number)
            self._numbers.append(number)
            if not future.done():
                future.set_result(result)

    def give_up(self) -> None:
        """The queue has ended, and nobody tells when they do; new ones fail."""
        self._is_over = True
        for future, memory in self._running.values():
            _lost.append(memory)
            if not future.done():
                future.set_result(-errno.EIO)
        self._running.clear()


def current() -> Files | None:
    """Those of the running loop; None for a loop that is no queue's."""
    found = _current.get(None)
    return found if found and found.loop is asyncio.get_running_loop() else None
